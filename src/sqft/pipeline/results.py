"""Publishing what the user keeps of finished stages: the report, and the model under its own name."""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.artifacts import ITEM_FIGURES, LATENT, digest_file, digest_json
from sqft.checks import Check
from sqft.directories import claim_folder, free_place, new_directory, remove_partial
from sqft.marks import EVALUATIONS, Mark, changed_since, is_directory, read_mark
from sqft.pipeline.context import ADAPTER, TRAINING
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.reported import stage_name
from sqft.pipeline.runner import FinishedStage, damaged_stage
from sqft.report import ReportData, write_report
from sqft.report.content import LayerRow, LineageRow, ModelRow
from sqft.report.summary import format_seconds

__all__ = ["RunResult", "write_results"]

logger = logging.getLogger(__name__)

# Parts of a stage directory that only a later stage or a resumed run reads.
NOT_PUBLISHED = (LATENT, TRAINING)


@dataclass(frozen=True)
class RunResult:
    """Where the results of a recipe are, and the figures in them.

    model_dir: the recipe's product, None for a recipe that only measures. adapter_dir: the chosen
    sub-adapter, merged into model_dir or beside it. base_dir: the model that it was trained on.
    """

    data: ReportData
    report_json: Path
    report_html: Path
    model_dir: Path | None
    adapter_dir: Path | None
    base_dir: Path | None
    stages: list[FinishedStage]


def write_results(
    recipe: Recipe,
    stages: list[FinishedStage],
    workspace: Path,
    seconds: float,
    *,
    model_directory: Path,
) -> RunResult:
    """Publish the final model below WORKSPACE/NAME, and write report.json and report.html there.

    A folder of that name that is not this recipe's, and what in it is not as a run wrote it, stay as they
    are: the results go beside them, to NAME-2, or merged-2.
    model_directory: the recipe's model, on which adapters stand where nothing compresses it.

    Raises: WorkspaceError if a stage is not as it was written.
    """
    by_name = {stage.name: stage for stage in stages}
    directory = claim_folder(workspace / recipe.name, _about(recipe, stages, workspace))
    _tell_if_elsewhere(workspace / recipe.name, directory)
    final = by_name.get(recipe.final_stage)
    model_dir = adapter_dir = None
    if final is not None:
        model_dir = _publish(final, Path(), directory / ("merged" if recipe.merges else "model"))
    if recipe.adapters:
        adapter_dir = _publish(by_name[recipe.adapter_stage], Path(ADAPTER), directory / "adapter")
    data = report_data(recipe, stages, seconds, model_dir)
    report_json, report_html = write_report(data, directory, _items(stages))
    base_dir = None
    if recipe.adapters:
        base = by_name.get(recipe.base_stage)
        base_dir = base.directory if base else model_directory
    return RunResult(data, report_json, report_html, model_dir, adapter_dir, base_dir, stages)


def report_data(
    recipe: Recipe, stages: list[FinishedStage], seconds: float, model_dir: Path | None = None
) -> ReportData:
    """The figures of a run, gathered from the manifests of its stages.

    seconds: what this run took; the report adds what its reused stages took when they ran.
    """
    from sqft.evaluation.measurement import compare_models

    metrics = {stage.name: stage.manifest.metrics for stage in stages}
    rows = [ModelRow(**metrics[stage_name("evaluate", name)]["row"]) for name in recipe.reported_models()]
    checks = [Check(**check) for check in metrics["merge"]["checks"]] if "merge" in metrics else None
    layers = metrics.get("quantize", metrics.get("sparsify", {})).get("layers", [])
    training = metrics.get("train", metrics.get("tune", {}))
    return ReportData(
        name=recipe.name,
        models=rows,
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        versions=stages[-1].manifest.environment if stages else {},
        elapsed_seconds=seconds + sum(s.manifest.elapsed_seconds for s in stages if s.reused),
        checks=checks,
        stage_seconds={stage.name: stage.manifest.elapsed_seconds for stage in stages},
        layers=[LayerRow(row["name"], row.get("sparsity"), row.get("error")) for row in layers],
        ranks=metrics.get("search", {}).get("ranks", {}),
        training=[(step, loss) for step, loss in training.get("curve", [])],
        eval_losses=[(step, loss) for step, loss in training.get("eval_curve", [])],
        lineage=[_lineage(stage) for stage in stages],
        data=metrics.get("items", {}).get("data", {}),
        notes=compare_models(_items(stages)) + _reconstruction(metrics.get("reconstruct", {})),
        chance_accuracy=metrics.get("items", {}).get("chance_accuracy"),
        merged_dir=str(model_dir) if model_dir else None,
    )


