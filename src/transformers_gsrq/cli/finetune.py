"""`gsrq finetune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import PartialState

from ..calibration.finetune import finetune
from ..card import nats
from ..codebooks import GSRQCodebooks
from ..loading import load_model, read_texts
from .common import (
    BeamOption,
    CodebooksArgument,
    DeviceOption,
    DtypeOption,
    Interrupted,
    ModelArgument,
    Report,
    RevisionOption,
    TokenOption,
    files_name,
    partial_folder,
    remove_partial,
)


def run(
    model: ModelArgument,
    codebooks: CodebooksArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the new codebooks.", metavar="DIR")],
    text: Annotated[
        list[Path],
        typer.Option("--text", help="UTF-8 text file, or folder of .txt files; may be repeated.", metavar="FILE"),
    ],
    guard: Annotated[
        list[Path] | None,
        typer.Option(help="Text of a kind that is not trained on, to see that it gains too.", metavar="FILE"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps at most.")] = 200,
    window_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows of a step.")] = 1,
    learning_rate: Annotated[
        float, typer.Option(help="Step of a centroid, relative to the spread of its stage.")
    ] = 3e-3,
    recall_share: Annotated[float, typer.Option(help="Share of windows that hide something to be repeated.")] = 0.25,
    evaluate_every: Annotated[
        int,
        typer.Option(
            help="Steps from one evaluation on held-out (and --guard) windows to the next; the state is saved then."
        ),
    ] = 25,
    patience: Annotated[int, typer.Option(help="Evaluations without progress after which it stops.")] = 5,
    beam_width: BeamOption = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order of texts and of the recall windows.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    model_revision: RevisionOption = None,
    token: TokenOption = None,
) -> Report:
    """Distill MODEL into CODEBOOKS at the same bits.

    The codebooks come nearer to the plain model; size, speed and format stay the same. An interrupted run goes on
    where it stopped when the same command is given again. On several GPUs of one machine:
    accelerate launch --num_processes 4 -m transformers_gsrq finetune MODEL CODEBOOKS ...
    """
    checkpoint = partial_folder(output)
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    if state.num_processes > 1:
        device = device or str(state.device)
    texts = read_texts(text)
    guard_texts = read_texts(guard) if guard else None
    start = GSRQCodebooks.from_pretrained(codebooks, token=token)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, revision=model_revision, token=token)
    try:
        made = finetune(
            loaded,
            tokenizer,
            texts,
            start,
            guard_texts=guard_texts,
            checkpoint=checkpoint,
            steps=steps,
            window_length=window_length,
            batch_size=batch_size,
            learning_rate=learning_rate,
            recall_share=recall_share,
            evaluate_every=evaluate_every,
            patience=patience,
            beam_width=beam_width,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            data_name=files_name(text),
        )
        if state.is_main_process:
            made.save_pretrained(output)
        state.wait_for_everyone()
    except KeyboardInterrupt as stopped:
        said = f"Nothing was kept: the first state is saved after {evaluate_every} steps (--evaluate-every)."
        if (checkpoint / "state.safetensors").is_file():
            said = f"What was learned up to the last evaluation is kept in {checkpoint}; the same command goes on."
        raise Interrupted(f"Interrupted. {said}") from stopped
    state.destroy_process_group()
    if not state.is_main_process:
        sys.exit()
    remove_partial(checkpoint, "state.safetensors")
    record = dict(made.provenance["training"][-1])
    record.update(record.pop("measured"))
    course = record["course"]
    best = next(point for point in course if point["step"] == record["best_step"])
    lines = [
        f"Saved to {output}. {record['stopped'].capitalize()}; {record['seconds']:g} s.",
        f"Divergence from the plain model on held-out text: {nats(course[0]['kl'])} before, {nats(best['kl'])} after "
        f"step {record['best_step']}.",
    ]
    if guard:
        before, after = (nats(point["guard_kl"]) for point in (course[0], best))
        lines.append(f"On text of another kind: {before} before, {after} after.")
    return Report({"output": str(output), "digest": made.digest, **record}, "\n".join(lines))
