"""A model decodes the same with the kernels as without; and the model is left as it was found.

Needs a GPU or TRITON_INTERPRET=1; `ops/test_interpreter.py` runs it in the interpreter where there is no GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks, GSRQConfig, attach, attention, detach, hooks
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.ops.triton import gluon_reason, triton_version, unsupported_reason

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = triton_version() is not None and unsupported_reason(torch.device(DEVICE), torch.float16) is None
# Partial rotary embedding; one projection for all; two rotary embeddings and sliding layers; its own scaling.
IN_THE_INTERPRETER = ("gpt-neox", "phi3", "gemma3", "granite")
ON_A_GPU = (
    "llama-linear", "llama-llama3", "llama-yarn", "mistral", "qwen2", "qwen2-sliding", "qwen3", "stablelm", "olmo2",
    "smollm3", "mixtral", "qwen3-moe",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or TRITON_INTERPRET=1 and Triton")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    return LlamaForCausalLM(config).to(DEVICE, torch.float16).eval()


@pytest.fixture(scope="module")
def codebooks(model: LlamaForCausalLM) -> GSRQCodebooks:
    config = GSRQConfig.for_model(model.config, bits=0.25, subspace_dim=64)
    gains, shapes = {}, {}
    make = torch.Generator().manual_seed(1)
    for layer in config.layers:
        for kind in ("key", "value"):
            subspaces, stages = 1, config.stages(kind)[layer]
            points = torch.randn(subspaces, stages, 256, 64, generator=make)
            shapes[layer, kind] = torch.nn.functional.normalize(points, dim=-1).half()
            gains[layer, kind] = torch.rand(subspaces, stages, 256, generator=make)
    return GSRQCodebooks(config, gains, shapes)


def make_cache(model: LlamaForCausalLM, codebooks: GSRQCodebooks, backend: str) -> GSRQCache:
    return GSRQCache(codebooks, model=model, residual_length=8, chunk_length=4, sink_length=2, backend=backend)


def decode(model: LlamaForCausalLM, cache: GSRQCache, mask: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """Logits of every token after a prompt of 20, `widths` tokens at a time."""
    tokens = torch.randint(0, 64, mask.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = mask.to(DEVICE)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, first = [], 0
    with torch.no_grad():
        for width in (20, *widths):
            last = first + width
            out = model(
                tokens[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=positions[:, first:last],
                **{CACHE_ARGUMENT: cache},
            )
            logits.append(out.logits[:, -width:].float())
            first = last
    return torch.cat(logits[1:], 1)


@pytest.mark.host
@pytest.mark.parametrize(("padding", "widths"), [(0, (3, 5)), (15, (1,) * 5)])
def test_kernels_decode_like_torch(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks, padding: int, widths: tuple[int, ...]
) -> None:
    mask = torch.ones(2, 20 + sum(widths), dtype=torch.long)
    mask[1, :padding] = 0
    results = {}
    for backend in ("torch", "triton", "auto"):
        cache = make_cache(model, codebooks, backend)
        results[backend] = decode(model, cache, mask, widths)
        assert cache.backend == ("triton" if backend == "auto" else backend)
    error = (results["torch"] - results["triton"]).norm() / results["torch"].norm()
    # Measured: 2e-4 to 8e-4 in float16, where one rounding is 5e-4.
    assert error < 5e-3
    assert torch.equal(results["auto"], results["triton"])


@pytest.mark.parametrize("name", [*IN_THE_INTERPRETER, *ON_A_GPU])
@torch.no_grad()
def test_kernels_decode_like_torch_on_other_architectures(name: str, tmp_path: Path) -> None:
    """From the same codes: of two centroids almost equally near the kernel may choose the other."""
    if name in ON_A_GPU and DEVICE == "cpu":
        pytest.skip("slow in the interpreter, and like one that runs there")
    settings = {**SUPPORTED[name].settings, "hidden_size": 256}
    if "head_dim" in settings:
        settings["head_dim"] = 64
    model = dataclasses.replace(SUPPORTED[name], settings=settings).build(torch.float16, "sdpa").to(DEVICE)
    codebooks = random_codebooks(model, bits=0.5, subspace_dim=64, num_centroids=256)
    prompt = (torch.arange(60) * 31 % 89 + 3).view(2, 30).to(DEVICE)
    mask = torch.ones(2, 32, dtype=torch.long, device=DEVICE)
    mask[1, :9] = 0
    cache = GSRQCache(codebooks, model, residual_length=5, sink_length=2, backend="torch")
    model(prompt, attention_mask=mask[:, :30], **{CACHE_ARGUMENT: cache})
    cache.save(tmp_path / "cache.safetensors")
    results = []
    for backend in ("torch", "triton"):
        cache = GSRQCache.load(tmp_path / "cache.safetensors", codebooks, model, backend=backend)
        steps = [
            model(prompt[:, i : i + 1], attention_mask=mask[:, : 31 + i], **{CACHE_ARGUMENT: cache}).logits.float()
            for i in range(2)
        ]
        assert cache.backend == backend
        results.append(torch.cat(steps, 1))
    # Measured in the interpreter: 4e-4 to 5e-3, the most where scores are large; torch in float16 is up to 8e-3 from
    # float32 itself.
    assert (results[1] - results[0]).norm() < 1e-2 * results[0].norm()


def test_kernels_are_not_blind(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    """Wrong codes change what the kernels see."""
    mask = torch.ones(1, 22, dtype=torch.long)
    right = decode(model, make_cache(model, codebooks, "triton"), mask, (1, 1))
    cache = make_cache(model, codebooks, "triton")
    decode(model, cache, mask, (1,))
    for layer in cache.compressed_layers:
        layer.state.codes["value"].add_(1)
    tokens = torch.randint(0, 64, mask.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    with torch.no_grad():
        wrong = model(tokens[:, 21:], **{CACHE_ARGUMENT: cache}).logits.float()
    assert (right[:, -1:] - wrong).abs().max() > 1e-2


@torch.no_grad()
def test_a_mask_with_other_numbers_in_it_is_another_mask(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    tokens = torch.randint(0, 64, (1, 31), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    results = []
    for backend in ("torch", "triton"):
        cache = make_cache(model, codebooks, backend)
        model(tokens[:, :30], **{CACHE_ARGUMENT: cache})
        mask = torch.ones(1, 1, 1, 31, dtype=torch.bool, device=DEVICE)
        model(tokens[:, 30:], attention_mask=mask, **{CACHE_ARGUMENT: cache})
        cache.crop(-1)
        mask[..., 5:20] = False
        results.append(model(tokens[:, 30:], attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits.float())
        assert cache.backend == backend
    # As in the first test.
    assert (results[1] - results[0]).norm() < 5e-3 * results[0].norm()


def test_other_caches_and_prefill_take_the_original(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    tokens = torch.randint(0, 64, (1, 24)).to(DEVICE)
    detach(model)
    with torch.no_grad():
        plain = model(tokens, **{CACHE_ARGUMENT: DynamicCache()}).logits
        cache = make_cache(model, codebooks, "triton")
        assert model.config._attn_implementation == "sdpa"
        assert model.model.layers[0].self_attn.config._attn_implementation == "gsrq_sdpa"
        assert torch.equal(model(tokens, **{CACHE_ARGUMENT: DynamicCache()}).logits, plain)
        assert torch.equal(model(tokens, **{CACHE_ARGUMENT: cache}).logits, plain)
    assert cache.backend == "torch"
    detach(model)
    assert model.model.layers[0].self_attn.config is model.config


def test_triton_says_why_it_cannot_run(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks, caplog: pytest.LogCaptureFixture
) -> None:
    mask = torch.ones(1, 21, dtype=torch.long)
    eager = copy.deepcopy(model)
    detach(eager)
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="cannot decode layer 0: the model's attention implementation is 'eager'"):
        decode(eager, make_cache(eager, codebooks, "triton"), mask, (1,))
    attention.log_path.cache_clear()
    with caplog.at_level(logging.INFO, "transformers_gsrq.attention"):
        cache = make_cache(eager, codebooks, "auto")
        decode(eager, cache, mask, (1,))
    assert cache.backend == "torch"
    assert len(caplog.records) == 1
    assert "Decoding in torch: the model's attention implementation is 'eager'" in caplog.text


def test_which_kernels_run_is_told_once(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks, caplog: pytest.LogCaptureFixture
) -> None:
    attention.log_path.cache_clear()
    with caplog.at_level(logging.INFO, "transformers_gsrq.attention"):
        for _ in range(2):
            decode(model, make_cache(model, codebooks, "triton"), torch.ones(1, 21, dtype=torch.long), (1,))
    assert len(caplog.records) == 1
    reason = gluon_reason(1)
    expected = "by Triton kernels." if reason is None else f"by portable kernels, slower on long contexts: {reason}."
    assert caplog.text.rstrip().endswith(expected)


def test_attention_that_is_never_called_is_an_error(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not ask for the attention function of its config would see the newest tokens only."""
    cache = make_cache(model, codebooks, "triton")
    mask = torch.ones(1, 21, dtype=torch.long)
    tokens = torch.zeros(1, 21, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        model(tokens[:, :20], **{CACHE_ARGUMENT: cache})
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def unmasked(module: object, *args: object, **kwargs: object) -> object:
            return sdpa(module, *args[:3], None, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *args: unmasked)
            with pytest.raises(RuntimeError, match="newest tokens only"):
                model(tokens[:, 20:], **{CACHE_ARGUMENT: cache})
        assert cache.get_seq_length() == 20
        model(tokens[:, 20:], attention_mask=mask.to(DEVICE), **{CACHE_ARGUMENT: cache})
    assert cache.backend == "triton"


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter runs one kernel at a time")
def test_threads_read_their_own_caches(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    """Two threads run one model, each with its own cache, and meet between `update` and attention."""
    mask = torch.ones(1, 22, dtype=torch.long)
    expected = decode(model, make_cache(model, codebooks, "triton"), mask, (1, 1))
    other = decode(model, make_cache(model, codebooks, "triton"), torch.ones(2, 22, dtype=torch.long), (1, 1))
    both, found = threading.Barrier(2, timeout=60), {}
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: (both.wait(), None)[1])

    def run(rows: int) -> None:
        cache = make_cache(model, codebooks, "triton")
        found[rows] = decode(model, cache, torch.ones(rows, 22, dtype=torch.long), (1, 1))

    threads = [threading.Thread(target=run, args=(rows,)) for rows in (1, 2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hook.remove()
    assert torch.equal(found[1], expected) and torch.equal(found[2], other)


@pytest.fixture(scope="module")
def sharing_model() -> Gemma4ForCausalLM:
    """A model whose layer 1 hands what its cache returns to layer 3."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=24,
        pad_token_id=0,
    )
    return Gemma4ForCausalLM._from_config(config, attn_implementation="sdpa").to(DEVICE, torch.float16).eval()


def test_shared_states_are_decoded_for_the_layers_that_share_them(sharing_model: Gemma4ForCausalLM) -> None:
    codebooks = random_codebooks(sharing_model, bits=0.25, subspace_dim=64, num_centroids=256, key_space="after_rope")
    assert codebooks.config.layers == (1,)
    mask, results = torch.ones(1, 30, dtype=torch.long), []
    for backend in ("torch", "auto"):
        cache = make_cache(sharing_model, codebooks, backend)
        results.append(decode(sharing_model, cache, mask, (1,) * 10))
        assert cache.backend == "torch" and cache.layers[1].num_stored == 20
    # Traced too, where the operator would give later layers the new states only.
    graphs, cache = Graphs(), make_cache(sharing_model, codebooks, "auto")
    results.append(decode(torch.compile(sharing_model, backend=graphs), cache, mask, (1,) * 10))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="later layers attend to the states of this one"):
        decode(sharing_model, make_cache(sharing_model, codebooks, "triton"), mask, (1,) * 10)


@pytest.mark.parametrize("change", ["detached", "another implementation", "another dtype"])
def test_a_model_is_routed_again(model: LlamaForCausalLM, codebooks: GSRQCodebooks, change: str) -> None:
    changed = copy.deepcopy(model)
    if change == "another dtype":
        detach(changed)
        # Kernels take no float64, so nothing is routed when the cache is made.
        changed.double()
    cache = make_cache(changed, codebooks, "triton")
    if change == "detached":
        detach(changed)
        attach(changed)
    elif change == "another implementation":
        changed.set_attn_implementation("eager")
        changed.set_attn_implementation("sdpa")
    changed.to(DEVICE, torch.float16)
    decode(changed, cache, torch.ones(1, 21, dtype=torch.long), (1,))
    assert cache.backend == "triton"


@torch.no_grad()
def test_positions_are_looked_at_again_after_a_crop(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    """Other tokens at other positions take the place of cropped ones, up to the same number of codes."""
    tokens = (torch.arange(62) * 7 % 50)[None].to(DEVICE)
    results = []
    for backend in ("torch", "auto"):
        cache = GSRQCache(codebooks, model, residual_length=0, chunk_length=8, sink_length=2, backend=backend)
        model(tokens[:, :40], **{CACHE_ARGUMENT: cache})
        model(tokens[:, 40:41], **{CACHE_ARGUMENT: cache})
        assert cache.backend == ("torch" if backend == "torch" else "triton")
        cache.crop(-21)
        model(tokens[:, 41:61], position_ids=torch.arange(200, 220)[None].to(DEVICE), **{CACHE_ARGUMENT: cache})
        position = torch.tensor([[220]], device=DEVICE)
        results.append(model(tokens[:, 61:], position_ids=position, **{CACHE_ARGUMENT: cache}).logits.float())
        # Kernels take positions that follow one another.
        assert cache.layers[0].num_stored == 40 and cache.backend == "torch"
    assert (results[1] - results[0]).norm() < 5e-3 * results[0].norm()


def test_memory_counts_the_key_tables(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    reports = []
    for _ in range(3):
        cache = make_cache(model, codebooks, "triton")
        decode(model, cache, torch.ones(1, 21, dtype=torch.long), (1,))
        tables = cache.compressed_layers[0].quantizers["key"].key_tables(cache.layers[0].rotary).nbytes
        assert tables > 0
        reports.append(cache.memory().codebooks)
    assert reports[0] >= codebooks.config.codebook_bytes + tables
    # Further caches share what the first one made.
    assert reports[1:] == reports[:1] * 2


class Graphs:
    """A compiler that changes nothing and counts the operators of our attention in each graph."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.operators: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        self.operators.append(sum("decode_attention" in str(node.target) for node in graph.graph.nodes))
        return graph


def test_a_model_compiled_as_a_whole_decodes_as_an_eager_one(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks, caplog: pytest.LogCaptureFixture
) -> None:
    """It breaks at our hooks, and says what decodes faster; how `generate` compiles is tested in test_decoding.py."""
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, :9] = 0
    widths = (1,) * 4 + (5,)
    expected = decode(model, make_cache(model, codebooks, "triton"), mask, widths)
    graphs, cache = Graphs(), make_cache(model, codebooks, "triton")
    hooks._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "transformers_gsrq.hooks"):
        found = decode(torch.compile(model, backend=graphs), cache, mask, widths)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert cache.backend == "triton"
    assert caplog.text.count("model.get_compiled_call") == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="inductor is slow around the interpreter")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_what_inductor_compiles_decodes_as_an_eager_model(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks, mode: str
) -> None:
    torch.compiler.reset()
    mask = torch.ones(2, 84, dtype=torch.long)
    mask[1, :9] = 0
    widths = (1,) * 64
    expected = decode(model, make_cache(model, codebooks, "triton"), mask, widths)
    cache = make_cache(model, codebooks, "triton")
    found = decode(torch.compile(model, mode=mode), cache, mask, widths)
    assert cache.backend == "triton"
    assert (found - expected).norm() < 5e-3 * expected.norm()


