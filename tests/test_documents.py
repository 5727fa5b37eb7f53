"""Generated documents are current, recipes are valid, examples run."""

import importlib.util
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from benchmarks.families import FAMILIES, run_family

from sqft.pipeline import load_recipe
from sqft.pipeline.sweep import load_sweep

ROOT = Path(__file__).parents[1]


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_reference_is_current() -> None:
    generate = load_script(ROOT / "docs" / "generate.py")
    current = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert current == generate.render_recipe(), "run: make docs"


def test_the_table_of_families_is_current() -> None:
    generate = load_script(ROOT / "docs" / "generate.py")
    measured = json.loads((ROOT / "docs" / "results" / "families.json").read_text(encoding="utf-8"))
    current = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert current == generate.render_families(measured), "run: make docs"


def test_the_tables_of_the_small_experiments_are_current() -> None:
    """Every model of every cell has its row, measured or not."""
    generate = load_script(ROOT / "docs" / "generate.py")
    page = (ROOT / "docs" / "results" / "paper-small.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "docs" / "results" / "paper-small.json").read_text(encoding="utf-8"))
    assert page == generate.render_experiments(page, kept), "run: make docs"
    for name, table in generate.collect_experiments({}).items():
        assert [line[:2] for line in kept[name][1:]] == [line[:2] for line in table[1:]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_out_as_the_table_says(family: str, tmp_path: Path) -> None:
    measured = json.loads((ROOT / "docs" / "results" / "families.json").read_text(encoding="utf-8"))
    expected = next(row for row in measured["rows"] if row["family"] == family)
    row = run_family(family, tmp_path)
    assert row.keys() == expected.keys()
    for same in ("certificate", "refused", "gguf"):  # the reasons of what is refused, word for word
        assert row.get(same) == expected.get(same)
    assert row.get("changed", 0) == 0
    assert row.get("transformers", 0) <= 1e-5
    assert row.get("llama.cpp", 0) < 4e-4


def test_the_diagram_of_packages_is_current() -> None:
    generate = load_script(ROOT / "docs" / "generate.py")
    current = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert current == generate.render_architecture(current), "run: make docs"


def test_the_diagram_shows_what_does_not_follow_from_the_rest() -> None:
    generate = load_script(ROOT / "docs" / "generate.py")
    shown = generate.render_packages({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert "a --> b" in shown
    assert "b --> c" in shown
    assert "a --> b & c" not in shown
    assert generate.package_imports()["ops"] >= {"errors"}


def test_the_demo_table_is_exchanged_as_a_whole() -> None:
    from tests.report.invented import invent_report

    generate = load_script(ROOT / "docs" / "generate.py")
    table = generate.render_demo(invent_report())
    text = generate.replace_demo(f"before\n{generate.BEGIN}\nold\n{generate.END}\nafter\n", table)
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| merged, sparse INT4 |" in text
    assert generate.replace_demo(text, table) == text


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert f"`{path.name}`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("[!p]*/*.yaml")), ids=lambda p: p.stem)
def test_sweeps_are_valid(path: Path) -> None:
    assert len(load_sweep(path).cells) > 1
    assert f"`{path.parent.name}/{path.name}`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:trl")
def test_examples_run(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model = str(tiny_model_dir("llama"))
    examples = {path.stem: load_script(path) for path in (ROOT / "examples").glob("*.py")}
    records = [
        {"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a in range(40) for b in range(35)
    ]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = examples.pop("finetune").main(
        [model, str(train), "--steps", "4", "--workspace", str(tmp_path / "runs")]
    )
    assert result.data.passed
    assert isinstance(examples.pop("generate").main(str(result.model_dir), "What is 1 plus 1?", 4), str)
    sparse, merged = str(tmp_path / "sparse"), str(tmp_path / "merged")
    before, after = examples.pop("own_training_loop").main(model, sparse, merged, steps=2)
    assert before == after
    assert abs(after - 0.5) < 0.001
    base = next((tmp_path / "runs" / "stages").glob("quantize-*"))
    losses = examples.pop("many_tasks").main(
        str(base), str(tmp_path / "adapters"), str(tmp_path / "task"), steps=4
    )
    for task, other in (("sums", "animals"), ("animals", "sums")):
        assert losses[task][task] < min(losses["none"][task], losses[other][task])
    assert (tmp_path / "task" / "sqft_certificate.json").is_file()
    taught, preferred = examples.pop("with_trl").main(str(base), str(tmp_path / "with_trl"), steps=4)
    assert taught[-1] < 0.95 * taught[0]
    assert len(preferred) == 4
    assert (tmp_path / "with_trl" / "sqft_certificate.json").is_file()
    del examples["fsdp"]  # tests/end_to_end/test_launchers.py runs it as its launchers do
    assert not examples, "an example without a test"


def test_make_knows_its_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = [
        "setup",
        "demo",
        "demo-small",
        "demo-full",
        "test",
        "test-slow",
        "check",
        "fix",
        "docs",
        "site",
        "dist",
        "bench",
        "gpu",
    ]
    assert all(f"make {target}" in done.stdout for target in wanted)
    for target in re.findall(r"make ([\w-]+)", done.stdout):  # a target that is told and not there
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
