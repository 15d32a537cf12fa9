"""Models on GPUs, spread over several devices, and offloaded by accelerate; what each operation allocates."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from transformers import PreTrainedModel

from operations import OPERATIONS, OPTIONS
from test_cache_errors import PROMPT, assert_unchanged, contents
from test_operations import make_bench
from tiny_models import SUPPORTED, Architecture, random_codebooks
from transformers_gsrq import GSRQCache, GSRQConfig
from transformers_gsrq.calibration import capture, fit
from transformers_gsrq.compat import CACHE_ARGUMENT

SETTINGS = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
DETERMINISTIC = [name for name in OPERATIONS if name not in ("sampling", "beam-sampling", "several-sequences")]
# Another device sums in another order: measured below 1e-5 on logits of the order of 10.
TOLERANCE = 1e-3
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_weights_offloaded_by_accelerate(name: str, tmp_path: Path) -> None:
    """Weights that are fetched for each call and lie on the meta device between calls."""
    plain = SUPPORTED[name].build()
    codebooks = random_codebooks(plain)
    expected = plain.generate(PROMPT, **{CACHE_ARGUMENT: GSRQCache(codebooks, plain, **OPTIONS)}, **SETTINGS)
    model = accelerate.cpu_offload(SUPPORTED[name].build(), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.model.layers.parameters()} == {"meta"}
    cache = GSRQCache(codebooks, model, **OPTIONS)
    assert torch.equal(model.generate(PROMPT, **{CACHE_ARGUMENT: cache}, **SETTINGS), expected)
    cache.save(tmp_path / "cache.safetensors")
    assert_unchanged(GSRQCache.load(tmp_path / "cache.safetensors", codebooks, model), contents(cache))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("operation", DETERMINISTIC)
@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm"])
def test_operations_on_a_gpu(name: str, operation: str) -> None:
    if SUPPORTED[name].sliding and OPERATIONS[operation].sliding:
        pytest.skip(OPERATIONS[operation].sliding)
    if SUPPORTED[name].sliding and OPERATIONS[operation].host_sliding:
        pytest.skip(OPERATIONS[operation].host_sliding)
    bench = copy.copy(make_bench(name))
    outputs = []
    for device in ("cpu", "cuda"):
        bench.model, bench.draft = copy.deepcopy(bench.model).to(device), copy.deepcopy(bench.draft).to(device)
        bench.make_cache = lambda mask, **options: GSRQCache(bench.codebooks, bench.model, **OPTIONS, **options)
        outputs.append([tensor.cpu() for tensor in OPERATIONS[operation].run(bench)])
    for cpu, gpu in zip(*outputs, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=0, atol=TOLERANCE)


def spread(name: str, *devices: int | str) -> PreTrainedModel:
    """A tiny model with its layers on these devices in turn."""
    model = SUPPORTED[name].build()
    places: dict[str, int | str] = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "lm_head"), 0)
    places |= {f"model.layers.{index}": device for index, device in enumerate(devices)}
    places["model.norm"] = 0
    return accelerate.dispatch_model(model, places, main_device="cuda:0", force_hooks=True)


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("devices", [(0, 1, 1), (1, 0, 1), (0, 1, "cpu")], ids=str)
def test_layers_on_several_devices(name: str, devices: tuple[int | str, ...], tmp_path: Path) -> None:
    alone, model = SUPPORTED[name].build().to("cuda:0"), spread(name, *devices)
    codebooks = random_codebooks(alone)
    mask = torch.ones_like(PROMPT)
    mask[0, :9] = 0
    inputs = {"inputs": PROMPT.to("cuda:0"), "attention_mask": mask.to("cuda:0"), **SETTINGS}
    expected = alone.generate(**inputs, **{CACHE_ARGUMENT: GSRQCache(codebooks, alone, **OPTIONS)})
    cache = GSRQCache(codebooks, model, **OPTIONS)
    assert torch.equal(model.generate(**inputs, **{CACHE_ARGUMENT: cache}), expected)
    for index, layer in enumerate(cache.layers):
        own = torch.device("cuda", 0 if devices[index] == "cpu" else devices[index])
        assert layer.keys.device == own
        if layer in cache.compressed_layers:
            held = [*layer.tensors().values(), *(q.centroids for q in layer.quantizers.values())]
            assert {tensor.device for tensor in held} == {own}
    beams = {**inputs, "num_beams": 3}
    ours, theirs = (
        each.generate(**beams, **{CACHE_ARGUMENT: GSRQCache(codebooks, each, **OPTIONS)}) for each in (model, alone)
    )
    assert torch.equal(ours, theirs)
    # Saved from several devices, loaded onto them.
    cache.save(tmp_path / "cache.safetensors")
    loaded = GSRQCache.load(tmp_path / "cache.safetensors", codebooks, model)
    assert_unchanged(loaded, contents(cache))
    assert [layer.keys.device for layer in loaded.layers] == [layer.keys.device for layer in cache.layers]
    for rows in (torch.tensor([1, 0]), torch.tensor([0], device="cuda:1")):
        loaded.batch_select_indices(rows)
    if name == "llama":
        loaded.crop(-30)
    following = torch.cat([expected[1:], expected[1:, -3:]], -1)
    following = following[:, : loaded.get_seq_length() + 3]
    model.generate(following, **{CACHE_ARGUMENT: loaded}, **SETTINGS)


@pytest.mark.gpu
@needs_two_gpus
def test_calibration_on_several_devices() -> None:
    windows = (torch.arange(4 * 96) * 31 % 89 + 3).view(4, 96)
    fitted = []
    for model in (SUPPORTED["llama"].build().to("cuda:0"), spread("llama", 0, 1, "cpu")):
        config = GSRQConfig.for_model(model.config, bits=2.0, subspace_dim=8, num_centroids=16)
        samples = capture(model, windows, config, max_vectors=384, progress=False)
        fitted.append((samples, fit(samples, config, iterations=3, progress=False)))
    (one, first), (two, second) = fitted
    for key in one.states:
        torch.testing.assert_close(two.states[key].cpu(), one.states[key].cpu(), rtol=0, atol=1e-4)
        torch.testing.assert_close(two.gradients[key].cpu(), one.gradients[key].cpu(), rtol=0, atol=1e-2)
    # Codebooks of the other device's rounding: as good, not the same bits.
    ours, theirs = (torch.stack([book.gains(*key).float().mean() for key in one.states]) for book in (second, first))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0)


@pytest.mark.gpu
@needs_two_gpus
@torch.no_grad()
def test_kernels_on_several_devices() -> None:
    """Codes, tables and launches on each layer's own device."""
    alone = HEADS_OF_64.build(torch.float16).to("cuda:0")
    model = accelerate.dispatch_model(
        HEADS_OF_64.build(torch.float16),
        {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1,
         "model.norm": 0, "lm_head": 0},
        main_device="cuda:0",
        force_hooks=True,
    )  # fmt: skip
    codebooks = random_codebooks(alone, bits=1.0, subspace_dim=64, num_centroids=256)
    logits = []
    for each in (alone, model):
        cache = GSRQCache(codebooks, each, **OPTIONS)
        each(PROMPT.to("cuda:0"), **{CACHE_ARGUMENT: cache})
        steps = [each(PROMPT[:, i : i + 1].to("cuda:0"), **{CACHE_ARGUMENT: cache}).logits.float() for i in range(6)]
        assert cache.backend == "triton"
        logits.append(torch.cat(steps, 1))
    assert (logits[1] - logits[0]).norm() < 5e-3 * logits[0].norm()


