"""Every Python block of README and docs is run, every command line in them is parsed, every link leads somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from torch import nn

from transformers_gsrq import GSRQConfig, calibrate
from transformers_gsrq.cli import app
from transformers_gsrq.demo import DEFAULT_FOLDER, load_embedded_model
from transformers_gsrq.evaluation.perplexity import summarize

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of every block of a language."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start()].count("\n") + 2, re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE))
        for match in FENCE.finditer(text)
        if match[2] == language
    ]


@pytest.fixture(scope="module")
def demo_folder(
    smollm2: tuple[Any, Any], texts: tuple[list[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `make demo` leaves behind, but quick: the first layers of the same model, and rough codebooks for them."""
    folder = tmp_path_factory.mktemp("docs") / DEFAULT_FOLDER.name
    real = Path(smollm2[0].config.name_or_path)
    model, tokenizer = load_embedded_model(real.parent)
    model.model.layers = nn.ModuleList(model.model.layers[:2])
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder / real.name)
    tokenizer.save_pretrained(folder / real.name)
    config = GSRQConfig.for_model(model.config, bits=1.0)
    options = {"num_samples": 2, "window_length": 256, "iterations": 1, "progress": False}
    calibrate(model, tokenizer, texts[0][:1], config, **options).save_pretrained(folder / "codebooks-1bit")
    return folder


@pytest.fixture
def workspace(demo_folder: Path, texts: tuple[list[str], list[str]], tmp_path: Path, monkeypatch: Any) -> Path:
    """Working folder of a reader who has run the demo and has texts of their own."""
    (tmp_path / DEFAULT_FOLDER).parent.mkdir()
    (tmp_path / DEFAULT_FOLDER).symlink_to(demo_folder)
    for name, text in (("my-text.txt", texts[0][0]), ("held-out.txt", texts[1][0])):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
@pytest.mark.usefixtures("workspace")
def test_python_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Blocks of one page follow each other, as a reader would run them.
    namespace: dict[str, Any] = {"__name__": page.stem}
    shown = dict(blocks(page, "text"))
    for line, source in blocks(page, "python"):
        capsys.readouterr()
        # Padded, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)
        # A text block right below says what the block prints.
        below = line + source.count("\n") + 3
        if below in shown:
            assert capsys.readouterr().out == shown[below]


def command_lines() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for _, source in blocks(page, "bash"):
            for line in source.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0].endswith("gsrq"):
                    found.append((page.stem, words[1:]))
    return found


