"""Refusing in time an adapter that `train.adapter` cannot go on from."""

from pathlib import Path
from typing import TYPE_CHECKING

from sqft.errors import AdapterError
from sqft.pipeline.checks import ChosenModules
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.runner import READ_AT_ONCE

if TYPE_CHECKING:
    from sqft.models import ModelOutline

__all__ = ["check_start", "check_start_base"]


def check_start(recipe: Recipe, outline: "ModelOutline", chosen: ChosenModules) -> None:
    """Compare the adapter that the training goes on from with what the recipe would train.

    Raises: AdapterError if it is missing, damaged, or of other settings or linears.
    """
    directory, section = recipe.starting_adapter, recipe.adapters
    if directory is None or section is None:
        return
    from sqft.adapters.start import open_start

    try:
        start = open_start(directory)
        shapes = {name: outline.linears[name] for name in sorted(chosen.adapted)}
        start.check_settings(section, shapes, chosen.scaled)
    except AdapterError as error:
        raise AdapterError(f"train.adapter: {error}") from None
    if start.config.rank_pattern and recipe.search and recipe.search.evaluates:
        raise AdapterError(
            f"search.method: {recipe.search.method} has nothing to choose from: {directory} has one rank for "
            "each linear already; remove the search section, or go on from the adapter of the train stage"
        )


def check_start_base(recipe: Recipe, base: Path) -> None:
    """Compare the digests of the base that the adapter was trained on with this one's, if it is no large one.

    A large one is compared by the run, before its first step.

    Raises: AdapterError if it is another one.
    """
    directory, section = recipe.starting_adapter, recipe.adapters
    assert directory is not None
    assert section is not None
    if sum(path.stat().st_size for path in base.glob("*.safetensors")) > READ_AT_ONCE:
        return
    from sqft.adapters import attach_adapters
    from sqft.adapters.start import open_start
    from sqft.models import load_trainable, open_checkpoint

    stored = open_checkpoint(base, trust_remote_code=recipe.model.trust_remote_code)
    model = load_trainable(
        base, base_precision=section.loaded_as, trust_remote_code=recipe.model.trust_remote_code
    )
    storage = None if stored.grid else stored.storage_dtype
    try:
        attach_adapters(model, section, storage_dtype=storage, start=open_start(directory))
    except AdapterError as error:
        raise AdapterError(
            f"train.adapter: {error}; or name that one as model, without sparsify and quantize"
        ) from None
