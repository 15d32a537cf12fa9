"""Wrong use, and failures in the middle of a forward pass: a clear error, and the cache as it was."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaForCausalLM, PreTrainedModel

import transformers_gsrq
from operations import OPTIONS
from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.layer import GSRQLayer
from transformers_gsrq.quantizer import ResidualQuantizer
from transformers_gsrq.state import LayerState, TokenState


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return SUPPORTED["llama"].build()


@pytest.fixture(scope="module")
def codebooks(model: PreTrainedModel) -> GSRQCodebooks:
    return random_codebooks(model)


PROMPT = (torch.arange(60) * 7 % 89 + 3).view(2, 30)


@pytest.fixture
def cache(model: PreTrainedModel, codebooks: GSRQCodebooks) -> GSRQCache:
    """Thirty tokens in two rows."""
    cache = GSRQCache(codebooks, model, **OPTIONS)
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    return cache


def contents(cache: GSRQCache) -> list[torch.Tensor]:
    """Every tensor a cache holds, and its lengths."""
    out = [torch.tensor([cache.get_seq_length(), cache.tokens.length])]
    for layer in cache.layers:
        if hasattr(layer, "tensors"):
            out += [tensor.clone() for tensor in layer.tensors().values()] + [torch.tensor(layer.num_stored)]
        else:
            out += [layer.keys.clone(), layer.values.clone(), torch.tensor(layer.cumulative_length)]
    return [*out, cache.tokens.positions.clone(), cache.tokens.starts.clone()]


def assert_unchanged(cache: GSRQCache, before: list[torch.Tensor]) -> None:
    after = contents(cache)
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)


@torch.no_grad()
def next_logits(model: PreTrainedModel, cache: GSRQCache, count: int = 4) -> torch.Tensor:
    tokens = (torch.arange(count * 2) * 11 % 90 + 3).view(2, count)
    return model(tokens, **{CACHE_ARGUMENT: cache}).logits


WRONG = {
    "crop more than there is": (lambda cache: cache.crop(-31), ValueError, "from 0 to the 30 cached"),
    "crop a positive number": (lambda cache: cache.crop(5), ValueError, "removes the last n tokens"),
    "reorder another number of rows": (
        lambda cache: cache.reorder_cache(torch.tensor([0])), ValueError, "needs 2 rows"
    ),
    "reorder to a row that is not there": (
        lambda cache: cache.reorder_cache(torch.tensor([0, 2])), ValueError, "from 0 to 1"
    ),
    "select a row that is not there": (
        lambda cache: cache.batch_select_indices(torch.tensor([-1])), ValueError, "from 0 to 1"
    ),
    "select nothing": (
        lambda cache: cache.batch_select_indices(torch.tensor([False, False])), ValueError, "one or more"
    ),
    "select by a mask of another length": (
        lambda cache: cache.batch_select_indices(torch.tensor([True])), ValueError, r"shape \(2,\)"
    ),
    "repeat no times": (lambda cache: cache.batch_repeat_interleave(0), ValueError, "positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operation(case: str, model: PreTrainedModel, cache: GSRQCache) -> None:
    operation, error, message = WRONG[case]
    expected = next_logits(model, copy.deepcopy(cache))
    before = contents(cache)
    with pytest.raises(error, match=message):
        operation(cache)
    assert_unchanged(cache, before)
    assert torch.equal(next_logits(model, cache), expected)


def test_another_batch(model: PreTrainedModel, cache: GSRQCache) -> None:
    before = contents(cache)
    with pytest.raises(ValueError, match="holds 2 rows, but the model was given 3"):
        model(torch.ones(3, 1, dtype=torch.long), **{CACHE_ARGUMENT: cache})
    assert_unchanged(cache, before)


def test_another_model(model: PreTrainedModel, cache: GSRQCache) -> None:
    other = SUPPORTED["llama"].build(seed=1)
    transformers_gsrq.attach(other)
    before, expected = contents(cache), next_logits(model, copy.deepcopy(cache))
    with pytest.raises(ValueError, match="made for another model"):
        next_logits(other, cache)
    assert_unchanged(cache, before)
    assert torch.equal(next_logits(model, cache), expected)


def test_a_model_that_was_never_attached(model: PreTrainedModel, cache: GSRQCache) -> None:
    other = SUPPORTED["llama"].build(seed=1)
    before = contents(cache)
    with pytest.raises(RuntimeError, match="detached, or never attached"):
        next_logits(other, cache)
    assert_unchanged(cache, before)


@pytest.mark.host
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_decoder_called_with_a_positional_cache(name: str) -> None:
    model = SUPPORTED[name].build()
    codebooks = random_codebooks(model)
    decoder = model.get_decoder()
    place = list(inspect.signature(decoder.forward).parameters).index(CACHE_ARGUMENT)
    outputs = []
    for positional in (False, True):
        cache = GSRQCache(codebooks, model, **OPTIONS)
        with torch.no_grad():
            for tokens in (PROMPT, PROMPT[:, :1], PROMPT[:, :4]):
                arguments = (tokens, *[None] * (place - 1), cache)
                out = decoder(*arguments) if positional else decoder(tokens, **{CACHE_ARGUMENT: cache})
        assert cache.get_seq_length() == cache.memory().tokens == 35
        outputs.append(out[0])
    assert torch.equal(*outputs)


def test_layers_run_by_hand(model: PreTrainedModel, cache: GSRQCache) -> None:
    """Nothing would say when their forward pass is complete."""
    before, expected = contents(cache), next_logits(model, copy.deepcopy(cache))
    positions = torch.arange(30, 34)[None]
    hidden = model.model.embed_tokens(PROMPT[:, :4])
    embeddings = model.model.rotary_emb(hidden, positions)
    with pytest.raises(RuntimeError, match=r"run one by one.*call the model, or model.get_decoder\(\)"):
        model.model.layers[0](
            hidden, position_ids=positions, **{CACHE_ARGUMENT: cache}, position_embeddings=embeddings
        )
    assert_unchanged(cache, before)
    assert torch.equal(next_logits(model, cache), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_asking_leaves_a_running_pass_alone(name: str, tmp_path: Path) -> None:
    """Every question that a cache answers, asked in the middle of each forward pass, as a streamer's thread may."""
    model = SUPPORTED[name].build()
    codebooks = random_codebooks(model)
    caches = [GSRQCache(codebooks, model, **OPTIONS) for _ in range(2)]
    answers = []

    def ask(*_: object) -> None:
        cache, path = caches[1], tmp_path / "asked.safetensors"
        answer = [cache.memory().tokens, cache.get_seq_length(), len(repr(cache)) > 0, bool(cache)]
        answer += [copy.deepcopy(cache).get_seq_length(), cache.get_query_offset(), cache.is_compileable]
        if cache:
            cache.save(path)
            answer += [GSRQCache.load(path, codebooks, model).get_seq_length()]
            answer += [layer.states()[0].shape[2] for layer in cache.compressed_layers]
        answers.append(answer)

    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(PROMPT, **{CACHE_ARGUMENT: caches[0]}, **settings)
    hook = model.get_decoder().layers[-1].register_forward_hook(ask)
    try:
        found = model.generate(PROMPT, **{CACHE_ARGUMENT: caches[1]}, **settings)
    finally:
        hook.remove()
    assert torch.equal(found, expected)
    assert_unchanged(caches[1], contents(caches[0]))
    # The tokens of the passes that were complete by then.
    assert [answer[0] for answer in answers] == [0, *range(30, 41)]
    assert all(set(answer) <= {answer[0], True, False} for answer in answers)


