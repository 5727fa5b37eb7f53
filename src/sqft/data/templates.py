"""Format strings over the fields of a record, which must be texts or numbers."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import Formatter
from typing import Any

from sqft.data.records import Record
from sqft.errors import DataError

__all__ = ["field_names", "fill_template"]


def fill_template(
    key: str, template: str, record: Record, values: Mapping[str, Any] | None = None
) -> str | None:
    """A format string with the record's fields filled in; None where one of them is null.

    values: stand in for fields of the same names. A list of texts is written out, separated by commas, and
    `{choices[0]}` takes one entry of it, `{messages[0][content]}` a field of an entry.

    Raises: DataError, with the place, for a missing field, or one that is neither text nor number.
    """
    known = {**record.fields, **values} if values else record.fields
    names, pieces = _parse(template, key)
    for name in names:
        if name not in known:
            have = ", ".join(map(repr, record.fields))
            raise DataError(f"{record.place}: no field {name!r}; it has {have}")
        if known[name] is None or known[name] != known[name]:  # NaN is how a table says null
            return None
    if pieces and all(isinstance(known[name], str) for name in names):
        return "".join([known[text] if is_field else text for text, is_field in pieces])
    try:
        return _Texts(key).vformat(template, (), known)
    except DataError as error:
        raise DataError(f"{record.place}: {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise DataError(f"{record.place}: data.{key} cannot be filled in: {error}") from error


@lru_cache(maxsize=64)
def _parse(template: str, key: str) -> tuple[list[str], list[tuple[str, bool]]]:
    """The fields of a format string, and its pieces, each with whether it is a field.

    No pieces where a field is more than a name, so that Python's formatter is needed.
    """
    names = field_names(template, key)
    pieces: list[tuple[str, bool]] = []
    for literal, name, form, conversion in Formatter().parse(template):
        pieces += [(literal, False)] if literal else []
        if name is not None:
            if form or conversion or "." in name or "[" in name:
                return names, []
            pieces.append((name, True))
    return names, pieces


def field_names(template: str, key: str) -> list[str]:
    """The field names a format string uses.

    Raises: DataError if it is not a format string over named fields.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"data.{key} is not a format string: {error}; write {{{{ for a brace") from error
    fields = [name.split(".")[0].split("[")[0] for name in names]
    if any(not field or field.isdigit() for field in fields):
        raise DataError(f"data.{key} must name its fields, for instance {{question}}: {template!r}")
    return fields


class _Texts(Formatter):
    """A formatter that takes nothing but texts, numbers and lists of them."""

    def __init__(self, key: str) -> None:
        self.key = key

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, used = super().get_field(field_name, args, kwargs)
        if isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
            return ", ".join(map(str, value)), used
        if not isinstance(value, str | int | float):
            kind = "list of messages" if _holds_messages(value) else type(value).__name__
            raise DataError(
                f"data.{self.key} uses {{{field_name}}}, which is a {kind}, no text; name a field inside it, "
                f"as {{{field_name}[0][content]}}, or leave prompt and answer out to have its form recognised"
            )
        return value, used


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
