"""A changed source file makes exactly the stages that run it new; nothing about it is kept by hand."""

import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sqft.pipeline import parse_recipe, run_recipe, runner, sources
from sqft.pipeline.context import StageContext
from sqft.pipeline.runner import stage_keys
from sqft.pipeline.stages import Stage, recipe_stages

PACKAGE = Path(sources.__file__).parents[1]
KINDS = {"items", "sparsify", "quantize", "train", "search", "merge", "evaluate", "export"}


@pytest.fixture
def package(package_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package whose files stand for the ones that run."""
    monkeypatch.setattr(sources, "ROOT", package_copy)
    sources._path.cache_clear()
    forget_digests()
    yield package_copy
    sources._path.cache_clear()
    forget_digests()


@pytest.fixture(scope="module")
def package_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "sqft"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def forget_digests() -> None:
    """What a new process would do; a comment at the end changes no imports."""
    sources.source_digest.cache_clear()
    sources._digest.cache_clear()


def change(path: Path) -> None:
    path.write_text(path.read_text() + "\n# changed\n")
    forget_digests()


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    (tmp_path / "train.jsonl").write_text("{}")
    values = {
        "model": "model",
        "data": {"train": str(tmp_path / "train.jsonl")},
        "sparsify": {},
        "quantize": {},
        "adapters": {},
        "evaluate": {"models": ["quantized"]},
        "export": {"formats": ["gguf"]},
    }
    return parse_recipe(values)


def changed_sources(recipe: Any, path: Path) -> set[str]:
    """The kinds of stages whose own source changes with a file."""
    stages = recipe_stages(recipe)
    before = {stage.kind: sources.source_digest(stage.step.__module__) for stage in stages}
    change(path)
    return {
        stage.kind for stage in stages if sources.source_digest(stage.step.__module__) != before[stage.kind]
    }


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("data/splits.py", {"items"}),
        ("data/duplicates.py", {"items"}),
        ("compression/obs.py", {"sparsify", "quantize"}),
        ("compression/magnitude.py", {"sparsify"}),
        ("compression/gptaq.py", {"quantize"}),
        ("training/head.py", {"train"}),
        ("search/hill_climb.py", {"search"}),
        ("certificate/provenance.py", {"merge"}),
        ("evaluation/harness.py", {"evaluate"}),
        ("formats/gguf_model.py", {"export"}),
        ("runtimes/llama_cpp.py", {"export"}),
        ("foreign/rungs.py", set()),
        ("report/plots.py", set()),
        ("cli/run.py", set()),
        ("errors.py", KINDS),
        ("pipeline/recipe.py", KINDS),
    ],
)
def test_the_stages_that_run_a_file_follow_it(package: Path, recipe: Any, file: str, kinds: set[str]) -> None:
    assert changed_sources(recipe, package / file) == kinds


def test_a_changed_source_is_handed_on_to_later_stages(package: Path, recipe: Any) -> None:
    before = stage_keys(recipe, "model")
    change(package / "training" / "head.py")
    after = stage_keys(recipe, "model")
    names = {name for name in before if after[name] != before[name]}
    assert names == {"train", "search", "merge", "export-gguf"}


def test_a_run_repeats_what_the_change_reaches(
    package: Path, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    values = {
        "model": str(tiny_model_dir()),
        "sparsify": {"method": "magnitude"},
        "quantize": {"method": "rtn", "group_size": 32},
        "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu"},
    }

    def stages_that_ran() -> list[str]:
        return [stage.name for stage in run_recipe(parse_recipe(values)).stages if not stage.reused]

    assert stages_that_ran() == ["sparsify", "quantize"]
    assert stages_that_ran() == []
    change(package / "compression" / "rtn.py")
    assert stages_that_ran() == ["quantize"]
    change(package / "cli" / "run.py")
    assert stages_that_ran() == []


def test_no_stage_calls_a_function_that_its_imports_do_not_reach(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: what really runs, function by function, is among the files that were read off."""
    pytest.importorskip("xllamacpp")
    for module in ("adapters", "certificate", "compression", "evaluation", "export", "search", "training"):
        import_module(f"sqft.{module}")
    called: dict[str, set[Path]] = {}

    def watched(stage: Stage) -> Stage:
        files = called.setdefault(stage.name, set())

        def note(frame: FrameType, event: str, argument: Any) -> None:
            code = frame.f_code
            is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)  # not the body of a module or class
            if event == "call" and is_function and code.co_filename.startswith(str(PACKAGE)):
                files.add(Path(code.co_filename))

        @wraps(stage.step)
        def step(context: StageContext) -> dict[str, Any]:
            sys.setprofile(note)
            try:
                return stage.step(context)
            finally:
                sys.setprofile(None)

        return replace(stage, step=step)

    monkeypatch.setattr(runner, "recipe_stages", lambda recipe: [watched(s) for s in recipe_stages(recipe)])
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"question": f"{n} plus 1?", "answer": str(n + 1)}) + "\n" for n in range(30))
    )
    recipe = parse_recipe(
        {
            "model": str(tiny_model_dir()),
            "data": {"train": str(tmp_path / "train.jsonl"), "search_items": 2, "test_items": 2},
            "calibration": {"num_samples": 4, "sequence_length": 16},
            "sparsify": {},
            "quantize": {"group_size": 32},
            "adapters": {"ranks": [4, 2]},
            "train": {"max_steps": 1, "batch_size": 2},
            "search": {"method": "hill_climb", "num_trials": 2},
            "evaluate": {"models": ["merged"], "max_new_tokens": 2},
            "export": {"formats": ["gguf"]},
            "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu"},
        }
    )
    run_recipe(recipe)
    for stage in recipe_stages(recipe):
        reached = set(sources.source_files(stage.step.__module__))
        assert len(called[stage.name]) > 1
        called[stage.name] -= {PACKAGE / "deferred.py"}  # which only leads to what is imported
        assert called[stage.name] - reached == set(), stage.name
