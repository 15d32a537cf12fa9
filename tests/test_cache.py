"""What the cache promises of itself: drafts leave no trace, copies share codebooks, dtypes and attentions agree."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from cache_oracle import OracleCache
from operations import OPTIONS
from test_cache_errors import PROMPT, assert_unchanged, contents
from test_cache_states import CODEBOOKS, HEAD_DIM, HEADS, LAYERS, MODEL, MODULES
from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, attention
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.ops import triton as kernels
from transformers_gsrq.steps import Step

# A code that two roundings of a state put on different sides of a tie moves that state by up to a centroid's distance;
# such states are counted, all others must agree to the rounding of the dtype.
SHARE_OF_TIES = 0.02


def push(cache: GSRQCache, states: torch.Tensor, first: int, last: int) -> None:
    """One forward pass with tokens `first` to `last` of `[layer, kind, B, H, T, D]`."""
    positions = torch.arange(first, last)[None]
    cos_sin = MODEL.model.rotary_emb(torch.zeros(1), positions)
    cache.begin_pass(MODEL.model)
    cache.stage_step(MODULES[0], Step(positions, cos_sin, None, 1, last - first, positions.device))
    for layer in range(LAYERS):
        keys, values = states[layer, :, :, :, first:last]
        cache.update(keys, values, layer)
    cache.commit_pass()


@pytest.mark.parametrize("seed", range(5))
def test_rejected_drafts_leave_no_trace(seed: int) -> None:
    """Bit for bit the cache that saw only the accepted tokens, whatever was drafted and rejected in between."""
    generator = torch.Generator().manual_seed(seed)
    accepted = torch.randint(-900, 900, (LAYERS, 2, 1, HEADS, 200, HEAD_DIM), generator=generator) + 0.25
    drafting, plain = (GSRQCache(CODEBOOKS, MODEL, **OPTIONS) for _ in range(2))
    for cache in (drafting, plain):
        cache.activate_past_recording()
        push(cache, accepted, 0, 20)
    length = 20
    while length < 180:
        kept, rejected = (int(n) for n in torch.randint(0, 9, (2,), generator=generator))
        kept += 1
        drafted = accepted.clone()
        drafted[..., length + kept :, :] = torch.randint(-900, 900, drafted[..., length + kept :, :].shape) + 0.25
        push(drafting, drafted, length, length + kept + rejected)
        drafting.crop(-rejected)
        push(plain, accepted, length, length + kept)
        length += kept
        assert_unchanged(drafting, contents(plain))
    assert plain.layers[0].num_stored > 150


def test_without_triton_a_model_decodes_in_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a plain install on a CPU; here Triton is only made out to be missing."""
    remembered = (kernels.unsupported_reason, kernels.gluon_reason, attention.log_path)
    for function in remembered:
        function.cache_clear()
    monkeypatch.setattr(kernels, "triton_version", lambda: None)
    try:
        model = SUPPORTED["llama"].build()
        cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
        with torch.no_grad(), caplog.at_level(logging.INFO, "transformers_gsrq.attention"):
            for tokens in (PROMPT, PROMPT[:, :1]):
                model(tokens, **{CACHE_ARGUMENT: cache})
        assert cache.memory().codes > 0 and cache.backend == "torch"
        assert "Decoding in torch: Triton is not installed" in caplog.text
    finally:
        for function in remembered:
            function.cache_clear()


def test_a_copy_shares_what_never_changes() -> None:
    model = SUPPORTED["llama"].build()
    cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    other = copy.deepcopy(cache)
    assert other.codebooks is cache.codebooks
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        assert theirs.quantizers["key"].centroids is ours.quantizers["key"].centroids
        assert theirs.rotary is ours.rotary and theirs.tokens is other.tokens
        assert theirs.state.codes["key"].data_ptr() != ours.state.codes["key"].data_ptr()
    assert other.tokens is not cache.tokens


def test_an_empty_cache_is_false() -> None:
    model = SUPPORTED["llama"].build()
    cache = GSRQCache(random_codebooks(model), model)
    assert not cache and len(cache) == 3 and cache.get_max_length() == -1
    assert cache.is_croppable and not cache.is_compileable and cache.is_sliding == [False] * 3
    model(PROMPT, **{CACHE_ARGUMENT: cache})
    assert cache


