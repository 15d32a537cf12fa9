"""`generate` in each of its modes with a real model, against the same mode on the oracle cache."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer, pipeline

from cache_oracle import OracleCache
from operations import OPERATIONS, Bench
from transformers_gsrq import GSRQCache, GSRQCodebooks, registration
from transformers_gsrq.compat import CACHE_ARGUMENT

SmolLM2 = tuple[PreTrainedModel, PreTrainedTokenizerBase]
MODES = (
    "greedy", "sampling", "beams", "beam-sampling", "assisted", "prompt-lookup", "streaming", "stopping",
    "chunked-prefill",
)  # fmt: skip
WINDOW = {"residual_length": 6, "sink_length": 2, "chunk_length": 3}
PROMPTS = ("The president spoke of the harvest,", "Our relations with foreign powers " * 3 + "remain")
# Logits reach 30 here. A state that is equally near two centroids may get another code in float64 than in float32,
# which moves logits by less than this (measured: 2e-3 at most); a wrong token's states move them by more than 1.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def bench(smollm2: SmolLM2, tiny_codebooks: GSRQCodebooks) -> Bench:
    model, tokenizer = smollm2
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    draft = copy.deepcopy(model)
    # The first layers of a model are a cheap draft of it.
    draft.model.layers = draft.model.layers[:20]
    draft.config.num_hidden_layers = 20
    return Bench(model, tiny_codebooks, inputs["input_ids"], inputs["attention_mask"], Cache, draft, 8)


def use(bench: Bench, kind: type[Cache], **window: int) -> Bench:
    window = window or WINDOW

    def make_cache(mask: torch.Tensor, **options: int) -> Cache:
        if kind is GSRQCache:
            return GSRQCache(bench.codebooks, bench.model, **window, **options)
        return OracleCache(bench.codebooks, bench.model, mask, **window)

    bench.make_cache = make_cache
    return bench


@pytest.mark.host
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode: str, bench: Bench) -> None:
    ours, oracle = (OPERATIONS[mode].run(use(bench, kind)) for kind in (GSRQCache, OracleCache))
    assert len(ours) == len(oracle)
    for mine, expected in zip(ours, oracle, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, expected, rtol=0, atol=TOLERANCE)
        else:
            assert mine.tolist() == expected.tolist()


def test_the_comparison_can_fail(bench: Bench) -> None:
    """The plain cache gives other logits than the oracle: the modes above do test the codes."""
    plain = bench.generate(**{CACHE_ARGUMENT: None})[-1]
    oracle = OPERATIONS["greedy"].run(use(bench, OracleCache))[-1]
    assert (plain - oracle).abs().max() > 10 * TOLERANCE


@pytest.mark.host
@pytest.mark.parametrize("mode", ["assisted", "prompt-lookup"])
def test_drafts_change_nothing_while_the_window_covers_the_text(mode: str, bench: Bench) -> None:
    drafted, *scores = OPERATIONS[mode].run(use(bench, GSRQCache, residual_length=500))
    rows = slice(1, 2)
    prompt = bench.prompt[rows, :10].repeat(1, 3) if mode == "prompt-lookup" else bench.prompt[rows]
    plain = bench.generate(prompt=prompt, attention_mask=torch.ones_like(prompt), **{CACHE_ARGUMENT: None})
    assert drafted.tolist() == plain[0].tolist()
    # Every token is the best one of the state that it was verified on.
    assert [score.argmax().item() for score in scores] == drafted[0, prompt.shape[1] :].tolist()


@pytest.mark.host
def test_a_compressed_draft_model(bench: Bench, smollm2: SmolLM2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides compressed, each by its own settings; the text is the target's own."""
    model = smollm2[0]
    made: list[tuple[PreTrainedModel, GSRQCache]] = []
    real = registration.make_cache

    def make_cache(model: PreTrainedModel, *args: object) -> GSRQCache:
        made.append((model, real(model, *args)))
        return made[-1][1]

    monkeypatch.setattr(registration, "make_cache", make_cache)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompt = bench.prompt[1:2]
    target = {"cache_implementation": "gsrq", "cache_config": {"codebooks": bench.codebooks, "residual_length": 300}}
    plain = model.generate(prompt, **settings)
    # A draft model without settings of its own keeps a plain cache: the target's codebooks are not for it.
    assert torch.equal(model.generate(prompt, assistant_model=bench.draft, **settings, **target), plain)
    assert [who for who, _ in made] == [model]
    monkeypatch.setattr(bench.draft.generation_config, "cache_implementation", "gsrq")
    monkeypatch.setattr(bench.draft.generation_config, "cache_config", {"codebooks": draft_codebooks(bench), **WINDOW})
    for own in (target, {}):
        # With the target's settings or without, the draft's own count.
        made.clear()
        assert torch.equal(model.generate(prompt, assistant_model=bench.draft, **settings, **own), plain)
        assert {who for who, _ in made} == ({model, bench.draft} if own else {bench.draft})
        assert made[-1][1].memory().codes > 0


def draft_codebooks(bench: Bench) -> GSRQCodebooks:
    from transformers_gsrq import GSRQConfig

    config = GSRQConfig.for_model(bench.draft.config, bits=1.0, num_centroids=64)
    jobs = [(layer, kind) for layer in config.layers for kind in ("key", "value")]
    return GSRQCodebooks(
        config, {job: bench.codebooks.gains(*job) for job in jobs}, {job: bench.codebooks.shapes(*job) for job in jobs}
    )


@pytest.mark.host
def test_pipeline(bench: Bench, smollm2: SmolLM2) -> None:
    model, tokenizer = smollm2
    settings = {
        "max_new_tokens": 8, "do_sample": False, "cache_implementation": "gsrq",
        "cache_config": {"codebooks": bench.codebooks, **WINDOW},
    }  # fmt: skip
    said = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        PROMPTS[1], return_full_text=False, **settings
    )
    prompt = tokenizer(PROMPTS[1], return_tensors="pt")
    out = model.generate(**prompt, **settings)
    assert said[0]["generated_text"] == tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


@pytest.mark.host
def test_text_streamer(bench: Bench, smollm2: SmolLM2) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer(PROMPTS[1], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    cache = GSRQCache(bench.codebooks, model, **WINDOW)
    out = model.generate(**prompt, **{CACHE_ARGUMENT: cache}, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


@pytest.mark.host
def test_chat_over_several_turns(bench: Bench, smollm2: SmolLM2) -> None:
    """One cache for the whole conversation, as the chat template writes it."""
    model, tokenizer = smollm2

    def talk(make_cache: Callable[[torch.Tensor], Cache]) -> list[str]:
        messages, cache = [], None
        for said in ("Name a fruit.", "And one that is red?", "Which of them is sweeter, and why?"):
            messages.append({"role": "user", "content": said})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            cache = cache or make_cache(inputs["attention_mask"])
            out = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=6, do_sample=False)
            reply = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": reply})
        assert cache.get_seq_length() > 50
        return [message["content"] for message in messages]

    assert talk(use(bench, GSRQCache).make_cache) == talk(use(bench, OracleCache).make_cache)


@pytest.mark.host
def test_a_row_does_not_depend_on_its_neighbours(bench: Bench) -> None:
    """A row next to a much longer one generates what it generates alone."""
    use(bench, GSRQCache)
    together = bench.generate()[0][:, bench.prompt.shape[1] :]
    for row in range(2):
        real = bench.mask[row].bool()
        alone = bench.generate(
            prompt=bench.prompt[row : row + 1, real], attention_mask=bench.mask[row : row + 1, real]
        )
        assert alone[0][0, real.sum() :].tolist() == together[row].tolist()
