"""Saving and loading a cache: the same bytes, the same text in a new process, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import transformers_gsrq
from operations import OPTIONS
from test_cache_errors import PROMPT, assert_unchanged, contents, next_logits
from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.models import fingerprint


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return SUPPORTED["gemma3"].build()


@pytest.fixture(scope="module")
def codebooks(model: PreTrainedModel) -> GSRQCodebooks:
    return random_codebooks(model)


@pytest.fixture
def cache(model: PreTrainedModel, codebooks: GSRQCodebooks) -> GSRQCache:
    cache = GSRQCache(codebooks, model, **OPTIONS)
    mask = torch.ones_like(PROMPT)
    mask[0, :9] = 0
    with torch.no_grad():
        model(PROMPT, attention_mask=mask, **{CACHE_ARGUMENT: cache})
    return cache


@pytest.mark.host
def test_the_same_bytes(model: PreTrainedModel, codebooks: GSRQCodebooks, cache: GSRQCache, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cache.safetensors"
    cache.save(path)
    assert os.listdir(path.parent) == [path.name]
    loaded = GSRQCache.load(path, codebooks, model)
    assert_unchanged(loaded, contents(cache))
    assert loaded.options == cache.options
    # Positions and sliding layers are parts of other tensors before, and tensors of their own after.
    for part in ("tokens", "codes", "reserved", "sinks", "window", "codebooks"):
        assert getattr(loaded.memory(), part) == getattr(cache.memory(), part)
    # Codes, window and sinks, not the codebooks.
    assert path.stat().st_size < cache.memory().cache + 8192
    assert torch.equal(next_logits(model, loaded, 20), next_logits(model, cache, 20))


def test_run_time_choices_may_change(
    model: PreTrainedModel, codebooks: GSRQCodebooks, cache: GSRQCache, tmp_path: Path
) -> None:
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    codebooks.save_pretrained(tmp_path / "codebooks")
    loaded = GSRQCache.load(path, tmp_path / "codebooks", model, residual_length=20)
    assert loaded.options.residual_length == 20 and loaded.options.sink_length == OPTIONS["sink_length"]
    with pytest.raises(ValueError, match="sink_length=2, which cannot change"):
        GSRQCache.load(path, codebooks, model, sink_length=4)


# The package as it is here, and the models of the tests.
PYTHONPATH = os.pathsep.join([str(Path(__file__).parent), str(Path(transformers_gsrq.__file__).parents[1])])
SCRIPT = """
import sys, torch
from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache
from transformers_gsrq.compat import CACHE_ARGUMENT
model = SUPPORTED["gemma3"].build()
cache = GSRQCache.load(sys.argv[1], random_codebooks(model), model)
prompt = torch.load(sys.argv[2])
out = model.generate(prompt, **{CACHE_ARGUMENT: cache}, max_new_tokens=12, do_sample=False, eos_token_id=None)
print(out.tolist())
"""


@pytest.mark.host
def test_a_cache_after_drafts(model: PreTrainedModel, codebooks: GSRQCodebooks, tmp_path: Path) -> None:
    """transformers 5.17 crops by a tensor, and lengths are tensors from then on."""
    cache = GSRQCache(codebooks, model, **OPTIONS)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
    model.generate(PROMPT[:1], **{CACHE_ARGUMENT: cache}, **settings)
    cache.save(tmp_path / "cache.safetensors")
    assert_unchanged(GSRQCache.load(tmp_path / "cache.safetensors", codebooks, model), contents(cache))


def test_sliding_layers_that_record_the_past(model: PreTrainedModel, codebooks: GSRQCodebooks, tmp_path: Path) -> None:
    """After drafts they hold more than their window, until `reset`."""
    cache = GSRQCache(codebooks, model, **OPTIONS)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
    model.generate(PROMPT[:1], **{CACHE_ARGUMENT: cache}, **settings)
    cache.save(tmp_path / "cache.safetensors")
    loaded = GSRQCache.load(tmp_path / "cache.safetensors", codebooks, model)
    with torch.no_grad():
        for tokens in (PROMPT[:1, :6], PROMPT[1:, :3]):
            found, expected = (model(tokens, **{CACHE_ARGUMENT: each}).logits for each in (loaded, cache))
            assert torch.equal(found, expected)


ROUTED = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
print(model(torch.tensor([[3, 4, 5]])).logits.shape)
"""


