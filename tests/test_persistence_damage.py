"""Saved caches that were damaged or made up: one ValueError that names the file, at once, and nothing computed."""

from __future__ import annotations

import copy
import datetime
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from regression import format_1
from transformers_gsrq import GSRQCache, GSRQCodebooks, persistence

Document = dict[str, Any]
Tensors = dict[str, torch.Tensor]
NAMES = list(format_1.MODELS)


class Saved:
    """One of the kept files with its parts, to be written again with some of them changed."""

    def __init__(self, name: str) -> None:
        folder = format_1.FOLDER / name
        self.model: PreTrainedModel = format_1.build(name)
        self.codebooks = GSRQCodebooks.from_pretrained(folder / format_1.CODEBOOKS)
        self.path = folder / format_1.CACHE
        self.tensors: Tensors = load_file(self.path)
        with safe_open(self.path, framework="pt") as file:
            self.document: Document = json.loads(file.metadata()["gsrq"])

    def load(self, path: Path) -> GSRQCache:
        return GSRQCache.load(path, self.codebooks, self.model, backend="torch")

    def write(self, path: Path, document: object, tensors: Tensors) -> Path:
        text = document if isinstance(document, str) else json.dumps(document)
        save_file(tensors, path, metadata={"gsrq": text})
        return path

    def refused(self, path: Path) -> str:
        """Why a file is refused, in one line that a terminal shows as it is."""
        with pytest.raises(ValueError) as caught:
            self.load(path)
        message = str(caught.value)
        assert str(path) in message and message.isprintable() and len(message) < 600
        return message


@pytest.fixture(scope="module")
def saved() -> dict[str, Saved]:
    return {name: Saved(name) for name in NAMES}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


def other_shapes(shape: torch.Size) -> Iterator[list[int]]:
    """One more and one less of each axis, an axis of one (which would broadcast), an axis less and one more."""
    for axis, size in enumerate(shape):
        for other in {size - 1, size + 1, 1, 0} - {size, -1}:
            yield [*shape[:axis], other, *shape[axis + 1 :]]
    yield list(shape[1:])
    yield [1, *shape]


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_the_dtype_and_shape_that_the_rest_asks_for(
    saved: dict[str, Saved], name: str, path: Path
) -> None:
    """Whatever part does not fit: a sink too few, a shorter window in one layer, positions of another length."""
    file = saved[name]
    for part, tensor in file.tensors.items():
        changed = [tensor.new_zeros(shape) for shape in other_shapes(tensor.shape)]
        integer, real = (torch.int16, torch.float16) if not tensor.is_floating_point() else (torch.int32, torch.int8)
        for other in [*changed, tensor.to(integer), tensor.to(real)]:
            file.refused(file.write(path, file.document, {**file.tensors, part: other}))
        rest = {other: held for other, held in file.tensors.items() if other != part}
        assert "lacks the tensors" in file.refused(file.write(path, file.document, rest))


@pytest.mark.parametrize("name", NAMES)
def test_layers_hold_the_same_tokens(saved: dict[str, Saved], name: str, path: Path) -> None:
    """Every tensor of one layer one token shorter, and its count too: a window of its own."""
    file = saved[name]
    for index, described in enumerate(file.document["layers"]):
        tensors, document = dict(file.tensors), copy.deepcopy(file.document)
        for part in ("keys", "values"):
            tensors[f"layers.{index}.{part}"] = tensors[f"layers.{index}.{part}"][:, :, 1:].contiguous()
        file.refused(file.write(path, document, tensors))
        for field in {"num_stored", "cumulative_length"} & described.keys():
            for count in (described[field] - 1, described[field] + 1, 0, -1, 2**80):
                document["layers"][index][field] = count
                file.refused(file.write(path, document, file.tensors))


def set_in(document: Document, keys: tuple[Any, ...], value: object) -> Document:
    document = copy.deepcopy(document)
    place: Any = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return document


