"""How much goes, or what should come out, as people write it: ``20%``, ``4GB``, ``kv 60%``."""

import contextlib
import json
import re
from typing import Any, Literal

_UNITS = "units: B, kB (not KB), MB, GB, TB, kiB, MiB, GiB, TiB"
_SIZES = "a number of layers (7), a share of the parameters (20%), or bytes (4GB, 512MiB"
_TARGETS = (
    "speedup 1.3 (more than 1, of a whole request), speedup 1.3 prefill, speedup 1.3 decode, kv "
    f"60% (more than 0, less than 100), or bytes 20GB ({_UNITS})"
)


def shown(value: Any) -> str:
    """As it may stand behind ``--set``."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)


def parse_size(text: str) -> tuple[Literal["fraction", "bytes"], float]:
    """``"20%"`` as a fraction, or ``"4GB"``, ``"512MiB"`` as bytes; ValueError if it is neither."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:(%)|([kMGT]?)(i?)B)", text.strip())
    if match is None or float(match[1]) <= 0 or (match[2] and float(match[1]) >= 100):
        raise ValueError(f"give {_SIZES}; {_UNITS})")
    if match[2]:
        return "fraction", float(match[1]) / 100
    power = " kMGT".index(match[3] or " ")
    return "bytes", float(match[1]) * (1024 if match[4] else 1000) ** power


def parse_target(text: str) -> tuple[Literal["speedup", "kv", "bytes"], float, str]:
    """``speedup 1.3 [prefill|decode]``, ``kv 60%``, ``bytes 20GB``: kind, number, part or empty."""
    if match := re.fullmatch(r"speedup (\d+(?:\.\d+)?)(?: (prefill|decode))?", text.strip()):
        if float(match[1]) > 1:
            return "speedup", float(match[1]), match[2] or ""
    elif match := re.fullmatch(r"(kv|bytes) (\S+)", text.strip()):
        with contextlib.suppress(ValueError):
            unit, size = parse_size(match[2])
            if unit == ("fraction" if match[1] == "kv" else "bytes"):
                return "kv" if match[1] == "kv" else "bytes", size, ""
    raise ValueError(f"give {_TARGETS}")


def parse_amount(text: str) -> int | str:
    """What may stand in a list: layers as a number, or a size or target as it is."""
    if text.isdigit():
        return int(text)
    for parse in (parse_size, parse_target):
        with contextlib.suppress(ValueError):
            parse(text)
            return text
    raise ValueError(f"{text!r} is no size or target: give {_SIZES}), or {_TARGETS}")
