"""From finished stages to what the user keeps: the report, and the model under a name of its own."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.artifacts import new_directory
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.runner import FinishedStage
from sqft.pipeline.steps import ITEMS
from sqft.report import ReportData, write_report
from sqft.report.content import CheckRow, LayerRow, LineageRow, ModelRow

__all__ = ["RunResult", "write_results"]

# Parts of a stage directory that only a later stage or a resumed run reads.
NOT_PUBLISHED = ("manifest.json", "sqft_latent.safetensors", ".environment.json")


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
    directory: Path,
    seconds: float,
    *,
    model_directory: Path,
) -> RunResult:
    """Publish the final model below `directory`, and write report.json and report.html there.

    model_directory: the recipe's model, on which adapters stand where nothing compresses it.
    """
    by_name = {stage.name: stage for stage in stages}
    directory.mkdir(parents=True, exist_ok=True)
    final = by_name.get(recipe.final_stage)
    model_dir = adapter_dir = None
    if final is not None:
        model_dir = directory / ("merged" if recipe.merges else "model")
        _publish(final.directory, model_dir)
    if recipe.adapters:
        adapter_dir = directory / "adapter"
        _publish(by_name["search"].directory / "adapter", adapter_dir)
    data = report_data(recipe, stages, seconds, model_dir)
    report_json, report_html = write_report(data, directory)
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
    rows = [ModelRow(**metrics[f"evaluate-{name}"]["row"]) for name in recipe.reported_models()]
    checks = [CheckRow(**check) for check in metrics["merge"]["checks"]] if "merge" in metrics else None
    layers = metrics.get("quantize", metrics.get("sparsify", {})).get("layers", [])
    training = metrics.get("train", {})
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
        lineage=[_lineage(stage) for stage in stages],
        data=_data_report(training, metrics),
        notes=compare_models(_items(stages)),
        chance_accuracy=_first(metrics, "chance_accuracy"),
        merged_dir=str(model_dir) if model_dir else None,
    )


def _lineage(stage: FinishedStage) -> LineageRow:
    return LineageRow(
        stage.name,
        stage.manifest.key,
        stage.directory.name,
        stage.manifest.elapsed_seconds,
        stage.reused,
    )


def _data_report(training: dict[str, Any], metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return dict(training.get("data") or _first(metrics, "data") or {})


def _first(metrics: dict[str, dict[str, Any]], key: str) -> Any:
    """A figure that every evaluation repeats."""
    return next((m[key] for name, m in metrics.items() if name.startswith("evaluate-") and key in m), None)


def _items(stages: list[FinishedStage]) -> dict[str, dict[str, Any]]:
    """The per-item figures of every measured model."""
    prefix = "evaluate-"
    return {
        stage.name.removeprefix(prefix): json.loads((stage.directory / ITEMS).read_text(encoding="utf-8"))
        for stage in stages
        if stage.name.startswith(prefix)
    }


def _publish(source: Path, target: Path) -> None:
    """Put a finished directory under the results; weights are hard links where the file system allows."""
    with new_directory(target) as partial:
        for path in sorted(p for p in source.rglob("*") if p.is_file() and p.name not in NOT_PUBLISHED):
            place = partial / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".safetensors" or not _link(path, place):
                shutil.copy2(path, place)


def _link(path: Path, place: Path) -> bool:
    try:
        os.link(path, place)
    except OSError:
        return False
    return True