HEADS_OF_64 = Architecture("Llama, heads of 64", "LlamaConfig", {"head_dim": 64})
LARGE = Architecture(
    "Llama, larger",
    "LlamaConfig",
    {
        "vocab_size": 512, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    },
)  # fmt: skip


@pytest.mark.gpu
@needs_gpu
def test_peak_memory_of_each_operation() -> None:
    """No operation holds the cache more than once beside itself; most hold far less."""
    model = LARGE.build(torch.bfloat16).to("cuda")
    codebooks = random_codebooks(model, bits=1.0, subspace_dim=128, num_centroids=256)
    tokens = torch.randint(0, 512, (4, 8192), device="cuda")
    cache = GSRQCache(codebooks, model)
    with torch.no_grad():
        model(tokens, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    memory = cache.memory()
    held = memory.cache
    one_layer = held / len(cache.layers)
    report: dict[str, float] = {"cache MiB": held / 2**20, "plain MiB": memory.plain / 2**20}

    def measure(name: str, operation: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = operation()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        del kept
        report[f"{name} MiB"] = extra / 2**20
        return extra

    def step(count: int) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                model(tokens[:, :count], **{CACHE_ARGUMENT: cache}, logits_to_keep=1)

        return run

    rows = torch.tensor([3, 0, 1, 1], device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        # The first token also makes the tables of the kernels, once for the codebooks.
        step(1)()
        measure("decode 1 token", step(1))
        assert measure("crop within the window", lambda: cache.crop(-1)) == 0
        assert measure("reorder", lambda: cache.reorder_cache(rows)) <= 2 * one_layer
        assert measure("save", lambda: cache.save(path)) <= one_layer
        assert measure("copy", lambda: copy.deepcopy(cache)) <= 1.05 * held
        assert measure("load", lambda: GSRQCache.load(path, codebooks, model)) <= 1.1 * held
        other = copy.deepcopy(cache)
        assert measure("select half of the rows", lambda: other.batch_select_indices(rows[:2])) <= 2 * one_layer
        assert measure("repeat twice", lambda: other.batch_repeat_interleave(2)) <= 1.2 * held
        assert measure("crop half of the codes", lambda: cache.crop(-4096)) == 0
        layer = cache.layers[0]
        assert measure("offload one layer", layer.offload) == 0
        assert measure("prefetch one layer", layer.prefetch) <= 1.1 * one_layer
    fresh = GSRQCache(codebooks, model)
    cache, other = fresh, None
    with torch.no_grad():
        measure("prefill 8192 tokens", lambda: model(tokens, **{CACHE_ARGUMENT: fresh}, logits_to_keep=1) and None)
    print(json.dumps({name: round(value, 2) for name, value in report.items()}, indent=1))
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "cache_memory.json").write_text(json.dumps(report, indent=1))
