"""Imports go one way, files stay small, and a command that needs no torch does not wait for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sqft"
TIERS = [
    {
        "errors",
        "progress",
        "artifacts",
        "checks",
        "deferred",
        "launch",
        "marks",
        "directories",
        "patterns",
        "sections",
        "untrusted",
        "kernels",
    },
    {"ops"},
    {"models", "data"},
    {"compression", "adapters", "formats"},
    {"training", "search", "evaluation", "certificate", "runtimes", "foreign", "report"},
    {"export"},
    {"pipeline"},
    {"cli"},
]
TIER = {name: place for place, names in enumerate(TIERS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))
# Plain values and errors that everything of the lowest tier may share.
FOUNDATION = {
    "errors", "progress", "artifacts", "checks", "deferred", "launch", "marks", "directories", "patterns",
    "sections", "untrusted",
}  # fmt: skip
# sqft itself, and `python -m sqft`, stand above all: they only hand on.
ENTRANCES = {SOURCE / "__init__.py", SOURCE / "__main__.py"}


def imported_modules(path: Path) -> set[str]:
    """Every sqft module that a file imports, also inside functions and for types only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {_named(node.module or "", alias.name) for alias in node.names}
    return {name for name in names if name.startswith("sqft.")}


def _named(package: str, name: str) -> str:
    """What `from package import name` imports: the module of that name, or the package that holds it."""
    inside = SOURCE.parent.joinpath(*package.split("."), name)
    is_module = package.split(".")[0] == "sqft" and (inside.with_suffix(".py").is_file() or inside.is_dir())
    return f"{package}.{name}" if is_module else package


def module_name(path: Path) -> str:
    """A file's name in an import; a package's __init__ is called by the package."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def owner(path: Path) -> str:
    """The package, or module at the top, that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in FILES if p not in ENTRANCES], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_go_down_only(path: Path) -> None:
    mine = owner(path)
    assert mine in TIER, f"{mine} has no place in the tier table"
    for module in imported_modules(path):
        other = module.split(".")[1]
        if other == mine or other.startswith("__"):
            continue
        assert other in TIER, f"{module} has no place in the tier table"
        shared = other in FOUNDATION and mine in FOUNDATION
        assert TIER[other] < TIER[mine] or shared, f"{mine} may not import {module}"


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules that import each other in a circle, and those above them; empty if there is none."""
    imports = dict(imports)
    done: set[str] = set()
    while imports:
        ready = {name for name, needs in imports.items() if needs & (imports.keys() | done) <= done}
        if not ready:
            return sorted(imports)
        done |= ready
        imports = {name: needs for name, needs in imports.items() if name not in ready}
    return []


@pytest.mark.parametrize("reader", ["stored", "adapter", "provenance"])
def test_what_recomputes_a_merge_shares_no_code_with_what_made_it(reader: str) -> None:
    """Nor with what opens models: only errors, progress, and how files are listed and digested."""
    waiting = [f"sqft.certificate.{reader}"]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            parts = name.split(".")[1:]
            path = SOURCE.joinpath(*parts).with_suffix(".py")
            waiting += imported_modules(path if path.is_file() else SOURCE.joinpath(*parts, "__init__.py"))
    elsewhere = {name for name in reached if not name.startswith("sqft.certificate.")}
    assert elsewhere <= {f"sqft.{name}" for name in ("errors", "progress", "artifacts", "checks", "marks")}


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "elsewhere"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for types count too. A package's own name stands for its __init__."""
    imports = {}
    for path in FILES:
        if path not in ENTRANCES:
            imports[module_name(path)] = imported_modules(path) - {module_name(path)}
    assert circle(imports) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_small_and_one_folder_deep(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    assert len(path.relative_to(SOURCE).parts) <= 2
    assert "utils" not in path.stem


def test_nothing_is_left_open() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("TODO", "FIXME", "NotImplementedError") if word in text], path


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["schema"], ["run", "missing.yaml"]])
def test_commands_that_need_no_torch_do_not_import_it(arguments: list[str]) -> None:
    script = (
        "import sys; from sqft.cli import run_command_line; "
        f"run_command_line({arguments!r}); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
