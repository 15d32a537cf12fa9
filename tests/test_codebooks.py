"""Files: what is saved is what is loaded, and everything else is refused."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from transformers_gsrq import GSRQCodebooks, GSRQConfig

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
