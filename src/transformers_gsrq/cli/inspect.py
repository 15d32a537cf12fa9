"""`gsrq inspect`."""

from __future__ import annotations

from typing import Any

from ..card import training_steps
from ..codebooks import GSRQCodebooks
from ..config import KINDS
from .common import CodebooksArgument, Report, TokenOption, table


def run(codebooks: CodebooksArgument, token: TokenOption = None) -> Report:
    """Show what codebooks are and cost.

    Geometry, bits, bytes, from what context on they save memory, what they were made from, and how well each layer's
    states come out.
    """
    loaded = GSRQCodebooks.from_pretrained(codebooks, token=token)
    figures, text = describe(loaded)
    layers = layer_table(loaded)
    return Report({**figures, "provenance": loaded.provenance}, "\n\n".join(filter(None, (text, layers))))


def describe(codebooks: GSRQCodebooks) -> tuple[dict[str, Any], str]:
    """Figures of codebooks, and the same as text."""
    config, made = codebooks.config, codebooks.provenance
    calibration, data = made.get("calibration", {}), made.get("data", {})
    figures: dict[str, Any] = {
        "digest": codebooks.digest,
        "config": config.to_dict(),
        "bits": config.bits(),
        "key_bits": config.bits("key"),
        "value_bits": config.bits("value"),
        "code_bytes_per_token": config.code_bytes_per_token,
        "bf16_bytes_per_token": config.dense_bytes_per_token(),
        "codebook_bytes": config.codebook_bytes,
        "break_even_tokens": config.break_even_tokens,
    }
    share = config.code_bytes_per_token / config.dense_bytes_per_token()
    geometry = ", ".join(
        f"{kind}s {_range(config.stages(kind))} stages of {config.subspace_dim(kind)} channels" for kind in KINDS
    )
    facts = {
        "model": made.get("base_model") or config.model_type,
        "geometry": f"{len(config.layers)} of {config.num_hidden_layers} layers, {config.num_kv_heads} KV heads of "
        f"{config.head_dim}; {geometry}; {config.num_centroids} centroids",
        "bits": f"{config.bits():g} per element (keys {config.bits('key'):g}, values {config.bits('value'):g})",
        "a token": f"{config.code_bytes_per_token:,} bytes, {share:.1%} of the {config.dense_bytes_per_token():,} in "
        "bfloat16",
        "codebooks": f"{config.codebook_bytes / 2**20:,.1f} MiB in memory, once for all sequences",
        "break-even": f"{config.break_even_tokens:,.0f} compressed tokens over all sequences; below that a bfloat16 "
        "cache is smaller",
        "digest": codebooks.digest,
        "calibration": f"{data.get('name') or 'unnamed text'}, {calibration.get('tokens_read', 0):,} tokens, "
        f"{calibration.get('vectors', 0):,} vectors, {calibration.get('method')}, weights "
        f"{calibration.get('weighting')}, seed {calibration.get('seed')}"
        if calibration
        else "not recorded",
        **training_steps(made),
        "versions": ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items()),
    }
    for record in made.get("evaluations", ()):
        facts[f"perplexity, {record['data']}"] = (
            f"{record['perplexity']:.2f}, plain cache {record['plain_perplexity']:.2f} ({record['increase']:+.1%})"
        )
    width = max(len(name) for name in facts)
    return figures, "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items() if value)


def _range(stages: tuple[int, ...]) -> str:
    least, most = min(stages), max(stages)
    return f"{least} to {most}" if most > least else str(least)


def layer_table(codebooks: GSRQCodebooks) -> str:
    """How well each layer's held-out states came out, after all stages; empty if nothing is recorded."""
    report = codebooks.provenance.get("report", ())
    if not report:
        return ""
    rows = [["layer", "kind", "squared error / energy", "cosine", "error of the norm"]]
    for entry in report:
        stages = codebooks.config.code_shape(entry["layer"], entry["kind"])[1]
        last = entry["stages"][:stages][-1]
        figures = [f"{last['distortion']:.3f}", f"{last['cosine']:.3f}", f"{last['gain_error']:.3f}"]
        rows.append([str(entry["layer"]), entry["kind"], *figures])
    return "Held-out calibration states, all stages:\n" + table(rows)
