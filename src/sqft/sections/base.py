"""What all sections share: frozen values, unknown keys refused, settings without effect refused."""

import re
from os.path import expanduser
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

__all__ = ["Fraction", "ModuleNames", "NonNegative", "PathText", "Positive", "Section"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PathText = Annotated[str, AfterValidator(expanduser)]  # of a file or folder; ~ is the user's home


def _check_names(value: list[str] | str) -> list[str] | str:
    try:
        if isinstance(value, str):
            re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}; names go into a list") from None
    return value


# Linears: their names, ends of names or patterns; or one text: all-linear, or a regular expression.
ModuleNames = Annotated[list[str] | str, AfterValidator(_check_names)]


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def without_effect(self) -> dict[str, str]:
        """Settings that the others leave without effect, each with the reason; given, they are refused."""
        return {}

    @model_validator(mode="after")
    def _refuse_ignored(self) -> Self:
        for name, reason in self.without_effect().items():
            if name in self.model_fields_set:
                raise ValueError(f"{name} would be ignored: {reason}; remove it")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_ignored(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        ignored = self.without_effect()
        return {name: value for name, value in write(self).items() if name not in ignored}
