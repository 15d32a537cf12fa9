"""What codebooks know of themselves: how they were made, and what was measured on them. JSON types."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .foreign import check_json, printable, shown

# Entries that were measured on these very centroids.
MEASURED = ("report", "evaluations")
# What two evaluations share of which the newer one counts.
SAME = ("model", "data_digest", "dtype", "residual_length", "sink_length", "beam_width")

TEXT, WHOLE, NUMBER, NOTHING = (str,), (int,), (int, float), (type(None),)
_VERSIONS = {"*": TEXT}
_STEPS: dict[str, Any] = {
    "refinement": {"step": TEXT, "rounds": WHOLE, "beam_width": WHOLE},
    "distillation": {
        "step": TEXT, "best_step": WHOLE, "batch_size": WHOLE, "processes": WHOLE, "window_length": WHOLE,
        "data": TEXT + NOTHING, "data_digest": TEXT, "base_model": TEXT + NOTHING,
        "measured": ({"course": [{"step": NUMBER, "kl": NUMBER + NOTHING}]}, None),
    },
}  # fmt: skip
# What cards and `gsrq inspect` read, and of which type: types; the fields of a mapping, "?" for one that may be left
# away and "*" for any name; what each part of a list is; or that or None. Other entries are anybody's.
_READ: dict[str, Any] = {
    "base_model?": TEXT + NOTHING, "base_model_revision?": TEXT + NOTHING, "dtype?": TEXT + NOTHING,
    "device?": TEXT + NOTHING, "versions?": _VERSIONS, "data?": {"name?": TEXT + NOTHING},
    "calibration?": {
        "tokens_read?": WHOLE, "vectors?": WHOLE, "data_digest?": TEXT, "method?": TEXT, "weighting?": TEXT,
        "iterations?": WHOLE, "seed?": WHOLE,
    },
    "training?": [{"step": TEXT}],
    "report?": [
        {"layer": WHOLE, "kind": TEXT, "stages": [{"distortion": NUMBER, "cosine": NUMBER, "gain_error": NUMBER}]}
    ],
    "evaluations?": [
        {
            "data": TEXT, "perplexity": NUMBER, "standard_error": NUMBER + NOTHING, "plain_perplexity": NUMBER,
            "increase": NUMBER, "increase_error": NUMBER + NOTHING, "windows": WHOLE, "window_length": WHOLE,
            "data_digest": TEXT, "residual_length": WHOLE, "sink_length": WHOLE, "beam_width": WHOLE,
            "model": TEXT + NOTHING, "dtype": TEXT, "device": TEXT, "versions": _VERSIONS,
        }
    ],
}  # fmt: skip


def check_provenance(provenance: Any, layers: Iterable[int]) -> None:
    """Check that a provenance can be stored, and that what cards and `gsrq inspect` read of it is what they expect.

    Args:
        provenance: Of codebooks.
        layers: Their layers.

    Raises:
        ValueError: naming the entry, what it is, and what it must be.
    """
    check_json(provenance, "provenance")
    _check(provenance, _READ, "provenance")
    for number, step in enumerate(provenance.get("training", ())):
        place = f"provenance.training[{number}]"
        _check(step, _STEPS.get(step["step"], {}), place)
        if step["step"] == "distillation" and step["measured"]:
            seen = {point["step"] for point in step["measured"]["course"]}
            if not {0, step["best_step"]} <= seen:
                raise ValueError(f"{place}.measured.course lacks step 0 or best_step, {step['best_step']}.")
    known = set(layers)
    for number, part in enumerate(provenance.get("report", ())):
        if part["layer"] not in known or part["kind"] not in ("key", "value") or not part["stages"]:
            raise ValueError(
                f"provenance.report[{number}] must be of the keys or values of a compressed layer, and have stages; "
                f"it is of layer {part['layer']}, kind {shown(part['kind'])}, {len(part['stages'])} stages."
            )


def _check(value: Any, wanted: Any, place: str) -> None:
    """Check a value against a description as in `_READ`."""
    if isinstance(wanted, tuple) and wanted[-1] is None:
        if value is not None:
            _check(value, wanted[0], place)
    elif isinstance(wanted, tuple):
        if not isinstance(value, wanted) or isinstance(value, bool):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in wanted)
            raise ValueError(f"{place} must be of type {names}, got {shown(value)}.")
    elif isinstance(wanted, list):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{place} must be a list, got {shown(value)}.")
        for number, part in enumerate(value):
            _check(part, wanted[0], f"{place}[{number}]")
    elif not isinstance(value, Mapping):
        raise ValueError(f"{place} must be a mapping, got {shown(value)}.")
    else:
        for name, kind in wanted.items():
            field = name.rstrip("?")
            if name == "*":
                for key, part in value.items():
                    _check(part, kind, f"{place}.{printable(key)}")
            elif field in value:
                _check(value[field], kind, f"{place}.{field}")
            elif not name.endswith("?"):
                raise ValueError(f"{place} lacks {field!r}.")


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
        ValueError: if the perplexity is not a finite number, or the record is none.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("perplexity"), NUMBER):
        raise ValueError(f"An evaluation is a record with a perplexity and its circumstances, got {shown(record)}.")
    if not math.isfinite(record["perplexity"]):
        raise ValueError(
            f"The perplexity is {record['perplexity']}, so it is not kept. Check the model and its dtype."
        )
    # The standard error of a single window is NaN, which JSON does not know.
    new = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in record.items()}
    kept = [old for old in provenance.get("evaluations", ()) if any(old.get(key) != new.get(key) for key in SAME)]
    _check(new, _READ["evaluations?"][0], "the evaluation")
    return {**provenance, "evaluations": [*kept, new]}