def test_an_attached_model_in_a_new_process(codebooks: GSRQCodebooks, tmp_path: Path) -> None:
    """A pickled model has only its hooks to import us, and attention of its own."""
    model = SUPPORTED["gemma3"].build(attention="sdpa")
    GSRQCache(codebooks, model)
    torch.save(model, tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", ROUTED, str(tmp_path / "model.pt")], check=True)


@pytest.mark.host
def test_generation_in_a_new_process(model: PreTrainedModel, codebooks: GSRQCodebooks, tmp_path: Path) -> None:
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cache = GSRQCache(codebooks, model, **OPTIONS)
    prompt = model.generate(PROMPT, **{CACHE_ARGUMENT: cache}, **settings)
    cache.save(tmp_path / "cache.safetensors")
    torch.save(prompt, tmp_path / "prompt.pt")
    expected = model.generate(prompt, **{CACHE_ARGUMENT: cache}, **settings)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "cache.safetensors"), str(tmp_path / "prompt.pt")],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


def test_other_codebooks_and_models_are_refused(
    model: PreTrainedModel, codebooks: GSRQCodebooks, cache: GSRQCache, tmp_path: Path
) -> None:
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    with pytest.raises(ValueError, match=f"other codebooks.*{codebooks.digest[:12]}"):
        GSRQCache.load(path, random_codebooks(model, seed=1), model)
    with pytest.raises(ValueError, match="states of another model"):
        GSRQCache.load(path, codebooks, SUPPORTED["gemma3"].build(seed=1))
    with pytest.raises(ValueError, match="states of another model"):
        GSRQCache.load(path, codebooks, SUPPORTED["gemma3"].build(dtype=torch.bfloat16))
    llama = SUPPORTED["llama"].build()
    with pytest.raises(ValueError, match="learned for another model"):
        GSRQCache.load(path, codebooks, llama)
    with pytest.raises(ValueError, match="other codebooks"):
        GSRQCache.load(path, random_codebooks(llama), llama)


def test_files_that_are_not_caches(
    model: PreTrainedModel, codebooks: GSRQCodebooks, cache: GSRQCache, tmp_path: Path
) -> None:
    path = tmp_path / "cache.safetensors"
    with pytest.raises(FileNotFoundError, match=r"cache\.safetensors"):
        GSRQCache.load(path, codebooks, model)
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        GSRQCache.load(path, codebooks, model)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"not one that GSRQCache\.save wrote"):
        GSRQCache.load(path, codebooks, model)
    cache.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        GSRQCache.load(path, codebooks, model)
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["gsrq"])
    tensors = load_file(path)
    save_file(tensors, path, metadata={"gsrq": json.dumps({**document, "format_version": 2})})
    with pytest.raises(ValueError, match=r"format version 2.*[Uu]pgrade"):
        GSRQCache.load(path, codebooks, model)


def test_an_empty_cache_is_not_saved(model: PreTrainedModel, codebooks: GSRQCodebooks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        GSRQCache(codebooks, model).save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_file(
    cache: GSRQCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    before = path.read_bytes()

    def fail(tensors: dict, target: Path, metadata: dict) -> None:
        target.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("transformers_gsrq.files.save_file", fail)
    with pytest.raises(OSError, match=r"cache\.safetensors cannot be written \(No space left on device\)\. Free some"):
        cache.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_fingerprint_names_every_weight_and_counts_past_what_float32_can() -> None:
    """2^24 + 1 is no float32: the last sample of a large matrix would lie beyond its end."""
    model = SUPPORTED["llama"].build()
    marks = {fingerprint(model)}
    for weight in model.get_decoder().parameters():
        with torch.no_grad():
            weight.flatten()[-1].add_(1)
        marks.add(fingerprint(model))
    assert len(marks) == 1 + len(list(model.get_decoder().parameters()))
    # As large as the projection of a 13B model, in memory of one number.
    model.model.norm.weight = torch.nn.Parameter(torch.zeros(1).expand(5120, 5120))
    assert fingerprint(model) not in marks
