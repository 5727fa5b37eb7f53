"""The contributor's kit: workflows run make targets that exist, forms and the citation are well-formed."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_make_targets_and_nothing_else(path: Path) -> None:
    jobs = read(path)["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(commands) == len(jobs)
    for command in commands:
        program, *targets = command.split()
        assert program == "make"
        assert set(targets) <= TARGETS


def test_the_tests_run_on_every_python_that_is_supported() -> None:
    matrix = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_ci_and_the_hooks_run_what_the_makefile_has() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = {word for line in re.findall(r"^make (.*)$", script, re.MULTILINE) for word in line.split()}
    assert {"check", "test", "demo-small", "dist", "site"} <= targets <= TARGETS
    (hooks,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert hooks["repo"] == "local"  # no repository of others is needed
    assert [hook["entry"] for hook in hooks["hooks"]] == ["make check"]


@pytest.mark.parametrize("name", ["bug.yml", "wish.yml"])
def test_issue_forms_have_what_github_asks_for(name: str) -> None:
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / name)
    assert {"name", "description", "body"} <= form.keys()
    assert len({item["id"] for item in form["body"]}) == len(form["body"])
    assert all(item["attributes"]["label"] for item in form["body"])


def test_the_citation_is_of_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Muñoz", "Yuan", "Jain"]
    assert paper["identifiers"][0]["value"] == "arXiv:2410.03750"
