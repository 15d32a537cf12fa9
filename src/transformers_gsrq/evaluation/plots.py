"""Pictures of what was measured. Needs matplotlib: `pip install "transformers-gsrq[plots]"`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter
from transformers import PreTrainedModel

from ..calibration import capture
from ..codebooks import GSRQCodebooks
from ..config import KINDS, GSRQConfig
from .perplexity import PLAIN, Perplexity
from .reconstruction import Reconstruction, sweep_gaussians, sweep_states
from .retrieval import NEEDLE_TASKS, Retrieval

# Told apart by people with any colour vision (Okabe and Ito), and by line style.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# The methods often lie on top of each other: large hollow circles behind small squares show both.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "kmeans": {"linestyle": "--", "marker": "o", "markersize": 9, "markerfacecolor": "none"},
    "gskm": {"linestyle": "-", "marker": "s", "markersize": 4},
}
LINES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v")
METHOD_NAMES = {"kmeans": "k-means", "gskm": "GSKM"}
DEPTH_BINS = 5
# States of fewer tokens cannot be clustered for the pictures that go with perplexity.
MIN_TOKENS = 256
MEASURES = {"mse": "squared error / energy", "gain_error": "error of the norm / norm", "cosine": "cosine"}


def plot_perplexity(results: Mapping[str, Sequence[tuple[float, Perplexity]]], plain: Perplexity, text: str) -> Figure:
    """Perplexity against bits per element, with standard errors of the difference to the plain cache.

    Args:
        results: For each series, bits and perplexity of its codebooks.
        plain: Perplexity with the model's own cache.
        text: What was read, for the title.
    """
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for index, (color, (name, points)) in enumerate(zip(COLORS, results.items(), strict=False)):
        points = sorted(points, key=lambda point: point[0])
        # A little beside each other, so that every error bar is seen.
        shift = 2 ** (0.03 * (index - (len(results) - 1) / 2))
        axes.errorbar(
            [bits * shift for bits, _ in points],
            [found.value for _, found in points],
            yerr=[found.increase_error * plain.value for _, found in points],
            color=color,
            marker="o",
            capsize=3,
            label=name,
        )
    axes.axhline(plain.value, color="0.35", linestyle=":", label=f"plain cache, {plain.value:.2f}")
    _bits_axis(axes, {bits for points in results.values() for bits, _ in points})
    axes.set_ylabel("perplexity")
    axes.set_title(textwrap.fill(f"Perplexity on {text}, every token through the codes", 80), fontsize=10)
    axes.legend(frameon=False)
    return figure


def plot_increases(series: Mapping[str, Sequence[tuple[float, float, float]]], title: str) -> Figure:
    """Increase of perplexity over the plain cache against bits per element, both logarithmic.

    Args:
        series: For each method, its points: bits, the increase as a fraction and its standard error.
        title: What was read by which model.
    """
    figure = _figure(6.4, 4.6)
    axes = figure.subplots()
    for index, (name, points) in enumerate(series.items()):
        bits, increases, errors = zip(*sorted(points), strict=True)
        axes.errorbar(
            bits,
            increases,
            yerr=errors,
            color=COLORS[index % len(COLORS)],
            linestyle=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            capsize=2,
            label=name,
        )
    _bits_axis(axes, {point[0] for points in series.values() for point in points})
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color="0.9")
    axes.set_ylabel("increase of perplexity")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _bits_axis(axes: Axes, bits: Iterable[float]) -> None:
    places = sorted(bits)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_xlabel("bits per key/value element")


def plot_memory(
    configs: Mapping[str, GSRQConfig], max_tokens: int, *, exact_tokens: int = 132, batch: int = 1
) -> Figure:
    """Bytes against context length, codebooks included, with each break-even against bfloat16 marked.

    Args:
        configs: Geometry by name.
        max_tokens: Longest context.
        exact_tokens: Tokens of a row that stay exact (sinks and window).
        batch: Rows.
    """
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    lengths = [max_tokens * step // 400 for step in range(401)]
    plain = next(iter(configs.values())).dense_bytes_per_token()
    axes.plot(lengths, [length * batch * plain / 2**20 for length in lengths], color="0.35", label="bfloat16 cache")
    for color, (name, config) in zip(COLORS, configs.items(), strict=False):
        held = [batch * _row_bytes(config, length, exact_tokens) + config.codebook_bytes for length in lengths]
        even = exact_tokens + config.break_even_tokens / batch
        label = f"{name}, smaller from {even:,.0f} tokens on"
        axes.plot(lengths, [number / 2**20 for number in held], color=color, label=label)
        if even <= max_tokens:
            axes.plot(even, even * batch * plain / 2**20, "o", color=color, markersize=7)
    axes.set_xlim(0, max_tokens)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache" + (f", for each of {batch} rows" if batch > 1 else ""))
    axes.set_ylabel("MiB, codebooks included")
    axes.set_title("Memory of a cache, codebooks included; dots mark the break-even", fontsize=10)
    axes.legend(frameon=False)
    return figure


def _row_bytes(config: GSRQConfig, length: int, exact_tokens: int) -> int:
    exact = min(length, exact_tokens)
    return exact * config.dense_bytes_per_token() + (length - exact) * config.code_bytes_per_token


def plot_shrinkage(rows: Iterable[Reconstruction]) -> Figure:
    """Centroid shrinkage against the width of a subspace (the paper's figure 2)."""
    rows = list(rows)
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    _lines(axes, rows, "shrinkage", "subspace_dim")
    axes.axhline(1, color="0.35", linestyle=":")
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("E‖μ‖² / E‖x‖²")
    axes.set_title(f"Energy of the centroids over that of the vectors, K = {rows[0].num_centroids}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_reconstruction(rows: Iterable[Reconstruction], against: str = "subspace_dim") -> Figure:
    """Squared error, error of the norm and cosine of k-means and GSKM (the paper's figures 4 and 5).

    Args:
        rows: All at one K if `against` is "subspace_dim", all at one S if it is "num_centroids".
        against: Attribute for the horizontal axis.
    """
    rows = list(rows)
    figure = _figure(11.5, 3.8)
    for axes, (measure, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        _lines(axes, rows, measure, against)
        axes.set_ylim(bottom=0)
        axes.set_title(label, fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    fixed = f"K = {rows[0].num_centroids}" if against == "subspace_dim" else f"S = {rows[0].subspace_dim}"
    figure.suptitle(f"One clustering stage, same start and iterations, {fixed}", fontsize=10)
    return figure


def _lines(axes: Axes, rows: Sequence[Reconstruction], measure: str, against: str) -> None:
    colors = dict(zip(dict.fromkeys(row.data for row in rows), COLORS, strict=False))
    for data, color in colors.items():
        for method, style in METHOD_STYLES.items():
            mine = sorted((r for r in rows if (r.data, r.method) == (data, method)), key=lambda r: getattr(r, against))
            axes.plot(
                [getattr(row, against) for row in mine],
                [getattr(row, measure) for row in mine],
                color=color,
                label=f"{data}, {METHOD_NAMES[method]}",
                **style,
            )
    ticks = sorted({getattr(row, against) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("channels S of a subspace" if against == "subspace_dim" else "centroids K")


def plot_ratios(series: Mapping[str, Sequence[tuple[str, float, float]]], base: str, along: str) -> Figure:
    """Perplexity of variants over that of one of them.

    Args:
        series: For each name, its points: a variant, the ratio and the standard error of the ratio.
        base: What the ratios are to.
        along: What the variants differ in.
    """
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    places = list(dict.fromkeys(variant for points in series.values() for variant, _, _ in points))
    for index, (name, points) in enumerate(series.items()):
        # A little beside each other, so that every error bar is seen.
        shift = 0.06 * (index - (len(series) - 1) / 2)
        axes.errorbar(
            [places.index(variant) + shift for variant, _, _ in points],
            [value for _, value, _ in points],
            yerr=[error for _, _, error in points],
            color=COLORS[index],
            linestyle=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=3,
            label=name,
        )
    axes.axhline(1, color="0.35", linestyle=":")
    axes.set_xticks(range(len(places)), places)
    axes.set_xlabel(along)
    axes.set_ylabel(f"perplexity / perplexity of {base}")
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_retrieval(results: Mapping[str, Sequence[Retrieval]]) -> Figure:
    """Share of answered needles by depth and prompt length, both tasks together, one panel for each method.

    Tracked variables are left out: they stand everywhere in the text.

    Args:
        results: What `measure_retrieval` returned.
    """
    results = {name: [found for found in scores if found.task in NEEDLE_TASKS] for name, scores in results.items()}
    lengths = sorted({found.length for scores in results.values() for found in scores})
    tasks = dict.fromkeys(found.task.replace("_", " ") for scores in results.values() for found in scores)
    fewest = min(len(found.hits) for scores in results.values() for found in scores)
    # Every bin has a prompt of every task: depths are spread evenly.
    bins = min(DEPTH_BINS, fewest)
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    width = 0.8 + 0.7 * len(lengths)
    figure = _figure(1.8 + columns * width, 1.4 + rows * (0.8 + 0.4 * bins))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, (name, scores) in zip(panels, results.items(), strict=False):
        shares = [[_answered(scores, length, bin_, bins) for length in lengths] for bin_ in range(bins)]
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for row, column in product(range(bins), range(len(lengths))):
            share = shares[row][column]
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color="k" if share > 0.5 else "w")
        # Names are paths as often as not.
        axes.set_title(textwrap.fill(name, int(11 * width)), fontsize=10)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(bins), [f"{row / bins:.0%}–{(row + 1) / bins:.0%}" for row in range(bins)])
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=figure.axes, label="answered")
    figure.supxlabel("tokens of the prompt", fontsize=10)
    figure.supylabel("depth of the needle", fontsize=10)
    figure.suptitle(f"Retrieval: {', '.join(tasks)}", fontsize=10)
    return figure


def _answered(scores: Sequence[Retrieval], length: int, bin_: int, bins: int) -> float:
    hits = [
        hit for found in scores if found.length == length for depth, hit in found.hits if int(depth * bins) == bin_
    ]
    return sum(hits) / len(hits)


def draw_all(
    folder: str | Path,
    model: PreTrainedModel,
    windows: torch.Tensor,
    codebooks: Mapping[str, GSRQCodebooks],
    found: Mapping[str, Mapping[str, Any]],
    text: str,
) -> list[Path]:
    """Every picture of what was measured; with perplexity go memory and clusterings, some minutes on a CPU.

    Args:
        folder: Where the PNG files go.
        model: The model that was evaluated.
        windows: The windows that it read, `[windows, T]`; its middle layer's states on them are clustered.
        codebooks: What was evaluated, by name.
        found: What `evaluate` returned, with "perplexity", "retrieval" or both.
        text: What to call the text.

    Returns:
        The files.
    """
    figures = {}
    if "perplexity" in found:
        figures.update(_draw_perplexity(model, windows, codebooks, found["perplexity"], text))
    if "retrieval" in found:
        figures["retrieval"] = plot_retrieval(found["retrieval"])
    return save_figures(figures, folder)


def _draw_perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    codebooks: Mapping[str, GSRQCodebooks],
    results: Mapping[str, Perplexity],
    text: str,
) -> dict[str, Figure]:
    config = next(iter(codebooks.values())).config
    samples = capture(model, windows, config, gradients=False)
    states = sweep_states(samples, config, config.layers[len(config.layers) // 2])
    direct = [row for row in states if row.data in KINDS]
    gaussians = sweep_gaussians()
    width, count = 256, MIN_TOKENS
    by_width = [row for row in gaussians if row.num_centroids == count]
    by_count = [row for row in gaussians if row.subspace_dim == width]
    configs = {
        f"{made.config.bits():g} bit{'s' * (made.config.bits() != 1)}": made.config for made in codebooks.values()
    }
    longest = 2.5 * max(config.break_even_tokens for config in configs.values())
    # Lower rates of the first codebooks come after all of them, named by their bits.
    series: dict[str, list[tuple[float, Perplexity]]] = {}
    for name, made in codebooks.items():
        owner = next(iter(codebooks)) if name == f"{made.config.bits():g} bits" else name
        series.setdefault(owner, []).append((made.config.bits(), results[name]))
    return {
        "perplexity": plot_perplexity(series, results[PLAIN], text),
        "memory": plot_memory(configs, int(round(longest, -2))),
        "shrinkage": plot_shrinkage([*(row for row in by_width if row.subspace_dim <= width), *direct]),
        "clustering-gaussian-width": plot_reconstruction(by_width),
        "clustering-gaussian-centroids": plot_reconstruction(by_count, "num_centroids"),
        "clustering-states": plot_reconstruction(direct),
        "clustering-residuals": plot_reconstruction(row for row in states if row.data not in KINDS),
    }


def save_figures(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write figures as PNG files, named by their keys.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=140)
    return paths


def _figure(width: float, height: float) -> Figure:
    # No pyplot: nothing global changes, and no window system is asked for.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure
