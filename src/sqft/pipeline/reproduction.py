"""The paper's experiments: the sweeps that come with the package, and published figures beside ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sqft.artifacts import REPORT
from sqft.errors import RecipeError, WorkspaceError
from sqft.pipeline.comparison import Measured, find_measured
from sqft.pipeline.recipe_file import apply_override, read_recipe_values, set_value
from sqft.pipeline.sweep import Sweep, expand_sweep
from sqft.report.summary import loss_unit, models_table

__all__ = ["Row", "experiment_names", "experiment_table", "load_experiment", "reproduction_rows"]

Scale = Literal["full", "small"]
# Settings that name files of the data folder.
FILES = ("data.train", "data.search", "data.test", "calibration.source", "evaluate.perplexity")


@dataclass(frozen=True)
class Row:
    """One model of an experiment. ours: None where it was not run. published: in per cent, if known."""

    cell: str
    model: str
    ours: Measured | None
    published: float | None
    source: str | None


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, or beside the source.

    Raises: WorkspaceError if they are in neither.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / "paper").is_dir():
            return folder
    raise WorkspaceError("the paper's recipes did not come with this installation; install sqft again")


def experiment_names(scale: Scale) -> list[str]:
    """The experiments that there are at a scale."""
    folder = recipes_folder() / "paper"
    files = (folder / "small" if scale == "small" else folder).glob("*.yaml")
    return sorted(path.stem for path in files if path.stem != "published")


def load_experiment(name: str, scale: Scale, data: Path, overrides: list[str] | None = None) -> Sweep:
    """The sweep of an experiment, its files taken from the folder `data`.

    Raises: RecipeError for an unknown name, with those that there are.
    """
    names = experiment_names(scale)
    if name not in names:
        other: Scale = "small" if scale == "full" else "full"
        raise RecipeError(
            f"there is no experiment {name} at scale {scale}; there are {', '.join(names)} (at scale "
            f"{other}: {', '.join(experiment_names(other))})"
        )
    folder = recipes_folder() / "paper"
    path = (folder / "small" if scale == "small" else folder) / f"{name}.yaml"
    values = read_recipe_values(path)
    _place_files(values, data)
    for choices in values.get("sweep", {}).get("axes", {}).values():
        for settings in choices.values():
            for key in [key for key in settings or {} if key in FILES]:
                settings[key] = _below(data, settings[key])
    if (values.get("evaluate") or {}).get("tasks"):
        set_value(values, "evaluate.tasks_data", str(data))
    for override in overrides or []:
        apply_override(values, override)
    return expand_sweep(values, path=path, many=True)


def reproduction_rows(name: str, sweep: Sweep, directory: Path) -> list[Row]:
    """Every model that the cells of an experiment measure, ours beside the published figure.

    directory: the results of the sweep; what is not there was not run.
    """
    published = _published().get(name, {})
    rows = []
    for cell in sweep.cells:
        place = directory / cell.name
        found = {one.row.name: one for one in find_measured(str(place))} if _is_run(place) else {}
        models = cell.recipe.reported_models()
        for model in models:
            told = published.get(f"{cell.name}:{model}") or (
                published.get(cell.name) if len(models) == 1 else None
            )
            figure, source = (told["accuracy"], told["source"]) if told else (None, None)
            rows.append(Row(cell.name, model, found.get(model), figure, source))
    return rows


def experiment_table(name: str, scale: Scale, sweep: Sweep, directory: Path) -> list[list[str]]:
    """Header and one row a model, as text: what was measured, and at full scale what was published.

    directory: as `reproduction_rows` takes it.
    """
    rows = reproduction_rows(name, sweep, directory)
    measured = [row for row in rows if row.ours is not None]
    among_choices = any(cell.recipe.data and cell.recipe.data.choices for cell in sweep.cells)
    unit = loss_unit(among_choices=among_choices)
    figures = models_table([row.ours.row for row in measured if row.ours], unit)
    header, *lines = figures if measured else [["model", "ours"]]
    found = dict(zip([(row.cell, row.model) for row in measured], lines, strict=True))
    told = ["published (accuracy, %)", "source"] if scale == "full" else []
    table = [["cell", *header, *told]]
    for row in rows:
        cells = found.get((row.cell, row.model)) or [row.model, *["not run"] * (len(header) - 1)]
        shown = ["not found" if row.published is None else f"{row.published:g}", row.source or "-"]
        table.append([row.cell, *cells, *(shown if told else [])])
    return table


def _is_run(place: Path) -> bool:
    return (place / REPORT).is_file()


def _published() -> dict[str, Any]:
    text = (recipes_folder() / "paper" / "published.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def _place_files(values: dict[str, Any], data: Path) -> None:
    for path in FILES:
        section, key = path.split(".")
        node = values.get(section)
        if isinstance(node, dict) and node.get(key):
            node[key] = _below(data, node[key])


def _below(data: Path, file: Any) -> Any:
    """A file of the data folder; what is none (train, a data set of the hub) stays."""
    is_file = isinstance(file, str) and Path(file).suffix in (".jsonl", ".txt")
    return str(data / file) if is_file else file
