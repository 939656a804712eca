"""Numbers with their units as a person reads them."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghost_dist import progress
from ghost_dist.export.verify import has_our_code

DASH = "\N{EN DASH}"
NBSP = "\N{NO-BREAK SPACE}"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; a power of ten where plain digits would be long."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 <= size < 6:
        mantissa, _, exponent = f"{value:.{max(0, digits - 1)}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def perplexity(value: float | None) -> str:
    """Two decimals below 1000, as papers print it."""
    if value is not None and 0.01 <= value < 1000:
        return f"{value:.2f}"
    return number(value)


def percent(value: float, digits: int = 0, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{value:{plus}.{digits}%}"


def count(value: float) -> str:
    """A large number: 7.72 M."""
    return _scaled(value, "TBMk") or f"{value:,.0f}"


def nbytes(value: float) -> str:
    scaled = _scaled(value, "TGMk")
    return f"{scaled or f'{value:.0f}{NBSP}'}B"


def target_value(wanted: str, value: float) -> str:
    """What a target or size is said to come to, in its own terms."""
    if wanted.startswith("speedup"):
        return f"{value:.3f} times"
    return percent(value, 1) if wanted.endswith("%") else nbytes(value)


def target_words(found: Mapping[str, Any]) -> str:
    """A target with what was predicted, and measured if it was."""
    wanted, said = found["target"], []
    for key in ("predicted", "measured"):
        if key in found:
            said.append(f"{key} {target_value(wanted, found[key])}")
    if "range" in found:
        said[-1] += f" (rounds {found['range'][0]:.3f} to {found['range'][1]:.3f})"
    return f"{wanted}: {', '.join(said)}"


PARETO = ("Wanted", "Layers removed", "KL, nats", "Params", "Size", "KV cache", "Speed-up")


def pareto_cells(row: Mapping[str, Any]) -> list[str]:
    """What was searched for and what is predicted of it."""
    return [
        row["wanted"],
        spans(row["spans"]),
        number(row["kl"], 4),
        percent(-row["removed"], 1, sign=True),
        nbytes(row["bytes"]),
        DASH if row["kv"] is None else percent(row["kv"], 1),
        DASH if row["speedup"] is None else number(row["speedup"]),
    ]


def _scaled(value: float, prefixes: str) -> str:
    """In the largest unit that it has; empty below a thousand."""
    for power, prefix in zip((12, 9, 6, 3), prefixes, strict=True):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{NBSP}{prefix}"
    return ""


def date(seconds: float) -> str:
    """Of a time since 1970, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def clock(seconds: float) -> str:
    """The same, without the day."""
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


def load_words(checkpoint: Path) -> str:
    """The call of transformers that loads a checkpoint."""
    trusted = ", trust_remote_code=True" if has_our_code(checkpoint) else ""
    return f'AutoModelForCausalLM.from_pretrained("{checkpoint}"{trusted})'


def duration(seconds: float) -> str:
    return progress.duration(seconds).replace(" ", NBSP)


def candidate(row: Mapping[str, Any]) -> str:
    """Operator, and what it regresses on where that is not the stream alone."""
    features = "" if row["features"] == "stream" else f", {row['features']}"
    return f"{row['operator']}{features}"


def divergence(row: Mapping[str, Any]) -> str:
    """Of a candidate from the dense model; of a dropped one, on the first source."""
    if "failed" in row:
        return "failed"
    return number(row.get("kl"), 4) + (" on the first" if "dropped" in row else "")


def span(pair: Sequence[int]) -> str:
    """A half-open span of layers, not to be broken."""
    return f"[{pair[0]},{NBSP}{pair[1]})"


def spans(pairs: Sequence[Sequence[int]]) -> str:
    return ", ".join(span(pair) for pair in pairs) or "none"


def layers(pairs: Sequence[Sequence[int]]) -> str:
    """Spans in words: layers 7 to 13."""
    return join_words([f"{a} to {b - 1}" if b - a > 1 else str(a) for a, b in pairs])


def interval(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{perplexity(pair[0])} {DASH} {perplexity(pair[1])}"


def join_words(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
