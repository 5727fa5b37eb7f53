"""Reading a recipe: one YAML file, overrides from the command line, and every mistake told with its path."""

from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sqft.errors import RecipeError
from sqft.pipeline.keys import takes_text
from sqft.pipeline.mistakes import describe_mistake, of_one_kind
from sqft.pipeline.recipe import Recipe
from sqft.untrusted import parse_yaml, read_bounded

__all__ = [
    "apply_override",
    "load_recipe",
    "parse_recipe",
    "read_recipe_values",
    "recipe_schema",
    "set_value",
]

RECIPE_BYTES = 256 * 1024


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides of the form section.key=value.

    The value is YAML; for a key that takes a text, the text as it stands.

    Raises: RecipeError that lists every wrong key with its path.
    """
    return parse_recipe(read_recipe_values(path, overrides), origin=str(path), path=Path(path))


def read_recipe_values(path: Path | str, overrides: list[str] | None = None) -> dict[str, Any]:
    """A recipe as nested dictionaries, named after its file, overrides applied, nothing else checked.

    Raises: RecipeError if it cannot be read, is not a mapping, or an override does not fit.
    """
    path = Path(path)
    try:
        text = read_bounded(path, RECIPE_BYTES).decode("utf-8")
    except (FileNotFoundError, IsADirectoryError):
        near = get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
        hint = f" (did you mean {path.with_name(near[0])}?)" if near else ""
        raise RecipeError(f"there is no recipe {path}{hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not a recipe: {error}") from None
    try:
        values = parse_yaml(text, _Loader)
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no recipe; write at least 'model: NAME'")
    values.setdefault("name", path.stem)
    for override in overrides or []:
        apply_override(values, override)
    return values


def _check_characters(value: Any, place: str) -> None:
    """Raises: RecipeError for a text that UTF-8 cannot hold, as YAML's escapes or odd file names write."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecipeError(f"{place} holds {value[error.start]!a}, which is not a character") from None
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_characters(key, f"a key of {place}")
            _check_characters(part, f"{place}: {key}")
    elif isinstance(value, list):
        for part in value:
            _check_characters(part, place)


def parse_recipe(
    values: dict[str, Any],
    overrides: list[str] | None = None,
    *,
    origin: str = "recipe",
    path: Path | None = None,
) -> Recipe:
    """Check a recipe given as nested dictionaries, with overrides as `load_recipe` takes them.

    origin: what messages call it. path: the file that it came from.

    Raises: RecipeError that lists every wrong key with its path.
    """
    values = deepcopy(values)
    for override in overrides or []:
        apply_override(values, override)
    if "sweep" in values:
        raise RecipeError(f"{origin} has a section sweep: it stands for several runs; use sqft sweep")
    _check_characters(values, origin)
    try:
        recipe = Recipe.model_validate(values)
        recipe._path = path
        return recipe
    except ValidationError as error:
        mistakes = (describe_mistake(Recipe, item) for item in of_one_kind(error.errors()))
        raise RecipeError(f"{origin}: " + "; ".join(mistakes)) from None


def set_value(values: dict[str, Any], path: str, value: Any) -> None:
    """Set section.key in nested dictionaries, making the sections on the way.

    Raises: RecipeError if something on the way is a value.
    """
    *sections, last = path.split(".")
    node = values
    for depth, key in enumerate(sections):
        child = node.get(key)
        if key == "model" and depth == 0 and isinstance(child, str):
            child = {"source": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise RecipeError(f"{'.'.join(sections[: depth + 1])} is a value, not a section")
        node[key] = child
        node = child
    node[last] = value


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors that complete YAML."""
    return Recipe.model_json_schema()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in one respect: 2:4 is a text, where YAML 1.1 reads 124, to the base of 60."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in the values of a recipe. Raises: RecipeError for what is no override."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"'{override}' is not an override; write section.key=value")
    try:
        value = parse_yaml(text, _Loader)
    except ValueError as error:
        if not takes_text(Recipe, keys, {}):
            raise RecipeError(f"the value of '{override}' is not valid YAML: {error}") from None
        value = {}
    if takes_text(Recipe, keys, value):
        value = text  # where a text is wanted, braces, colons and digits mean themselves
    try:
        set_value(values, path, value)
    except RecipeError as error:
        raise RecipeError(f"'{override}': {error}") from None
