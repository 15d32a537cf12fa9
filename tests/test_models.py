"""What a transformers model is asked: its fingerprint, whatever its weights are, and how long a text it can read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, decoding
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.models import check_length, execution_device, fingerprint, position_limit


class Wrapped(torch.Tensor):
    """A weight that holds another tensor and refuses every operator but `detach`, as quantized ones refuse most."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.bfloat16, device=held.device)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        raise NotImplementedError(f"{func} is not implemented")


class Telling(Wrapped):
    """One that says what it consists of, as torchao, quanto and DTensor do."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], context: None, size: Any, stride: Any) -> Telling:
        return cls(inner["held"])


class Refusing(torch.Tensor):
    """A tensor with numbers of its own that cannot be indexed from Python."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.flatten, torch.Tensor.__getitem__):
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def with_weight(weight: torch.Tensor) -> PreTrainedModel:
    model = SUPPORTED["llama"].build()
    model.model.norm.weight = nn.Parameter(weight, requires_grad=False)
    return model


def test_the_fingerprint_of_plain_weights_is_what_it_was() -> None:
    """Saved caches name their model by it: these two are what version 0.1.0 computed."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    known = {
        torch.float32: "1a4ca451125e392ebbbcf1b3183e5acdeaecc4e309c0ebc9fb199b77b8cbed19",
        torch.bfloat16: "c8a8b2d57b812d1bd398f5258c224fb87eddc44c5bef42226186c6f83641cae2",
    }
    for dtype, mark in known.items():
        model = LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_((torch.arange(weight.numel()) % 251 - 125).view_as(weight) / 128)
        assert fingerprint(model) == mark


@pytest.mark.parametrize("kind", [Telling, Refusing], ids=["wrapper", "refusing"])
def test_weights_that_refuse_indexing_are_named_by_what_they_hold(kind: Any) -> None:
    numbers = torch.arange(64, dtype=torch.float32)
    make = kind if kind is Telling else lambda held: held.as_subclass(kind)
    first, again, other = (fingerprint(with_weight(make(held))) for held in (numbers, numbers.clone(), numbers + 1))
    assert first == again != other


def test_weights_that_tell_nothing_count_by_shape_and_dtype() -> None:
    first, other = (fingerprint(with_weight(Wrapped(torch.zeros(size)))) for size in (64, 32))
    assert first == fingerprint(with_weight(Wrapped(torch.ones(64)))) != other


@pytest.mark.parametrize("scheme", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_caches_of_torchao_models_are_saved_and_loaded(scheme: str, tmp_path: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    models = [SUPPORTED["llama"].build(torch.bfloat16, seed=seed) for seed in (0, 0, 1)]
    for model in models:
        quantization.quantize_(model.model, getattr(quantization, scheme)())
    model, same, other = models
    cache = GSRQCache(random_codebooks(model), model, residual_length=4)
    model.generate(torch.arange(3, 43)[None], max_new_tokens=4, **{CACHE_ARGUMENT: cache})
    cache.save(tmp_path / "cache.safetensors")
    loaded = GSRQCache.load(tmp_path / "cache.safetensors", cache.codebooks, same)
    assert loaded.get_seq_length() == cache.get_seq_length()
    with pytest.raises(ValueError, match="another model"):
        GSRQCache.load(tmp_path / "cache.safetensors", cache.codebooks, other)


def test_modules_without_parameters_have_a_device() -> None:
    packed = nn.Module()
    assert execution_device(packed) == torch.device("cpu")
    packed.register_buffer("qweight", torch.zeros(4, device="meta"))
    assert execution_device(packed) == torch.device("meta")


SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "is_decoder": True,
    "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
LIMITED = {
    "GPT2Config": 40, "GPTBigCodeConfig": 40, "OPTConfig": 40, "BioGptConfig": 40, "BertConfig": 40,
    "RobertaConfig": 38, "CTRLConfig": 40, "GPTJConfig": 40, "MptConfig": 40,
}  # fmt: skip
UNLIMITED = ("LlamaConfig", "BloomConfig", "GPTNeoXConfig", "XGLMConfig")
MORE: dict[str, dict[str, Any]] = {
    "OPTConfig": {"word_embed_proj_dim": 64, "ffn_dim": 64},
    "GPTJConfig": {"rotary_dim": 8},
    "MptConfig": {"max_seq_len": 40},
    "CTRLConfig": {"dff": 64},
}


@pytest.mark.parametrize("name", [*LIMITED, *UNLIMITED])
def test_the_limit_is_what_the_model_can_read(name: str) -> None:
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SIZES, **MORE.get(name, {})})).eval()
    limit = LIMITED.get(name)
    assert position_limit(model) == limit
    with torch.no_grad():
        model(input_ids=torch.full((1, limit or 60), 7))
        check_length(model, limit or 60, "")
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, limit + 1), 7))
            with pytest.raises(
                ValueError, match=f"positions for {limit} tokens and cannot read {limit + 1}. Shorten it"
            ):
                check_length(model, limit + 1, "Shorten it.")


@pytest.mark.parametrize("kind", [Wrapped, Telling, Refusing])
def test_what_a_recorded_step_depends_on(kind: type) -> None:
    """Weights elsewhere, training, hooks: no weight is asked for memory that it does not have."""
    model = with_weight(kind(torch.ones(64)))
    states = [decoding._state_of(model)]
    model.model.norm.weight = nn.Parameter(kind(torch.ones(64)), requires_grad=False)
    states.append(decoding._state_of(model))
    states.append(decoding._state_of(model.train()))
    model.model.norm.register_forward_hook(lambda *_: None)
    states.append(decoding._state_of(model))
    assert len(set(states)) == 4 and decoding._state_of(model) == states[-1]
