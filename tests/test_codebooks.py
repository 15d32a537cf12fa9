"""Files: what is saved is what is loaded, and everything else is refused."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from transformers_gsrq import GSRQCodebooks, GSRQConfig
from transformers_gsrq.codebooks import _read_tensors
from transformers_gsrq.hub import MAX_FOLDERS

CONFIG = GSRQConfig.for_model(
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2),
    bits=1.0,
    num_centroids=8,
)


def make_codebooks() -> GSRQCodebooks:
    gains, shapes = {}, {}
    for layer in CONFIG.layers:
        for kind in ("key", "value"):
            shape = (*CONFIG.code_shape(layer, kind), CONFIG.num_centroids)
            gains[layer, kind] = torch.rand(shape)
            shapes[layer, kind] = torch.nn.functional.normalize(torch.randn(*shape, CONFIG.subspace_dim(kind)), dim=-1)
    return GSRQCodebooks(CONFIG, gains, shapes, {"base_model": "tiny", "calibration": {"seed": 1}})


def test_round_trip(tmp_path: Path) -> None:
    codebooks = make_codebooks()
    codebooks.save_pretrained(tmp_path / "codebooks")
    again = GSRQCodebooks.from_pretrained(tmp_path / "codebooks")
    assert again.config == codebooks.config
    assert again.provenance == codebooks.provenance
    assert again.digest == codebooks.digest
    for layer in CONFIG.layers:
        for kind in ("key", "value"):
            assert torch.equal(again.gains(layer, kind), codebooks.gains(layer, kind))
            assert torch.equal(again.shapes(layer, kind), codebooks.shapes(layer, kind))


def test_other_tensors_have_another_digest() -> None:
    assert make_codebooks().digest != make_codebooks().digest


def test_centroids_are_gain_times_shape_and_made_once() -> None:
    codebooks = make_codebooks()
    centroids = codebooks.centroids(1, "value", torch.device("cpu"), torch.float32)
    expected = codebooks.gains(1, "value").float()[..., None] * codebooks.shapes(1, "value").float()
    assert torch.equal(centroids, expected)
    assert codebooks.centroids(1, "value", torch.device("cpu"), torch.float32) is centroids
    assert copy.deepcopy(codebooks) is codebooks


def test_lower_rates_are_prefixes() -> None:
    codebooks = make_codebooks()
    lower = codebooks.with_stages(1, 2)
    assert (lower.config.key_stages, lower.config.value_stages) == ((1, 1), (2, 2))
    assert torch.equal(lower.shapes(0, "value"), codebooks.shapes(0, "value")[:, :2])
    with pytest.raises(ValueError, match="key_stages must be 1 to 4"):
        codebooks.with_stages(5, 1)


def damage_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "codebooks.safetensors")
        change(tensors)
        save_file(tensors, folder / "codebooks.safetensors")

    return damage


def damage_config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))

    return damage


def truncate(folder: Path) -> None:
    path = folder / "codebooks.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


NAME = "layers.0.key.gains"
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
    "no tensors": (
        lambda folder: (folder / "codebooks.safetensors").unlink(),
        FileNotFoundError,
        r"codebooks\.safetensors is missing",
    ),
    "truncated": (truncate, ValueError, "not a complete safetensors file"),
    "not json": (lambda folder: (folder / "config.json").write_text("{"), ValueError, "not valid JSON"),
    "another config": (lambda folder: (folder / "config.json").write_text("{}"), ValueError, '"gsrq" section'),
    "newer format": (damage_config(lambda d: d.update(format_version=9)), ValueError, "format version 9.*version 1"),
    "unknown field": (damage_config(lambda d: d["gsrq"].update(extra=1)), ValueError, r"unknown fields \['extra'\]"),
    "missing tensor": (damage_tensors(lambda t: t.pop(NAME)), ValueError, NAME),
    "wrong shape": (
        damage_tensors(lambda t: t.update({NAME: t[NAME][:, :1].contiguous()})),
        ValueError,
        rf"{NAME} is torch.float16 \[1, 1, 8\].*\[1, 4, 8\]",
    ),
    "wrong dtype": (damage_tensors(lambda t: t.update({NAME: t[NAME].float()})), ValueError, f"{NAME} is F32"),
    "changed number": (damage_tensors(lambda t: t[NAME].add_(1)), ValueError, "digest"),
    "changed config": (damage_config(lambda d: d["gsrq"].update(model_type="qwen2")), ValueError, "digest"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGES[case]
    make_codebooks().save_pretrained(tmp_path / "codebooks")
    damage(tmp_path / "codebooks")
    with pytest.raises(error, match=message):
        GSRQCodebooks.from_pretrained(tmp_path / "codebooks")


def test_nan_codebooks_are_never_made() -> None:
    codebooks = make_codebooks()
    jobs = [(layer, kind) for layer in CONFIG.layers for kind in ("key", "value")]
    gains = {job: codebooks.gains(*job).float() for job in jobs}
    gains[1, "key"][0, 0, 0] = 1e6  # overflows float16
    with pytest.raises(ValueError, match=r"layers\.1\.key\.gains holds NaN or infinity"):
        GSRQCodebooks(CONFIG, gains, {job: codebooks.shapes(*job) for job in jobs})


def test_a_missing_tensor_is_named() -> None:
    codebooks = make_codebooks()
    jobs = [(layer, kind) for layer in CONFIG.layers for kind in ("key", "value")]
    gains, shapes = {job: codebooks.gains(*job) for job in jobs}, {job: codebooks.shapes(*job) for job in jobs[:-1]}
    with pytest.raises(ValueError, match=r"layers\.1\.value\.shapes is missing: give shapes of every layer"):
        GSRQCodebooks(CONFIG, gains, shapes)


def test_an_interrupted_save_leaves_the_old_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_codebooks()
    old.save_pretrained(tmp_path / "codebooks")

    def interrupted(tensors: dict, path: Path, *args: object, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_gsrq.files.save_file", interrupted)
    for folder in ("codebooks", "new"):
        with pytest.raises(KeyboardInterrupt):
            make_codebooks().save_pretrained(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["codebooks"]
    assert sorted(path.name for path in (tmp_path / "codebooks").iterdir()) == ["codebooks.safetensors", "config.json"]
    assert GSRQCodebooks.from_pretrained(tmp_path / "codebooks").digest == old.digest


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "not JSON"])
def test_a_model_is_not_overwritten(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileExistsError, match=r"not of codebooks, but perhaps of a model. Name a folder"):
        make_codebooks().save_pretrained(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", content)]


def test_a_folder_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    replace = os.replace

    def within_a_disk(source: Path, target: Path) -> None:
        if len({Path(path).resolve().is_relative_to(disk) for path in (source, target)}) == 2:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", within_a_disk)
    codebooks = make_codebooks()
    codebooks.save_pretrained(link)
    assert sorted(path.name for path in disk.iterdir()) == ["codebooks.safetensors", "config.json"]
    assert GSRQCodebooks.from_pretrained(link).digest == codebooks.digest


@pytest.mark.parametrize("begun", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize("stop_at", range(4))
def test_a_save_that_is_stopped_at_any_step_leaves_whole_codebooks(
    stop_at: int, begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over old ones, over none, and over what a save that was stopped has left."""
    real, steps = os.replace, []

    def stopping(source: Path, target: Path) -> None:
        steps.append(target)
        stop = len(steps) == stop_at + 1
        if stop and not begun:
            raise KeyboardInterrupt
        real(source, target)
        if stop:
            raise KeyboardInterrupt

    for name in ("over none", "over old", "over a stopped one"):
        folder, known = tmp_path / name, set()
        monkeypatch.setattr(os, "replace", stopping)
        for _ in range(["over none", "over old", "over a stopped one"].index(name) + 1):
            codebooks = make_codebooks()
            before = (
                GSRQCodebooks.from_pretrained(folder).digest if known and (folder / "config.json").exists() else None
            )
            steps.clear()
            if name != "over none" and not known:
                steps.extend([Path()] * 99)  # the first save of these is not stopped
            known.add(codebooks.digest)
            try:
                codebooks.save_pretrained(folder)
            except KeyboardInterrupt:
                if before is None:
                    continue
            assert GSRQCodebooks.from_pretrained(folder).digest in (before, codebooks.digest)
        monkeypatch.setattr(os, "replace", real)
        # The next one clears up.
        last = make_codebooks()
        last.save_pretrained(folder)
        assert GSRQCodebooks.from_pretrained(folder).digest == last.digest


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_process_that_is_killed_while_it_saves(step: int, tmp_path: Path) -> None:
    old, new = make_codebooks(), make_codebooks()
    old.save_pretrained(tmp_path / "codebooks")
    new.save_pretrained(tmp_path / "new")
    script = (
        "import os, sys\nfrom transformers_gsrq import GSRQCodebooks\n"
        "new, real, left = GSRQCodebooks.from_pretrained(sys.argv[1]), os.replace, [int(sys.argv[3])]\n"
        "def counted(source, target):\n"
        "    if not left[0]: os._exit(9)\n"
        "    left[0] -= 1\n    real(source, target)\n"
        "os.replace = counted\nnew.save_pretrained(sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "new", tmp_path / "codebooks", str(step)], check=False)
    found = GSRQCodebooks.from_pretrained(tmp_path / "codebooks").digest
    assert found == (old.digest if step < 3 else new.digest)
    assert list(GSRQCodebooks.available(tmp_path)) == ["codebooks", "new"]
    old.save_pretrained(tmp_path / "codebooks")
    assert GSRQCodebooks.from_pretrained(tmp_path / "codebooks").digest == old.digest
    names = sorted(path.name for path in (tmp_path / "codebooks").iterdir() if not path.name.startswith(".saving-"))
    # What was put beside the old ones and never meant stays; nobody can know that it is nobody's.
    assert [name for name in names if new.digest not in name] == ["codebooks.safetensors", "config.json"]


def test_a_reader_beside_a_writer_finds_whole_codebooks(tmp_path: Path) -> None:
    both = [make_codebooks(), make_codebooks()]
    both[0].save_pretrained(tmp_path / "codebooks")
    done = threading.Event()

    def write() -> None:
        for turn in range(60):
            both[turn % 2].save_pretrained(tmp_path / "codebooks")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert GSRQCodebooks.from_pretrained(tmp_path / "codebooks").digest in {made.digest for made in both}
    writer.join()
    assert len(list((tmp_path / "codebooks").iterdir())) == 2


def test_others_and_then_the_same_are_saved_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that gets tensors of others finds the digest that it began with, in a newer file."""
    both = [make_codebooks(), make_codebooks()]
    both[0].save_pretrained(tmp_path)
    to_save = [both[1], both[0]]

    def read(path: Path, config: GSRQConfig) -> object:
        if len(to_save) == 2:
            to_save.pop(0).save_pretrained(tmp_path)
        found = _read_tensors(path, config)
        if to_save:
            to_save.pop(0).save_pretrained(tmp_path)
        return found

    monkeypatch.setattr("transformers_gsrq.codebooks._read_tensors", read)
    assert GSRQCodebooks.from_pretrained(tmp_path).digest == both[0].digest
    assert not to_save


def test_nobody_else_can_change_them() -> None:
    gains = {(layer, kind): torch.ones(1) for layer in CONFIG.layers for kind in ("key", "value")}
    source = make_codebooks()
    shapes = {job: source.shapes(*job) for job in gains}
    gains = {job: source.gains(*job) for job in gains}
    codebooks = GSRQCodebooks(CONFIG, gains, shapes)
    digest = codebooks.digest
    for tensors in (gains, shapes):
        tensors[0, "key"].zero_()
    codebooks.gains(0, "key").zero_()
    codebooks.shapes(0, "key").zero_()
    codebooks.with_stages(1, 1)._tensors["layers.0.key.gains"].zero_()
    codebooks._digest = None
    assert codebooks.digest == digest == source.digest


def test_the_tensors_of_loaded_codebooks_are_not_those_of_the_file(tmp_path: Path) -> None:
    codebooks = make_codebooks()
    codebooks.save_pretrained(tmp_path)
    loaded = GSRQCodebooks.from_pretrained(tmp_path)
    path = tmp_path / "codebooks.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    loaded._digest = None
    assert loaded.digest == codebooks.digest


def test_a_large_folder_is_not_searched_through(tmp_path: Path) -> None:
    make_codebooks().save_pretrained(tmp_path / "a" / "b" / "c")
    make_codebooks().save_pretrained(tmp_path / "a" / "b" / "c" / "d")
    make_codebooks().save_pretrained(tmp_path / ".hidden")
    assert list(GSRQCodebooks.available(tmp_path)) == ["a/b/c"]
    for number in range(MAX_FOLDERS):
        (tmp_path / f"0{number}").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no codebooks"):
        GSRQCodebooks.from_pretrained(tmp_path)
    assert GSRQCodebooks.available(tmp_path) == {}


def test_an_empty_name_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_codebooks().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    for load in (GSRQCodebooks.from_pretrained, GSRQCodebooks.available):
        with pytest.raises(FileNotFoundError, match="'' is not a local folder"):
            load("")
    with pytest.raises(ValueError, match="folder is an empty string"):
        make_codebooks().save_pretrained("")
    assert GSRQCodebooks.available(".").keys() == {""}


MISTYPED = {
    "config is a folder": (lambda made: GSRQCodebooks("folder", {}, {}), "config must be a GSRQConfig, got str"),
    "config is its fields": (lambda made: GSRQCodebooks(CONFIG.to_dict(), {}, {}), "config must be a GSRQConfig"),
    "gains are a tensor": (lambda made: GSRQCodebooks(CONFIG, torch.ones(1), {}), "gains must be a mapping"),
    "no tensor": (
        lambda made: GSRQCodebooks(CONFIG, {(0, "key"): [1]}, {}),
        r"layers\.0\.key\.gains must be a tensor",
    ),
    "provenance is text": (lambda made: GSRQCodebooks(CONFIG, {}, {}, "mine"), "provenance must be a mapping"),
    "source is None": (lambda made: GSRQCodebooks.from_pretrained(None), "named by a folder or a Hub id"),
    "source is codebooks": (lambda made: GSRQCodebooks.from_pretrained(made), "Hub id .* got GSRQCodebooks"),
    "available of a number": (lambda made: GSRQCodebooks.available(5), "Hub id .* got int"),
    "subfolder is a number": (
        lambda made: GSRQCodebooks.from_pretrained("a/b", subfolder=1),
        "subfolder must be a str",
    ),
    "revision is a number": (lambda made: GSRQCodebooks.from_pretrained("a/b", revision=1), "revision must be a str"),
    "repository is a path": (lambda made: made.push_to_hub(Path("a/b")), "repo_id must be a string"),
    "folder is None": (lambda made: made.save_pretrained(None), "folder must be a path, got NoneType"),
    "stages are bits": (lambda made: made.with_stages(1.0, 2), "key_stages must be 1 to 4"),
    "stages are text": (lambda made: made.with_stages(1, "2"), "value_stages must be 1 to 4"),
    "kind and layer swapped": (lambda made: made.gains("key", 0), "no gains of layer 'key', kind 0"),
    "no such layer": (lambda made: made.shapes(7, "key"), "no shapes of layer 7"),
    "evaluation is text": (lambda made: made.with_evaluation("good"), "a record with a perplexity"),
    "evaluation is empty": (lambda made: made.with_evaluation({"perplexity": 2.0}), "the evaluation lacks 'data'"),
}


@pytest.mark.parametrize("case", MISTYPED)
def test_mistyped_and_swapped_arguments(case: str) -> None:
    call, message = MISTYPED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call(make_codebooks())
