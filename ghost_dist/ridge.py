"""What a ridge may be: found on held-out windows, relative to the Gram matrix, or absolute."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class _Ridge(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RelativeRidge(_Ridge):
    """Ridge as a multiple of the median diagonal entry of the Gram matrix."""

    relative: float = Field(gt=0, allow_inf_nan=False)


class AbsoluteRidge(_Ridge):
    """Ridge added to the Gram matrix as it is (the paper: 1e-6)."""

    absolute: float = Field(ge=0, allow_inf_nan=False)


def _kind_of_ridge(value: Any) -> str | None:
    """Which of the three a value means, so that a mistake in it is told once."""
    if value == "auto":
        return "auto"
    if isinstance(value, Mapping):
        return "AbsoluteRidge" if "absolute" in value else "RelativeRidge"
    return type(value).__name__ if isinstance(value, RelativeRidge | AbsoluteRidge) else None


Ridge = Annotated[
    Annotated[Literal["auto"], Tag("auto")]
    | Annotated[RelativeRidge, Tag("RelativeRidge")]
    | Annotated[AbsoluteRidge, Tag("AbsoluteRidge")],
    Discriminator(
        _kind_of_ridge,
        custom_error_type="ridge",
        custom_error_message="expected auto, {relative: 0.1} or {absolute: 1e-6}",
    ),
]