def places(value: object, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in a document of JSON types."""
    if keys:
        yield keys
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from places(each, (*keys, key))


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_there_and_of_its_type(saved: dict[str, Saved], name: str, path: Path) -> None:
    file = saved[name]
    for keys in places(file.document):
        held: Any = file.document
        for key in keys:
            held = held[key]
        wrong: list[Any] = ["\x1b[31mred", 1.5, [], {}, math.nan, "x" * 10**6, -1]
        # None is how a length is not given, and how a layer without states is described.
        wrong += [None] if keys != ("options", "max_length") else []
        wrong += [int(held)] if isinstance(held, bool) else [True] if not isinstance(held, str) else [1]
        for value in wrong:
            file.refused(file.write(path, set_in(file.document, keys, value), file.tensors))
        if isinstance(keys[-1], str):
            document = copy.deepcopy(file.document)
            place: Any = document
            for key in keys[:-1]:
                place = place[key]
            del place[keys[-1]]
            file.refused(file.write(path, document, file.tensors))
    for layers in (file.document["layers"][:-1], [*file.document["layers"], None], [*file.document["layers"]] * 2):
        file.refused(file.write(path, {**file.document, "layers": layers}, file.tensors))


def test_what_a_later_version_adds_is_called_that(saved: dict[str, Saved], path: Path) -> None:
    file = saved["llama"]
    document = file.document
    later = {
        "a field": ({**document, "tokens": [1, 2]}, {}),
        "an option": (set_in(document, ("options", "window_dtype"), "float8"), {}),
        "a choice": (set_in(document, ("options", "backend"), "pallas"), {}),
        "a field of a layer": (set_in(document, ("layers", 0, "outliers"), 3), {}),
        "a tensor": (document, {"layers.0.key_outliers": torch.zeros(2)}),
        "an option with a name that a terminal obeys": (set_in(document, ("options", "\x1b[2J"), 1), {}),
    }
    for changed, more in later.values():
        message = file.refused(file.write(path, changed, {**file.tensors, **more}))
        assert "newer version" in message and "pip install -U transformers-gsrq" in message
    message = file.refused(file.write(path, {**document, "format_version": 2}, file.tensors))
    assert "format version 2" in message and "pip install -U transformers-gsrq" in message


def test_codes_that_no_centroid_has_and_rows_that_begin_nowhere(saved: dict[str, Saved], path: Path) -> None:
    file = saved["llama"]
    codes = file.tensors["layers.1.value_codes"].clone()
    codes[0, 0, 0, 0] = 16
    message = file.refused(file.write(path, file.document, {**file.tensors, "layers.1.value_codes": codes}))
    assert "code 16, the codebooks 16 centroids" in message
    starts = torch.tensor([-1, 0])
    assert "before token 0" in file.refused(file.write(path, file.document, {**file.tensors, "table.starts": starts}))
    # Of a row that was cut back into its padding only that is known.
    starts = torch.tensor([2**62, 0])
    cache = file.load(file.write(path, file.document, {**file.tensors, "table.starts": starts}))
    assert cache.tokens.starts is not None and cache.tokens.starts.tolist() == [file.document["num_tokens"], 0]


def test_a_long_rotary_embedding_that_the_model_has_not(saved: dict[str, Saved], path: Path) -> None:
    document = set_in(saved["llama"].document, ("layers", 1, "long_rotary"), True)
    assert "second rotary" in saved["llama"].refused(saved["llama"].write(path, document, saved["llama"].tensors))


HEADERS = [
    "", "null", "[]", '"gsrq-cache"', "[" * 10**6, '{"a":' * 10**6, "9" * 10**5, "\x1b[31m{",
    '{"format": "gsrq-cache"}', '{"format": ["gsrq-cache"]}',
    '{"format": "gsrq-cache", "format_version": ' + "1" * 5000 + "}",
]  # fmt: skip


@pytest.mark.parametrize("text", HEADERS, ids=lambda text: ascii(text)[:14])
def test_headers_that_are_not_of_caches(saved: dict[str, Saved], path: Path, text: str) -> None:
    saved["llama"].refused(saved["llama"].write(path, text, saved["llama"].tensors))


def test_sizes_are_checked_before_a_tensor_is_read(
    saved: dict[str, Saved], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    class Watched:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            if name == "get_tensor":
                read.append(name)
            return getattr(self._file, name)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *error: object) -> None:
            return None

    def watched(*args: Any, **kwargs: Any) -> Watched:
        return Watched(safe_open(*args, **kwargs))

    monkeypatch.setattr(persistence, "safe_open", watched)
    file = saved["llama"]
    file.load(file.path)
    assert read
    read.clear()
    # The last of the parts that are looked at.
    part = "layers.1.value_codes"
    file.refused(file.write(path, file.document, {**file.tensors, part: file.tensors[part][..., 1:].contiguous()}))
    assert not read


def json_values() -> st.SearchStrategy[Any]:
    numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2, 10**300]) | st.floats()
    words = st.text(max_size=8) | st.sampled_from(["\x1b]0;title\x07", "\u202e", "float32", "torch"])
    return st.recursive(st.none() | st.booleans() | numbers | words, lambda of: st.lists(of, max_size=3), max_leaves=5)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Document, Tensors], tuple[Document, Tensors]]:
    """Something done to a file's parts."""
    choose = draw(st.integers(0, 10**6))
    value, word = draw(json_values()), draw(st.text(max_size=5))
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    dtype = draw(st.sampled_from([torch.float32, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]))
    kind = draw(st.sampled_from(["set", "add", "drop", "shape", "new", "rename"]))

    def change(document: Document, tensors: Tensors) -> tuple[Document, Tensors]:
        where = list(places(document))
        keys, names = where[choose % len(where)] if where else (), sorted(tensors)
        if kind == "set" and keys:
            return set_in(document, keys, value), tensors
        if kind == "add":
            return set_in(
                document, (*(key for key in keys[:1] if isinstance(document[key], dict)), word), value
            ), tensors
        if kind == "new" or not names:
            return document, {**tensors, word: torch.zeros(shape, dtype=dtype)}
        name = names[choose % len(names)]
        rest = {each: tensor for each, tensor in tensors.items() if each != name}
        if kind == "shape":
            return document, {**rest, name: torch.zeros(shape, dtype=dtype)}
        return document, {**rest, word: tensors[name]} if kind == "rename" else rest

    return change


def load_or_refuse(file: Saved, path: Path) -> None:
    """A cache whose states can be read, or one ValueError."""
    try:
        cache = file.load(path)
    except ValueError as error:
        assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < 600
    else:
        format_1.states(cache)


@settings(
    max_examples=150,
    deadline=datetime.timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=st.sampled_from(NAMES), made=st.lists(changes(), min_size=1, max_size=3))
def test_parts_made_up(saved: dict[str, Saved], path: Path, name: str, made: list[Any]) -> None:
    document, tensors = saved[name].document, saved[name].tensors
    for change in made:
        document, tensors = change(document, tensors)
    load_or_refuse(saved[name], saved[name].write(path, document, tensors))


@settings(
    max_examples=150,
    deadline=datetime.timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(NAMES),
    cut=st.integers(0, 2**16) | st.none(),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
)
def test_bytes_made_up(
    saved: dict[str, Saved], path: Path, name: str, cut: int | None, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(saved[name].path.read_bytes())
    for at, byte in flips:
        data[at % len(data)] = byte
    path.write_bytes(data if cut is None else data[: cut % len(data)])
    load_or_refuse(saved[name], path)
