"""`gsrq eval`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..codebooks import GSRQCodebooks
from ..config import KINDS, ROUNDING
from ..evaluation.compare import compare_records, read_record
from ..evaluation.measures import MEASURES, Settings, evaluate
from ..evaluation.records import perplexity_record, run_record
from ..files import check_folder
from ..loading import load_model
from ..models import fingerprint
from ..text import token_windows
from .common import (
    BeamOption,
    ColumnOption,
    DatasetConfigOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    Report,
    RevisionOption,
    SplitOption,
    TextOption,
    TokenOption,
    check_source,
    command_line,
    named_texts,
)
from .results import comparison_text, result_tables


def run(
    model: ModelArgument,
    codebooks: Annotated[list[str], typer.Argument(metavar="CODEBOOKS", help="One or more; see `gsrq --help`.")],
    measure: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(MEASURES)}; may be repeated. Perplexity by default.")
    ] = None,
    text: TextOption = None,
    dataset: DatasetOption = None,
    dataset_config: DatasetConfigOption = None,
    split: SplitOption = "test",
    column: ColumnOption = "text",
    bits: Annotated[
        list[float] | None,
        typer.Option(help="Also these lower rates, by the first stages of the first CODEBOOKS; may be repeated."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of text to read at most.")] = 8,
    window_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    prompts: Annotated[int, typer.Option(help="Retrieval prompts of each task and length.")] = 16,
    prompt_length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a retrieval prompt, 2048 by default; may be repeated.")
    ] = None,
    residual_length: Annotated[
        int | None,
        typer.Option(help="Latest tokens kept exact: 0 by default for perplexity, 128 for retrieval and greedy text."),
    ] = None,
    sink_length: Annotated[
        int | None, typer.Option(help="First tokens kept exact: 0 by default for perplexity, 4 for the others.")
    ] = None,
    beam_width: BeamOption = 1,
    seed: Annotated[int, typer.Option(help="Of the retrieval prompts.")] = 0,
    plots: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures of perplexity (takes some minutes) and retrieval.", metavar="DIR"),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Add the perplexity to CODEBOOKS (local folders), for the model card.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="MODEL and CODEBOOKS are two records, files that --json was written to.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    model_revision: RevisionOption = None,
    token: TokenOption = None,
) -> Report:
    """Measure what CODEBOOKS cost, beside the plain cache.

    Perplexity, every token attending to what the cache stores; agreement with the plain cache's predictions, and for
    how many tokens greedy texts are the same; attribution of the increase to keys, values and quarters of the layers;
    retrieval of needles and chained variables hidden in the text; reconstruction of each layer's states.

    Use text that calibration did not see. --json prints the record of the run: results with settings, versions and
    digests. `gsrq eval --compare a.json b.json` shows two records side by side.
    """
    if compare:
        return _compare(model, codebooks)
    settings = Settings(
        measures=tuple(dict.fromkeys(measure or Settings.measures)),
        residual_length=residual_length,
        sink_length=sink_length,
        beam_width=beam_width,
        num_prompts=prompts,
        prompt_lengths=tuple(prompt_length or Settings.prompt_lengths),
        seed=seed,
    )
    _check(settings, codebooks, bits or [], plots, save)
    check_source(text, dataset)
    sources = {source: GSRQCodebooks.from_pretrained(source, token=token) for source in codebooks}
    _check_different(sources)
    rates = {**sources, **{f"{rate:g} bits": lower_rate(sources[codebooks[0]], rate) for rate in bits or ()}}
    texts, data_name = named_texts(text, dataset, split, column, dataset_config)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, revision=model_revision, token=token)
    model_fingerprint = fingerprint(loaded)
    data = token_windows(tokenizer, texts, window_length, windows)
    if plots is not None and "perplexity" in settings.measures:
        from ..evaluation.plots import MIN_TOKENS

        if data.numel() < MIN_TOKENS:
            raise ValueError(f"--plots needs windows of {MIN_TOKENS} tokens in all, these are {data.numel()}.")
    found: dict[str, dict[str, Any]] = {}
    done: list[str] = []
    failures: list[tuple[str, BaseException]] = []
    # Retrieval first: that its text is too little is told before the long work.
    for name in sorted(settings.measures, key=("retrieval", *MEASURES).index):
        with _noted(failures, f"{name} was not measured"):
            found.update(evaluate(loaded, tokenizer, texts, data, rates, replace(settings, measures=(name,))))
            done.append(name)
        if failures:
            break
    if not done:
        raise failures[0][1]
    settings = replace(settings, measures=tuple(name for name in settings.measures if name in done))
    record = run_record(
        loaded,
        data,
        rates,
        found,
        settings,
        model_fingerprint=model_fingerprint,
        data=data_name,
        command=command_line(),
    )
    saved = []
    for source, made in sources.items() if save and "perplexity" in found else ():
        with _noted(failures, f"nothing was saved with {source}"):
            entry = perplexity_record(
                loaded, data, found["perplexity"], source, data=data_name, beam_width=beam_width, **settings.reading
            )
            made.with_evaluation(entry).save_pretrained(source)
            saved.append(source)
    lines = [result_tables(record)]
    if set(settings.measures) != {"retrieval"}:
        lines.append(f"{len(data)} windows of {window_length} tokens of {data_name}.")
    if saved:
        lines.append(f"Saved with: {', '.join(saved)}.")
    if plots is not None and not any(isinstance(error, KeyboardInterrupt) for _, error in failures):
        from ..evaluation.plots import draw_all

        with _noted(failures, "the pictures were not finished"):
            record["plots"] = [str(path) for path in draw_all(plots, loaded, data, rates, found, data_name)]
            lines.append("Pictures: " + ", ".join(record["plots"]))
    return Report(record, "\n".join(lines), failures)


@contextmanager
def _noted(failures: list[tuple[str, BaseException]], undone: str) -> Iterator[None]:
    """Note what fails instead of raising it: what was measured before is shown first."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  bugs too: they are raised afterwards
        failures.append((undone, error))


