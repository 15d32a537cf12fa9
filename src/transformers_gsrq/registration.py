"""`cache_implementation="gsrq"` for `generate`: adds the name that transformers' closed list lacks."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
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
_PREPARE = "_prepare_cache_for_generation"
# What we read of its arguments; others are passed on as they come.
_NEEDED = {"generation_config", "model_kwargs", "max_cache_length"}
# Continuous batching keeps states in pages of its own and never asks what cache is wanted.
_CONTINUOUS = ("generate_batch", "init_continuous_batching")
# The latest of each model object, loaded once and not at each `generate` call: source, when its file was written, and
# the codebooks. One for each, since those of a model of 8 billion parameters take half a GiB.
_LOADED: WeakKeyDictionary[PreTrainedModel, tuple[str, int, GSRQCodebooks]] = WeakKeyDictionary()


def register() -> None:
    """Make "gsrq" a cache implementation; doing it again changes nothing.

    Continuous batching, which knows no cache but its own, then refuses the name; so does `generate` if this
    transformers prepares caches in a way that we do not know, and says what to do instead.
    """
    if any(_is_wrapped(name) for name in (_PREPARE, "generate", *_CONTINUOUS)):
        return
    if _prepares_as_known():
        _wrap(_PREPARE, _preparing)
    else:
        _wrap(
            "generate",
            _refusing(
                RuntimeError,
                f'cache_implementation="{NAME}" does not work with this version of transformers, whose generate makes '
                f"caches in a way that this transformers-gsrq does not know. Pass {CACHE_ARGUMENT}=GSRQCache("
                "codebooks, model) to generate instead; or upgrade transformers-gsrq, or use a version of "
                "transformers that its README lists.",
            ),
        )
    for name in _CONTINUOUS:
        if hasattr(GenerationMixin, name):
            _wrap(
                name,
                _refusing(
                    ValueError,
                    f'cache_implementation="{NAME}" does not work with continuous batching ({name}), which keeps '
                    "states in pages of its own. Call generate, or serve without continuous batching; or pass a "
                    'generation_config with another cache_implementation, such as "paged".',
                ),
            )
    names = getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", None)
    if isinstance(names, tuple):
        configuration_utils.ALL_CACHE_IMPLEMENTATIONS = (*names, NAME)


def unregister() -> None:
    """Take "gsrq" out again, leaving transformers as it was."""
    for name in (_PREPARE, "generate", *_CONTINUOUS):
        if _is_wrapped(name):
            setattr(_owner(name), name, getattr(GenerationMixin, name).gsrq_original)
    names = getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", None)
    if isinstance(names, tuple):
        configuration_utils.ALL_CACHE_IMPLEMENTATIONS = tuple(name for name in names if name != NAME)


def _prepares_as_known() -> bool:
    names = getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", None)
    original = getattr(GenerationMixin, _PREPARE, None)
    return isinstance(names, tuple) and callable(original) and set(inspect.signature(original).parameters) >= _NEEDED


def _owner(name: str) -> type:
    """The class that a method of models is written in."""
    return next(each for each in GenerationMixin.__mro__ if name in vars(each))


def _is_wrapped(name: str) -> bool:
    return hasattr(getattr(GenerationMixin, name, None), "gsrq_original")


def _wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put what `make` makes of a method in its place, and keep the method in it for `unregister`."""
    owner = _owner(name)
    original = vars(owner)[name]
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper.gsrq_original = original
    setattr(owner, name, wrapper)


def _preparing(original: Callable[..., Any]) -> Callable[..., Any]:
    """What prepares the cache of a `generate` call: ours where it is asked for, else as without us."""
    signature = inspect.signature(original)

    def prepare(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        generation_config, model_kwargs = given["generation_config"], given["model_kwargs"]
        if generation_config.is_assistant and generation_config.cache_implementation == NAME:
            made = model_kwargs.get(CACHE_ARGUMENT) is not None
            generation_config = given["generation_config"] = _for_assistant(self, generation_config, made)
        held = model_kwargs.get(CACHE_ARGUMENT)
        if isinstance(held, GSRQCache):
            held.expect_length(given["max_cache_length"])
        ours = generation_config.cache_implementation == NAME and generation_config.use_cache is not False
        if not ours or held is not None:
            return original(*call.args, **call.kwargs)
        cache = make_cache(self, generation_config.cache_config, given["max_cache_length"])
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_ARGUMENT] = cache
        return None

    return prepare


def _refusing(kind: type[Exception], message: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a method raise where "gsrq" is asked for: by name, by the settings given, else by the model's own."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)]
            own = getattr(self, "generation_config", None)
            asked = [kwargs.get("cache_implementation")]
            asked += [getattr(config, "cache_implementation", None) for config in (*given, own)]
            if next((name for name in asked if name is not None), None) == NAME:
                raise kind(message)
            return original(self, *args, **kwargs)

        return refuse

    return make


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


def make_cache(model: PreTrainedModel, cache_config: Mapping[str, Any] | None, max_length: int | None) -> GSRQCache:
    """The cache that `generate(cache_implementation="gsrq", cache_config=...)` uses.

    Args:
        model: The generating model.
        cache_config: "codebooks" (an object, folder or Hub id) and any keyword of `GSRQCache`. Not changed. Part of a
            `GenerationConfig` that is to be saved or printed, it names folder or Hub id by a string: transformers
            writes JSON, which holds neither objects nor a `Path`.
        max_length: Tokens that `generate` will cache at most, if known.

    Raises:
        TypeError: if `cache_config` is no mapping, or "codebooks" nothing that names codebooks.
        ValueError: for a missing "codebooks" or an unknown key.
    """
    if not isinstance(cache_config, Mapping | None):
        raise TypeError(
            f'cache_config must be a dictionary, such as {{"codebooks": ...}}, got {type(cache_config).__name__}.'
        )
    options = dict(cache_config or {})
    legal = [name for name in inspect.signature(GSRQCache).parameters if name not in ("codebooks", "model")]
    source = options.pop("codebooks", None)
    if source is None:
        raise ValueError(
            f'cache_implementation="{NAME}" needs codebooks, and cache_config has {sorted(map(str, options))}: '
            'pass cache_config={"codebooks": ...} with GSRQCodebooks, a folder or a Hub id '
            "(in a GenerationConfig that is to be saved: one of the last two as a string). "
            "For a new model make them with transformers_gsrq.calibrate()."
        )
    if not isinstance(source, GSRQCodebooks | str | Path):
        raise TypeError(
            f'cache_config["codebooks"] must be GSRQCodebooks, a folder or a Hub id, got {type(source).__name__}.'
        )
    unknown = sorted(map(str, set(options) - set(legal)))
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
