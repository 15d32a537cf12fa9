"""`gsrq eval`: its figures are the library's, its record names what they depend on, two records can be compared."""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from cli_runner import assert_one_line, run, run_json
from transformers_gsrq import GSRQCache, GSRQCodebooks, GSRQConfig
from transformers_gsrq.compat import CACHE_ARGUMENT, library_versions
from transformers_gsrq.config import KINDS
from transformers_gsrq.evaluation import measure_perplexity, plots
from transformers_gsrq.evaluation.agreement import measure_agreement
from transformers_gsrq.evaluation.perplexity import window_loss
from transformers_gsrq.evaluation.records import git_commit
from transformers_gsrq.evaluation.retrieval import TASKS, make_prompts
from transformers_gsrq.loading import load_model
from transformers_gsrq.simulation import CodebookMethod
from transformers_gsrq.text import token_windows, windows_digest

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
# A file or folder, and what the command said.
Record = tuple[Path, dict[str, Any]]
TextFiles = tuple[Path, Path]
SMALL = ("--windows", 2, "--window-length", 150)


def raising(error: BaseException) -> Callable[..., None]:
    """A function that fails."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.fixture(scope="module")
def loaded(short_model: Path) -> Loaded:
    return load_model(short_model)


@pytest.fixture(scope="module")
def windows(loaded: Loaded, text_files: TextFiles) -> torch.Tensor:
    return token_windows(loaded[1], [text_files[1].read_text(encoding="utf-8")], 150, 2)


@pytest.fixture(scope="module")
def record(
    codebooks: Record, short_model: Path, text_files: TextFiles, tmp_path_factory: pytest.TempPathFactory
) -> Record:
    """Record of everything but pictures, in a file and read again."""
    measures = [word for name in ("agreement", "attribution", "reconstruction") for word in ("--measure", name)]
    options = ("--text", text_files[1], *SMALL, "--bits", 0.25, "--measure", "perplexity", *measures)
    seen = run_json("eval", short_model, codebooks[0], *options)
    path = tmp_path_factory.mktemp("records") / "first.json"
    path.write_text(json.dumps(seen), encoding="utf-8")
    return path, seen


def test_perplexity_and_pictures_are_the_librarys(
    codebooks: Record,
    short_model: Path,
    loaded: Loaded,
    text_files: TextFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The full sweep takes minutes.
    quick = functools.partial(plots.sweep_gaussians, (4, 256), (64, 256), num_vectors=500, iterations=2)
    monkeypatch.setattr(plots, "sweep_gaussians", quick)
    folder = tmp_path / "codebooks"
    GSRQCodebooks.from_pretrained(codebooks[0]).save_pretrained(folder)
    options = ("--text", text_files[1], "--windows", 2, "--window-length", 300)
    seen = run_json("eval", short_model, folder, *options, "--bits", 0.5, "--save", "--plots", tmp_path / "plots")
    model, tokenizer = loaded
    saved = GSRQCodebooks.from_pretrained(folder)
    windows = token_windows(tokenizer, [text_files[1].read_text(encoding="utf-8")], 300, 2)
    expected = measure_perplexity(model, windows, {"1": saved, "0.5": saved.with_stages(4, 4)}, progress=False)
    found = seen["results"]
    assert found["plain"]["perplexity"] == pytest.approx(expected["plain"].value)
    assert found[str(folder)]["perplexity"] == pytest.approx(expected["1"].value)
    assert found["0.5 bits"]["perplexity"] == pytest.approx(expected["0.5"].value)
    assert found["0.5 bits"]["perplexity"] != pytest.approx(expected["1"].value)
    assert seen["digests"]["0.5 bits"] == saved.with_stages(4, 4).digest
    # Saved with the codebooks, which stay the same codebooks.
    assert saved.provenance["evaluations"] == [found[str(folder)]]
    assert saved.digest == codebooks[1]["digest"]
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == [
        "clustering-gaussian-centroids.png", "clustering-gaussian-width.png", "clustering-residuals.png",
        "clustering-states.png", "memory.png", "perplexity.png", "shrinkage.png",
    ]  # fmt: skip
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_record_names_what_its_figures_depend_on(
    record: Record,
    codebooks: Record,
    short_model: Path,
    windows: torch.Tensor,
) -> None:
    seen = record[1]
    assert (seen["model"], seen["dtype"], seen["device"]) == (str(short_model), "float32", "cpu")
    assert seen["versions"] == library_versions()
    assert seen["commit"] == git_commit()
    assert (seen["data"], seen["data_digest"]) == ("held-out.txt", windows_digest(windows))
    assert seen["settings"]["seed"] == 0
    assert seen["settings"]["reading"] == {"residual_length": 0, "sink_length": 0}
    assert seen["settings"]["generating"] == {"residual_length": 128, "sink_length": 4}
    made = GSRQCodebooks.from_pretrained(codebooks[0])
    for name, expected in ((str(codebooks[0]), made), ("0.25 bits", made.with_stages(2, 2))):
        assert GSRQConfig.from_dict(seen["caches"][name]["config"]) == expected.config
        assert seen["caches"][name]["bits"] == expected.config.bits()
        assert seen["digests"][name] == expected.digest


def test_agreement_and_attribution_are_the_librarys(
    record: Record,
    codebooks: Record,
    loaded: Loaded,
    windows: torch.Tensor,
) -> None:
    made = GSRQCodebooks.from_pretrained(codebooks[0])
    methods = {
        "all": CodebookMethod(made),
        "keys only": CodebookMethod(made, kinds=("key",)),
        "values only": CodebookMethod(made, kinds=("value",)),
        "layers 1-1": CodebookMethod(made, only_layers=(1,)),
    }
    expected = measure_agreement(loaded[0], windows, methods, progress=False)
    result = record[1]["results"][str(codebooks[0])]
    assert result["agreement"]["divergence"] == pytest.approx(expected["all"].divergence)
    assert result["agreement"]["top1"] == expected["all"].top1
    assert list(result["attribution"]) == [
        "plain", "all", "keys only", "values only", "layers 0-0", "layers 1-1", "layers 2-2",
    ]  # fmt: skip
    increases = set()
    for part in methods:
        found = result["attribution"][part]
        assert found["perplexity"]["increase"] == pytest.approx(expected[part].perplexity.increase)
        assert found["divergence"] == pytest.approx(expected[part].divergence)
        increases.add(round(found["perplexity"]["increase"], 9))
    assert len(increases) == len(methods)
    # Greedy texts of both windows, with the default sinks and window.
    counts = result["same_tokens"]
    mask = torch.ones(1, 150, dtype=torch.long)
    options = {"attention_mask": mask, "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    plain, coded = (
        loaded[0].generate(windows[:1], **{CACHE_ARGUMENT: cache}, **options)[0, 150:].tolist()
        for cache in (None, GSRQCache(made, loaded[0]))
    )
    assert len(counts) == 2
    assert counts[0] == next((i for i, pair in enumerate(zip(plain, coded, strict=True)) if len(set(pair)) == 2), 64)


def test_reconstruction_is_what_a_cache_gives_back(
    record: Record,
    codebooks: Record,
    loaded: Loaded,
    windows: torch.Tensor,
) -> None:
    made = GSRQCodebooks.from_pretrained(codebooks[0])
    found = record[1]["results"][str(codebooks[0])]["reconstruction"]
    rows = {(row["layer"], row["kind"]): row["stages"] for row in found}
    assert list(rows) == [(layer, kind) for layer in (0, 1, 2) for kind in KINDS]
    error, energy = 0.0, 0.0
    for window in windows:
        exact, cache = DynamicCache(), GSRQCache(made, loaded[0], residual_length=0, sink_length=0)
        for filled in (exact, cache):
            loaded[0](window[None], **{CACHE_ARGUMENT: filled})
        given, stored = exact.layers[2].values, cache.layers[2].states()[1]
        error += (given - stored).square().sum().item()
        energy += given.square().sum().item()
    assert rows[2, "value"][-1]["distortion"] == pytest.approx(error / energy, rel=1e-4)
    for stages in rows.values():
        distortions = [stage["distortion"] for stage in stages]
        assert len(distortions) == 8
        assert distortions == sorted(distortions, reverse=True)
    fewer = record[1]["results"]["0.25 bits"]["reconstruction"][0]["stages"]
    assert [stage["cosine"] for stage in fewer] == pytest.approx([stage["cosine"] for stage in rows[0, "key"][:2]])


def test_retrieval_is_asked_at_every_length(
    codebooks: Record,
    short_model: Path,
    loaded: Loaded,
    text_files: TextFiles,
    tmp_path: Path,
) -> None:
    lengths = (400, 440)
    options = ("--measure", "retrieval", "--prompts", 2, "--prompt-length", 400, "--prompt-length", 440, "--seed", 5)
    seen = run_json(
        "eval", short_model, codebooks[0], "--text", text_files[1], *SMALL, *options, "--plots", tmp_path / "plots"
    )
    assert list(seen["results"]) == ["plain", str(codebooks[0])]
    text = text_files[1].read_text(encoding="utf-8")
    for found in seen["results"].values():
        rows = {(row["task"], row["length"]): row for row in found["retrieval"]}
        assert list(rows) == [(task, length) for length in lengths for task in TASKS]
        for (task, length), row in rows.items():
            prompts = make_prompts(loaded[1], [text], task, length, 2, seed=5)
            assert [depth for depth, _ in row["hits"]] == [prompt.depth for prompt in prompts]
            assert row["data_digest"] == windows_digest(torch.stack([prompt.input_ids for prompt in prompts]))
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["retrieval.png"]


FAILURES = {
    "interrupted": (KeyboardInterrupt(), 130, "gsrq: Interrupted: the pictures were not finished.\n"),
    "full disk": (OSError("No space left"), 1, "gsrq: The pictures were not finished: No space left\n"),
    "bug": (KeyError("axis"), 1, "gsrq: The pictures were not finished: 'axis'\n"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_results_survive_pictures_that_fail(
    case: str,
    codebooks: Record,
    short_model: Path,
    text_files: TextFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, code, message = FAILURES[case]
    monkeypatch.setattr(plots, "draw_all", raising(error))
    options = ("--measure", "retrieval", "--prompts", 1, "--prompt-length", 400, "--plots", tmp_path / "plots")
    result = run("eval", short_model, codebooks[0], "--text", text_files[1], *SMALL, *options, "--json")
    assert result.exit_code == code
    assert list(json.loads(result.stdout)["results"]) == ["plain", str(codebooks[0])]
    assert result.stderr.endswith(message)
    # A bug shows its traceback.
    assert (result.exception is error) == (case == "bug")


def test_results_survive_what_fails_after_them(
    codebooks: Record, short_model: Path, text_files: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measure that fails, or a folder that cannot be written any more, takes nothing else with it."""
    first, second = tmp_path / "first", tmp_path / "second"
    whole = GSRQCodebooks.from_pretrained(codebooks[0])
    whole.save_pretrained(first)
    # The same codebooks twice would be refused.
    whole.with_stages(max(1, min(whole.config.key_stages) - 1), min(whole.config.value_stages)).save_pretrained(second)
    save = GSRQCodebooks.save_pretrained

    def save_the_second(self: GSRQCodebooks, folder: str) -> None:
        if Path(folder) == first:
            raise OSError("No space left")
        save(self, folder)

    monkeypatch.setattr(GSRQCodebooks, "save_pretrained", save_the_second)
    monkeypatch.setattr("transformers_gsrq.evaluation.measures.measure_agreement", raising(RuntimeError("No memory")))
    measures = ("--measure", "agreement", "--measure", "perplexity", "--save")
    options = ("--text", text_files[1], "--windows", 1, "--window-length", 50, *measures)
    result = run("eval", short_model, first, second, *options, "--json")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["settings"]["measures"] == ["perplexity"]
    assert GSRQCodebooks.from_pretrained(second).provenance["evaluations"] == [record["results"][str(second)]]
    assert result.stderr.splitlines()[-2:] == [
        "gsrq: Agreement was not measured: No memory",
        f"gsrq: Nothing was saved with {first}: No space left",
    ]
    shown = run("eval", short_model, first, second, *options)
    assert shown.exit_code == 1
    assert "perplexity" in shown.stdout
    assert shown.stdout.endswith(f"Saved with: {second}.\n")
    # With nothing measured there is nothing but the error.
    assert_one_line(run("eval", short_model, first, *options[:-3], "--measure", "agreement"), "gsrq: No memory")


