"""Fidelity at equal bits: every method on one model, the same texts, starts, seeds and iterations.

    python benchmarks/fidelity_texts.py texts
    python benchmarks/fidelity.py MODEL --calibration texts/calibration.jsonl --haystack texts/unseen.jsonl \
        --domain prose=texts/prose.jsonl --domain code=texts/code.jsonl --domain unseen=texts/unseen.jsonl \
        --output results.json

MODEL is a folder, a Hub id or a GGUF file. Text files hold one JSON object a line, with a "text". Results are written
as they come, and stages that would begin after --seconds are left out, so that an interrupted run keeps what it
has. With several GPUs, run one part of the study on each (--parts), then join them:

    python benchmarks/fidelity.py --join recipe.json improved.json baselines.json --output results.json
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from transformers_gsrq import GSRQCodebooks, GSRQConfig
from transformers_gsrq.calibration import capture, fit
from transformers_gsrq.calibration.finetune import finetune
from transformers_gsrq.calibration.refine import refine
from transformers_gsrq.compat import quantized_backends
from transformers_gsrq.config import PREFERRED_SUBSPACE_DIM, stages_for_bits
from transformers_gsrq.evaluation.agreement import measure_agreement
from transformers_gsrq.evaluation.baselines import (
    STRIDED_DIM,
    QuantizedCacheMethod,
    ScalarMethod,
    coupled_config,
    fit_strided,
)
from transformers_gsrq.evaluation.plots import Figure, plot_increases, save_figures
from transformers_gsrq.evaluation.records import circumstances, git_commit
from transformers_gsrq.evaluation.retrieval import make_prompts, measure_retrieval, read_prompts
from transformers_gsrq.evaluation.split import choose_split
from transformers_gsrq.loading import load_model
from transformers_gsrq.simulation import CodebookMethod, Method, stage_prefix
from transformers_gsrq.text import token_windows, windows_digest

RATES = (2.0, 1.0, 0.75, 0.5, 0.375)
# Distillation is the costly part; the rates that it is shown at.
TRAINED_RATES = (1.0, 0.5)
TASKS = ("needle", "needle_of_four")
PARTS = ("recipe", "improved", "clusterings", "baselines")
RECIPE = "GSKM + log"
DRAWN = {
    "CQ": "CQ",
    "VQLLM-like": "VQLLM-like",
    "kmeans": "k-means",
    RECIPE: "GSKM, log weights (the paper's recipe)",
    "distilled": "+ split, refined, distilled",
    "distilled + beam 4": "+ beam 4",
}


class Study:
    """One model, its data, and the results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.perf_counter()
        self.model, self.tokenizer = load_model(args.model, dtype=torch.bfloat16)
        self.calibration = read_lines(args.calibration)
        # Splits are chosen on text that is neither fitted nor reported.
        self.calibration, self.choosing = self.calibration[:-40], self.calibration[-40:]
        self.domains = {}
        for entry in args.domain:
            name, _, path = entry.partition("=")
            self.domains[name] = token_windows(self.tokenizer, read_lines(path), args.length, args.windows)
        self.haystack = read_lines(args.haystack)[-200:]
        self.codebooks: dict[Any, GSRQCodebooks] = {}
        self.prompts: list[Any] = []
        self.samples: Any = None
        width = GSRQConfig.for_model(self.model.config, bits=2.0).key_subspace_dim
        self.stages = {rate: max(1, round(rate * width / 8)) for rate in RATES}
        self.results: dict[str, Any] = {
            **circumstances(self.model),
            "commit": args.commit,
            "settings": {key: value for key, value in vars(args).items() if key not in ("output", "images", "commit")},
            "data": {name: windows_digest(windows) for name, windows in self.domains.items()},
            "subspace_dim": width,
            "rows": {},
            "seconds": {},
        }
        where = f"{self.elapsed():.0f} s on {self.model.device}"
        print(f"loaded in {where}, width {width}, stages {self.stages}", flush=True)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def run(self, name: str, stage: Callable[[], None], needs: float = 0.0) -> None:
        """Run one stage; a stage that fails is recorded and the others go on."""
        if self.elapsed() + needs > self.args.seconds:
            self.results["seconds"][name] = "left out: no time"
            print(f"--- {name}: left out at {self.elapsed():.0f} s", flush=True)
            return
        began = time.perf_counter()
        try:
            stage()
            self.results["seconds"][name] = round(time.perf_counter() - began, 1)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError) as error:
            traceback.print_exc()
            self.results["seconds"][name] = f"failed: {error}"[:300]
        print(f"--- {name}: {self.results['seconds'][name]} ({self.elapsed():.0f} s in all)", flush=True)
        self.save()

    def save(self) -> None:
        """Write the results."""
        path = Path(self.args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.results, indent=1, default=str) + "\n")

    # Measuring

    def measure(
        self, methods: dict[str, tuple[float, Method]], texts: bool = True, prompts: int | None = None
    ) -> None:
        """Add rows: agreement on every domain, retrieval on the first `prompts` batches (all if None)."""
        named = {name: method for name, (_, method) in methods.items()}
        for name, (rate, method) in methods.items():
            row = self.results["rows"].setdefault(name, {"rate": rate, "bits": method.bits, "agreement": {}})
            row.setdefault("retrieval", {})
        if texts:
            for domain, windows in self.domains.items():
                found = measure_agreement(self.model, windows, named, batch_size=self.args.batch_size, progress=False)
                self.results.setdefault("plain", {})[domain] = asdict(found["plain"].perplexity)
                for name in methods:
                    self.results["rows"][name]["agreement"][domain] = found[name].to_dict()
        found = measure_retrieval(self.model, self.prompts[:prompts], named) if self.prompts and prompts != 0 else {}
        for name, scores in found.items():
            row = self.results["rows"].setdefault(name, {"rate": 16, "bits": 16, "agreement": {}, "retrieval": {}})
            add_scores(row, {score.task: {**asdict(score), "prompts": len(score.hits)} for score in scores})
        self.save()

    # Stages of the study

    def read_haystacks(self) -> None:
        """Prefill all retrieval prompts once; tasks alternate, so that a first part has both."""
        by_task = [
            list(
                read_prompts(
                    self.model,
                    shuffled(
                        make_prompts(self.tokenizer, self.haystack, task, self.args.prompt_length, self.args.prompts)
                    ),
                    batch_size=self.args.prompt_batch,
                    progress=False,
                )
            )
            for task in TASKS
        ]
        self.prompts = [batch for pair in zip(*by_task, strict=True) for batch in pair]

    def capture(self) -> None:
        """Keys, values and gradients for all fits."""
        windows = token_windows(self.tokenizer, self.calibration, self.args.length, self.args.samples, seed=0)
        config = GSRQConfig.for_model(self.model.config, bits=2.0)
        self.samples = capture(self.model, windows, config, max_vectors=self.args.max_vectors, progress=False)
        self.results["calibration"] = {
            "windows": len(windows), "length": windows.shape[1], "vectors": self.samples.num_vectors,
            "iterations": self.args.iterations, "data_digest": self.samples.data_digest,
        }  # fmt: skip

    def learn(self, name: str, key_stages: int, value_stages: int, **options: Any) -> None:
        """Fit codebooks under a name."""
        base = GSRQConfig.for_model(self.model.config, bits=2.0)
        layers = len(base.layers)
        config = replace(base, key_stages=(key_stages,) * layers, value_stages=(value_stages,) * layers)
        self.codebooks[name] = fit(
            self.samples, config, iterations=self.args.iterations, progress=False, **options
        )  # fmt: skip

    def even_rows(self, name: str, label: str, rates: Iterable[float]) -> dict[str, tuple[float, Method]]:
        """As many stages for keys as for values, by prefix."""
        return {
            f"{label} @{rate:g}": (
                rate, CodebookMethod(self.codebooks[name].with_stages(self.stages[rate], self.stages[rate]))
            )
            for rate in rates
        }  # fmt: skip

    def choose(self) -> None:
        """The measured split of every rate."""
        windows = token_windows(self.tokenizer, self.choosing, self.args.length, 8)
        prompts = [
            prompt
            for task in TASKS
            for prompt in make_prompts(
                self.tokenizer, self.choosing, task, self.args.prompt_length // 2, self.args.choosing_prompts, seed=7
            )
        ]
        self.results["splits"] = {}
        for rate in RATES if "recipe" in self.args.parts else self.args.train_rates:
            bits = self.stages[rate] * 8 / self.results["subspace_dim"]
            choice = choose_split(
                self.model,
                self.codebooks["log"],
                bits,
                windows,
                prompts,
                batch_size=self.args.batch_size,
                progress=False,
            )
            self.results["splits"][f"{rate:g}"] = asdict(choice)
            print(f"split @{rate:g}: {choice.reason}", flush=True)
            pair = choice.chosen.key_stages, choice.chosen.value_stages
            self.codebooks["split", rate] = self.codebooks["log"].with_stages(*pair)

    def improve(self, rate: float) -> None:
        """Refined, then distilled codebooks of one rate."""
        start = self.codebooks["split", rate]
        refined = refine(self.samples, start, rounds=self.args.rounds, progress=False)
        self.codebooks["refined", rate] = refined
        report = refined.provenance["training"][-1]["measured"]["report"]
        for kind in ("key", "value"):
            mine = [entry for entry in report if entry["kind"] == kind]
            before, after = (sum(entry[k] for entry in mine) / len(mine) for k in ("before", "after"))
            print(f"refine @{rate:g} {kind}: held-out error {before:.4f} -> {after:.4f}", flush=True)
        self.distill(refined, rate, "distilled", self.args.learning_rate)

    def distill(self, start: GSRQCodebooks, rate: float, name: str, learning_rate: float) -> None:
        """Distill codebooks under a name; their provenance goes into the results."""
        made = finetune(
            self.model, self.tokenizer, self.calibration, start, guard_texts=self.haystack[:40],
            steps=self.args.steps, window_length=self.args.length, batch_size=self.args.train_batch,
            learning_rate=learning_rate,
            evaluate_every=max(1, self.args.steps // 8), progress=False,
        )  # fmt: skip
        self.codebooks[name, rate] = made
        record = made.provenance["training"][-1]
        record = {**record, **record.pop("measured")}
        self.results.setdefault("distillation", {})[f"{name} @{rate:g}"] = record
        print(f"{name} @{rate:g}, rate {learning_rate}: {record['seconds']} s, {record['course']}", flush=True)

    def tune(self) -> None:
        """Take the learning rate that leaves least divergence on held-out windows after half the steps."""
        steps, self.args.steps = self.args.steps, max(1, self.args.steps // 2)
        for rate in self.args.try_rates:
            self.distill(self.codebooks["split", 1.0], 1.0, f"rate {rate:g}", rate)
        self.args.steps = steps
        tried = {rate: self.results["distillation"][f"rate {rate:g} @1"] for rate in self.args.try_rates}
        # A divergence that was not finite is None.
        least = {rate: min(p["kl"] for p in run["course"] if p["kl"] is not None) for rate, run in tried.items()}
        self.args.learning_rate = min(least, key=least.__getitem__)
        self.results["learning_rate"] = self.args.learning_rate

    def learned_rows(self, kind: str, rates: Iterable[float], beam: int = 1) -> dict[str, tuple[float, Method]]:
        """Rows of what `choose` and `improve` made."""
        suffix = f" + beam {beam}" if beam > 1 else ""
        return {
            f"{kind}{suffix} @{rate:g}": (rate, CodebookMethod(self.codebooks[kind, rate], beam_width=beam))
            for rate in rates
            if (kind, rate) in self.codebooks
        }


def read_lines(path: str | Path) -> list[str]:
    """Texts of a file with one JSON object a line."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def shuffled(items: list[Any]) -> list[Any]:
    """In a fixed order that spreads depths over the first part."""
    return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()]


def of_recipe(results: dict[str, Any], row: dict[str, Any]) -> str:
    """A row's increase of perplexity as a fraction of the paper's recipe at the same rate, mean over the domains."""
    recipe = results["rows"].get(f"{RECIPE} @{row['rate']:g}", {}).get("agreement", {})
    if not recipe or not row["agreement"]:
        return "-"
    increases = [
        [agreement[domain]["perplexity"]["increase"] for domain in results["data"]]
        for agreement in (row["agreement"], recipe)
    ]
    return f"{sum(ours / theirs for ours, theirs in zip(*increases, strict=True)) / len(results['data']):.2f}"


def print_table(results: dict[str, Any]) -> None:
    """Perplexity above the plain cache in percent, with standard errors, and retrieval."""
    domains = list(results["data"])
    print(f"\n{results['model']} on {results['device']}; plain perplexity: ", end="")
    print(", ".join(f"{d} {results['plain'][d]['value']:.2f}" for d in domains if d in results.get("plain", {})))
    print(
        f"{'method':<28}{'bits':>6} "
        + "".join(f"{d:>16}" for d in domains)
        + f"{'of recipe':>10}{'KL':>8}{'needle':>14}{'of four':>14}"
    )
    for name, row in results["rows"].items():
        cells = []
        for domain in domains:
            found = row["agreement"].get(domain)
            cells.append(
                f"{found['perplexity']['increase']:+8.1%} ±{found['perplexity']['increase_error']:5.1%}"
                if found
                else "-"
            )
        divergences = [found["divergence"] for found in row["agreement"].values()]
        mean = sum(divergences) / len(divergences) if divergences else math.nan
        scores = []
        for task in TASKS:
            found = row["retrieval"].get(task)
            scores.append(f"{found['accuracy']:.1%} n={found['prompts']}" if found else "-")
        print(
            f"{name:<28}{row['bits']:>6.3g} "
            + "".join(f"{c:>16}" for c in cells)
            + f"{of_recipe(results, row):>10}{mean:>8.3f}"
            + "".join(f"{s:>14}" for s in scores)
        )


def draw(results: dict[str, Any]) -> dict[str, Figure]:
    """Mean increase of perplexity over the domains against bits, one line for each method."""
    series: dict[str, list[tuple[float, float, float]]] = {}
    for method, label in DRAWN.items():
        rows = [row for name, row in results["rows"].items() if name.rpartition(" @")[0] == method]
        for row in rows:
            found = [row["agreement"][domain]["perplexity"] for domain in results["data"]]
            mean = sum(one["increase"] for one in found) / len(found)
            error = math.hypot(*(one["increase_error"] for one in found)) / len(found)
            series.setdefault(label, []).append((row["rate"], mean, error))
    name = Path(results["model"].split(",")[0]).name
    return {f"fidelity-{name.lower()}": plot_increases(series, f"{name}, mean of {', '.join(results['data'])}")}


def join(paths: Iterable[str]) -> dict[str, Any]:
    """One result of several parts of a study; what two of them have is that of the first, but for longer retrieval."""
    joined: dict[str, Any] = {"parts": []}
    for path in paths:
        part = json.loads(Path(path).read_text())
        if joined.setdefault("data", part["data"]) != part["data"]:
            raise SystemExit(f"{path} measured other texts than the parts before it.")
        # A record that was joined before brings the parts that it was made of.
        own = {key: part.pop(key) for key in ("commit", "settings", "seconds", "splits") if key in part}
        own["device"] = part["device"]
        joined["parts"] += part.pop("parts", [own])
        rows = joined.setdefault("rows", {})
        for name, row in part.pop("rows").items():
            add_scores(rows.setdefault(name, row), row["retrieval"])
        for key, value in part.items():
            joined[key] = {**value, **joined.get(key, {})} if key == "distillation" else joined.setdefault(key, value)
    return joined


def add_scores(row: dict[str, Any], scores: dict[str, Any]) -> None:
    """Give a row retrieval scores by task, unless it has some of as many prompts."""
    for task, score in scores.items():
        if score["prompts"] > row["retrieval"].get(task, {"prompts": 0})["prompts"]:
            row["retrieval"][task] = score


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--join", nargs="+", metavar="FILE", help="join the results of parts, and measure nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--calibration")
    parser.add_argument("--domain", action="append", default=[], help="NAME=FILE")
    parser.add_argument("--haystack")
    parser.add_argument("--output", default="fidelity.json")
    parser.add_argument("--images", help="folder for a picture of the results")
    parser.add_argument("--commit", default=git_commit(), help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no stage after this")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=12, help="windows of each domain")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--max-vectors", type=int, default=32768)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of joint refinement")
    parser.add_argument("--train-rates", type=float, nargs="+", default=TRAINED_RATES, help="bits to distill at")
    parser.add_argument("--steps", type=int, default=480, help="steps of distillation")
    parser.add_argument("--train-batch", type=int, default=1, help="windows of a step of distillation")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--try-rates", type=float, nargs="*", default=[], help="learning rates to choose from")
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64, help="retrieval prompts of each task")
    parser.add_argument("--prompt-length", type=int, default=8192)
    parser.add_argument("--prompt-batch", type=int, default=8)
    parser.add_argument("--choosing-prompts", type=int, default=16)
    args = parser.parse_args()
    if not args.join and not (args.model and args.calibration and args.domain and args.haystack):
        parser.error("a study needs MODEL, --calibration, --domain and --haystack")
    return args


def main() -> None:
    """Run all stages and print the table."""
    logging.basicConfig(level=logging.WARNING)
    args = parse()
    if args.join:
        results = join(args.join)
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    else:
        results = run_study(Study(args))
    print_table(results)
    if args.images:
        save_figures(draw(results), args.images)


def run_study(study: Study) -> dict[str, Any]:
    """All stages of the parts asked for."""
    args = study.args
    high = study.stages[2.0]
    study.run("capture", study.capture)
    study.run("haystacks", study.read_haystacks)
    if "recipe" in args.parts or "improved" in args.parts:
        study.run("fit log", lambda: study.learn("log", high, high + high // 4, weighting="log"))
    if "recipe" in args.parts:
        study.run("log rows", lambda: study.measure(study.even_rows("log", RECIPE, RATES)))
    if "recipe" in args.parts or "improved" in args.parts:
        study.run("choose split", study.choose)
    if "improved" in args.parts:
        if args.try_rates:
            study.run("learning rates", study.tune)
        for rate in args.train_rates:
            study.run(f"improve {rate:g}", lambda rate=rate: study.improve(rate), needs=60)
            study.run(f"improved rows {rate:g}", lambda rate=rate: improved_rows(study, rate))
    if "recipe" in args.parts:
        study.run("split rows", lambda: study.measure(study.learned_rows("split", RATES)))
        study.run("attribution", lambda: attribution_rows(study))
    if "clusterings" in args.parts:
        for method, weighting in (("kmeans", "none"), ("gskm", "none"), ("gskm", "raw")):
            label = method if weighting == "none" else "GSKM + raw"
            study.run(
                f"fit {label}",
                lambda m=method, w=weighting, n=label: study.learn(n, high, high, method=m, weighting=w),
                needs=25,
            )
            study.run(f"{label} rows", lambda n=label: clustering_rows(study, n))
    if "baselines" in args.parts:
        study.run("scalar rows", lambda: scalar_rows(study))
        study.run("coupled", lambda: coupled_rows(study), needs=20)
        study.run("strided", lambda: strided_rows(study), needs=20)
    study.results["total_seconds"] = round(study.elapsed(), 1)
    study.save()
    return study.results


def improved_rows(study: Study, rate: float) -> None:
    """Refined, distilled, and both with a beam."""
    beam = study.args.beam
    study.measure(study.learned_rows("distilled", [rate]))
    study.measure(study.learned_rows("refined", [rate]), prompts=8)
    study.measure(study.learned_rows("distilled", [rate], beam))
    study.measure(study.learned_rows("split", [rate], beam), prompts=0)


def clustering_rows(study: Study, name: str) -> None:
    """All rates; retrieval on a quarter of the prompts."""
    if name in study.codebooks:
        study.measure(study.even_rows(name, name, RATES), prompts=4)


def scalar_rows(study: Study) -> None:
    """KIVI's layout, and transformers' own caches where installed; bits count scales and zero points."""
    group = min(32, PREFERRED_SUBSPACE_DIM)
    methods = {bits: ScalarMethod.for_model(study.model, bits, group) for bits in (2, 1)}
    rows: dict[str, tuple[float, Method]] = {f"scalar {bits} bit": (m.bits, m) for bits, m in methods.items()}
    for backend in quantized_backends():
        cache = QuantizedCacheMethod(study.model.config, backend, 2)
        rows[f"transformers, {backend} 2 bit"] = (cache.bits, cache)
    study.measure(rows, prompts=4)


def coupled_rows(study: Study) -> None:
    """Coupled quantization where whole channels allow it."""
    base = GSRQConfig.for_model(study.model.config, bits=2.0)
    rows = {}
    for rate in (2.0, 1.0, 0.5):
        made = fit(
            study.samples, coupled_config(base, rate), iterations=study.args.iterations, method="kmeans",
            weighting="raw", progress=False,
        )  # fmt: skip
        rows[f"CQ @{rate:g}"] = (rate, CodebookMethod(made))
    study.measure(rows, prompts=4)


def strided_rows(study: Study) -> None:
    """Like VQLLM, at the rates that are whole stages there."""
    base = GSRQConfig.for_model(study.model.config, bits=2.0)
    full = fit_strided(study.samples, base, RATES[0], iterations=study.args.iterations)
    rows = {}
    for rate in RATES[:4]:
        stages = stages_for_bits(rate, STRIDED_DIM)
        rows[f"VQLLM-like @{rate:g}"] = (rate, stage_prefix(full, stages, stages))
    study.measure(rows, prompts=4)


def attribution_rows(study: Study) -> None:
    """The paper's recipe at 1 bit with one kind exact."""
    stages = study.stages[1.0]
    books = study.codebooks["log"].with_stages(stages, stages)
    study.measure(
        {f"log, {kind}s only @1": (1.0, CodebookMethod(books, kinds=(kind,))) for kind in ("key", "value")}, prompts=4
    )


if __name__ == "__main__":
    main()
