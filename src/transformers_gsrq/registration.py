"""`cache_implementation="gsrq"` for `generate`: adds the name that transformers' closed list lacks."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import configuration_utils

from .cache import GSRQCache
from .codebooks import GSRQCodebooks
from .compat import CACHE_ARGUMENT
from .hub import TENSORS_NAME
from .models import attention_modules

NAME = "gsrq"
# What `generate` hands to the method we wrap; another signature means other internals.
_KNOWN_PARAMETERS = [
    "self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"
]  # fmt: skip
# The latest of each model object, loaded once and not at each `generate` call: source, when its file was written, and
# the codebooks. One for each, since those of a model of 8 billion parameters take half a GiB.
_LOADED: WeakKeyDictionary[PreTrainedModel, tuple[str, int, GSRQCodebooks]] = WeakKeyDictionary()


def register() -> None:
    """Make "gsrq" a cache implementation; doing it again changes nothing.

    Raises:
        RuntimeError: if this transformers prepares caches in a way we do not know.
    """
    original = GenerationMixin._prepare_cache_for_generation
    if hasattr(original, "gsrq_original"):
        return
    parameters = list(inspect.signature(original).parameters)
    if parameters != _KNOWN_PARAMETERS or not hasattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS"):
        raise RuntimeError(
            f'cache_implementation="{NAME}" cannot be added to this version of transformers (its '
            f"_prepare_cache_for_generation takes {parameters}). Pass {CACHE_ARGUMENT}=GSRQCache(...) to generate "
            "instead, or use a version of transformers that the README lists."
        )

    @functools.wraps(original)
    def prepare(
        self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any,
        batch_size: int, max_cache_length: int,
    ) -> Any:  # fmt: skip
        if generation_config.is_assistant and generation_config.cache_implementation == NAME:
            made = model_kwargs.get(CACHE_ARGUMENT) is not None
            generation_config = _for_assistant(self, generation_config, made)
        ours = generation_config.cache_implementation == NAME and generation_config.use_cache is not False
        if not ours or model_kwargs.get(CACHE_ARGUMENT) is not None:
            return original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        cache = make_cache(self, generation_config.cache_config, max_cache_length)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_ARGUMENT] = cache
        return None

    prepare.gsrq_original = original  # type: ignore[attr-defined]
    GenerationMixin._prepare_cache_for_generation = prepare
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS += (NAME,)


def _for_assistant(assistant: PreTrainedModel, generation_config: GenerationConfig, made: bool) -> GenerationConfig:
    """The settings of a draft model's cache.

    `generate` hands the assistant the target's settings, whose codebooks are the target's. So an assistant compresses
    its cache exactly when its own `generation_config` says so, with the codebooks named there; not where it is the
    target itself, cut to its first layers (`assistant_early_exit`). It is called once for each draft, from the second
    on with the cache that was `made` for the first.
    """
    own, settings = assistant.generation_config, copy.copy(generation_config)
    compress = own.cache_implementation == NAME and not made and not _is_cut(assistant)
    settings.cache_implementation = NAME if compress else None
    settings.cache_config = own.cache_config
    return settings


def _is_cut(model: PreTrainedModel) -> bool:
    """Whether a model runs fewer layers than it has: `generate` then lowers its config's number of layers."""
    return max(attention_modules(model)) >= model.config.get_text_config(decoder=True).num_hidden_layers


def unregister() -> None:
    """Take "gsrq" out again, leaving transformers as it was."""
    wrapped = GenerationMixin._prepare_cache_for_generation
    if hasattr(wrapped, "gsrq_original"):
        GenerationMixin._prepare_cache_for_generation = wrapped.gsrq_original
        names = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        configuration_utils.ALL_CACHE_IMPLEMENTATIONS = tuple(name for name in names if name != NAME)


def make_cache(model: PreTrainedModel, cache_config: Mapping[str, Any] | None, max_length: int) -> GSRQCache:
    """The cache that `generate(cache_implementation="gsrq", cache_config=...)` uses.

    Args:
        model: The generating model.
        cache_config: "codebooks" (an object, folder or Hub id) and any keyword of `GSRQCache`. Not changed. Part of a
            `GenerationConfig` that is to be saved or printed, it names folder or Hub id by a string: transformers
            writes JSON, which holds neither objects nor a `Path`.
        max_length: Tokens that `generate` will cache at most.

    Raises:
        ValueError: for a missing "codebooks" or an unknown key.
    """
    options = dict(cache_config or {})
    legal = [name for name in inspect.signature(GSRQCache).parameters if name not in ("codebooks", "model")]
    source = options.pop("codebooks", None)
    if source is None:
        raise ValueError(
            f'cache_implementation="{NAME}" needs codebooks, and cache_config has {sorted(options)}: '
            'pass cache_config={"codebooks": ...} with GSRQCodebooks, a folder or a Hub id '
            "(in a GenerationConfig that is to be saved: one of the last two as a string). "
            "For a new model make them with transformers_gsrq.calibrate()."
        )
    unknown = sorted(set(options) - set(legal))
    if unknown:
        raise ValueError(f"Unknown cache_config keys {unknown} for {NAME!r}. Legal keys: {['codebooks', *legal]}.")
    if not isinstance(source, GSRQCodebooks):
        source = _load(model, str(source))
    return GSRQCache(source, model, **{"max_length": max_length, **options})


def _load(model: PreTrainedModel, source: str) -> GSRQCodebooks:
    """Codebooks of a Hub id, or of a folder as it is now: calibrating into it again is seen."""
    file = Path(source) / TENSORS_NAME
    written = file.stat().st_mtime_ns if file.is_file() else 0
    loaded = _LOADED.get(model)
    if loaded is None or loaded[:2] != (source, written):
        # Let go of the others first, so that two are never held.
        _LOADED.pop(model, None)
        loaded = _LOADED[model] = source, written, GSRQCodebooks.from_pretrained(source)
    return loaded[2]
