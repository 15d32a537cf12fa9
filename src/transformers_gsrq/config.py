"""`GSRQConfig`: the meaning of the bytes in a compressed cache. Saved, frozen and versioned."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .compat import is_full_attention, native_layers
from .foreign import check_json, shown

FORMAT_VERSION = 1
KEY_SPACES = ("before_rope", "after_rope")
SPLITS = ("paper", "measured")
MIN_BITS, MAX_BITS = 0.25, 4.0
# Of layers, heads, channels and stages: no model comes near, and damaged files are refused at once.
MAX_SIZE = 1 << 16
# Relative difference between bits and whole stages that is taken for rounding.
ROUNDING = 1e-4

Kind = Literal["key", "value"]
KINDS: tuple[Kind, ...] = ("key", "value")
# Models that cannot take a cache of ours, and how they say no other way.
REFUSED = {
    "cpmant": "hands its attention layers the cache without its name, so keys cannot be matched with their positions",
    "minimax": "takes no cache but its own",
}
# Widths for codebooks: the paper's 128 where the geometry allows it, else the nearest that does (docs/method.md).
PREFERRED_SUBSPACE_DIM = 128


@dataclass(frozen=True)
class GSRQConfig:
    """Geometry of a compressed cache: which layers, cut into which subspaces, coded by how many stages.

    Two configs are equal exactly when the same code bytes mean the same vectors under the same codebooks. Choices
    that may change from run to run (window, sinks, beam width) belong to `GSRQCache` and are never saved.

    Args:
        model_type: `model_type` of the transformers config that the codebooks were learned for.
        num_hidden_layers: Number of decoder layers of that model.
        layers: Indices of the compressed layers, those with plain full attention, ascending.
        num_kv_heads: Key/value heads H of a compressed layer.
        head_dim: Channels D of a head.
        key_subspace_dim: Channels S that one key code describes. Divides D, or is a multiple of D that divides H*D.
        value_subspace_dim: The same for values.
        key_stages: Stages R of each compressed layer's keys, in the order of `layers`.
        value_stages: Stages R of each compressed layer's values, in the order of `layers`.
        num_centroids: Centroids K of a stage, 2 to 256. Codes are stored as one byte whatever K is.
        key_space: "before_rope" (the paper's choice) or "after_rope" (keys as the cache receives them).
        rope_parameters: The model's rotary settings for its full-attention layers, None without rotary embedding.

    Raises:
        ValueError: if a field is outside its legal set; the message names the field, the value and the set.
    """

    model_type: str
    num_hidden_layers: int
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    key_subspace_dim: int
    value_subspace_dim: int
    key_stages: tuple[int, ...]
    value_stages: tuple[int, ...]
    num_centroids: int = 256
    key_space: str = "before_rope"
    rope_parameters: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model_type, str) or not self.model_type.isprintable():
            raise ValueError(f"model_type must be a string of printable characters, got {shown(self.model_type)}.")
        for name in ("num_hidden_layers", "num_kv_heads", "head_dim"):
            _check_whole(name, getattr(self, name))
        for name in ("layers", "key_stages", "value_stages"):
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or not all(map(_is_whole, given)):
                raise ValueError(f"{name} must be a list of whole numbers, got {shown(given)}.")
            object.__setattr__(self, name, tuple(given))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be ascending layer indices without repetition, got {shown(self.layers)}.")
        if self.layers[0] < 0 or self.layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"layers must lie in 0..{self.num_hidden_layers - 1} (num_hidden_layers={self.num_hidden_layers}), "
                f"got {shown(self.layers)}."
            )
        if not _is_whole(self.num_centroids) or not 2 <= self.num_centroids <= 256:
            raise ValueError(
                f"num_centroids must be 2 to 256, whole (a code is one byte), got {shown(self.num_centroids)}."
            )
        if self.key_space not in KEY_SPACES:
            raise ValueError(f"key_space must be one of {KEY_SPACES}, got {shown(self.key_space)}.")
        for kind in KINDS:
            width = self.subspace_dim(kind)
            if not _is_whole(width) or not _tiles(width, self.num_kv_heads, self.head_dim):
                raise ValueError(
                    f"{kind}_subspace_dim={shown(width)} does not tile {self.num_kv_heads} heads of "
                    f"{self.head_dim} channels. Legal values: {legal_subspace_dims(self.num_kv_heads, self.head_dim)}."
                )
            stages = self.stages(kind)
            if len(stages) != len(self.layers) or not 1 <= min(stages) <= max(stages) <= MAX_SIZE:
                raise ValueError(
                    f"{kind}_stages must hold one positive number for each of the {len(self.layers)} layers, "
                    f"got {shown(stages)}."
                )
        if self.rope_parameters is not None:
            if not isinstance(self.rope_parameters, Mapping):
                raise ValueError(f"rope_parameters must be a mapping or None, got {shown(self.rope_parameters)}.")
            check_json(self.rope_parameters, "rope_parameters")
            # A model's config may change later, and this one may not.
            object.__setattr__(self, "rope_parameters", copy.deepcopy(dict(self.rope_parameters)))

    def subspace_dim(self, kind: Kind) -> int:
        """Channels S that one code of `kind` describes."""
        return self.key_subspace_dim if _checked(kind) == "key" else self.value_subspace_dim

    def stages(self, kind: Kind) -> tuple[int, ...]:
        """Stages R of `kind`, one number for each compressed layer."""
        return self.key_stages if _checked(kind) == "key" else self.value_stages

    def num_subspaces(self, kind: Kind) -> int:
        """Subspaces M = H*D/S of `kind`."""
        return self.num_kv_heads * self.head_dim // self.subspace_dim(kind)

    def code_shape(self, layer: int, kind: Kind) -> tuple[int, int]:
        """`(M, R)` of a compressed layer: the bytes that one token takes there are M*R.

        Raises:
            ValueError: if the layer is not compressed, or for another kind than "key" and "value".
        """
        if layer not in self.layers:
            raise ValueError(f"Layer {shown(layer)} is not compressed; these are: {self.layers}.")
        return self.num_subspaces(kind), self.stages(kind)[self.layers.index(layer)]

    def bits(self, kind: Kind | None = None) -> float:
        """Stored bits per key/value element, averaged over layers and, if `kind` is None, over keys and values."""
        if kind is None:
            return (self.bits("key") + self.bits("value")) / 2
        stages = self.stages(kind)
        return sum(stages) / len(stages) * 8 / self.subspace_dim(kind)

    @property
    def code_bytes_per_token(self) -> int:
        """Bytes of codes that one token takes over all compressed layers, keys and values together."""
        return sum(self.num_subspaces(kind) * sum(self.stages(kind)) for kind in KINDS)

    @property
    def codebook_bytes(self) -> int:
        """Bytes of all codebooks in a 16-bit run-time dtype."""
        return sum(
            self.num_subspaces(kind) * sum(self.stages(kind)) * self.num_centroids * self.subspace_dim(kind) * 2
            for kind in KINDS
        )

    def dense_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes that one token takes in a plain cache over the same layers, `element_bytes` per element."""
        return 2 * len(self.layers) * self.num_kv_heads * self.head_dim * element_bytes

    @property
    def break_even_tokens(self) -> float:
        """Cached tokens (batch times context) from which codes plus codebooks take less than bf16 states.

        Infinity where codes are no smaller than those.
        """
        saved = self.dense_bytes_per_token() - self.code_bytes_per_token
        return self.codebook_bytes / saved if saved > 0 else math.inf

    @classmethod
    def for_model(
        cls,
        model_config: PreTrainedConfig,
        bits: float | None = None,
        *,
        key_bits: float | None = None,
        value_bits: float | None = None,
        split: str | tuple[float, float] = "paper",
        subspace_dim: int | tuple[int, int] | None = None,
        num_centroids: int = 256,
        key_space: str = "before_rope",
    ) -> GSRQConfig:
        """Build the config for a model.

        Args:
            model_config: The model's config; for a vision-language model its text part is taken.
            bits: Bits per element for keys and values alike, 0.25 to 4, as whole stages.
            key_bits: Bits for keys where they differ from `bits`.
            value_bits: Bits for values where they differ from `bits`. With both, `bits` has nothing to say and may
                not be given.
            split: How to divide twice `bits` between keys and values: "paper" gives both the same; "measured" gives
                keys three eighths from 1 bit on, what measured best by perplexity without losing retrieval
                (docs/fidelity.md; `evaluation.split.choose_split` measures it on your model); or `(key_bits,
                value_bits)`, instead of all three.
            subspace_dim: Channels per code for both kinds, or `(key, value)`. By default 128 if the heads can be cut
                that way, else the largest legal width below it.
            num_centroids: Centroids of a stage.
            key_space: "before_rope" or "after_rope".

        Raises:
            TypeError: if `model_config` is not a config, but for example the model itself, or bits are no numbers.
            ValueError: if the model cannot be compressed, if arguments contradict one another, or if the bits do not
                come out as whole stages; the message lists the nearest legal values.
        """
        _check_model_config(model_config)
        key_bits, value_bits = _divided(bits, key_bits, value_bits, split)
        text_config = model_config.get_text_config(decoder=True)
        layers = compressible_layers(model_config)
        num_heads, head_dim = head_geometry(text_config)
        if subspace_dim is None:
            subspace_dim = default_subspace_dim(num_heads, head_dim)
        dims = subspace_dim if isinstance(subspace_dim, (list, tuple)) else (subspace_dim, subspace_dim)
        if len(dims) != 2 or not all(map(_is_whole, dims)):
            raise ValueError(f"subspace_dim must be a whole number, or two: (key, value). Got {shown(subspace_dim)}.")
        key_stages = stages_for_bits(key_bits, dims[0], "key_bits")
        value_stages = stages_for_bits(value_bits, dims[1], "value_bits")
        if split == "measured":
            key_stages, value_stages = measured_split(key_stages, value_stages, dims)
        num_layers = len(layers)
        return cls(
            model_type=text_config.model_type,
            num_hidden_layers=text_config.num_hidden_layers,
            layers=layers,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            key_subspace_dim=dims[0],
            value_subspace_dim=dims[1],
            key_stages=(key_stages,) * num_layers,
            value_stages=(value_stages,) * num_layers,
            num_centroids=num_centroids,
            key_space=key_space,
            rope_parameters=full_attention_rope(text_config),
        )

    def check_model(self, model_config: PreTrainedConfig) -> None:
        """Check that codebooks of this config fit a model.

        Rotary settings are compared by what they mean: two that give the same frequencies and scaling are the same,
        though one names a default that the other leaves away.

        Raises:
            TypeError: if `model_config` is not a config, but for example the model itself.
            ValueError: naming every field that differs, its value here and in the model.
        """
        _check_model_config(model_config)
        text_config = model_config.get_text_config(decoder=True)
        heads, head_dim = head_geometry(text_config)
        seen = {
            "model_type": text_config.model_type,
            "num_hidden_layers": text_config.num_hidden_layers,
            "layers": compressible_layers(model_config),
            "num_kv_heads": heads,
            "head_dim": head_dim,
            "rope_parameters": full_attention_rope(text_config),
        }
        wrong = [
            f"{name}: codebooks {getattr(self, name)}, model {value}"
            for name, value in seen.items()
            if getattr(self, name) != value
            and not (name == "rope_parameters" and _turn_alike(text_config, self.rope_parameters, value))
        ]
        if wrong:
            raise ValueError(
                "These codebooks were learned for another model. " + "; ".join(wrong) + ". Use codebooks calibrated "
                "for this model, or make some with transformers_gsrq.calibrate()."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GSRQConfig:
        """Rebuild a config from `to_dict`.

        Raises:
            ValueError: for a field that is unknown, missing or illegal: guessing would decode the bytes wrongly.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"The GSRQ config must be a mapping of fields, got {shown(fields)}.")
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        required = {name for name, f in known.items() if f.default is dataclasses.MISSING}
        missing = sorted(required - set(fields))
        if unknown or missing:
            raise ValueError(
                f"The GSRQ config has unknown fields {shown(unknown)} and lacks {missing}. Known fields: "
                f"{sorted(known)}. It was damaged, or written by a newer transformers-gsrq: upgrade the package."
            )
        return cls(**fields)


def legal_subspace_dims(num_kv_heads: int, head_dim: int) -> list[int]:
    """Widths S that tile the concatenated heads: divisors of D, and multiples of D that divide H*D."""
    within = [s for s in range(1, head_dim + 1) if head_dim % s == 0]
    across = [head_dim * n for n in range(2, num_kv_heads + 1) if num_kv_heads % n == 0]
    return within + across


def _tiles(width: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether a width is one of `legal_subspace_dims`."""
    if not 1 <= width <= num_kv_heads * head_dim:
        return False
    return head_dim % width == 0 or (width % head_dim == 0 and num_kv_heads * head_dim % width == 0)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_whole(name: str, value: Any) -> None:
    if not _is_whole(value) or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{name} must be a whole number, 1 to {MAX_SIZE}, got {shown(value)}.")


def _checked(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {shown(kind)}.")
    return kind


def _check_model_config(given: object) -> None:
    if not isinstance(given, PreTrainedConfig):
        raise TypeError(f"model_config must be a model's config (model.config), got {type(given).__name__}.")


def _divided(
    bits: float | None, key_bits: float | None, value_bits: float | None, split: str | tuple[float, float]
) -> tuple[float, float]:
    """Bits of keys and of values from the arguments of `GSRQConfig.for_model`, before "measured" moves any."""
    each = {"bits": bits, "key_bits": key_bits, "value_bits": value_bits}
    given = [name for name, value in each.items() if value is not None]
    if isinstance(split, str):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS} or (key_bits, value_bits), got {shown(split)}.")
        if split == "measured" and given != ["bits"]:
            raise ValueError(
                f'split="measured" divides `bits` itself: give bits and no key_bits or value_bits, got {given}.'
            )
        if len(given) == 3:
            raise ValueError(
                f"bits={bits} contradicts key_bits={key_bits} and value_bits={value_bits}, which say all there is to "
                "say. Leave bits away, or one of the others."
            )
        key_bits = bits if key_bits is None else key_bits
        value_bits = bits if value_bits is None else value_bits
    else:
        if not isinstance(split, (list, tuple)) or len(split) != 2:
            raise ValueError(f"split must be one of {SPLITS} or (key_bits, value_bits), got {shown(split)}.")
        if given:
            raise ValueError(f"split={split} says the bits of keys and values; leave {' and '.join(given)} away.")
        key_bits, value_bits = split
    if key_bits is None or value_bits is None:
        raise ValueError("Say how many bits per element to store: pass bits=1.0, or both key_bits and value_bits.")
    for name, value in (*each.items(), ("split", key_bits), ("split", value_bits)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name} must be a number of bits, got {shown(value)}.")
    return key_bits, value_bits


def default_subspace_dim(num_kv_heads: int, head_dim: int) -> int:
    """The widest legal subspace up to the paper's 128 channels."""
    return max(s for s in legal_subspace_dims(num_kv_heads, head_dim) if s <= PREFERRED_SUBSPACE_DIM)


def stages_for_bits(bits: float, subspace_dim: int, name: str = "bits") -> int:
    """Stages R with R*8/S = bits (a code is one byte).

    Raises:
        ValueError: if `bits` is out of range or R would not be whole; lists the nearest legal values.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name} must be {MIN_BITS} to {MAX_BITS}, got {bits}.")
    stages = bits * subspace_dim / 8
    # The values that the message lists are rounded too, and must be accepted.
    if round(stages) < 1 or abs(stages - round(stages)) > ROUNDING * stages:
        around = (count * 8 / subspace_dim for count in (int(stages), int(stages) + 1))
        nearest = [f"{value:g}" for value in around if MIN_BITS <= value <= MAX_BITS]
        legal = f"The nearest legal values are {' and '.join(nearest)}; or choose" if nearest else "Choose"
        raise ValueError(
            f"{name}={bits} is {stages:g} stages of one byte for {subspace_dim} channels, which is not whole. "
            f"{legal} another subspace_dim."
        )
    return round(stages)


def measured_split(key_stages: int, value_stages: int, dims: Sequence[int]) -> tuple[int, int]:
    """Move stages from keys to values, from 1 bit on, at exactly the same bits.

    Args:
        key_stages: Stages of keys in the even split.
        value_stages: Stages of values in the even split.
        dims: Subspace widths of keys and values.

    Raises:
        ValueError: if the even split is not even, or the widths differ: a stage then has not the same price.
    """
    if dims[0] != dims[1] or key_stages != value_stages:
        raise ValueError(
            'split="measured" divides `bits` itself: give no key_bits or value_bits, and one subspace_dim.'
        )
    if key_stages * 8 < dims[0]:
        return key_stages, value_stages
    moved = key_stages // 4
    return key_stages - moved, value_stages + moved


def compressible_layers(model_config: PreTrainedConfig) -> tuple[int, ...]:
    """Indices of the layers whose states can be compressed: those with plain full attention.

    Raises:
        ValueError: by name, for encoder-decoders, multi-head latent attention, and models without such a layer.
    """
    name = model_config.model_type
    if name in REFUSED:
        raise ValueError(f"{name!r} {REFUSED[name]}; it is not supported.")
    if model_config.is_encoder_decoder:
        raise ValueError(f"{name!r} is an encoder-decoder; only decoder-only models are supported.")
    text_config = model_config.get_text_config(decoder=True)
    each = (text_config.per_layer_config[i] for i in range(text_config.num_hidden_layers))
    rank = next((rank for config in each if (rank := getattr(config, "kv_lora_rank", None)) is not None), None)
    if rank is not None:
        raise ValueError(
            f"{name!r} uses multi-head latent attention (kv_lora_rank={rank}), which already stores a compressed "
            "latent instead of keys and values; it is not supported."
        )
    layers = tuple(i for i, layer in enumerate(native_layers(model_config)) if is_full_attention(layer))
    if not layers:
        raise ValueError(
            f"{name!r} has no layer with plain full attention (all are sliding, chunked, linear or state-space), so "
            "its cache does not grow with the context and there is nothing to compress. Use transformers' own cache."
        )
    return layers


def head_geometry(text_config: PreTrainedConfig) -> tuple[int, int]:
    """`(H, D)`: key/value heads of a compressed layer and channels of a head.

    Raises:
        ValueError: if values have other channels than keys, or layers other heads than one another.
    """
    layers = compressible_layers(text_config)
    found = {layer: _layer_geometry(text_config.per_layer_config[layer]) for layer in layers}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"Layers of {text_config.model_type!r} differ in heads and channels of a head ({found}); only layers of "
            "one geometry can be compressed."
        )
    return found[layers[0]]


def _layer_geometry(config: PreTrainedConfig) -> tuple[int, int]:
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    value_dim = getattr(config, "v_head_dim", None) or head_dim
    if value_dim != head_dim:
        raise ValueError(
            f"Value heads of {config.model_type!r} have {value_dim} channels and key heads {head_dim}; only heads of "
            "one width are supported."
        )
    # Falcon's newer architecture repeats its key/value heads before it caches them, whatever multi_query says.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1, head_dim
    return getattr(config, "num_key_value_heads", None) or num_heads, head_dim


def full_attention_rope(text_config: PreTrainedConfig) -> dict[str, Any] | None:
    """The rotary settings that full-attention layers use, None for a model without rotary embedding."""
    parameters = getattr(text_config, "rope_parameters", None)
    if not parameters:
        return None
    # Models that alternate attention types keep one set of settings for each type.
    if isinstance(parameters.get("full_attention"), Mapping):
        parameters = parameters["full_attention"]
    return dict(parameters)


# Settings that say how frequencies are given to channels, and are no part of the frequencies.
_ROPE_LAYOUT = ("mrope_section", "mrope_interleaved")
# What a formula of transformers raises for settings that it was not written for.
_ROPE_MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _turn_alike(
    text_config: PreTrainedConfig, first: Mapping[str, Any] | None, second: Mapping[str, Any] | None
) -> bool:
    """Whether two rotary settings of full-attention layers turn keys alike, in contexts of any length."""
    if first is None or second is None or any(first.get(key) != second.get(key) for key in _ROPE_LAYOUT):
        return False
    kind = first.get("rope_type", "default")
    if kind != second.get("rope_type", "default"):
        return False
    config = text_config.per_layer_config[compressible_layers(text_config)[0]]
    try:
        # longrope turns otherwise beyond its original length, "dynamic" does so the more the longer the context is.
        ends = [
            each.get("original_max_position_embeddings") or config.max_position_embeddings for each in (first, second)
        ]
        lengths = sorted({length for end in ends for length in (end, end + 1, 2 * end)})
        ours, theirs = (_turning(config, kind, parameters, lengths) for parameters in (first, second))
    except _ROPE_MISFITS:
        return False
    return ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def _turning(
    layer_config: PreTrainedConfig, kind: str, parameters: Mapping[str, Any], lengths: list[int]
) -> tuple[list[float], torch.Tensor]:
    """Scaling, and frequencies `[lengths, P]`, by transformers' own formulas.

    Raises:
        _ROPE_MISFITS: for settings that no formula is known for.
    """
    share = parameters.get("partial_rotary_factor") or 1.0
    if not 0 < share <= 1:
        raise ValueError("no such part of a head can be turned")
    if kind == "default":
        width = int(_layer_geometry(layer_config)[1] * share)
        return [1.0], 1.0 / parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    # A formula completes the settings that it is given; those of the model stay as they are.
    config = copy.copy(layer_config)
    vars(config)["rope_parameters"] = copy.deepcopy(dict(parameters))
    found = [ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length) for length in lengths]
    return [float(scaling) for _, scaling in found], torch.stack([frequencies for frequencies, _ in found])
