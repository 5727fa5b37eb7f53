"""Fine-tune once, get one small file (sparse, INT4) that is provably the model you trained.

The steps of the command line as functions; each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sqft.adapters import SqftConfig, attach_adapters, merge_adapters
    from sqft.certificate import check_integrity, check_provenance
    from sqft.compression import quantize_model, sparsify_model
    from sqft.models import load_model, load_trainable, open_checkpoint
    from sqft.pipeline import load_recipe, parse_recipe, plan_recipe, run_recipe

__all__ = [
    "SqftConfig",
    "attach_adapters",
    "check_integrity",
    "check_provenance",
    "load_model",
    "load_recipe",
    "load_trainable",
    "merge_adapters",
    "open_checkpoint",
    "parse_recipe",
    "plan_recipe",
    "quantize_model",
    "run_recipe",
    "sparsify_model",
]

_HOMES = {
    "SqftConfig": "adapters",
    "attach_adapters": "adapters",
    "merge_adapters": "adapters",
    "check_integrity": "certificate",
    "check_provenance": "certificate",
    "quantize_model": "compression",
    "sparsify_model": "compression",
    "load_model": "models",
    "load_trainable": "models",
    "open_checkpoint": "models",
    "load_recipe": "pipeline",
    "parse_recipe": "pipeline",
    "plan_recipe": "pipeline",
    "run_recipe": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sqft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sqft' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
