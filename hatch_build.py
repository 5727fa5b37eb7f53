"""Puts the compiled CPU kernels into a wheel where there is a C compiler; without one the wheel is pure."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

KERNELS = "src/sqft/kernels"


class NativeBuildHook(BuildHookInterface[Any]):
    """Compiles for the machine's own platform tag. An editable install compiles at the first use instead."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile into the source tree, and name the library as part of the wheel."""
        native = _load(Path(self.root) / KERNELS / "native_build.py")
        compiler = native.find_compiler()
        if version == "editable" or compiler is None or sys.platform == "win32":
            self.app.display_info("the wheel has no compiled CPU kernels")
            return
        library = native.compile_library(Path(self.root) / KERNELS, compiler)
        build_data["force_include"][str(library)] = f"sqft/kernels/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Take the library out of the source tree again: there it would outlive the sources it is made of."""
        for library in build_data["force_include"]:
            os.remove(library)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
