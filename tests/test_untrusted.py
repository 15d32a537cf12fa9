"""Codebooks that somebody tampered with: one `ValueError` that names file and field, at once, or they load."""

from __future__ import annotations

import copy
import json
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cli_runner import run
from test_codebooks import CONFIG, make_codebooks
from transformers_gsrq import GSRQCodebooks
from transformers_gsrq.card import Rate, model_card
from transformers_gsrq.cli.inspect import describe, layer_table

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
VERSIONS = {"torch": "2.13"}
QUALITY = {"distortion": 0.1, "cosine": 0.9, "gain_error": 0.1}
# Everything that cards and `gsrq inspect` read.
PROVENANCE: dict[str, Any] = {
    "base_model": "someone/llama", "base_model_revision": "ab" * 20, "dtype": "bfloat16", "device": "cpu",
    "versions": VERSIONS, "data": {"name": "prose"},
    "calibration": {
        "tokens_read": 9, "vectors": 9, "data_digest": "ab", "method": "gskm", "weighting": "log", "iterations": 2,
        "seed": 0,
    },
    "training": [
        {"step": "refinement", "rounds": 3, "beam_width": 4, "measured": None},
        {
            "step": "distillation", "best_step": 25, "batch_size": 1, "processes": 1, "window_length": 64,
            "data": None, "data_digest": "ab", "base_model": "someone/llama",
            "measured": {"course": [{"step": 0.0, "kl": None}, {"step": 25.0, "kl": 0.1}]},
        },
    ],
    "report": [{"layer": 1, "kind": "key", "stages": [QUALITY], "seconds": 1.0}],
    "evaluations": [
        {
            "data": "prose", "perplexity": 12.5, "standard_error": None, "plain_perplexity": 10.0, "increase": 0.25,
            "increase_error": None, "windows": 1, "window_length": 512, "data_digest": "ab", "residual_length": 0,
            "sink_length": 0, "beam_width": 1, "model": "someone/llama", "dtype": "float32", "device": "cpu",
            "versions": VERSIONS,
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrusted") / "codebooks"
    codebooks = make_codebooks()
    codebooks.provenance.update(PROVENANCE)
    codebooks.save_pretrained(folder)
    return folder


def show(codebooks: GSRQCodebooks) -> None:
    """Everything that is made of a provenance."""
    describe(codebooks)
    layer_table(codebooks)
    model_card("me/it", {"": Rate(codebooks.config, codebooks.provenance, codebooks.digest)})


def load(config: str | bytes, tensors: bytes) -> GSRQCodebooks | None:
    """What the package makes of two files; None if it refuses them as it should."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
        (Path(folder) / "codebooks.safetensors").write_bytes(tensors)
        began = time.process_time()
        try:
            codebooks = GSRQCodebooks.from_pretrained(folder)
        except ValueError as error:
            assert any(name in str(error) for name in ("config.json", "codebooks.safetensors"))
            assert str(error).isprintable()
            assert len(str(error)) < 2000
            return None
        finally:
            assert time.process_time() - began < 1
        show(codebooks)
        return codebooks


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a document."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += places(part, (*path, key))
    return found


def changed(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    document = copy.deepcopy(document)
    part = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return document


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([ESCAPE, 10**9, 10**18, 10**400, -1, 0, 1, "3", "key", 1.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_in_the_config(data: st.DataObject, saved: Path) -> None:
    document = json.loads((saved / "config.json").read_text())
    path = data.draw(st.sampled_from(places(document)))
    load(json.dumps(changed(document, path, data.draw(JSON))), (saved / "codebooks.safetensors").read_bytes())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_in_either_file(data: st.DataObject, saved: Path) -> None:
    files = [(saved / name).read_bytes() for name in ("config.json", "codebooks.safetensors")]
    which = data.draw(st.sampled_from([0, 1, 1]))
    # Mostly in the beginning, where the header is.
    at = data.draw(st.integers(0, 2000) | st.integers(0, len(files[which])))
    new = data.draw(st.binary(max_size=12))
    files[which] = files[which][:at] + new + files[which][at + data.draw(st.sampled_from([0, len(new), 8])) :]
    load(*files)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tensors(data: st.DataObject, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tensors = load_file(saved / "codebooks.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]
    shape = data.draw(st.just(tuple(tensors[name].shape)) | st.lists(st.integers(0, 9), max_size=5))
    value = data.draw(st.sampled_from([0.0, -1.0, 1.0, 6e4, float("nan"), float("inf")]))
    new = torch.full(tuple(shape), value).to(data.draw(st.sampled_from(dtypes)))
    tensors[data.draw(st.sampled_from([name, name, name + ESCAPE]))] = new
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "t")
        load((saved / "config.json").read_bytes(), (Path(folder) / "t").read_bytes())


@pytest.mark.parametrize("path", places(PROVENANCE)[1:], ids=lambda path: ".".join(map(str, path)))
def test_provenance_of_another_type(path: tuple[Any, ...], saved: Path) -> None:
    document = json.loads((saved / "config.json").read_text())
    tensors = (saved / "codebooks.safetensors").read_bytes()
    for bad in ([], {}, "x", 1.5, True, ESCAPE, [ESCAPE], {"x": []}, 10**400):
        load(json.dumps(changed(document, ("provenance", *path), bad)), tensors)
    assert load(json.dumps(changed(document, ("provenance", *path), ESCAPE)), tensors) is None


@pytest.mark.parametrize(
    ("path", "bad", "named"),
    [
        (("gsrq", "head_dim"), 10**9, "head_dim"),
        (("gsrq", "num_kv_heads"), 10**9, "num_kv_heads"),
        (("gsrq", "num_kv_heads"), "3", "num_kv_heads"),
        (("gsrq", "model_type"), ESCAPE, "model_type"),
        (("provenance", "versions"), [], r"provenance\.versions must be a mapping"),
        (("provenance", "base_model"), ESCAPE, r"provenance\.base_model .* control characters"),
        (("provenance", "anything"), {"deep": [ESCAPE]}, r"provenance\.anything\.deep\[0\]"),
        (("provenance", "anything"), float("nan"), r"provenance\.anything is nan"),
        (("provenance", "training"), [{"step": 1}], r"provenance\.training\[0\]\.step"),
        (("provenance", "training"), [{"step": "distillation"}], r"provenance\.training\[0\] lacks 'best_step'"),
        (("provenance", "report"), [{"layer": 7, "kind": "key", "stages": [QUALITY]}], r"provenance\.report\[0\]"),
        (("provenance",), [], "provenance must be a mapping"),
        (("digest",), "../../etc/passwd", "digest must be 64 hexadecimal digits"),
        (("format_version",), True, "format version True"),
        (("format_version",), ESCAPE, "format version"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_the_file_and_the_field_are_named(
    path: tuple[str, ...], bad: Any, named: str, saved: Path, tmp_path: Path
) -> None:
    document = changed(json.loads((saved / "config.json").read_text()), path, bad)
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "codebooks.safetensors").write_bytes((saved / "codebooks.safetensors").read_bytes())
    with pytest.raises(ValueError, match=rf"config\.json.*{named}"):
        GSRQCodebooks.from_pretrained(tmp_path)
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("depth", [40, 900, 200_000])
@pytest.mark.parametrize("key", ["gsrq", "provenance", "other"])
def test_deep_json(key: str, depth: int, saved: Path) -> None:
    document = json.loads((saved / "config.json").read_text())
    inner = "[" * depth + "]" * depth
    text = json.dumps({**document, key: {"rope_parameters": "HERE"} if key != "gsrq" else "HERE"})
    loaded = load(text.replace('"HERE"', inner), (saved / "codebooks.safetensors").read_bytes())
    assert (loaded is None) == (key != "other" or depth > 900)


def test_a_header_that_talks_to_the_terminal(saved: Path) -> None:
    header = json.dumps({"x": {"dtype": ESCAPE, "shape": [1], "data_offsets": [0, 1]}}, ensure_ascii=False).encode()
    for content in (header, header.replace(b"\\u001b", b"\x1b"), b"{" + ESCAPE.encode()):
        assert load((saved / "config.json").read_bytes(), struct.pack("<Q", len(content)) + content + b"0") is None


JOBS = [(layer, kind) for layer in CONFIG.layers for kind in ("key", "value")]


def with_values(change: Callable[[dict, dict], None]) -> GSRQCodebooks:
    codebooks = make_codebooks()
    gains, shapes = ({job: read(*job) for job in JOBS} for read in (codebooks.gains, codebooks.shapes))
    change(gains, shapes)
    return GSRQCodebooks(CONFIG, gains, shapes)


def overflow(gains: dict, shapes: dict) -> None:
    gains[0, "key"].fill_(6e4)
    shapes[0, "key"].zero_()
    shapes[0, "key"][..., 0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gains, shapes: gains[0, "key"][0, 0, :1].neg_(), r"layers\.0\.key\.gains holds -.*0 or more"),
        (lambda gains, shapes: shapes[1, "value"][0, 0, 0].mul_(1.5), r"layers\.1\.value\.shapes .* unit"),
        (lambda gains, shapes: shapes[1, "value"][0, 0, 0].zero_(), r"layers\.1\.value\.shapes .* unit"),
        (overflow, r"layers\.0\.key\.gains: sums of centroids reach 2\.4e\+05"),
    ],
    ids=["negative gain", "long shape", "no shape", "overflow"],
)
def test_numbers_that_no_calibration_makes(change: Callable[[dict, dict], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_values(change)


def test_numbers_that_calibration_does_make(tmp_path: Path) -> None:
    """Centroids at the origin, with any direction or none; and directions rounded to float16."""

    def origin(gains: dict, shapes: dict) -> None:
        gains[0, "key"][0, 0, :3] = 0
        shapes[0, "key"][0, 0, 0] = 0
        shapes[0, "key"][0, 0, 1] /= 3
        gains[1, "value"][0, 0, 0] = 65504

    with_values(origin).save_pretrained(tmp_path)
    show(GSRQCodebooks.from_pretrained(tmp_path))
