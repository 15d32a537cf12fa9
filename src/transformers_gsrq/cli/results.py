"""What `gsrq eval` measured, and what two of its records have in common, as tables for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..evaluation import PLAIN
from ..evaluation.compare import Comparison
from ..evaluation.measures import GREEDY_TOKENS, MEASURES
from .common import table

Results = Mapping[str, Mapping[str, Any]]


def result_tables(record: Mapping[str, Any]) -> str:
    """A table for each measure of a run record."""
    return "\n\n".join(
        TABLES[measure](record["results"], record["caches"])
        for measure in MEASURES
        if measure in record["settings"]["measures"]
    )


def number(error: float, places: int) -> str:
    """A standard error; a single window has none."""
    return "-" if math.isnan(error) else f"{error:.{places}f}"


def share(error: float) -> str:
    """The same, of a share."""
    return "-" if math.isnan(error) else f"{error:.1%}"


def _perplexity(results: Results, caches: Results) -> str:
    rows = [["cache", "bits", "bytes/token", "perplexity", "+-", "increase", "+-"]]
    for name, found in results.items():
        if "perplexity" in found:
            cells = [f"{caches[name]['bits']:g}", f"{caches[name]['bytes_per_token']:,}"]
            cells += [f"{found['perplexity']:.2f}", number(found["standard_error"], 2)]
            increase = [] if name == PLAIN else [f"{found['increase']:+.1%}", share(found["increase_error"])]
            rows.append([name, *cells, *(increase or ["", ""])])
    return table(rows)


def _agreement(results: Results, caches: Results) -> str:
    rows = [["cache", "KL, nats", "+-", "same likeliest token", f"same greedy tokens of {GREEDY_TOKENS}"]]
    for name, found in results.items():
        if name != PLAIN:
            seen = found["agreement"]
            cells = [f"{seen['divergence']:.3f}", number(seen["divergence_error"], 3), f"{seen['top1']:.1%}"]
            rows.append([name, *cells, ", ".join(map(str, found["same_tokens"]))])
    return "Agreement with the plain cache, every token through the codes:\n" + table(rows)


def _attribution(results: Results, caches: Results) -> str:
    rows = [["cache", "compressed", "increase", "+-", "KL, nats"]]
    for name, found in results.items():
        for part, seen in found.get("attribution", {}).items():
            if part != PLAIN:
                increase = seen["perplexity"]["increase"], seen["perplexity"]["increase_error"]
                rows.append([name, part, f"{increase[0]:+.1%}", share(increase[1]), f"{seen['divergence']:.3f}"])
    return "What each part costs by itself, all else exact:\n" + table(rows)


def _retrieval(results: Results, caches: Results) -> str:
    rows = [["cache", "task", "tokens", "prompts", "answered", "+-"]]
    for name, found in results.items():
        for seen in found["retrieval"] if "retrieval" in found else ():
            answered = [f"{seen['accuracy']:.0%}", f"{seen['standard_error']:.0%}"]
            rows.append([name, seen["task"], f"{seen['length']:,}", str(len(seen["hits"])), *answered])
    return "Retrieval:\n" + table(rows)


def _reconstruction(results: Results, caches: Results) -> str:
    rows = [["cache", "kind", "squared error / energy", "worst layer", "cosine", "error of the norm"]]
    for name, found in results.items():
        entries = found.get("reconstruction", [])
        for kind in dict.fromkeys(entry["kind"] for entry in entries):
            last = {entry["layer"]: entry["stages"][-1] for entry in entries if entry["kind"] == kind}
            mean = {key: statistics.mean(stage[key] for stage in last.values()) for key in next(iter(last.values()))}
            worst = max(last, key=lambda layer: last[layer]["distortion"])
            cells = [f"{mean['distortion']:.3f}", f"{worst}: {last[worst]['distortion']:.3f}"]
            rows.append([name, kind, *cells, f"{mean['cosine']:.3f}", f"{mean['gain_error']:.3f}"])
    return "Reconstruction of this text's states, all stages, mean over layers:\n" + table(rows)


TABLES: dict[str, Callable[[Results, Results], str]] = {
    "perplexity": _perplexity,
    "agreement": _agreement,
    "attribution": _attribution,
    "retrieval": _retrieval,
    "reconstruction": _reconstruction,
}


def comparison_text(comparison: Comparison, names: tuple[str, str]) -> str:
    """What differs in the circumstances, the figures side by side, and what is not comparable."""
    parts = ["The circumstances are the same."]
    if comparison.circumstances:
        differing = comparison.circumstances.items()
        parts = [
            table([["differs", *names], *([key, *(_shown(key, fact) for fact in pair)] for key, pair in differing)])
        ]
    parts.append(table([["cache", "figure", names[0], "+-", names[1], "+-", "difference", "+-"], *_rows(comparison)]))
    return "\n\n".join([*parts, *(["\n".join(comparison.notes)] if comparison.notes else [])])


def _rows(comparison: Comparison) -> Iterator[list[str]]:
    for found in comparison.differences:
        numbers = (
            found.first, found.first_error, found.second, found.second_error, found.difference, found.error,
        )  # fmt: skip
        yield [found.cache, found.figure, *("" if number is None else f"{number:.4g}" for number in numbers)]


def _shown(key: str, fact: Any) -> str:
    # Digests are told apart by their beginnings.
    return "-" if fact is None else str(fact)[: 12 if "digest" in key else None]
