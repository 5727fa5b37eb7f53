"""The type checker that jaxtyping's import hook uses in all tests; conftest.py installs it."""

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray

__all__ = ["check_shapes"]


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype on the arguments and results whose annotation states a shape; the others are left to mypy."""
    annotations = dict(function.__annotations__)
    function.__annotations__ = {name: hint for name, hint in annotations.items() if _states_shape(hint)}
    checked: Callable[..., Any] = beartype(function) if function.__annotations__ else function
    function.__annotations__ = annotations
    checked.__annotations__ = annotations
    return checked


def _states_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(_states_shape(part) for part in get_args(hint))
