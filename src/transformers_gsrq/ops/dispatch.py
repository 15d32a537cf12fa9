"""Which implementation runs an operation: decided for each call from facts, never by catching exceptions."""

from __future__ import annotations

BACKENDS = ("auto", "torch", "triton")


def choose_backend(requested: str, reason: str | None) -> str:
    """The backend for a call.

    Args:
        requested: "auto" (kernels where they can run), "torch" or "triton".
        reason: Why kernels cannot run on this call, None if they can.

    Raises:
        ValueError: for an unknown name, or when "triton" was asked for and cannot run.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {requested!r}.")
    if requested == "triton" and reason is not None:
        raise ValueError(f"backend='triton' cannot run: {reason}.")
    return "torch" if requested == "torch" or reason is not None else "triton"
