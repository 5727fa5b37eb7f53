"""The README's files, commands and Python run, on a tiny model; its links lead somewhere."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.documents import run_document

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))


def test_the_marked_blocks_run(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "my-model")
    records = [
        {"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a in range(40) for b in range(35)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    more = [json.dumps({"question": f"What is {a} plus 50?", "answer": str(a + 50)}) for a in range(4)]
    (tmp_path / "more.jsonl").write_text("\n".join(more))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    searched = "method: hill_climb"
    assert README.count(searched) == 1
    commands = run_document(
        README, names, lambda source: source.replace(searched, f"{searched}\n  num_trials: 3")
    )
    assert len(commands) >= 5
    assert {"sqft", "AutoTokenizer", "SqftConfig"} <= names.keys()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_tree_names_every_package() -> None:
    packages = {p.parent.name for p in (ROOT / "src" / "sqft").glob("*/__init__.py")}
    named = set(re.findall(r"^  (\w+)/", README, re.MULTILINE))
    assert packages <= named
