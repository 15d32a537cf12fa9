"""JSON that somebody else may have written: what is wrong is named, and nothing of it can command a terminal."""

from __future__ import annotations

import math
import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32
# Of a value in a message.
MAX_SHOWN = 80
_LAYOUT = "\t\n\r"
# Of any depth and length it writes only the beginning.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = MAX_SHOWN


def printable(text: object, layout: str = "") -> str:
    """Text whose control, format and unassigned characters are spelled out: an escape becomes backslash, x1b.

    Args:
        text: Anything; its string.
        layout: Characters to keep as they are.
    """
    return "".join(
        c if c in layout or not _is_hidden(c) else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category.startswith("C") or category in ("Zl", "Zp")


def shown(value: object) -> str:
    """A value in an error message: as Python writes it, at most some characters of it."""
    text = printable(_SHORT.repr(value))
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def check_json(value: Any, name: str) -> None:
    """Check that a value is of JSON types, not too deep, and safe to store and print.

    Args:
        value: The value.
        name: What to call it in messages; parts of it are named from there, as `name.field[3]`.

    Raises:
        ValueError: naming the part that is no JSON type, not finite, nested too deep, or holds control characters.
    """
    left: list[tuple[Any, str, int]] = [(value, name, 0)]
    while left:
        part, place, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"{name} is nested more than {MAX_DEPTH} levels deep.")
        if isinstance(part, str):
            if any(unicodedata.category(c) == "Cc" and c not in _LAYOUT for c in part):
                raise ValueError(f"{place} is {shown(part)}, which holds control characters.")
        elif isinstance(part, Mapping):
            for key, item in part.items():
                if not isinstance(key, str):
                    raise ValueError(f"{place} has the key {shown(key)}; keys must be strings.")
                # A long or a strange key is refused by what it is, not by a name made of it.
                left.append((key, f"a key of {place}", depth))
                left.append((item, f"{place}.{printable(key)[:MAX_SHOWN]}", depth + 1))
        elif isinstance(part, (list, tuple)):
            left.extend((item, f"{place}[{index}]", depth + 1) for index, item in enumerate(part))
        elif isinstance(part, float):
            if not math.isfinite(part):
                raise ValueError(f"{place} is {part}, which is not a finite number.")
        elif isinstance(part, int):
            if part.bit_length() > 64:
                raise ValueError(f"{place} is {shown(part)}, which takes more than 64 bits.")
        elif part is not None:
            raise ValueError(f"{place} is {shown(part)}; only JSON types can be stored.")
