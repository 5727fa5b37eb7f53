"""Fine-tune once, get one small file (sparse, INT4) that is provably the model you trained.

    recipe = sqft.load_recipe("recipe.yaml")
    result = sqft.run_recipe(recipe)

The packages below (`sqft.adapters`, `sqft.compression`, ...) are the same steps on models and tensors. Names
here are imported when they are first used, so that `import sqft` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqft.pipeline import (
        Plan,
        Recipe,
        RunResult,
        load_recipe,
        parse_recipe,
        plan_recipe,
        run_recipe,
        workspace_status,
    )

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Recipe",
    "RunResult",
    "load_recipe",
    "parse_recipe",
    "plan_recipe",
    "run_recipe",
    "workspace_status",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sqft' has no attribute {name!r}")
    return getattr(import_module("sqft.pipeline"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
