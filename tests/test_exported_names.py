import ast
import importlib
from pathlib import Path

import pytest

import sqft

SOURCE = Path(sqft.__file__).parent
MODULES = sorted(
    "sqft." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if path != SOURCE / "__init__.py" and path.name != "__main__.py"
)


@pytest.mark.parametrize("name", [name.removesuffix(".__init__") for name in MODULES])
def test_exported_names_are_sorted_and_exist(name: str) -> None:
    path = SOURCE.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    exported = None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == "__all__" and node.value is not None:
            exported = ast.literal_eval(node.value)
    assert exported is not None, f"{name} has no __all__"
    capitals_first = sorted(exported, key=lambda n: (not n.isupper(), n.islower(), n))
    assert exported in (sorted(exported), capitals_first)
    module = importlib.import_module(name)
    assert [n for n in exported if not hasattr(module, n)] == []
