"""A changed source file makes exactly the stages that run it new; nothing about it is kept by hand."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqft.pipeline import parse_recipe, sources
from sqft.pipeline.runner import stage_keys
from sqft.pipeline.stages import recipe_stages

PACKAGE = Path(sources.__file__).parents[1]
KINDS = {"items", "sparsify", "quantize", "train", "search", "merge", "evaluate", "export"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the package whose files stand for the ones that run."""
    copy = tmp_path_factory.mktemp("source") / "sqft"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "ROOT", copy)
        sources._path.cache_clear()
        forget_digests()
        yield copy
    sources._path.cache_clear()
    forget_digests()


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
        ("data/records.py", {"items", "sparsify", "quantize"}),  # calibration texts are records too
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


def test_every_file_that_is_loaded_was_foreseen(package: Path) -> None:
    """What Python itself imports for a module of this package is among the files read off its imports."""
    script = (
        "import sys, sqft.compression.quantize, sqft.certificate.provenance, sqft.training.train; "
        "print(*sorted(m.__file__ for n, m in sys.modules.items() if n.startswith('sqft.')))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment(package)
    )
    loaded = {Path(path) for path in shown.stdout.split() if not path.endswith("__init__.py")}
    foreseen = {
        path
        for name in ("compression", "certificate", "training")
        for path in sources.source_files(f"sqft.{name}")
    }
    assert loaded - foreseen == set()


def test_a_run_repeats_what_the_change_reaches(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    shutil.copytree(PACKAGE, tmp_path / "src" / "sqft", ignore=shutil.ignore_patterns("__pycache__"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model_dir()}\n"
        "sparsify: {method: magnitude}\n"
        "quantize: {method: rtn, group_size: 32}\n"
        "runtime: {device: cpu}\n"
    )
    script = (
        "import sqft; result = sqft.run_recipe(sqft.load_recipe('recipe.yaml')); "
        "print([stage.name for stage in result.stages if not stage.reused])"
    )
    shown = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env=environment(tmp_path / "src" / "sqft"),
        )
        shown.append(done.stdout.strip())
        change(tmp_path / "src" / "sqft" / "compression" / "rtn.py")
    assert shown == ["['sparsify', 'quantize']", "['quantize']"]


def environment(package: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(package.parent)}