def test_states_of_an_empty_layer() -> None:
    model = SUPPORTED["llama"].build()
    with pytest.raises(RuntimeError, match="Layer 0 of this cache is empty"):
        GSRQCache(random_codebooks(model), model).layers[0].states()


def test_reset_ends_the_recording_of_drafts() -> None:
    """Prompt lookup announces that it will crop; the next text is compressed as any other."""
    model = SUPPORTED["gemma3"].build()
    codebooks = random_codebooks(model)
    used, fresh = (GSRQCache(codebooks, model, **OPTIONS) for _ in range(2))
    model.generate(PROMPT[:1], **{CACHE_ARGUMENT: used}, max_new_tokens=5, prompt_lookup_num_tokens=3, do_sample=False)
    assert used.get_seq_length() > 30
    used.reset()
    with torch.no_grad():
        for cache in (used, fresh):
            model(PROMPT, **{CACHE_ARGUMENT: cache})
    assert fresh.layers[1].num_stored == 25
    assert_unchanged(used, contents(fresh))
    assert not any(layer.record_past for layer in used.layers)


def test_every_call_of_a_quantized_prefill_is_quantized() -> None:
    """A text in parts reads what it reads as one: the codes."""
    model = SUPPORTED["llama"].build()
    codebooks, text = random_codebooks(model), PROMPT.view(1, 60)
    seen = []
    for size in (60, 20):
        cache = GSRQCache(codebooks, model, residual_length=0, sink_length=0, quantize_prefill=True)
        with torch.no_grad():
            seen.append(torch.cat([model(part, **{CACHE_ARGUMENT: cache}).logits for part in text.split(size, 1)], 1))
        assert [layer.num_stored for layer in cache.layers] == [60] * 3
    torch.testing.assert_close(*seen, rtol=0, atol=1e-4)


def test_backend_is_that_of_the_latest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randint(-900, 900, (LAYERS, 2, 1, HEADS, 80, HEAD_DIM)) + 0.25
    cache = GSRQCache(CODEBOOKS, MODEL, residual_length=0, chunk_length=1)
    # Made out to have kernels; what they would compute is not looked at.
    monkeypatch.setattr(
        GSRQCache, "_can_read_codes", lambda self, layer, module, step, straight: self.get_seq_length() > 0
    )
    monkeypatch.setattr(GSRQCache, "_prepare_kernels", lambda self, running: None)
    cache.driven = True
    cache._all_read = True
    for layer in cache.layers:
        layer.can_read_codes = True
    said = []
    for first, last in ((0, 20), (20, 21), (21, 22), (22, 60), (60, 61)):
        push(cache, states, first, last)
        said.append(cache.backend)
    assert said == ["torch", "triton", "triton", "torch", "triton"]
    # A single token is never a prompt, however short the window: it waits there for the next.
    assert [layer.num_stored for layer in cache.layers] == [60] * LAYERS
    cache.reset()
    assert cache.backend == "torch"


