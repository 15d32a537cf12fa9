"""`generate(cache_implementation="gsrq")` with the real generate of the installed transformers."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import configuration_utils
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import transformers_gsrq
from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks, register, unregister
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.registration import make_cache

pytestmark = pytest.mark.host
SmolLM2 = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Prompt = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def prompt(smollm2: SmolLM2, texts: tuple[list[str], list[str]]) -> Prompt:
    ids = smollm2[1](texts[1][0], return_tensors="pt")["input_ids"][:, :160]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def continue_text(model: PreTrainedModel, prompt: Prompt, **options: object) -> list[int]:
    out = model.generate(**prompt, max_new_tokens=6, do_sample=False, **options)
    return out[0, prompt["input_ids"].shape[1] :].tolist()


def test_a_window_longer_than_the_text_changes_nothing(
    smollm2: SmolLM2, tiny_codebooks: GSRQCodebooks, prompt: Prompt
) -> None:
    plain = continue_text(smollm2[0], prompt)
    config = {"codebooks": tiny_codebooks, "residual_length": 200}
    assert continue_text(smollm2[0], prompt, cache_implementation="gsrq", cache_config=config) == plain


def test_the_name_the_object_and_the_folder_give_the_same_text(
    smollm2: SmolLM2, tiny_codebooks: GSRQCodebooks, prompt: Prompt, tmp_path: Path
) -> None:
    model = smollm2[0]
    coarse = tiny_codebooks.with_stages(2, 2)
    coarse.save_pretrained(tmp_path / "codebooks")
    cache = GSRQCache(coarse, model, residual_length=16, sink_length=2)
    by_object = continue_text(model, prompt, **{CACHE_ARGUMENT: cache})
    assert cache.memory().codes > 0
    for source in (coarse, tmp_path / "codebooks", str(tmp_path / "codebooks")):
        config = {"codebooks": source, "residual_length": 16, "sink_length": 2}
        before = copy.copy(config)
        assert continue_text(model, prompt, cache_implementation="gsrq", cache_config=config) == by_object
        assert config == before
    # Not a test of the plain cache: coarse codebooks and a short window give another text.
    assert by_object != continue_text(model, prompt)


def test_the_old_name_of_the_argument_is_still_taken(
    smollm2: SmolLM2, tiny_codebooks: GSRQCodebooks, prompt: Prompt
) -> None:
    """Much code passes past_key_values; from transformers 5.24 on that only warns."""
    model = smollm2[0]
    text, logits = [], []
    for name in (CACHE_ARGUMENT, "past_key_values"):
        cache = GSRQCache(tiny_codebooks, model, residual_length=16, sink_length=2)
        text.append(continue_text(model, prompt, **{name: cache}))
        assert cache.memory().codes > 0
        cache = GSRQCache(tiny_codebooks, model, residual_length=16, sink_length=2)
        with torch.no_grad():
            logits.append(model(prompt["input_ids"], **{name: cache}, logits_to_keep=1).logits)
        assert cache.memory().codes > 0
    assert text[0] == text[1] and torch.equal(*logits)


def test_a_folder_is_read_once_until_it_changes(
    smollm2: SmolLM2, tiny_codebooks: GSRQCodebooks, prompt: Prompt, tmp_path: Path
) -> None:
    def used() -> GSRQCodebooks:
        options = {"cache_implementation": "gsrq", "cache_config": {"codebooks": str(tmp_path)}}
        out = smollm2[0].generate(**prompt, max_new_tokens=2, return_dict_in_generate=True, **options)
        return out[CACHE_ARGUMENT].codebooks

    tiny_codebooks.with_stages(2, 2).save_pretrained(tmp_path)
    first = used()
    assert used() is first
    tiny_codebooks.with_stages(3, 2).save_pretrained(tmp_path)
    assert used().config.stages("key")[0] == 3


def test_only_the_latest_codebooks_of_a_model_are_kept(
    smollm2: SmolLM2, tiny_codebooks: GSRQCodebooks, prompt: Prompt, tmp_path: Path
) -> None:
    def used(stages: int) -> weakref.ref[GSRQCodebooks]:
        config = {"codebooks": str(tmp_path / str(stages))}
        tiny_codebooks.with_stages(stages, stages).save_pretrained(config["codebooks"])
        options = {"cache_implementation": "gsrq", "cache_config": config}
        out = smollm2[0].generate(**prompt, max_new_tokens=2, return_dict_in_generate=True, **options)
        return weakref.ref(out[CACHE_ARGUMENT].codebooks)

    first, second = used(1), used(2)
    gc.collect()
    assert first() is None and second() is not None


def test_a_draft_by_early_exit_has_a_plain_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own settings name codebooks for all its layers, and the draft is its first layers only."""
    model, ids = SUPPORTED["llama"].build(), (torch.arange(30) * 7 % 50)[None]
    config = {"codebooks": random_codebooks(model), "residual_length": 8, "chunk_length": 4}
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = model.generate(ids, assistant_early_exit=1, cache_implementation="gsrq", cache_config=config, **options)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "gsrq")
    monkeypatch.setattr(model.generation_config, "cache_config", config)
    assert torch.equal(model.generate(ids, assistant_early_exit=1, **options), expected)