def test_a_thread_that_looks_while_another_generates(model: PreTrainedModel, codebooks: GSRQCodebooks) -> None:
    cache, results = GSRQCache(codebooks, model, **OPTIONS), []
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    expected = model.generate(PROMPT, **{CACHE_ARGUMENT: GSRQCache(codebooks, model, **OPTIONS)}, **settings)
    thread = threading.Thread(
        target=lambda: results.append(model.generate(PROMPT, **{CACHE_ARGUMENT: cache}, **settings))
    )
    thread.start()
    seen = set()
    while thread.is_alive():
        seen.add(cache.memory().tokens)
    thread.join()
    assert torch.equal(results[0], expected)
    assert len(seen) > 2


def test_two_threads_in_one_cache(model: PreTrainedModel, cache: GSRQCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused and leaves the first alone."""
    expected = next_logits(model, copy.deepcopy(cache))
    refused = []
    mlp = model.model.layers[1].mlp
    real = mlp.forward

    def intrude(hidden: torch.Tensor) -> torch.Tensor:
        def other() -> None:
            for use in (lambda: next_logits(model, cache), lambda: cache.crop(-1)):
                with pytest.raises(RuntimeError, match="Another thread is in a forward pass") as error:
                    use()
                refused.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return real(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", intrude)
        assert torch.equal(next_logits(model, cache), expected)
    assert len(refused) == 2 and cache.get_seq_length() == 34


def test_completing_a_pass_that_is_not_open(cache: GSRQCache) -> None:
    before = contents(cache)
    with pytest.raises(RuntimeError, match="No forward pass of this cache is running"):
        cache.commit_pass()
    assert_unchanged(cache, before)


@pytest.mark.parametrize("count", [1, 40])
def test_an_interrupt_while_a_pass_is_completed(
    count: int, model: PreTrainedModel, cache: GSRQCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is through: what is left to do is done by the next use of the cache."""
    other = copy.deepcopy(cache)
    next_logits(model, other, count)
    with monkeypatch.context() as patch:
        if count > 1:
            patch.setattr(GSRQLayer, "finish", fail_at(2, KeyboardInterrupt(), GSRQLayer.finish))
        else:
            patch.setattr(TokenState, "count", fail_at(1, KeyboardInterrupt(), TokenState.count))
        with pytest.raises(KeyboardInterrupt):
            next_logits(model, cache, count)
    cache.crop(0)
    assert_unchanged(cache, contents(other))


def test_pickling_names_what_to_do(cache: GSRQCache) -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled.*cache\.save\(path\)"):
        pickle.dumps(cache)
    assert_unchanged(copy.deepcopy(cache), contents(cache))


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("residual_length", -1, "an integer of at least 0, got -1"),
        ("residual_length", True, "an integer of at least 0, got True"),
        ("sink_length", 1.5, "an integer of at least 0, got 1.5"),
        ("chunk_length", 0, "an integer of at least 1, got 0"),
        ("beam_width", "2", "an integer of at least 1, got '2'"),
        ("quantize_prefill", "no", "True or False, got 'no'"),
        ("backend", "tritn", r"one of \('auto', 'torch', 'triton'\), got 'tritn'"),
        ("max_length", 1e4, "an integer of at least 1 or None, got 10000.0"),
        ("max_length", -3, "an integer of at least 1 or None, got -3"),
    ],
)
def test_options_out_of_range(
    name: str, value: object, legal: str, model: PreTrainedModel, codebooks: GSRQCodebooks
) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {legal}"):
        GSRQCache(codebooks, model, **{name: value})


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_detached_model(name: str) -> None:
    model = SUPPORTED[name].build()
    cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    before, expected = contents(cache), next_logits(model, copy.deepcopy(cache))
    transformers_gsrq.detach(model)
    with pytest.raises(RuntimeError, match="attach"):
        next_logits(model, cache)
    assert_unchanged(cache, before)
    transformers_gsrq.attach(model)
    assert torch.equal(next_logits(model, cache), expected)


