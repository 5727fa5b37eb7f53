"""Activations kept in files: the same bytes, also of a run that was cut, and nothing left behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.compression.tiny_runs import quantize, sparsify

from sqft.compression.walk import BlockWalk
from sqft.pipeline import parse_recipe
from sqft.pipeline.context import StageContext
from sqft.pipeline.stages import recipe_stages
from sqft.pipeline.step_sparsify import sparsify as sparsify_stage
from sqft.progress import Advance

Maker = Callable[..., Path]
JOBS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sparsify": (sparsify, {"method": "sparsegpt", "dense_targets": True}),
    "owl": (sparsify, {"budget": "owl"}),
    "quantize": (quantize, {"method": "gptaq"}),
}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("job", sorted(JOBS))
def test_a_spilled_run_that_was_cut_ends_with_the_same_bytes(
    tiny_model_dir: Maker, tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, settings = JOBS[job]
    directory = tiny_model_dir("llama")
    compress(directory, tmp_path / "whole", **settings)
    save, activations = BlockWalk.save_state, tmp_path / "cut" / "activations"
    spilled: list[str] = []

    def save_and_fail(walk: BlockWalk, *arguments: Any, **options: Any) -> None:
        save(walk, *arguments, **options)
        spilled.extend(sorted(path.name for path in activations.iterdir()))
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(BlockWalk, "save_state", save_and_fail)
        with pytest.raises(Interrupted):
            compress(directory, tmp_path / "cut", spill=True, **settings)
    assert spilled
    assert not activations.exists()
    activations.mkdir()
    (activations / "hidden-9.bin").write_bytes(b"of a run that was killed")
    seen: list[list[str]] = []
    leave = BlockWalk.__exit__

    def look_and_leave(walk: BlockWalk, *error: object) -> None:
        seen.append(sorted(path.name for path in activations.iterdir()))
        leave(walk, *error)

    monkeypatch.setattr(BlockWalk, "__exit__", look_and_leave)
    compress(directory, tmp_path / "cut", spill=True, **settings)
    assert all(names == spilled for names in seen)  # none of the run before beside them
    assert len(seen) == (2 if job == "owl" else 1)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_a_recipe_spills_and_keeps_its_identity(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory, texts = tiny_model_dir("llama"), tmp_path / "texts.txt"
    texts.write_text("".join(f"{n} plus {n} is {2 * n}\n" for n in range(200)))
    calibration = {"source": str(texts), "num_samples": 8, "sequence_length": 32}
    recipes = [
        parse_recipe(
            {
                "model": str(directory),
                "calibration": calibration,
                "sparsify": {"budget": "owl"},
                "runtime": {"spill": spill},
            }
        )
        for spill in (True, False)
    ]
    assert recipe_stages(recipes[0]) == recipe_stages(recipes[1])
    files: list[int] = []

    class Watch:
        @contextmanager
        def task(self, description: str, total: int) -> Iterator[Advance]:
            yield lambda done, note="": files.append(len(list(out.glob("activations/*"))))

    for recipe, name in zip(recipes, ("spilled", "kept"), strict=True):
        out = tmp_path / name
        inputs = {"model": directory}
        sparsify_stage(StageContext(recipe, "", out, inputs, "cpu", Watch(), out))
    assert all(files[:2])
    assert files[2:] == [0, 0]
    spilled, kept = (tmp_path / name / "model.safetensors" for name in ("spilled", "kept"))
    assert spilled.read_bytes() == kept.read_bytes()
