"""`generate(cache_implementation="gsrq")` with the real generate of the installed transformers."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import configuration_utils

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


def test_an_unknown_generate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: object, generation_config: object, kwargs: dict) -> None:
        """As a later transformers might have it."""

    unregister()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(GenerationMixin, "_prepare_cache_for_generation", other)
            with pytest.raises(RuntimeError, match=f"{CACHE_ARGUMENT}=GSRQCache"):
                register()
    finally:
        register()


def test_other_caches_are_untouched(smollm2: SmolLM2, prompt: Prompt) -> None:
    plain = continue_text(smollm2[0], prompt)
    assert continue_text(smollm2[0], prompt, cache_implementation="dynamic") == plain
    assert continue_text(smollm2[0], prompt, use_cache=False) == plain
