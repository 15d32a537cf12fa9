"""Time and bytes of caches whose layers are not all alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from test_cache_hybrid import build as build_hybrid
from tiny_models import SUPPORTED, VOCABULARY, random_codebooks
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.evaluation import speed as module


@pytest.mark.parametrize("build", [SUPPORTED["gemma2"].build, build_hybrid])
def test_layers_of_every_kind_are_measured(
    build: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Transformers' quantized caches refuse such models.
    monkeypatch.setattr(module, "quantized_backends", lambda: ["quanto"])
    model = build()
    ids = torch.randint(3, VOCABULARY, (40,))
    plain, coded = module.measure_speed(model, random_codebooks(model), ids, [30], new_tokens=3)
    assert (plain.cache, coded.cache) == ("plain", "gsrq 2 bits")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[None, :34], **{CACHE_ARGUMENT: cache})
    states = [tensor for layer in cache.layers for tensor in tensors(layer)]
    assert plain.cache_bytes >= sum(tensor.nbytes for tensor in states) > 0


def tensors(layer: object) -> list[torch.Tensor]:
    return [
        tensor
        for held in vars(layer).values()
        for tensor in (held.values() if isinstance(held, dict) else [held])
        if isinstance(tensor, torch.Tensor)
    ]