def test_a_generation_config_that_names_codebooks_by_a_string_is_saved(tmp_path: Path) -> None:
    """The only way that JSON can hold, as the error for missing codebooks says."""
    model, ids = SUPPORTED["llama"].build(), (torch.arange(30) * 7 % 50)[None]
    random_codebooks(model).save_pretrained(tmp_path / "codebooks")
    model.generation_config.cache_implementation = "gsrq"
    model.generation_config.cache_config = {"codebooks": str(tmp_path / "codebooks"), "residual_length": 8}
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.generation_config.cache_config == model.generation_config.cache_config
    assert torch.equal(again.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))
    with pytest.raises(ValueError, match=r"in a GenerationConfig that is to be saved: .* as a string"):
        make_cache(model, {}, 100)


def test_bad_cache_configs_are_named(smollm2: SmolLM2, tiny_codebooks: GSRQCodebooks, prompt: Prompt) -> None:
    model = smollm2[0]
    for config, message in (
        (None, "needs codebooks"),
        ({"residual_length": 3}, "needs codebooks"),
        ({"codebooks": tiny_codebooks, "nbits": 4}, r"Unknown cache_config keys \['nbits'\].*residual_length"),
        ({"codebooks": tiny_codebooks, "residual_length": -1}, "residual_length must be an integer of at least 0"),
        ({"codebooks": tiny_codebooks, "backend": "cuda"}, "backend"),
    ):
        with pytest.raises(ValueError, match=message):
            continue_text(model, prompt, cache_implementation="gsrq", cache_config=config)
    for config, message in (
        ({"codebooks": model}, "a folder or a Hub id, got LlamaForCausalLM"),
        ({"codebooks": 3}, "a folder or a Hub id, got int"),
        ({"codebooks": {"codebooks": tiny_codebooks}}, "a folder or a Hub id, got dict"),
        (tiny_codebooks, "must be a dictionary.*got GSRQCodebooks"),
        ("owner/name", "must be a dictionary.*got str"),
    ):
        with pytest.raises(TypeError, match=message):
            continue_text(model, prompt, cache_implementation="gsrq", cache_config=config)
    with pytest.raises(ValueError, match=r"Unknown cache_config keys \['3'\]"):
        make_cache(model, {"codebooks": tiny_codebooks, 3: 4}, 100)
    with pytest.raises(ValueError, match="only one of the two"):
        cache = GSRQCache(tiny_codebooks, model)
        continue_text(model, prompt, cache_implementation="gsrq", **{CACHE_ARGUMENT: cache})


def test_unregister_leaves_transformers_as_it_was(smollm2: SmolLM2, prompt: Prompt) -> None:
    register()
    wrapped = GenerationMixin._prepare_cache_for_generation
    try:
        unregister()
        assert GenerationMixin._prepare_cache_for_generation is wrapped.gsrq_original
        assert "gsrq" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
            continue_text(smollm2[0], prompt, cache_implementation="gsrq")
        unregister()
    finally:
        register()
    register()
    assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("gsrq") == 1
    assert not hasattr(GenerationMixin._prepare_cache_for_generation.gsrq_original, "gsrq_original")


ORIGINAL = GenerationMixin._prepare_cache_for_generation.gsrq_original