# Gemma 2 has no sdpa.
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name != "gemma2"])
def test_compiled_architectures_decode_as_eager_ones(name: str) -> None:
    if DEVICE == "cpu" and name not in ("gemma3", "phi3"):
        pytest.skip("slow in the interpreter")
    model = SUPPORTED[name].build(torch.float16).to(DEVICE)
    codebooks = random_codebooks(model, bits=1.0, num_centroids=256)
    ids = (torch.arange(56) * 7 % 50)[None].to(DEVICE)
    graphs, results = Graphs(), []
    for module in (model, torch.compile(model, backend=graphs)):
        cache = make_cache(model, codebooks, "auto")
        with torch.no_grad():
            logits = [module(ids[:, :48], **{CACHE_ARGUMENT: cache}).logits[:, -1:]]
            logits += [module(ids[:, i : i + 1], **{CACHE_ARGUMENT: cache}).logits for i in range(48, 56)]
        results.append(torch.cat(logits, 1).float())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


def test_a_compiled_model_takes_other_caches_without_a_break(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks
) -> None:
    make_cache(model, codebooks, "triton")
    graphs, tokens = Graphs(), torch.randint(0, 64, (1, 24)).to(DEVICE)
    with torch.no_grad():
        expected = model(tokens, **{CACHE_ARGUMENT: DynamicCache()}).logits
        found = torch.compile(model, backend=graphs, fullgraph=True)(tokens, **{CACHE_ARGUMENT: DynamicCache()}).logits
    assert torch.equal(found, expected)
    assert graphs.operators == [0]


def test_a_failure_in_a_compiled_model_leaves_the_cache_as_it_was(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks
) -> None:
    compiled, cache = torch.compile(model, backend=Graphs()), make_cache(model, codebooks, "triton")
    tokens = torch.randint(0, 64, (2, 24)).to(DEVICE)
    with torch.no_grad():
        compiled(tokens[:, :23], **{CACHE_ARGUMENT: cache})
        with pytest.raises(ValueError, match="holds 2 rows, but the model was given 1"):
            compiled(tokens[:1, 23:], **{CACHE_ARGUMENT: cache})
        assert cache.get_seq_length() == 23
        compiled(tokens[:, 23:], **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 24