@pytest.mark.host
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_inference_mode(name: str) -> None:
    """What was made in inference mode goes on outside of it, and with gradients."""
    model = SUPPORTED[name].build()
    logits = []
    for mode in (torch.no_grad, torch.inference_mode):
        # Codebooks of its own: centroids too are made in this mode.
        codebooks = random_codebooks(model)
        cache = GSRQCache(codebooks, model, **OPTIONS, max_length=100)
        with mode():
            model(PROMPT, **{CACHE_ARGUMENT: cache})
            for token in PROMPT.split(1, 1)[:5]:
                model(token, **{CACHE_ARGUMENT: cache})
            cache.reorder_cache(torch.tensor([1, 0]))
            for layer in cache.layers:
                layer.offload()
                layer.prefetch()
            cache = copy.deepcopy(cache)
        out = [model(token, **{CACHE_ARGUMENT: cache}).logits for token in PROMPT.split(1, 1)[:20]]
        out[-1].sum().backward()
        model(PROMPT, **{CACHE_ARGUMENT: GSRQCache(codebooks, model, **OPTIONS)}).logits.sum().backward()
        logits.append(torch.cat(out, 1).detach())
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_autocast(name: str) -> None:
    """Keys that were rotated are float32 there, values bfloat16; outside of it both are float32 again."""
    model = SUPPORTED[name].build()
    codebooks = random_codebooks(model)
    prompt, mask = padded_prompt()
    results = {}
    for kind in ("plain", "covered", "coded"):
        window = OPTIONS if kind == "coded" else {"residual_length": 100}
        cache = DynamicCache(config=model.config) if kind == "plain" else GSRQCache(codebooks, model, **window)
        steps = []
        for step in range(12):
            tokens = prompt if step == 0 else prompt[:, step : step + 1]
            seen = torch.cat([mask, mask.new_ones(2, step)], -1)
            positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=step < 8):
                out = model(tokens, attention_mask=seen, position_ids=positions, **{CACHE_ARGUMENT: cache})
            steps.append(out.logits[:, -1].float())
            if kind == "coded" and step == 0:
                for layer in cache.layers:
                    for name, states in zip(("key", "value"), (layer.keys, layer.values), strict=True):
                        assert layer.state.sinks(name).dtype == layer.quantizers[name].centroids.dtype == states.dtype
                assert layer.values.dtype == torch.bfloat16
        results[kind] = torch.stack(steps)
    assert torch.equal(results["covered"], results["plain"])
    assert cache.layers[0].num_stored > 30 and results["coded"].isfinite().all()


def padded_prompt() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(PROMPT)
    mask[0, :13] = 0
    return PROMPT, mask


def fill(model: PreTrainedModel, kind: type, **options: int) -> GSRQCache | OracleCache:
    prompt, mask = padded_prompt()
    cache = kind(random_codebooks(model), model, *([mask] if kind is OracleCache else []), **options)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cache.sequences = model.generate(prompt, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **settings)
    return cache


@pytest.mark.host
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3", "gpt2"])
def test_dtypes_and_attentions(name: str, dtype: torch.dtype, attention: str) -> None:
    """The same states as the oracle's in every dtype; nothing at all changes while the window covers the text."""
    model = SUPPORTED[name].build(dtype, attention)
    prompt, mask = padded_prompt()
    covered = fill(model, GSRQCache, residual_length=100).sequences
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(covered, model.generate(prompt, attention_mask=mask, **settings))
    # One forward pass: both caches are given the same states.
    ours, oracle = (
        kind(random_codebooks(model), model, *([mask] if kind is OracleCache else []), **OPTIONS)
        for kind in (GSRQCache, OracleCache)
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for cache in (ours, oracle):
            model(prompt, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache})
    for layer, other in zip(ours.layers, oracle.layers, strict=True):
        if layer not in ours.compressed_layers:
            continue
        for mine, expected in zip(layer.states(), (other.keys, other.values), strict=True):
            assert mine.dtype == expected.dtype == dtype
            real = mask.bool()[:, None, :, None].expand_as(mine)
            error = (mine.double() - expected.double()).abs()[real]
            rounding = 4 * torch.finfo(dtype).eps * expected[real].abs().double().clamp(min=1)
            assert (error > rounding).double().mean() <= SHARE_OF_TIES


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_flex_attention(name: str) -> None:
    """Left padding reaches the cache through a block mask."""
    reference = SUPPORTED[name].build(attention="sdpa")
    model = SUPPORTED[name].build(attention="flex_attention")
    prompt, mask = padded_prompt()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [GSRQCache(random_codebooks(reference), each, **OPTIONS) for each in (reference, model)]
    # Not compiled: that takes a minute and changes no number.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        sdpa, flex = (
            each(prompt, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache}).logits
            for each, cache in zip((reference, model), caches, strict=True)
        )
    assert caches[1].tokens.starts.tolist() == [13, 0]
    torch.testing.assert_close(flex[mask.bool()], sdpa[mask.bool()], rtol=0, atol=1e-4)
    for ours, theirs in zip(caches[1].compressed_layers, caches[0].compressed_layers, strict=True):
        same = ours.tensors()["value_codes"] == theirs.tensors()["value_codes"]
        assert same.float().mean() > 1 - SHARE_OF_TIES