def _check(settings: Settings, codebooks: list[str], bits: list[float], plots: Path | None, save: bool) -> None:
    """Refuse what would only fail after the work, and what is named twice."""
    names = [*codebooks, *(f"--bits {rate:g}" for rate in bits)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice. Name each codebooks and each rate once.")
    if plots is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError('Pictures need matplotlib: pip install "transformers-gsrq[plots]".')
    if plots is not None and not {"perplexity", "retrieval"} & set(settings.measures):
        raise ValueError("--plots draws perplexity and retrieval: add --measure perplexity or --measure retrieval.")
    if save and "perplexity" not in settings.measures:
        raise ValueError("--save keeps perplexity: add --measure perplexity.")
    if save and not all(Path(source).is_dir() for source in codebooks):
        raise ValueError("--save writes to local folders of codebooks only; download them first, and push afterwards.")
    for source in codebooks if save else ():
        check_folder("--save", Path(source))
    if plots is not None:
        check_folder("--plots", plots)


def _check_different(sources: dict[str, GSRQCodebooks]) -> None:
    """Refuse codebooks that go by two names."""
    seen: dict[str, str] = {}
    for name, made in sources.items():
        other = seen.setdefault(made.digest, name)
        if other != name:
            raise ValueError(f"{other} and {name} are the same codebooks (digest {made.digest[:12]}). Name them once.")


def _compare(first: str, others: list[str]) -> Report:
    if len(others) != 1:
        raise ValueError(f"--compare takes two records, got {1 + len(others)}: gsrq eval --compare a.json b.json")
    names = first, others[0]
    comparison = compare_records(read_record(first), read_record(others[0]), names)
    return Report(comparison.to_dict(), comparison_text(comparison, names))


def lower_rate(codebooks: GSRQCodebooks, bits: float) -> GSRQCodebooks:
    """The first stages of codebooks: `bits` per element, keys and values in the proportion that these have.

    Raises:
        ValueError: if that is not a whole number of stages for both.
    """
    config = codebooks.config
    if any(len(set(config.stages(kind))) > 1 for kind in KINDS):
        raise ValueError(
            "--bits takes the first stages of codebooks that have as many in every layer; these have "
            f"{config.key_stages} for keys and {config.value_stages} for values."
        )
    share = bits / config.bits()
    exact = {kind: config.stages(kind)[0] * share for kind in KINDS}
    stages = {kind: round(count) for kind, count in exact.items()}
    # The rates that the message lists are rounded too.
    if share > 1 or any(abs(exact[kind] - count) > ROUNDING * count or count < 1 for kind, count in stages.items()):
        legal = _lower_rates(codebooks)
        raise ValueError(
            f"--bits {bits:g} is no whole number of stages of these codebooks ({config.bits():g} bits). Legal: "
            f"{', '.join(f'{rate:g}' for rate in legal)}."
        )
    return codebooks.with_stages(stages["key"], stages["value"])


def _lower_rates(codebooks: GSRQCodebooks) -> list[float]:
    key, value = (min(codebooks.config.stages(kind)) for kind in KINDS)
    counts = [count for count in range(1, key + 1) if count * value % key == 0]
    return [codebooks.config.bits() * count / key for count in counts]