def test_detach_restores_the_model(codebooks: GSRQCodebooks) -> None:
    model = SUPPORTED["llama"].build()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    GSRQCache(codebooks, model)
    GSRQCache(codebooks, model)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == sum(hooks) + 5
    transformers_gsrq.detach(model)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(not m._forward_hooks_always_called and not m._forward_hooks_with_kwargs for m in model.modules())


def test_model_and_codebooks_swapped(model: PreTrainedModel, codebooks: GSRQCodebooks) -> None:
    with pytest.raises(TypeError, match="got LlamaForCausalLM. The order is GSRQCache"):
        GSRQCache(model, codebooks)


def test_codebooks_of_another_model(codebooks: GSRQCodebooks) -> None:
    with pytest.raises(ValueError, match="learned for another model.*model_type: codebooks llama, model qwen2"):
        GSRQCache(codebooks, SUPPORTED["qwen2"].build())


def fail_at(call: int, error: BaseException, real: Callable) -> Callable:
    """`real`, raising at its `call`-th call."""
    calls = 0

    def function(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*args, **kwargs)

    return function


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("count", [1, 9, 40])
@pytest.mark.parametrize(
    ("name", "call"), [("llama", 1), ("llama", 2), ("llama", 3), ("llama", 6), ("gemma3", 1), ("gemma3", 3)]
)
def test_failed_encoding(name: str, count: int, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding fails in one of the layers, with a window that is due and native layers beside it."""
    model = SUPPORTED[name].build()
    cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    next_logits(model, cache, 3)
    before, expected = contents(cache), next_logits(model, copy.deepcopy(cache), count)
    with monkeypatch.context() as patch:
        patch.setattr(ResidualQuantizer, "encode_into", fail_at(call, OUT_OF_MEMORY, ResidualQuantizer.encode_into))
        with pytest.raises(torch.OutOfMemoryError):
            next_logits(model, cache, count)
    assert_unchanged(cache, before)
    assert torch.equal(next_logits(model, cache, count), expected)


@pytest.mark.parametrize("growing", ["resize_ring", "reserve"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_failed_growth(
    call: int, growing: str, model: PreTrainedModel, codebooks: GSRQCodebooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while some layers have their new room and others do not."""
    cache = GSRQCache(codebooks, model, **OPTIONS)
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    cache.activate_past_recording()
    # More tokens than the ring has slots for; then, when they are due, more codes than there is room for.
    counts = [60, 3] if growing == "reserve" else [40]
    for count in counts[:-1]:
        next_logits(model, cache, count)
    before, expected = contents(cache), next_logits(model, copy.deepcopy(cache), counts[-1])
    with monkeypatch.context() as patch:
        patch.setattr(LayerState, growing, fail_at(call, OUT_OF_MEMORY, getattr(LayerState, growing)))
        with pytest.raises(torch.OutOfMemoryError):
            next_logits(model, cache, counts[-1])
    assert_unchanged(cache, before)
    assert torch.equal(next_logits(model, cache, counts[-1]), expected)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_failure_after_the_cache(name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP runs out of memory, or the user interrupts, when the layer's cache was updated already."""
    model = SUPPORTED[name].build()
    cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    before, expected = contents(cache), next_logits(model, copy.deepcopy(cache), 40)
    mlp = next(m for n, m in model.named_modules() if n.endswith("1.mlp"))
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", fail_at(1, error, mlp.forward))
        with pytest.raises(type(error)):
            next_logits(model, cache, 40)
    assert cache.get_seq_length() == 30
    # Hooks are not told of an interrupt; the next use of the cache sets it right.
    untouched = copy.deepcopy(cache)
    cache.batch_select_indices([0, 1])
    assert_unchanged(cache, before)
    assert torch.equal(next_logits(model, cache, 40), expected)
    assert torch.equal(next_logits(model, untouched, 40), expected)


def test_a_copy_of_an_interrupted_pass(
    model: PreTrainedModel, cache: GSRQCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between what the model says and the states: the copy is of what complete passes left."""
    expected = next_logits(model, copy.deepcopy(cache))
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].self_attn.q_proj, "forward", fail_at(1, KeyboardInterrupt(), len))
        with pytest.raises(KeyboardInterrupt):
            next_logits(model, cache)
    assert cache.tokens.running is not None
    other = copy.deepcopy(cache)
    assert other.tokens.running is None and cache.tokens.running is not None
    assert torch.equal(next_logits(model, other), expected)
    assert torch.equal(next_logits(model, cache), expected)


def test_masks_that_are_made_before_an_interrupted_pass_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vision-language model makes them, and only then calls its decoder."""
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=SUPPORTED["gemma3"].build().config.to_dict(),
            vision_config={
                "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
        )
    ).eval()  # fmt: skip
    cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
    types = torch.zeros_like(PROMPT)
    tokens = PROMPT[:, :6]
    with torch.no_grad():
        model(PROMPT, token_type_ids=types, **{CACHE_ARGUMENT: cache})
        intact = copy.deepcopy(cache)
        mlp = model.get_decoder().layers[2].mlp
        with monkeypatch.context() as patch:
            patch.setattr(mlp, "forward", fail_at(1, KeyboardInterrupt(), mlp.forward))
            with pytest.raises(KeyboardInterrupt):
                model(tokens, token_type_ids=types[:, :6], **{CACHE_ARGUMENT: cache})
        found, expected = (
            model(tokens, token_type_ids=types[:, :6], **{CACHE_ARGUMENT: each}).logits for each in (cache, intact)
        )
    assert torch.equal(found, expected)


def test_failed_first_prompt(
    model: PreTrainedModel, codebooks: GSRQCodebooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = GSRQCache(codebooks, model, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(ResidualQuantizer, "encode_into", fail_at(4, OUT_OF_MEMORY, ResidualQuantizer.encode_into))
        with pytest.raises(torch.OutOfMemoryError):
            model(PROMPT, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == cache.tokens.length == 0
    assert not cache and not any(layer.is_initialized for layer in cache.layers)
    with torch.no_grad():
        again = model(PROMPT, **{CACHE_ARGUMENT: cache}).logits
        assert torch.equal(again, model(PROMPT, **{CACHE_ARGUMENT: GSRQCache(codebooks, model, **OPTIONS)}).logits)


def test_failed_selection_says_so_later(
    model: PreTrainedModel, cache: GSRQCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selecting rows is not undone, which would take twice the memory; the cache refuses to go on half-selected."""
    layer = cache.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "reorder_cache", fail_at(1, OUT_OF_MEMORY, layer.reorder_cache))
        with pytest.raises(torch.OutOfMemoryError):
            cache.reorder_cache(torch.tensor([1, 1]))
    with pytest.raises(RuntimeError, match=r"failed half-way.*reset"):
        next_logits(model, cache)
    cache.reset()
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("kind", ["key", "value"])
def test_states_that_are_not_numbers(
    kind: str, model: PreTrainedModel, cache: GSRQCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(cache)
    projection = model.model.layers[1].self_attn.k_proj if kind == "key" else model.model.layers[1].self_attn.v_proj
    real = projection.forward
    with monkeypatch.context() as patch:
        patch.setattr(projection, "forward", lambda hidden: real(hidden) * float("nan"))
        with pytest.raises(ValueError, match=f"layer 1 {kind}.*bfloat16 or float32"):
            next_logits(model, cache, 40)
    assert_unchanged(cache, before)


def test_sliding_layers_that_forgot() -> None:
    """Where transformers' own layers cannot go back, none does."""
    model = SUPPORTED["gemma3"].build()
    cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    before, expected = contents(cache), next_logits(model, copy.deepcopy(cache))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
    assert_unchanged(cache, before)
    assert torch.equal(next_logits(model, cache), expected)


@pytest.mark.host
@pytest.mark.parametrize("name", ["phi3-longrope", "phi3"])
def test_phi3_context_cannot_cross(name: str) -> None:
    """Phi-3's generate drops its cache at original_max_position_embeddings; that must not happen in silence."""
    architecture = SUPPORTED[name]
    model = architecture.build()
    limit = model.config.original_max_position_embeddings = 40
    if name == "phi3-longrope":
        model.config.rope_parameters["original_max_position_embeddings"] = limit
    codebooks = random_codebooks(model)
    cache = GSRQCache(codebooks, model, **OPTIONS)
    with pytest.raises(ValueError, match=f"At {limit} this model's generate drops every cache"):
        model.generate(PROMPT, **{CACHE_ARGUMENT: cache}, max_new_tokens=20, eos_token_id=None)
    assert cache.get_seq_length() == limit - 1
    cache = GSRQCache(codebooks, model, **OPTIONS)
    model.generate(PROMPT, **{CACHE_ARGUMENT: cache}, max_new_tokens=10, eos_token_id=None)
    assert cache.get_seq_length() == limit - 1
    # A prompt beyond it is served, by this cache and no other.
    cache = GSRQCache(codebooks, model, **OPTIONS)
    out = model.generate(PROMPT.repeat(1, 2), **{CACHE_ARGUMENT: cache}, max_new_tokens=5, eos_token_id=None)
    assert cache.get_seq_length() == out.shape[1] - 1 == 64
    assert all(layer.num_stored > 0 for layer in cache.compressed_layers)
    assert [layer.uses_long_rotary for layer in cache.compressed_layers] == [name == "phi3-longrope"] * 3


def test_cache_does_not_keep_its_model_alive(codebooks: GSRQCodebooks, tmp_path: object) -> None:
    model: LlamaForCausalLM | None = SUPPORTED["llama"].build()
    cache = GSRQCache(codebooks, model, **OPTIONS)
    with torch.no_grad():
        model(PROMPT, **{CACHE_ARGUMENT: cache})
    model = None
    gc.collect()
    with pytest.raises(RuntimeError, match="was deleted"):
        cache.save(f"{tmp_path}/cache.safetensors")
