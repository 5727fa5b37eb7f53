"""The wheel and the sdist: complete, installed into a fresh environment, and working there."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import sqft

pytestmark = pytest.mark.slow  # `make dist` runs them too

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python in a fresh environment that holds the wheel; dependencies are those of the tests."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--quiet", "--disable-pip-version-check", str(wheel)], check=True)
    own = next(place.glob("lib/python*/site-packages"))
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str, program: str = "python", cwd: Path = place, code: int = 0) -> str:
        command = [str(place / "bin" / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return run


def test_they_hold_every_file_of_the_package(built: Path) -> None:
    wanted = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "sqft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name.startswith(f"sqft-{sqft.__version__}-")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert wanted <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("sqft/", "sqft-"))]
    with tarfile.open(sdist) as archive:
        parts = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"src/{name}" for name in wanted} <= parts
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py"} <= parts
    assert not [name for name in parts if name.split("/")[0] in {"runs", ".venv", "site", "dist"}]


def test_the_wheel_works_where_it_is_installed(
    installed: Callable[..., str], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    where = installed("-c", "import sqft; print(sqft.__file__)")
    assert str(ROOT) not in where
    assert f"sqft {sqft.__version__}" in installed("--version", program="sqft")
    assert "torch" in installed("doctor", program="sqft")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model_dir('llama')}\nsparsify: {{method: magnitude}}\nquantize: {{method: rtn}}\n"
    )
    plan = installed("plan", "recipe.yaml", program="sqft", cwd=tmp_path)
    assert "sparsify" in plan
    assert "self_attn.q_proj" in plan


def test_the_papers_recipes_are_in_it(
    installed: Callable[..., str], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """An experiment is shown and planned far from a checkout, and one that is not there refused."""
    help_text = installed("reproduce", "--help", program="sqft", cwd=tmp_path)
    assert "gsm8k" in help_text
    table = installed("reproduce", "gsm8k", "--table", program="sqft", cwd=tmp_path)
    assert "| mistral-7b-sparse-peft | merged | not run |" in table
    (tmp_path / "data" / "arc_easy").mkdir(parents=True)
    row = '{"question": "who runs?", "choices": ["a fox", "a dog"], "label": 1}\n'
    for split in ("train", "test"):
        (tmp_path / "data" / "arc_easy" / f"{split}.jsonl").write_text(row * 80)
    command = ["reproduce", "science", "--scale", "small", "--only", "arc-easy-*", "--plan"]
    plan = installed(*command, f"model={tiny_model_dir('llama')}", program="sqft", cwd=tmp_path)
    assert "science-small: 5 runs" in plan
    told = installed("reproduce", "gsm9k", program="sqft", cwd=tmp_path, code=2)
    assert "there is no experiment gsm9k at scale full; there are ablation, " in told


def test_importing_it_costs_nothing(installed: Callable[..., str]) -> None:
    script = (
        "import sys, time; start = time.process_time(); import sqft; spent = time.process_time() - start; "
        "print('torch' in sys.modules, spent)"
    )
    torch, spent = installed("-c", script).split()
    assert torch == "False"
    assert float(spent) < 0.5  # measured: 0.01 s; importing torch takes seconds
