"""The format: legal geometries, whole stages, and refusals by name."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from typing import Any

import pytest
from transformers import (
    CpmAntConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPTBigCodeConfig,
    LlamaConfig,
    MambaConfig,
    MiMoV2FlashConfig,
    MiniMaxConfig,
    MistralConfig,
    PreTrainedConfig,
    T5Config,
)

from transformers_gsrq import GSRQConfig
from transformers_gsrq.config import head_geometry, stages_for_bits

LLAMA_8B = LlamaConfig(
    hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32, head_dim=128
)


@pytest.mark.parametrize(
    ("bits", "subspace", "stages"),
    [(2, None, 32), (1, None, 16), (0.75, None, 12), (0.375, 256, 12), (0.25, None, 4), (4, None, 64), (1, 8, 1)],
)
def test_bits_are_whole_stages(bits: float, subspace: int | None, stages: int) -> None:
    config = GSRQConfig.for_model(LLAMA_8B, bits=bits, subspace_dim=subspace)
    assert config.key_stages == config.value_stages == (stages,) * 32
    assert config.bits() == config.bits("key") == config.bits("value") == bits


def test_sizes_of_an_8b_model() -> None:
    config = GSRQConfig.for_model(LLAMA_8B, bits=1.0)
    # One byte for 8 channels: 8 heads * 128 channels * 2 kinds * 32 layers / 8.
    assert config.code_bytes_per_token == 8192
    assert config.dense_bytes_per_token() == 131072
    assert config.codebook_bytes == 512 * 2**20
    assert config.break_even_tokens == pytest.approx(4369, abs=1)


def test_keys_and_values_may_differ() -> None:
    config = GSRQConfig.for_model(LLAMA_8B, key_bits=0.5, value_bits=1.5, subspace_dim=(64, 128))
    assert (config.key_stages[0], config.value_stages[0]) == (4, 24)
    assert (config.num_subspaces("key"), config.num_subspaces("value")) == (16, 8)
    assert config.bits() == 1.0


def test_bits_between_stages_list_their_neighbours() -> None:
    with pytest.raises(ValueError, match=r"bits=0\.3 .*nearest legal values are 0\.25 and 0\.3125"):
        GSRQConfig.for_model(LLAMA_8B, bits=0.3)
    with pytest.raises(ValueError, match=r"0\.25 to 4\.0, got 5"):
        GSRQConfig.for_model(LLAMA_8B, bits=5)
    with pytest.raises(ValueError, match="pass bits=1.0"):
        GSRQConfig.for_model(LLAMA_8B, key_bits=1.0)


@pytest.mark.parametrize(
    "given",
    [
        {"bits": 2.0, "split": (1.0, 1.0)},
        {"key_bits": 2.0, "split": (1.0, 1.0)},
        {"value_bits": 2.0, "split": [1.0, 1.0]},
        {"bits": 2.0, "key_bits": 1.0, "value_bits": 1.0},
        {"bits": 1.0, "key_bits": 1.0, "split": "measured"},
        {"key_bits": 1.0, "value_bits": 1.0, "split": "measured"},
        {"split": (1.0, 1.0, 1.0)},
        {"split": (1.0,)},
        {"split": 1.0},
        {"bits": 1.0, "split": "halves"},
        {"bits": 1.0, "subspace_dim": (128, 128, 128)},
        {"bits": 1.0, "subspace_dim": 128.0},
        {"bits": 1.0, "subspace_dim": "128"},
        {"bits": 1.0, "num_centroids": 64.0},
        {"bits": 1.0, "num_centroids": True},
        {"bits": float("nan")},
    ],
    ids=str,
)
def test_arguments_that_contradict_one_another_or_say_nothing(given: dict[str, Any]) -> None:
    """Each is refused by name, though some of the arguments could be obeyed."""
    with pytest.raises(ValueError, match="bits|split|subspace_dim|num_centroids"):
        GSRQConfig.for_model(LLAMA_8B, **given)


@pytest.mark.parametrize("given", [{"bits": "1"}, {"bits": True}, {"key_bits": [1], "value_bits": 1}, {"split": "11"}])
def test_bits_are_numbers(given: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"(bits|split) must be"):
        GSRQConfig.for_model(LLAMA_8B, **given)


def test_one_kind_may_have_bits_of_its_own() -> None:
    config = GSRQConfig.for_model(LLAMA_8B, bits=1.0, key_bits=0.5)
    assert (config.bits("key"), config.bits("value")) == (0.5, 1.0)
    assert GSRQConfig.for_model(LLAMA_8B, split=[0.5, 1.0]) == config


def test_subspaces_must_tile_the_heads() -> None:
    with pytest.raises(ValueError, match=r"key_subspace_dim=96 does not tile 8 heads of 128.*256"):
        GSRQConfig.for_model(LLAMA_8B, bits=1.0, subspace_dim=96)


def test_only_full_attention_layers_are_compressed() -> None:
    config = GSRQConfig.for_model(Gemma3TextConfig(num_hidden_layers=12), bits=1.0)
    assert config.layers == (5, 11)
    assert len(config.key_stages) == 2


GEMMA_4 = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
FALCON = {"hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model_config", "geometry"),
    [
        (LLAMA_8B, (8, 128)),
        (GPTBigCodeConfig(n_embd=64, n_head=4), (1, 16)),
        (GPTBigCodeConfig(n_embd=64, n_head=4, num_key_value_heads=4), (1, 16)),
        (GPTBigCodeConfig(n_embd=64, n_head=4, multi_query=False), (4, 16)),
        (FalconConfig(**FALCON, multi_query=True), (1, 16)),
        (FalconConfig(**FALCON, multi_query=False), (4, 16)),
        # It repeats the heads before it caches them.
        (FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2), (4, 16)),
        (Gemma4TextConfig(**GEMMA_4, num_key_value_heads=2, head_dim=16, global_head_dim=32), (2, 32)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_heads_are_those_of_the_compressed_layers(model_config: PreTrainedConfig, geometry: tuple[int, int]) -> None:
    assert head_geometry(model_config) == geometry
    config = GSRQConfig.for_model(model_config, bits=2.0, subspace_dim=4)
    assert (config.num_kv_heads, config.head_dim) == geometry
    config.check_model(model_config)


def test_layers_of_different_heads_are_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, per_layer_config={1: {"num_key_value_heads": 4}})
    with pytest.raises(ValueError, match="Layers of 'llama' differ in heads and channels of a head"):
        GSRQConfig.for_model(config, bits=1.0)


@pytest.mark.parametrize(
    ("model_config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (DeepseekV3Config(), "multi-head latent attention"),
        (DeepseekV3Config(per_layer_config={1: {"kv_lora_rank": 256}}), "multi-head latent attention"),
        (MistralConfig(sliding_window=128), "no layer with plain full attention"),
        (MambaConfig(), "no layer with plain full attention"),
        (MiniMaxConfig(), "no cache but its own"),
        (CpmAntConfig(), "the cache without its name"),
        (MiMoV2FlashConfig(), "have 128 channels and key heads 192"),
    ],
)
def test_unsupported_models_are_refused_by_name(model_config: object, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{model_config.model_type}.*{reason}"):
        GSRQConfig.for_model(model_config, bits=1.0)


def test_a_model_is_no_config() -> None:
    with pytest.raises(TypeError, match=r"must be a model's config \(model.config\), got str"):
        GSRQConfig.for_model("me/my-model", bits=1.0)


def test_round_trip_through_json() -> None:
    config = GSRQConfig.for_model(LLAMA_8B, bits=1.0)
    again = GSRQConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert dataclasses.replace(config, num_centroids=128) != config


def test_unknown_and_missing_fields_are_errors() -> None:
    fields = GSRQConfig.for_model(LLAMA_8B, bits=1.0).to_dict()
    with pytest.raises(ValueError, match=r"unknown fields \['packing'\]"):
        GSRQConfig.from_dict({**fields, "packing": 4})
    del fields["head_dim"]
    with pytest.raises(ValueError, match=r"lacks \['head_dim'\]"):
        GSRQConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_centroids": 512}, "num_centroids must be 2 to 256.*512"),
        ({"key_space": "rotated"}, "key_space must be one of .*'rotated'"),
        ({"key_stages": (16,)}, "key_stages must hold one positive number for each of the 32 layers"),
        ({"layers": (3, 1)}, "ascending"),
    ],
)
def test_illegal_fields_name_the_value_and_the_set(change: dict[str, object], message: str) -> None:
    fields = GSRQConfig.for_model(LLAMA_8B, bits=1.0).to_dict()
    with pytest.raises(ValueError, match=message):
        GSRQConfig.from_dict({**fields, **change})


NUMBERS = (
    "num_hidden_layers", "num_kv_heads", "head_dim", "key_subspace_dim", "value_subspace_dim", "num_centroids",
)  # fmt: skip
LISTS = ("layers", "key_stages", "value_stages")


@pytest.mark.parametrize("bad", [64.0, "3", True, None, [8], 0, -1, 10**9, 10**300], ids=str)
@pytest.mark.parametrize("field", NUMBERS)
def test_numbers_that_are_none(field: str, bad: object) -> None:
    """Wrong types, and sizes whose divisors would take minutes to count, in no time."""
    fields = GSRQConfig.for_model(LLAMA_8B, bits=1.0).to_dict()
    began = time.perf_counter()
    with pytest.raises(ValueError, match=field) as refused:
        GSRQConfig.from_dict({**fields, field: bad})
    assert time.perf_counter() - began < 0.5
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("bad", ["12", 5, None, {"1": 1}, [1.0], ["1"], [True], [], [[1]], [10**9] * 32], ids=str)
@pytest.mark.parametrize("field", LISTS)
def test_lists_that_are_none(field: str, bad: object) -> None:
    fields = GSRQConfig.for_model(LLAMA_8B, bits=1.0).to_dict()
    with pytest.raises(ValueError, match=field) as refused:
        GSRQConfig.from_dict({**fields, field: bad})
    assert len(str(refused.value)) < 300


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(depth):
        made = {"a": made}
    return made


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": 5},
        {"model_type": "\x1b[2Jllama"},
        {"model_type": "llama\u202e"},
        {"key_space": "\x1b[2J"},
        {"key_space": ["before_rope"]},
        {"rope_parameters": []},
        {"rope_parameters": "default"},
        {"rope_parameters": {"rope_theta": float("inf")}},
        {"rope_parameters": {"\x1b[2J": 1}},
        {"rope_parameters": nested(500)},
        {"rope_parameters": nested(100_000)},
    ],
)
def test_texts_and_settings_that_are_none(change: dict[str, Any]) -> None:
    fields = GSRQConfig.for_model(LLAMA_8B, bits=1.0).to_dict()
    with pytest.raises(ValueError, match=next(iter(change))) as refused:
        GSRQConfig.from_dict({**fields, **change})
    assert str(refused.value).isprintable()


def test_a_config_does_not_change_with_the_model_it_was_made_for() -> None:
    model = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 7.0, "list": [1.0]})
    config = GSRQConfig.for_model(model, bits=1.0)
    model.rope_parameters["list"].append(2.0)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0, "list": [1.0]}


def test_kinds_and_layers_are_checked() -> None:
    config = GSRQConfig.for_model(LLAMA_8B, bits=1.0)
    for ask in (config.bits, config.stages, config.subspace_dim, config.num_subspaces):
        with pytest.raises(ValueError, match=r"kind must be one of .*'keys'"):
            ask("keys")
    with pytest.raises(ValueError, match="Layer 32 is not compressed"):
        config.code_shape(32, "key")
    with pytest.raises(TypeError, match=r"must be a model's config \(model.config\), got str"):
        config.check_model("me/my-model")
    with pytest.raises(ValueError, match="must be a mapping of fields"):
        GSRQConfig.from_dict("config.json")


def test_codes_that_save_nothing_never_break_even() -> None:
    config = GSRQConfig.for_model(LLAMA_8B, bits=4.0, subspace_dim=8)
    wasteful = dataclasses.replace(config, key_stages=(16,) * 32, value_stages=(16,) * 32)
    assert wasteful.break_even_tokens == float("inf")


ROPE = {
    "default": {"rope_theta": 1e4},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
    },
    "longrope": {
        "factor": 4.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 1024,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope_type", ROPE)
def test_rotary_settings_are_compared_by_what_they_mean(rope_type: str) -> None:
    def model(**change: object) -> LlamaConfig:
        settings = {"rope_type": rope_type, "rope_theta": 1e4, **ROPE[rope_type], **change}
        return LlamaConfig(**{**LLAMA_8B.to_dict(), "max_position_embeddings": 4096, "rope_parameters": settings})

    config = GSRQConfig.for_model(model(), bits=1.0)
    # Defaults that a later transformers may name, and settings that it may add.
    for same in ({"partial_rotary_factor": 1.0}, {"attention_factor": None}, {"rope_theta": 10_000}, {"later": False}):
        config.check_model(model(**same))
        GSRQConfig.for_model(model(**same), bits=1.0).check_model(model())
    differing = [{"rope_theta": 5e5}, {"partial_rotary_factor": 0.5}, {"mrope_section": [16, 24, 24]}]
    if rope_type != "default":
        differing.append({"factor": 3.0})
    if rope_type == "longrope":
        differing += [{"original_max_position_embeddings": 2048}, {"long_factor": [3.0] * 64}]
    if rope_type in ("yarn", "longrope"):
        differing.append({"attention_factor": 1.5})
    for other in differing:
        if other != {"factor": 3.0} or rope_type != "longrope":  # which takes the ratio of its lengths
            with pytest.raises(ValueError, match="rope_parameters"):
                config.check_model(model(**other))
    for damaged in ({"rope_theta": "x"}, {"partial_rotary_factor": 1e12}, {"rope_type": "no such"}):
        with pytest.raises(ValueError, match="rope_parameters"):
            dataclasses.replace(config, rope_parameters={**config.rope_parameters, **damaged}).check_model(model())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 4}, "num_kv_heads: codebooks 8, model 4"),
        ({"head_dim": 64}, "head_dim: codebooks 128, model 64"),
        ({"num_hidden_layers": 16}, "num_hidden_layers: codebooks 32, model 16"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_parameters.*7.0"),
    ],
)
def test_codebooks_of_another_model_are_refused(change: dict[str, object], named: str) -> None:
    config = GSRQConfig.for_model(LLAMA_8B, bits=1.0)
    config.check_model(LLAMA_8B)
    with pytest.raises(ValueError, match=named):
        config.check_model(LlamaConfig(**{**LLAMA_8B.to_dict(), **change}))


@pytest.mark.parametrize("subspace_dim", [48, 64, 80, 96, 112, 128])
def test_the_values_that_a_message_names_are_accepted(subspace_dim: int) -> None:
    for hundredths in range(25, 401, 7):
        try:
            stages_for_bits(hundredths / 100, subspace_dim)
        except ValueError as error:
            named = re.findall(r"[\d.]+(?= and |; or)", str(error).split("values are ")[1])
            assert named and all(stages_for_bits(float(value), subspace_dim) >= 1 for value in named)
