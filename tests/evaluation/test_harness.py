"""lm-eval's own code paths must reach the codes."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_models import random_codebooks
from transformers_gsrq import GSRQCodebooks

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.api.instance import Instance

from transformers_gsrq.evaluation.harness import GSRQLM, HFLM

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
CONTEXT = "The speed of light in a vacuum, usually written c, is a constant of nature. Its value in km/s is about"


@pytest.fixture(scope="module")
def codebooks(first_layers: Loaded) -> GSRQCodebooks:
    return random_codebooks(first_layers[0], subspace_dim=64)


def test_likelihoods_are_read_through_the_codes_whatever_stands_beside_them(
    first_layers: Loaded, codebooks: GSRQCodebooks
) -> None:
    model, tokenizer = first_layers
    # A window of 128 would cover the short text, or at batch size 2 the padding behind it.
    pairs = [("The sky is", " blue"), (CONTEXT * 6, " a bicycle ride")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    plain, alone, together = (
        [score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)]
        for lm in (
            HFLM(model, tokenizer=tokenizer),
            GSRQLM(model, codebooks, tokenizer=tokenizer, batch_size=1),
            GSRQLM(model, codebooks, tokenizer=tokenizer, batch_size=2),
        )
    )
    assert alone == pytest.approx(together, rel=1e-4)
    assert all(abs(a - b) > 0.05 for a, b in zip(alone, plain, strict=True))


def test_texts_are_generated_with_what_the_caller_keeps_exact(first_layers: Loaded, codebooks: GSRQCodebooks) -> None:
    model, tokenizer = first_layers
    asked = [Instance("generate_until", {}, (CONTEXT, {"until": ["\n"], "max_gen_toks": 8}), 0)]
    plain, exact, coded = (
        lm.generate_until(asked, disable_tqdm=True)
        for lm in (
            HFLM(model, tokenizer=tokenizer),
            GSRQLM(model, codebooks, residual_length=512, tokenizer=tokenizer),
            GSRQLM(model, codebooks, residual_length=0, tokenizer=tokenizer),
        )
    )
    assert plain == exact != coded
