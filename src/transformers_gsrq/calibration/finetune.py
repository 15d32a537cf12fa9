"""Self-distillation: train codebooks so that the model with the compressed cache says what it says without.

Codes are chosen as at run time and passed straight through; only centroids are trained, by the divergence from the
plain model's own predictions. The next-token loss would look better and be something else: it teaches the text.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint as recompute
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..codebooks import GSRQCodebooks
from ..compat import CACHE_ARGUMENT
from ..config import KINDS, Kind
from ..files import check_folder, write_tensors
from ..models import capped_length, fingerprint, input_device
from ..ops import encode_vectors
from ..ops.reference import decode_vectors, split_subspaces
from ..rope import read_rotary
from ..simulation import Codec, Coding, SimulatedCache, StatelessLayer, layer_device
from ..text import token_windows, windows_digest
from .capture import attached, backward_pass, check_differentiable
from .fit import exact_centroids
from .recall import HELD_OUT_WINDOWS, TrainingData, WeightedWindow
from .report import model_record

logger = logging.getLogger(__name__)

# Predictions compared at once: float32 logits of this many tokens fit beside a model.
KL_TOKENS = 512
WARM_UP_SHARE = 0.05
# Held-out divergence this many times its least means that the learning rate is too high; less is noise, which the end
# of the schedule averages out.
RISE = 1.1
# Factor on the learning rate then.
SLOWDOWN = 0.3


@dataclass(frozen=True)
class FinetuneOptions:
    """How to distill; the keywords of `finetune`."""

    steps: int = 200
    window_length: int = 2048
    batch_size: int = 1
    learning_rate: float = 3e-3
    recall_share: float = 0.25
    evaluate_every: int = 25
    patience: int = 5
    beam_width: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "window_length", "batch_size", "evaluate_every", "patience", "beam_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.recall_share <= 1:
            raise ValueError(f"recall_share must be 0 to 1, got {self.recall_share}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}.")


@torch.inference_mode(False)
@torch.enable_grad()
def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    codebooks: GSRQCodebooks,
    *,
    guard_texts: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    data_name: str | None = None,
    **options: Any,
) -> GSRQCodebooks:
    """Distill the model into its codebooks: nearer to the plain model at the same bits.

    Under `accelerate launch` every process reads other windows and gradients are averaged.

    Args:
        model: The model, on its device; its parameters are frozen meanwhile and not changed.
        tokenizer: Its tokenizer.
        texts: Training texts, best mixed from all that the model will read: prose and code, for example.
        codebooks: Where to start: calibrated for this model or for a sibling of the same geometry.
        guard_texts: Texts of a domain that is not trained on. Divergence there is reported, and a warning given if
            training made it worse.
        checkpoint: Folder that keeps the state, so that an interrupted run with the same arguments goes on.
        progress: Show a progress bar.
        data_name: What to call the texts in the provenance.
        **options: Fields of `FinetuneOptions`: `steps` (200), `window_length` (2048, capped as in `calibrate`),
            `batch_size` (1), `learning_rate` (3e-3, relative to the spread of a stage), `recall_share` (0.25, windows
            that demand exact recall), `evaluate_every` (25) and `patience` (5) of early stopping on held-out windows,
            `beam_width` (1), `gradient_checkpointing` (False, less memory for a third more time), `seed` (0).

    Returns:
        The codebooks with the least divergence on held-out windows; the last of `provenance["training"]` has the
        course, with None for a divergence that is not a finite number.

    Raises:
        ValueError: if the codebooks do not fit the model, an option is out of range, the text is too short, or the
            checkpoint was begun with another number of processes.
        RuntimeError: if the model's layers have no backward pass.
    """
    chosen = FinetuneOptions(**options)
    codebooks.config.check_model(model.config)
    check_differentiable(model, "")
    if checkpoint is not None:
        check_folder("checkpoint", Path(checkpoint))
    chosen = replace(chosen, window_length=capped_length(model, chosen.window_length))
    windows = token_windows(tokenizer, texts, chosen.window_length, seed=chosen.seed)
    if len(windows) <= HELD_OUT_WINDOWS:
        raise ValueError(
            f"The texts give {len(windows)} windows of {chosen.window_length} tokens, and {HELD_OUT_WINDOWS} are held "
            "out. Pass more text, or a smaller window_length."
        )
    guard = []
    if guard_texts is not None:
        guard = list(token_windows(tokenizer, guard_texts, chosen.window_length, HELD_OUT_WINDOWS, chosen.seed))
    data = TrainingData(
        tokenizer,
        windows,
        guard,
        recall_share=chosen.recall_share,
        batch_size=chosen.batch_size,
        seed=chosen.seed,
    )
    trainer = _Trainer(model, codebooks, data, chosen, None if checkpoint is None else Path(checkpoint), data_name)
    with _frozen(model, chosen.gradient_checkpointing):
        trainer.run(progress)
    return trainer.result()


class _Trainer:
    """Centroids under training, their optimizer, and the best ones so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        codebooks: GSRQCodebooks,
        data: TrainingData,
        options: FinetuneOptions,
        folder: Path | None,
        data_name: str | None,
    ) -> None:
        self.model, self.codebooks, self.data, self.options, self.folder = model, codebooks, data, options, folder
        self.data_name = data_name
        self.state = PartialState(cpu=input_device(model).type == "cpu")
        self.scales: dict[tuple[int, Kind], torch.Tensor] = {}
        self.parameters: dict[tuple[int, Kind], torch.Tensor] = {}
        config = codebooks.config
        for layer in config.layers:
            device = layer_device(model, layer)
            for kind in KINDS:
                start = exact_centroids(codebooks, layer, kind, device)
                # In units of the spread of its own stage: first-stage keys share a mean many times larger than that.
                spread = start - start.mean(-2, keepdim=True)
                scale = spread.square().mean((-1, -2), keepdim=True).sqrt().clamp(min=1e-8)
                self.scales[layer, kind] = scale
                self.parameters[layer, kind] = (start / scale).requires_grad_()
        # Gradients of a mean over thousands of predictions are far below the usual epsilon.
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), lr=options.learning_rate, eps=1e-15)
        self.slowdown = 1.0
        rotaries = dict.fromkeys(config.layers)
        if config.key_space == "before_rope":
            rotaries = read_rotary(model, config.layers)
        self.coding = {
            layer: Coding({kind: self._codec(layer, kind) for kind in KINDS}, rotaries[layer])
            for layer in config.layers
        }
        # Named before the long work, so that it cannot fail after it.
        guard = [windows_digest(window.input_ids) for window in data.guard]
        identity = [asdict(options), data.digest, guard, codebooks.digest, fingerprint(model)]
        self.identity = json.dumps(identity)
        self.step = 0
        self.course: list[dict[str, float]] = []
        self.best = self._snapshot()
        self.began = time.perf_counter()
        self.seconds = 0.0
        self.stopped = ""

    def run(self, progress: bool) -> None:
        self._check_backward()
        self._resume()
        if not self.course:
            self._evaluate()
        main = self.state.is_main_process
        bar = tqdm(
            total=self.options.steps,
            initial=self.step,
            desc="Distilling",
            unit="step",
            disable=not (progress and main),
        )
        with bar:
            while self.step < self.options.steps and not self.stopped:
                began = time.perf_counter()
                loss = self._train_step()
                if not math.isfinite(loss):
                    self.stopped = f"the loss was {loss} at step {self.step}"
                    logger.warning("Distillation stopped: %s. The best codebooks before it are kept.", self.stopped)
                    break
                self.step += 1
                bar.update()
                tokens = self.options.batch_size * self.options.window_length * self.state.num_processes
                speed = tokens / (time.perf_counter() - began)
                bar.set_postfix(
                    kl=f"{loss:.4f}", held_out=f"{self.course[-1]['kl']:.4f}", tokens_per_s=f"{speed:,.0f}"
                )
                if self.step % self.options.evaluate_every == 0 or self.step == self.options.steps:
                    self._evaluate()
                    self._stop_early()
                    self._save()

    def result(self) -> GSRQCodebooks:
        gains, shapes = {}, {}
        for key, centroids in self.best.items():
            gain = centroids.norm(dim=-1)
            gains[key] = gain
            shapes[key] = centroids / gain.clamp(min=1e-12)[..., None]
            # A centroid at the origin has no direction; any will do.
            shapes[key][gain < 1e-12] = F.one_hot(torch.tensor(0), centroids.shape[-1]).to(centroids)
        least = min(self.course, key=lambda point: point["kl"])
        model = model_record(self.model)
        record = {
            **asdict(self.options),
            **model,
            "data": self.data_name,
            "data_digest": self.data.digest,
            "best_step": int(least["step"]),
            "steps_run": self.step,
            "seconds": round(self.seconds, 1),
            "processes": self.state.num_processes,
            "stopped": self.stopped or "all steps done",
            "from_model": self.codebooks.provenance.get("base_model"),
            "from_digest": self.codebooks.digest,
        }
        self._report(least)
        # They belong to the model that was distilled, whatever sibling they started from.
        names = {name: model[name] for name in ("base_model", "base_model_revision")}
        # JSON knows no infinity.
        course = [{name: v if math.isfinite(v) else None for name, v in point.items()} for point in self.course]
        return self.codebooks.trained("distillation", gains, shapes, record, {"course": course}, **names)

    def _report(self, least: dict[str, float]) -> None:
        first = self.course[0]
        logger.info("Held-out divergence %.4f before, %.4f after %d steps.", first["kl"], least["kl"], least["step"])
        if self.data.guard and least["guard_kl"] > first["guard_kl"]:
            logger.warning(
                "Divergence on the texts that were not trained on rose from %.4f to %.4f: the training texts are too "
                "narrow. Mix in more kinds of text.",
                first["guard_kl"],
                least["guard_kl"],
            )

    def _codec(self, layer: int, kind: Kind) -> Codec:
        def code(states: torch.Tensor) -> torch.Tensor:
            batch, num_heads, num_tokens, _ = states.shape
            centroids = self.parameters[layer, kind] * self.scales[layer, kind]
            with torch.no_grad():
                vectors = split_subspaces(states, centroids.shape[-1])
                codes = encode_vectors(vectors, centroids, self.options.beam_width)
            flat = decode_vectors(codes.unflatten(-1, (batch, num_tokens)).permute(2, 0, 1, 3), centroids)
            made = flat.unflatten(-1, (num_heads, -1)).transpose(1, 2)
            # Straight through: the value is that of the centroids, the gradient also reaches the states.
            return made + (states - states.detach())

        return code

    def _train_step(self) -> float:
        rate = self.options.learning_rate * self.slowdown * _schedule(self.step, self.options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        windows = self.data.batch(self.step, self.state.process_index, self.state.num_processes)
        total = 0.0
        for window in windows:
            loss = self._divergence(window) / len(windows)
            loss.backward()
            total += loss.item()
        total = self._mean(total)
        if math.isfinite(total):
            for parameter in self.parameters.values():
                if self.state.num_processes > 1:
                    parameter.grad = reduce(parameter.grad, "mean")
            self.optimizer.step()
        return total

    def _check_backward(self) -> None:
        """Try on two tokens, before the long work, that gradients come back to every codebook."""
        with backward_pass(self.model, "Distill from the model with plain weights; the codebooks fit both."):
            self._divergence(WeightedWindow.plain(self.data.train[0][:2])).backward()
            if any(parameter.grad is None for parameter in self.parameters.values()):
                raise RuntimeError("some codebooks get none")
        self.optimizer.zero_grad()

    def _divergence(self, window: WeightedWindow) -> torch.Tensor:
        """Weighted mean divergence (nats) of predictions with coded states from the plain model's."""
        ids = window.input_ids[None].to(input_device(self.model))
        with torch.no_grad():
            plain = self.model(input_ids=ids, use_cache=False).logits[0]
        cache = SimulatedCache(self.model, self.coding, StatelessLayer)
        coded = self.model(input_ids=ids, **{CACHE_ARGUMENT: cache}, use_cache=True).logits[0]
        weights = window.weights.to(coded.device)
        parts = [
            recompute(_weighted_kl, coded[part], plain[part], weights[part], use_reentrant=False)
            for part in (slice(at, at + KL_TOKENS) for at in range(0, len(weights), KL_TOKENS))
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def _evaluate(self) -> None:
        point = {"step": float(self.step), "kl": self._held_out(self.data.held_out)}
        if self.data.guard:
            point["guard_kl"] = self._held_out(self.data.guard)
        least = min((old["kl"] for old in self.course), default=math.inf)
        if point["kl"] < least:
            self.best = self._snapshot()
        elif not point["kl"] < RISE * least:
            self._step_back()
        self.course.append({**point, "slowdown": self.slowdown})
        self.seconds += time.perf_counter() - self.began
        self.began = time.perf_counter()

    def _step_back(self) -> None:
        """Go on from the best codebooks at a lower rate: too high a rate then costs time, not the result."""
        self.slowdown *= SLOWDOWN
        self.optimizer.state.clear()
        for key, parameter in self.parameters.items():
            parameter.copy_(self.best[key].to(parameter.device) / self.scales[key])

    def _held_out(self, windows: list[WeightedWindow]) -> float:
        mine = windows[self.state.process_index :: self.state.num_processes]
        total = sum(self._divergence(window).item() for window in mine) / len(windows)
        mean = self._mean(total) * self.state.num_processes
        # Infinity can be compared, as NaN cannot: whatever is a number is better.
        return mean if math.isfinite(mean) else math.inf

    def _stop_early(self) -> None:
        values = [point["kl"] for point in self.course]
        since = len(values) - 1 - values.index(min(values))
        if since >= self.options.patience:
            self.stopped = f"no better on held-out windows for {since} evaluations, at step {self.step}"

    def _mean(self, value: float) -> float:
        if self.state.num_processes == 1:
            return value
        return reduce(torch.tensor(value, device=self.state.device, dtype=torch.float32), "mean").item()

    def _snapshot(self) -> dict[tuple[int, Kind], torch.Tensor]:
        return {key: (p.detach() * self.scales[key]).cpu() for key, p in self.parameters.items()}

    # State on disk

    def _save(self) -> None:
        if self.folder is None or not self.state.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for key, parameter in self.parameters.items():
            name = f"{key[0]}.{key[1]}"
            tensors[f"{name}.now"] = parameter.detach()
            tensors[f"{name}.best"] = self.best[key]
            for moment, tensor in self.optimizer.state[parameter].items():
                tensors[f"{name}.{moment}"] = tensor
        progress = {
            "step": self.step, "course": self.course, "seconds": self.seconds, "stopped": self.stopped,
            "slowdown": self.slowdown, "processes": self.state.num_processes,
        }  # fmt: skip
        metadata = {"identity": self.identity, "progress": json.dumps(progress)}
        write_tensors(self.folder / "state.safetensors", tensors, metadata)

    def _resume(self) -> None:
        path = None if self.folder is None else self.folder / "state.safetensors"
        if path is None or not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != self.identity:
                logger.warning("%s belongs to a distillation with other arguments; starting anew.", path)
                return
            progress = json.loads(metadata["progress"])
            if progress["processes"] != self.state.num_processes:
                # Its steps would read other windows than those before them.
                raise ValueError(
                    f"The distillation in {self.folder} was begun with {progress['processes']} process(es) and cannot "
                    f"go on with {self.state.num_processes}. Launch as many as before, or begin another elsewhere."
                )
            self.step, self.course = progress["step"], progress["course"]
            self.seconds, self.stopped = progress["seconds"], progress["stopped"]
            self.slowdown = progress["slowdown"]
            for key, parameter in self.parameters.items():
                name = f"{key[0]}.{key[1]}"
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"{name}.now"))
                self.best[key] = file.get_tensor(f"{name}.best")
                if f"{name}.step" in file.keys():  # not a dict
                    self.optimizer.state[parameter] = {
                        "step": file.get_tensor(f"{name}.step"),
                        **{m: file.get_tensor(f"{name}.{m}").to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
                    }


def _weighted_kl(coded: torch.Tensor, plain: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of weight * KL(plain || coded), from logits `[T, V]`."""
    plain = plain.float().log_softmax(-1)
    return (F.kl_div(coded.float().log_softmax(-1), plain, reduction="none", log_target=True).sum(-1) * weights).sum()


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm_up = max(1, int(steps * WARM_UP_SHARE))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@contextmanager
def _frozen(model: PreTrainedModel, gradient_checkpointing: bool) -> Iterator[None]:
    """The model attached, without trainable parameters or dropout; as before afterwards."""
    # By name: accelerate makes new parameters of weights that it offloads.
    trainable = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    layers = list(model.get_decoder().layers) if gradient_checkpointing else []
    # Where accelerate has hooked a layer, the layer has a forward of its own.
    forwards = [vars(layer).get("forward") for layer in layers]
    with attached(model):
        model.requires_grad_(False)
        for layer in layers:
            # transformers' own switch drops the cache, and with it the codes.
            layer.forward = partial(recompute, layer.forward, use_reentrant=False)
        try:
            yield
        finally:
            for layer, forward in zip(layers, forwards, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if name in trainable:
                    parameter.requires_grad_()
