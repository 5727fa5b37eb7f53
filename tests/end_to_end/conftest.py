"""A tiny task, and recipes of the four pipelines for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PIPELINES = ["shears", "sqft", "sparse_peft", "qa_sparse_peft"]


@pytest.fixture
def task_files(tmp_path: Path) -> dict[str, str]:
    """As `write_task`, in the test's own folder."""
    return write_task(tmp_path)


def write_task(directory: Path) -> dict[str, str]:
    """Sums of two digits: 60 items to train on, 12 to search with, 12 to test on."""
    items = [
        {"question": f"what is {a} plus {b}?", "answer": str(a + b)} for a in range(10) for b in range(9)
    ]
    items = items[::2] + items[1::2]
    splits = {"train": items[:60], "search": items[60:72], "test": items[72:84]}
    paths = {}
    for name, records in splits.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        paths[name] = str(path)
    return paths


@pytest.fixture
def recipe_values(task_files: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`recipe_values(pipeline, model_dir)`: as `values_maker`, in the test's own folder."""
    return values_maker(task_files, tmp_path / "runs")


@pytest.fixture(scope="module")
def shared_values(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """As `recipe_values`, in one workspace: a stage that several tests of a module need is made once."""
    directory = tmp_path_factory.mktemp("shared")
    return values_maker(write_task(directory), directory / "runs")


def values_maker(task_files: dict[str, str], workspace: Path) -> Callable[..., dict[str, Any]]:
    """`make(pipeline, model_dir)`: one of the four pipelines, small enough for a test."""

    def make(pipeline: str, model_dir: Path) -> dict[str, Any]:
        methods = {"shears": "lora", "sqft": "lora"}
        values: dict[str, Any] = {
            "name": pipeline,
            "model": str(model_dir),
            "data": {**task_files, "prompt": "question: {question} answer: ", "sequence_length": 64},
            "calibration": {"num_samples": 8, "sequence_length": 64},
            "sparsify": {"method": "wanda", "sparsity": 0.5},
            "adapters": {"method": methods.get(pipeline, pipeline), "ranks": [8, 6, 4], "alpha": 16},
            "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 2e-2, "checkpoint_steps": 2},
            "search": {"method": "hill_climb", "num_trials": 4},
            "evaluate": {"batch_size": 8, "max_new_tokens": 4, "general_text": None},
            "runtime": {"workspace": str(workspace), "device": "cpu", "threads": 1},
        }
        if pipeline in ("sqft", "qa_sparse_peft"):
            values["quantize"] = {"method": "gptq", "group_size": 32}
        return values

    return make
