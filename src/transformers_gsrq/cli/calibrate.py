"""`gsrq calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..calibration import calibrate
from ..config import GSRQConfig
from ..hub import HubId
from ..loading import load_model
from .common import (
    ColumnOption,
    DatasetConfigOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    Interrupted,
    ModelArgument,
    Report,
    RevisionOption,
    SplitOption,
    TextOption,
    TokenOption,
    named_texts,
    partial_folder,
    remove_partial,
)
from .inspect import describe

# The files that `fit` keeps; other commands may have theirs in the same folder.
FINISHED = "layer-*.safetensors"


def run(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the codebooks.", metavar="DIR")],
    bits: Annotated[
        float | None, typer.Option(help="Bits per element, for keys and for values, 0.25 to 4; 1 by default.")
    ] = None,
    key_bits: Annotated[float | None, typer.Option(help="Instead of --bits for keys.")] = None,
    value_bits: Annotated[float | None, typer.Option(help="Instead of --bits for values.")] = None,
    subspace_dim: Annotated[
        int | None, typer.Option(help="Channels that one code describes; the widest up to 128 by default.")
    ] = None,
    text: TextOption = None,
    dataset: DatasetOption = None,
    dataset_config: DatasetConfigOption = None,
    split: SplitOption = "train",
    column: ColumnOption = "text",
    num_samples: Annotated[int, typer.Option(help="Windows of text to read at most.")] = 128,
    window_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    max_vectors: Annotated[int, typer.Option(help="Tokens, sampled from all windows, to cluster.")] = 65536,
    weighting: Annotated[str, typer.Option(help="log (gradients, the paper's), raw, or none (faster).")] = "log",
    method: Annotated[str, typer.Option(help="gskm, or kmeans as a baseline.")] = "gskm",
    iterations: Annotated[int, typer.Option(help="Updates of each clustering at most.")] = 20,
    refine_rounds: Annotated[
        int,
        typer.Option(
            "--refine",
            min=0,
            help="Rounds that fit all stages together: less error; the first stages alone serve no lower rate.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle, the sample and the clusterings.")] = 0,
    base_model: Annotated[str | None, typer.Option(help="Hub id of MODEL for the model card, if it is local.")] = None,
    push_to: Annotated[str | None, typer.Option(help="Also push to this repository.", metavar="ORG/NAME")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    model_revision: RevisionOption = None,
    token: TokenOption = None,
) -> Report:
    """Learn codebooks for MODEL from text.

    Needs some 260,000 tokens for the best result (128 windows of 2,048). An interrupted run goes on where it stopped
    when the same command is given again.
    """
    if bits is not None and key_bits is not None and value_bits is not None:
        raise ValueError("--bits has nothing to say beside --key-bits and --value-bits. Leave one of the three away.")
    if bits is None and (key_bits is None or value_bits is None):
        bits = 1.0
    checkpoint = partial_folder(output)
    if push_to:
        HubId.parse(push_to if "/" in push_to else f"me/{push_to}")
    texts, data_name = named_texts(text, dataset, split, column, dataset_config)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, revision=model_revision, token=token)
    config = GSRQConfig.for_model(
        loaded.config, bits, key_bits=key_bits, value_bits=value_bits, subspace_dim=subspace_dim
    )
    if base_model:
        loaded.config.name_or_path = base_model
    try:
        codebooks = calibrate(
            loaded,
            tokenizer,
            texts,
            config,
            num_samples=num_samples,
            window_length=window_length,
            max_vectors=max_vectors,
            weighting=weighting,
            method=method,
            iterations=iterations,
            refine_rounds=refine_rounds,
            seed=seed,
            checkpoint=checkpoint,
            data_name=data_name,
        )
        codebooks.save_pretrained(output)
    except KeyboardInterrupt as stopped:
        finished = len(list(checkpoint.glob(FINISHED)))
        kept = f"{finished} of {2 * len(config.layers)} codebooks are kept in {checkpoint}; the same command goes on."
        raise Interrupted(f"Interrupted. {kept if finished else 'Nothing was kept yet.'}") from stopped
    remove_partial(checkpoint, FINISHED)
    figures, description = describe(codebooks)
    lines = [f"Saved to {output}.", "", description]
    if push_to:
        try:
            figures["pushed"] = codebooks.push_to_hub(push_to, token=token).commit_url
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(
                f"The codebooks are saved in {output}, but were not pushed: {error} Push them with "
                f"`gsrq push {output} {push_to}`."
            ) from error
        lines.append(f"\nPushed: {figures['pushed']}")
    return Report({"output": str(output), **figures}, "\n".join(lines))
