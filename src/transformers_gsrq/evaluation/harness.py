"""Any task of lm-eval with a compressed cache. Needs lm-eval: `pip install "transformers-gsrq[eval]"`.

    from lm_eval import simple_evaluate
    from transformers_gsrq.evaluation.harness import GSRQLM

    lm = GSRQLM("Qwen/Qwen2.5-1.5B-Instruct", "someone/Qwen2.5-1.5B-gsrq-1bit", batch_size=4)
    results = simple_evaluate(lm, tasks=["gsm8k", "longbench_qasper"], limit=100)

Most tasks download their data from the Hub.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..cache import GSRQCache
from ..codebooks import GSRQCodebooks
from ..compat import CACHE_ARGUMENT


@register_model("gsrq")
class GSRQLM(HFLM):
    """lm-eval's Hugging Face model with a `GSRQCache`.

    Tasks that only score likelihoods read everything in one pass, which would never touch a code: there every token
    attends to what the cache stores (`quantize_prefill`), and nothing is kept exact, neither sinks nor window. Tasks
    that generate use the cache as `generate` does.

    Args:
        pretrained: As for lm-eval's "hf" model: a Hub id, a folder or a loaded model.
        codebooks: Codebooks, or where they are.
        residual_length: Latest tokens kept exact where text is generated.
        sink_length: First tokens kept exact where text is generated.
        beam_width: Partial sums kept when encoding.
        **kwargs: What lm-eval's "hf" model takes.
    """

    def __init__(
        self,
        pretrained: Any,
        codebooks: GSRQCodebooks | str,
        residual_length: int = 128,
        sink_length: int = 4,
        beam_width: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained=pretrained, **kwargs)
        if isinstance(codebooks, str):
            codebooks = GSRQCodebooks.from_pretrained(codebooks)
        self.codebooks = codebooks
        self.beam_width = beam_width
        self.kept_exact: dict[str, Any] = {"residual_length": residual_length, "sink_length": sink_length}

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        # Rows are padded on the right, which causal attention never looks at; but the latest tokens of a short row are
        # padding, so that an exact window would make its score depend on the rows beside it.
        cache = GSRQCache(
            self.codebooks,
            self.model,
            residual_length=0,
            sink_length=0,
            beam_width=self.beam_width,
            quantize_prefill=True,
        )
        with torch.no_grad():
            return self.model(inps, **{CACHE_ARGUMENT: cache}, use_cache=True).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        options = {**self.kept_exact, "beam_width": self.beam_width}
        cache = GSRQCache(self.codebooks, self.model, max_length=max_length, **options)
        return super()._model_generate(context, max_length, stop, **{CACHE_ARGUMENT: cache}, **kwargs)
