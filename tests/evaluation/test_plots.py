"""The heat map shows the hits where they were, the ratios stand over their variants."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from transformers_gsrq.evaluation.plots import plot_increases, plot_ratios, plot_retrieval
from transformers_gsrq.evaluation.retrieval import Retrieval


def scores(answered: dict[tuple[str, int], list[bool]]) -> list[Retrieval]:
    made = []
    for (task, length), hits in answered.items():
        depths = [(index + 0.5) / len(hits) for index in range(len(hits))]
        hit_list = tuple(zip(depths, hits, strict=True))
        made.append(Retrieval(task, length, sum(hits) / len(hits), 0.0, 1.0, hit_list, "digest"))
    return made


def test_heat_map_has_a_panel_for_each_method_by_depth_and_length() -> None:
    everything = {(task, length): [True] * 10 for task in ("needle", "needle_of_four") for length in (8192, 1024)}
    # Tracked variables stand at no one depth.
    everything["variable_tracking", 1024] = [False] * 10
    late = {
        **everything,
        ("needle", 8192): [False] * 6 + [True] * 4,
        ("needle_of_four", 8192): [False] * 9 + [True],
    }
    figure = plot_retrieval({"plain": scores(everything), "1 bit": scores(late)})
    plain, coded = (axes for axes in figure.axes if axes.get_title())
    assert (plain.get_title(), coded.get_title()) == ("plain", "1 bit")
    assert [label.get_text() for label in coded.get_xticklabels()] == ["1,024", "8,192"]
    assert [label.get_text() for label in plain.get_yticklabels()][0] == "0%–20%"
    assert (plain.images[0].get_array() == 1).all()
    # Two prompts of each task in every bin; rows are depths, columns lengths.
    assert coded.images[0].get_array()[:, 0].tolist() == [1, 1, 1, 1, 1]
    assert coded.images[0].get_array()[:, 1].tolist() == [0, 0, 0, 0.5, 0.75]
    assert [text.get_text() for text in coded.texts] == ["100%", "0%"] * 3 + ["100%", "50%", "100%", "75%"]


def test_heat_map_of_few_prompts_has_no_empty_bins() -> None:
    figure = plot_retrieval({name: scores({("needle", 512): [True, False]}) for name in "abcde"})
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 5
    assert all(axes.images[0].get_array().tolist() == [[1], [0]] for axes in panels)


def test_ratios_stand_over_their_variants() -> None:
    series = {"ours": [("a", 1.0, 0.0), ("c", 0.9, 0.1)], "theirs": [("a", 1.0, 0.0), ("b", 0.7, 0.05)]}
    axes = plot_ratios(series, "a", "letters").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "c", "b"]
    ours, theirs = (container.lines for container in axes.containers)
    assert [round(x) for x in ours[0].get_xdata()] == [0, 1]
    assert [round(x) for x in theirs[0].get_xdata()] == [0, 2]
    assert list(theirs[0].get_ydata()) == [1.0, 0.7]
    # The bars reach one standard error up and down.
    assert ours[2][0].get_segments()[1][:, 1].tolist() == pytest.approx([0.8, 1.0])
    assert axes.get_ylabel() == "perplexity / perplexity of a"


def test_increases_stand_over_their_bits() -> None:
    axes = plot_increases(
        {"ours": [(1.0, 0.1, 0.01), (0.5, 0.4, 0.02)], "theirs": [(2.0, 0.05, 0.0)]}, "a model"
    ).axes[0]
    ours, theirs = (container.lines for container in axes.containers)
    assert list(ours[0].get_xdata()) == [0.5, 1.0]
    assert list(ours[0].get_ydata()) == [0.4, 0.1]
    assert ours[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([0.38, 0.42])
    assert list(theirs[0].get_xdata()) == [2.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "1", "2"]