def one_more(
    self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: Any, max_cache_length: Any,
    chunk: Any = None,
) -> Any:  # fmt: skip
    return ORIGINAL(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def any_more(
    self: Any, generation_config: Any, model_kwargs: Any, mode: Any, rows: Any, max_cache_length: Any, *more: Any,
    **others: Any,
) -> Any:  # fmt: skip
    return ORIGINAL(self, generation_config, model_kwargs, mode, rows, max_cache_length)


def another_name(self: Any, generation_config: Any, kwargs: Any, *more: Any) -> Any:
    return ORIGINAL(self, generation_config, kwargs, *more)


def no_names(*args: Any) -> Any:
    return ORIGINAL(*args)


@pytest.mark.parametrize(
    ("later", "works"), [(one_more, True), (any_more, True), (another_name, False), (no_names, False)]
)
def test_a_later_transformers(later: Callable, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More arguments are passed on; where ours are not among them, the error says what works, and it does."""
    model, ids = SUPPORTED["llama"].build(), (torch.arange(30) * 7 % 50)[None]
    books, options = random_codebooks(model), {"residual_length": 8, "chunk_length": 4}
    settings = {"max_new_tokens": 10, "do_sample": False}
    asked = {"cache_implementation": "gsrq", "cache_config": {"codebooks": books, **options}}
    expected = model.generate(ids, **settings, **asked)
    unregister()
    plain = model.generate(ids, **settings)
    assert not torch.equal(plain, expected)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(GenerationMixin, "_prepare_cache_for_generation", later)
            register()
            assert torch.equal(model.generate(ids, **settings), plain)
            by_object = {CACHE_ARGUMENT: GSRQCache(books, model, **options)}
            assert torch.equal(model.generate(ids, **settings, **by_object), expected)
            if works:
                assert torch.equal(model.generate(ids, **settings, **asked), expected)
            else:
                for each in (asked, {"generation_config": GenerationConfig(**asked)}):
                    with pytest.raises(RuntimeError, match=f"Pass {CACHE_ARGUMENT}=GSRQCache"):
                        model.generate(ids, **each)
            unregister()
            assert GenerationMixin._prepare_cache_for_generation is later
            assert not hasattr(GenerationMixin.generate, "gsrq_original")
    finally:
        register()
    assert torch.equal(model.generate(ids, **settings, **asked), expected)


def test_importing_never_fails() -> None:
    """Whatever generate and continuous batching became."""
    script = """
from transformers import GenerationMixin
from transformers.generation import configuration_utils
for name in ("_prepare_cache_for_generation", "generate_batch", "init_continuous_batching"):
    delattr(next(each for each in GenerationMixin.__mro__ if name in vars(each)), name)
configuration_utils.ALL_CACHE_IMPLEMENTATIONS = list(configuration_utils.ALL_CACHE_IMPLEMENTATIONS)
import transformers_gsrq
try:
    GenerationMixin().generate(cache_implementation="gsrq")
except RuntimeError as error:
    print(error)
transformers_gsrq.unregister()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(transformers_gsrq.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"Pass {CACHE_ARGUMENT}=GSRQCache(codebooks, model)" in done.stdout


def test_continuous_batching_refuses_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it did as if it had not been asked, whatever the codebooks were."""
    model = SUPPORTED["llama"].build(attention="sdpa")
    config = {"cache_implementation": "gsrq", "cache_config": {"codebooks": "no/such/thing"}}
    asked = GenerationConfig(max_new_tokens=4, **config)
    with pytest.raises(ValueError, match=r"does not work with continuous batching \(generate_batch\).*Call generate"):
        model.generate_batch([[5, 6, 7]], generation_config=asked)
    with pytest.raises(ValueError, match="does not work with continuous batching"):
        model.generate_batch([[5, 6, 7]], **config)
    with pytest.raises(ValueError, match="does not work with continuous batching"):
        model.init_continuous_batching(asked)
    with (
        pytest.raises(ValueError, match="does not work with continuous batching"),
        model.continuous_batching_context_manager(generation_config=asked),
    ):
        pass
    monkeypatch.setattr(model.generation_config, "cache_implementation", "gsrq")
    with pytest.raises(ValueError, match="does not work with continuous batching"):
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=4))
    # Who asks for pages gets them.
    paged = GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0, cache_implementation="paged"
    )
    pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    done = model.generate_batch([[5, 6, 7]], generation_config=paged, continuous_batching_config=pages)
    monkeypatch.setattr(model.generation_config, "cache_implementation", None)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [one.generated_tokens for one in done.values()] == [expected[0, 3:].tolist()]


def test_other_caches_are_untouched(smollm2: SmolLM2, prompt: Prompt) -> None:
    plain = continue_text(smollm2[0], prompt)
    assert continue_text(smollm2[0], prompt, cache_implementation="dynamic") == plain
    assert continue_text(smollm2[0], prompt, use_cache=False) == plain