@pytest.mark.parametrize(("page", "words"), command_lines(), ids=lambda value: value if isinstance(value, str) else "")
def test_command_lines_are_legal(page: str, words: list[str]) -> None:
    group = typer.main.get_command(app)
    if words == ["--help"]:
        return
    name, *rest = words
    command = group.get_command(None, name)
    assert command is not None, f"{page}: there is no `gsrq {name}`"
    if rest != ["--help"]:
        # Raises a usage error for an unknown option, a missing argument or a value of the wrong type.
        assert command.make_context(name, list(rest)).params


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.split("#")[0] for target in LINK.findall(text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert missing == []


def test_tables_of_perplexities_are_what_was_recorded() -> None:
    record = json.loads((ROOT / "docs" / "records" / "rates-smollm2-h100.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "choosing-bits.md").read_text(encoding="utf-8")
    assert f"commit {record['commit']}" in readme
    assert f"commit {record['commit']}" in page
    assert f"{record['results']['plain']['value']:.1f}" in readme
    for bits in ("2", "1", "0.75", "0.5"):
        for name in ("kmeans, weights none", "gskm, weights none", "kmeans, weights log", "gskm, weights log"):
            found = record["results"][f"{name}, {bits} bits"]
            increase, error = f"{found['increase']:+.0%}", f"{found['increase_error']:.0%}"
            cell = f"{found['value']:.1f} ({increase.rstrip('%')} ± {error.rstrip('%')} %)"
            row = next(line for line in readme.splitlines() if line.startswith(f"| {bits} |"))
            assert cell in row
        row = f"{found['value']:.1f} ± {found['standard_error']:.1f} | {increase} ± {error} |"
        assert row in next(line for line in page.splitlines() if line.startswith(f"| {bits} bit"))


def test_gains_of_clustering_and_weights_are_what_was_recorded() -> None:
    record = json.loads((ROOT / "docs" / "records" / "rates-smollm2-h100.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    def gain(name: str, base: str, bits: str) -> str:
        losses, plain = (torch.tensor(record["results"][f"{n}, {bits} bits"]["losses"]).double() for n in (name, base))
        found = summarize(losses, plain)
        return f"{-found.increase * 100:.1f} ± {found.increase_error * 100:.1f} %"

    weights = [gain(f"{method}, weights log", f"{method}, weights none", "0.5") for method in ("kmeans", "gskm")]
    assert f"take {weights[0]} off the perplexity of k-means at 0.5 bits and {weights[1]} off GSKM's" in readme
    ahead = [gain("gskm, weights none", "kmeans, weights none", bits) for bits in ("1", "0.5")]
    assert f"GSKM is {ahead[0]} of the perplexity ahead of k-means at 1 bit and {ahead[1]} at 0.5" in readme


def test_table_of_the_ablation_is_what_was_recorded() -> None:
    record = json.loads((ROOT / "docs" / "records" / "ablation-smollm2-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    fits = record["fits"]

    def cell(name: str, bits: str, seed: str = "") -> str:
        losses, base = (torch.tensor(fits[n + seed]["losses"][bits]).double() for n in (name, "k-means"))
        found = summarize(losses, base)
        return f"{1 + found.increase:.3f} ± {found.increase_error:.3f}"

    for name in ("k-means", "GSKM", "GSKM, raw weights", "GSKM, log weights", "k-means, log weights"):
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        for bits in ("0.375", "1"):
            found = summarize(
                *(torch.tensor(values).double() for values in (fits[name]["losses"][bits], record["plain"]))
            )
            assert f"| {found.increase:+.0%} ± {found.increase_error:.0%} |" in row
            assert name == "k-means" or cell(name, bits) in row
        if name.startswith("GSKM"):
            assert " / ".join(cell(name, "0.375", seed) for seed in ("", ", seed 1", ", seed 2")) in row
    assert {fit["commit"][:7] for fit in fits.values()} == set(re.search("commits (\\w+) and (\\w+)", page).groups())


@pytest.mark.parametrize("name", ["fidelity-qwen2.5-coder-1.5b-h200", "fidelity-smollm2-h200"])
def test_tables_of_fidelity_are_what_was_recorded(name: str) -> None:
    record = json.loads((ROOT / "docs" / "records" / f"{name}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8").replace("**", "")
    plain = [f"{record['plain'][domain]['value']:.2f}" for domain in ("prose", "code", "unseen")]
    assert f"{plain[0]}, {plain[1]} and {plain[2]}" in page
    for row in record["rows"].values():
        cells = []
        for domain in ("prose", "code", "unseen") if row["agreement"] else ():
            found = row["agreement"][domain]["perplexity"]
            increase, digits = found["increase"], 1 if found["increase"] < 1 else 0
            error = f"{found['increase_error']:.{digits}%}"
            cells.append(f"{increase:+.{digits}%} ± {error}" if increase < 20 else f"× {1 + increase:,.0f}")
        assert " | ".join(cells) in page
        for scores in row["retrieval"].values():
            assert row["rate"] == 16 or f"| {sum(hit for _, hit in scores['hits'])}/{scores['prompts']} |" in page


def test_summary_of_fidelity_is_what_was_recorded() -> None:
    rows = json.loads((ROOT / "docs" / "records" / "fidelity-qwen2.5-coder-1.5b-h200.json").read_text())["rows"]
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    for rate in ("2", "1", "0.75", "0.5", "0.375"):
        both = [rows[f"{name} @{rate}"] for name in ("GSKM + log", "distilled + beam 4")]
        found = [[row["agreement"][kind]["perplexity"] for kind in ("prose", "code", "unseen")] for row in both]
        increases = torch.tensor([[kind["increase"] for kind in row] for row in found])
        cells = [f"{mean:+.{1 if mean < 1 else 0}%}" for mean in increases.mean(1).tolist()]
        cells.append(f"{(increases[1] / increases[0]).mean():.2f}")
        for task in ("needle", "needle_of_four"):
            cells.append(", ".join(str(sum(hit for _, hit in row["retrieval"][task]["hits"])) for row in both))
        assert f"| {rate} | {' | '.join(cells)} |" in page


def test_there_is_something_to_test() -> None:
    assert len(command_lines()) > 5
    assert sum(len(blocks(page, "python")) for page in PAGES) > 10
