"""`CacheOptions`: what a user chooses for one cache; never part of the format."""

from __future__ import annotations

from dataclasses import dataclass

from .ops import BACKENDS

# Far beyond what brings anything; a wider one takes minutes a token.
WIDEST_BEAM = 256


@dataclass(frozen=True)
class CacheOptions:
    """Run-time choices of a cache; see `GSRQCache`.

    Raises:
        ValueError: if one of them is of another type or out of range.
    """

    residual_length: int = 128
    sink_length: int = 4
    chunk_length: int = 64
    beam_width: int = 1
    quantize_prefill: bool = False
    backend: str = "auto"
    max_length: int | None = None

    def __post_init__(self) -> None:
        least = {"residual_length": 0, "sink_length": 0, "chunk_length": 1, "beam_width": 1}
        if self.max_length is not None:
            least["max_length"] = 1
        for name, smallest in least.items():
            value = getattr(self, name)
            # A bool is an int to Python.
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                optional = " or None" if name == "max_length" else ""
                raise ValueError(f"{name} must be an integer of at least {smallest}{optional}, got {value!r}.")
        if self.beam_width > WIDEST_BEAM:
            raise ValueError(f"beam_width must be {WIDEST_BEAM} at most, got {self.beam_width}.")
        if not isinstance(self.quantize_prefill, bool):
            raise ValueError(f"quantize_prefill must be True or False, got {self.quantize_prefill!r}.")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}.")
