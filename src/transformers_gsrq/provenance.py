"""What codebooks know of themselves: how they were made, and what was measured on them. JSON types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Entries that were measured on these very centroids.
MEASURED = ("report", "evaluations")
# What two evaluations share of which the newer one counts.
SAME = ("model", "data_digest", "dtype", "residual_length", "sink_length", "beam_width")


def inherited(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What codebooks that are made from others take over: how those were made, and nothing that was measured on them.

    Args:
        provenance: Of the others.
    """
    kept = {name: value for name, value in provenance.items() if name not in MEASURED}
    if "training" in kept:
        kept["training"] = [{**step, "measured": None} for step in kept["training"]]
    return kept


def add_step(
    provenance: Mapping[str, Any], name: str, record: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance of codebooks that training made of others.

    Args:
        provenance: Of the others.
        name: Of the step.
        record: How it was done.
        measured: What it measured on the result.
    """
    kept = inherited(provenance)
    return {**kept, "training": [*kept.get("training", ()), {"step": name, **record, "measured": dict(measured)}]}


def first_stages(provenance: Mapping[str, Any], stages: Mapping[str, int]) -> dict[str, Any]:
    """The provenance of the first stages of codebooks: the calibration's report as far as it is about them.

    Args:
        provenance: Of all stages.
        stages: How many are kept, by kind.
    """
    report = [{**part, "stages": part["stages"][: stages[part["kind"]]]} for part in provenance.get("report", ())]
    return {**inherited(provenance), **({"report": report} if report else {})}


def add_evaluation(provenance: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance with one more measurement; one of the same model, text and settings is replaced.

    Args:
        provenance: Of the codebooks that were measured.
        record: As `evaluation.records.perplexity_record` makes them.

    Raises:
        ValueError: if the perplexity is not a finite number.
    """
    if not math.isfinite(record["perplexity"]):
        raise ValueError(
            f"The perplexity is {record['perplexity']}, so it is not kept. Check the model and its dtype."
        )
    # The standard error of a single window is NaN, which JSON does not know.
    new = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in record.items()}
    kept = [old for old in provenance.get("evaluations", ()) if any(old.get(key) != new.get(key) for key in SAME)]
    return {**provenance, "evaluations": [*kept, new]}