def test_folders_that_cannot_be_written_are_named_before_the_work(
    codebooks: Record, short_model: Path, text_files: TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("eval", short_model, codebooks[0], "--text", text_files[1], *SMALL)
    monkeypatch.setattr("transformers_gsrq.cli.evaluate.load_model", raising(AssertionError()))
    inside = text_files[1] / "pictures"
    assert_one_line(run(*given, "--plots", inside), f"--plots {inside}: {text_files[1]} is a file. Name a folder")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    message = "is not writable. Make it so, or name another folder"
    assert_one_line(run(*given, "--plots", tmp_path / "new"), f"--plots {tmp_path / 'new'}: {tmp_path} {message}")
    assert_one_line(run(*given, "--save"), f"--save {codebooks[0]}: {codebooks[0]} {message}")


def test_a_dataset_is_read_like_files(
    codebooks: Record,
    short_model: Path,
    text_files: TextFiles,
    record: Record,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    row = {"body": text_files[1].read_text(encoding="utf-8")}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    seen = run_json("eval", short_model, codebooks[0], "--dataset", folder, "--column", "body", *SMALL)
    assert seen["data"] == f"{folder}, split test"
    assert seen["data_digest"] == record[1]["data_digest"]
    name = str(codebooks[0])
    assert seen["results"][name]["perplexity"] == pytest.approx(record[1]["results"][name]["perplexity"])


def test_a_record_holds_the_command_and_no_token(
    codebooks: Record, short_model: Path, text_files: TextFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "eval", short_model, codebooks[0], "--text", text_files[1], "--windows", 1, "--window-length", 20, "--token",
        "hf_secret", "--measure", "reconstruction",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["/somewhere/gsrq", *map(str, words)])
    seen = run_json(*words)
    assert seen["command"].startswith(f"gsrq eval {short_model} ")
    assert seen["command"].endswith("--token ... --measure reconstruction")
    assert "hf_secret" not in json.dumps(seen)


def test_a_standard_error_of_one_window_is_null(codebooks: Record, short_model: Path, text_files: TextFiles) -> None:
    options = ("--text", text_files[1], "--windows", 1, "--window-length", 20)
    assert run_json("eval", short_model, codebooks[0], *options)["results"]["plain"]["standard_error"] is None


def test_compare(
    record: Record,
    codebooks: Record,
    short_model: Path,
    loaded: Loaded,
    windows: torch.Tensor,
    text_files: TextFiles,
    tmp_path: Path,
) -> None:
    # Other codebooks under a name that both records have: every gain is smaller.
    made = GSRQCodebooks.from_pretrained(codebooks[0])
    jobs = [(layer, kind) for layer in made.config.layers for kind in KINDS]
    other = GSRQCodebooks(
        made.config, {job: made.gains(*job) * 0.8 for job in jobs}, {job: made.shapes(*job) for job in jobs}
    )
    other.save_pretrained(tmp_path / "other")
    options = ("--text", text_files[1], *SMALL, "--bits", 0.25, "--beam-width", 2)
    measures = ("--measure", "perplexity", "--measure", "reconstruction")
    seen = run_json("eval", short_model, tmp_path / "other", *options, *measures)
    second = tmp_path / "second.json"
    second.write_text(json.dumps(seen), encoding="utf-8")
    compared = run_json("eval", "--compare", record[0], second)
    # What differs is told, and nothing else is.
    expected = {
        "settings measures": [record[1]["settings"]["measures"], ["perplexity", "reconstruction"]],
        "settings beam_width": [1, 2],
        "digest 0.25 bits": [made.with_stages(2, 2).digest, other.with_stages(2, 2).digest],
    }
    assert compared["circumstances"] == expected
    rows = {(row["cache"], row["figure"]): row for row in compared["differences"]}
    assert {cache for cache, _ in rows} == {"plain", "0.25 bits"}
    assert rows["plain", "perplexity"]["difference"] == 0
    assert rows["plain", "perplexity"]["error"] == 0
    row = rows["0.25 bits", "perplexity"]
    assert row["first"] == record[1]["results"]["0.25 bits"]["perplexity"]
    assert row["second"] == seen["results"]["0.25 bits"]["perplexity"]
    assert row["difference"] == pytest.approx(row["second"] - row["first"])
    # The error is that of the windows pairwise: over two, half of the difference of their differences.
    exact = {"residual_length": 0, "sink_length": 0, "quantize_prefill": True}
    ours = [
        window_loss(loaded[0], window, GSRQCache(made.with_stages(2, 2), loaded[0], **exact)) for window in windows
    ]
    theirs = [
        window_loss(loaded[0], window, GSRQCache(other.with_stages(2, 2), loaded[0], beam_width=2, **exact))
        for window in windows
    ]
    pairs = [
        math.exp(statistics.mean(theirs)) * b - math.exp(statistics.mean(ours)) * a
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert row["error"] == pytest.approx(abs(pairs[0] - pairs[1]) / 2, rel=1e-3)
    key = rows["0.25 bits", "key distortion"]
    assert key["error"] is None
    assert key["difference"] == pytest.approx(key["second"] - key["first"]) != 0
    # Agreement is in one of them only.
    assert not any("divergence" in figure for _, figure in rows)
    assert compared["notes"] == [f"Only in {record[0]}: {codebooks[0]}.", f"Only in {second}: {tmp_path / 'other'}."]
    shown = run("eval", "--compare", record[0], second).stdout
    assert "settings beam_width" in shown
    assert made.with_stages(2, 2).digest[:12] in shown
    assert f"Only in {second}: " in shown
    assert "Not comparable" not in shown


def test_compare_says_what_is_not_comparable(
    record: Record,
    codebooks: Record,
    short_model: Path,
    text_files: TextFiles,
    tmp_path: Path,
) -> None:
    texts = sorted(text_files[0].iterdir())[0]
    seen = run_json("eval", short_model, codebooks[0], "--text", texts, *SMALL)
    (tmp_path / "other text.json").write_text(json.dumps(seen), encoding="utf-8")
    compared = run_json("eval", "--compare", record[0], tmp_path / "other text.json")
    assert compared["circumstances"]["data"] == ["held-out.txt", texts.name]
    assert {row["difference"] for row in compared["differences"]} == {None}
    assert "perplexities on different text are not comparable" in compared["notes"][0]
    other = {**record[1], "model": "someone/else", "model_fingerprint": "0"}
    (tmp_path / "other model.json").write_text(json.dumps(other), encoding="utf-8")
    compared = run_json("eval", "--compare", record[0], tmp_path / "other model.json")
    assert {row["difference"] for row in compared["differences"]} == {None}
    assert f"measured {short_model}, " in compared["notes"][0]
    assert "different models or weights are not comparable" in compared["notes"][0]
    same = run("eval", "--compare", record[0], record[0]).stdout
    assert same.startswith("The circumstances are the same.")


def test_compare_with_what_is_no_record(record: Record, tmp_path: Path) -> None:
    path, seen = record
    (tmp_path / "text.json").write_text("perplexity 12", encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "bench.json").write_text(json.dumps({"model": "m", "results": []}), encoding="utf-8")
    renamed = {**seen, "results": {"elsewhere": seen["results"]["0.25 bits"], "plain": seen["results"]["plain"]}}
    (tmp_path / "renamed.json").write_text(json.dumps({**renamed, "digests": {"elsewhere": "0"}}), encoding="utf-8")
    assert_one_line(
        run("eval", "--compare", path, tmp_path / "nothing.json"), "nothing.json is not a file. Name a file"
    )
    assert_one_line(run("eval", "--compare", path, tmp_path), "is not a file")
    assert_one_line(run("eval", "--compare", path, tmp_path / "text.json"), "text.json is not JSON")
    for name in ("list.json", "bench.json"):
        assert_one_line(run("eval", "--compare", path, tmp_path / name), f"{name} is not a record of `gsrq eval`")
    assert_one_line(
        run("eval", "--compare", path, tmp_path / "renamed.json"), "renamed.json has elsewhere. Caches are"
    )
    assert_one_line(run("eval", "--compare", path, path, path), "--compare takes two records, got 3")


def test_what_cannot_be_measured_is_told_first(codebooks: Record, short_model: Path, text_files: TextFiles) -> None:
    given = ("eval", short_model, codebooks[0], "--text", text_files[1], *SMALL)
    assert_one_line(run(*given, "--measure", "speed"), "There is no measure 'speed'. Measures: perplexity, agreement")
    assert_one_line(run(*given, "--measure", "agreement", "--save"), "--save keeps perplexity")
    assert_one_line(run(*given, "--measure", "agreement", "--plots", "x"), "--plots draws perplexity and retrieval")
    assert_one_line(run(*given, "--measure", "retrieval", "--prompts", 0), "at least 1 prompt of each task, got 0")
    assert_one_line(
        run(*given, "--measure", "retrieval", "--prompt-length", 20), "at most 2, less than the 20 of a prompt itself"
    )
    assert_one_line(run(*given, "--bits", 0.3), "Legal: 0.125, 0.25, 0.375")
    assert_one_line(run(*given, "--dataset", "also"), "--text FILE, or --dataset NAME, and not both")