def _reconstruction(metrics: dict[str, Any]) -> list[str]:
    """What fitting the blocks brought on the calibration sequences that were held out, in one line."""
    blocks = metrics.get("blocks", [])
    if not blocks:
        return []
    before, after = (sum(block[f"loss_{when}"] for block in blocks) for when in ("before", "after"))
    better = sum(block["epoch"] > 0 for block in blocks)
    tokens, seconds = (sum(block[name] for block in blocks) for name in ("num_tokens", "seconds"))
    return [
        f"reconstruction: {better} of {len(blocks)} blocks came closer to the dense ones, by "
        f"{1 - after / before if before else 0:.0%} of the squared error on held-out calibration; "
        f"{tokens / len(blocks):,.0f} tokens through each, {format_seconds(seconds)}"
    ]


def _lineage(stage: FinishedStage) -> LineageRow:
    return LineageRow(
        stage.name,
        stage.manifest.key,
        stage.directory.name,
        stage.manifest.elapsed_seconds,
        stage.reused,
    )


def _items(stages: list[FinishedStage]) -> dict[str, dict[str, Any]]:
    """The per-item figures of every measured model."""
    return {
        finished.stage.argument: json.loads((finished.directory / ITEM_FIGURES).read_text(encoding="utf-8"))
        for finished in stages
        if finished.stage.kind == "evaluate"
    }


def _about(recipe: Recipe, stages: list[FinishedStage], workspace: Path) -> dict[str, str]:
    """Which recipe this is: its file, so that an edited one replaces its results; else what it did."""
    if recipe.path is None:
        return {"stages": digest_json(sorted(stage.manifest.key for stage in stages))}
    return {"recipe": os.path.relpath(recipe.path.resolve(), workspace.resolve())}


def _publish(stage: FinishedStage, inside: Path, wanted: Path) -> Path:
    """Put a finished directory, or a folder in it, under the results, and return where.

    Weights are hard links where the file system allows. What is there already, byte by byte, stays as it is.
    """
    source = stage.directory / inside
    names = (Path(name) for name in stage.manifest.files if Path(name).is_relative_to(inside))
    digests = {
        name.relative_to(inside).as_posix(): stage.manifest.files[name.as_posix()]
        for name in names
        if name.parts[0] not in NOT_PUBLISHED
    }
    about = {"published": wanted.name}
    there = read_mark(wanted) if is_directory(wanted) else None
    same = there is not None and there.about == about and _digests(there) == digests
    if same and changed_since(wanted, thoroughly=True, beside=(EVALUATIONS,)) is None:
        remove_partial(wanted)
        return wanted  # evaluations of it that were added later
    place = free_place(wanted, about)
    _tell_if_elsewhere(wanted, place)
    mark = read_mark(place)
    if mark is not None and _digests(mark) == digests:
        remove_partial(place)
        return place
    with new_directory(place, about=about) as partial:
        for name in digests:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if Path(name).suffix != ".safetensors" or not _link(source / name, partial / name):
                shutil.copy2(source / name, partial / name)
        damaged = next((n for n, digest in digests.items() if digest_file(partial / n) != digest), None)
        if damaged is not None:
            raise damaged_stage(stage.directory, f"{(inside / damaged).as_posix()} in it changed")
    return place


def _digests(mark: Mark) -> dict[str, str]:
    return {name: digest for name, (_, _, digest) in (mark.files or {}).items()}


def _tell_if_elsewhere(wanted: Path, place: Path) -> None:
    if place != wanted:
        logger.warning("%s is not as a run of this recipe wrote it, and stays; see %s", wanted, place)


def _link(path: Path, place: Path) -> bool:
    try:
        os.link(path, place)
    except OSError:
        return False
    return True