@torch.no_grad()
def test_a_mask_of_ones_own() -> None:
    """Two passages side by side, then a question that sees both: the passages' last query sees one of them."""
    model = SUPPORTED["llama"].build()
    cache, plain = GSRQCache(random_codebooks(model), model, **OPTIONS), DynamicCache(config=model.config)
    prompt = padded_prompt()[0][1:]
    half = prompt.shape[1] // 2
    passage = torch.arange(prompt.shape[1]) // half
    side_by_side = (passage[:, None] == passage) & torch.ones(len(passage), len(passage), dtype=torch.bool).tril()
    question = torch.ones(3, len(passage) + 3, dtype=torch.bool).tril(len(passage))
    for ids, mask in ((prompt, side_by_side), (prompt[:, :3], question)):
        positions = torch.arange(ids.shape[1])[None] % half
        for each in (cache, plain):
            model(ids, attention_mask=mask[None, None], position_ids=positions, **{CACHE_ARGUMENT: each})
        assert cache.tokens.starts.tolist() == [0]
    sinks = slice(OPTIONS["sink_length"])
    for layer, exact in zip(cache.layers, plain.layers, strict=True):
        for mine, expected in zip(layer.states(), (exact.keys, exact.values), strict=True):
            assert torch.equal(mine[:, :, sinks], expected[:, :, sinks])


@torch.no_grad()
def test_positions_that_a_loop_counts_on_in_place() -> None:
    model = SUPPORTED["llama"].build()
    prompt = padded_prompt()[0]
    logits = []
    for dtype in (torch.int64, torch.int32):
        cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
        positions = torch.arange(prompt.shape[1], dtype=dtype)[None]
        model(prompt, position_ids=positions, **{CACHE_ARGUMENT: cache})
        positions = positions[:, -1:].clone()
        for index in range(8):
            positions += 1
            out = model(prompt[:, index : index + 1], position_ids=positions, **{CACHE_ARGUMENT: cache})
        logits.append(out.logits)
    assert torch.equal(*logits)


class LiveBytes(TorchDispatchMode):
    """Bytes of living tensors: those that were there before, and those that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def count(self, tensors: list[torch.Tensor]) -> int:
        """Bytes of tensors that are there already; they count until they die."""
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.storages |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        return sum(self.storages.values())

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))
        return out


def peak_bytes(cache: GSRQCache, operation: Callable[[], object]) -> int:
    """Bytes that an operation takes at its peak beyond what was there before it."""
    tracker = LiveBytes()
    for layer in cache.layers:
        tracker.count(layer.state.tensors())
    before = tracker.count(cache.tokens.tensors())
    with tracker:
        operation()
    return max(0, tracker.peak - before)


def test_no_operation_copies_the_cache_twice() -> None:
    """Rows are selected one layer after another, so the whole cache is never there twice; a crop copies nothing."""
    architecture = SUPPORTED["llama"]
    model = replace(architecture, settings={"num_hidden_layers": 8, "max_position_embeddings": 8192}).build()
    cache = GSRQCache(random_codebooks(model), model, **OPTIONS, max_length=4000)
    with torch.no_grad():
        model(torch.randint(3, 90, (4, 2000)), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    memory = cache.memory()
    assert memory.reserved > 0.8 * memory.codes
    one_layer = memory.cache / 8
    rows = torch.tensor([3, 0, 1, 1])
    assert peak_bytes(cache, lambda: cache.crop(-700)) == 0
    # New rows replace the old ones of their layer before the next layer begins.
    assert peak_bytes(cache, lambda: cache.reorder_cache(rows)) <= 1.2 * one_layer
    assert peak_bytes(cache, lambda: cache.batch_select_indices(rows[:2])) <= 1.2 * one_layer
    assert peak_bytes(cache, lambda: cache.batch_repeat_interleave(2)) <= 0.5 * memory.cache + 1.2 * one_layer
    # A forward pass of one token decodes a layer at a time.
    decoded = 2 * 4 * cache.get_seq_length() * 2 * 16 * 4
    step = torch.randint(3, 90, (4, 1))
    with torch.no_grad():
        assert peak_bytes(cache, lambda: model(step, **{CACHE_ARGUMENT: cache})) <= 8 * decoded + one_layer
