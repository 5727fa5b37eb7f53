"""The compiled part of the CPU kernels: finding it, or making it where there is a C compiler.

A wheel brings the library ready-made. From a source tree it is compiled at its first use, into a cache of the
user's, in a few seconds. The file's name carries a digest of the sources, so an old library is never taken
for a new one. Without a compiler and without a library everything else works.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["BUILT_FOR", "compile_library", "find_compiler", "find_library", "library_path", "native_sources"]

HERE = Path(__file__).parent
SOURCES = HERE / "native"
# Sums are added in the order that is written: -ffp-contract=off keeps all instruction sets alike.
FLAGS = ("-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
COMPILERS = ("gcc", "clang", "cc")
# What is compiled beside the C files, by the library's name: nothing, or what hooks them into llama.cpp.
LIBRARIES: dict[str, tuple[str, ...]] = {"cpu": (), "llama": ("llama_plugin.cpp",)}

BUILT_FOR = "2026.10.11549"  # the xllamacpp whose structures llama_plugin.cpp knows


def native_sources(library: str = "cpu") -> list[Path]:
    """The C files of a library, and the headers that they include."""
    own = [SOURCES / name for name in LIBRARIES[library]]
    return sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h"), *own])


def find_compiler() -> str | None:
    """The C compiler: what the variable CC names, else the first of gcc, clang and cc that is there."""
    named = os.environ.get("CC")
    names = (named,) if named else COMPILERS
    return next((path for path in map(shutil.which, names) if path), None)


def library_path(library: str = "cpu") -> Path | None:
    """The compiled library, made now if there is none yet; None where it cannot be made.

    Raises: OSError if there is a compiler and it fails.
    """
    found = find_library(library)
    if found is not None:
        return found
    compiler = find_compiler()
    if compiler is None or platform.system() == "Windows":
        return None
    return compile_library(_cache_dir(), compiler, library)


def find_library(library: str = "cpu") -> Path | None:
    """The compiled library, from the wheel or of an earlier use; None if there is none yet."""
    name = _library_name(library)
    return next((folder / name for folder in (HERE, _cache_dir()) if (folder / name).is_file()), None)


def compile_library(folder: Path, compiler: str, library: str = "cpu") -> Path:
    """Compile a library into a folder; whole or not at all.

    Raises: OSError with what the compiler said.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    final = folder / _library_name(library)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / final.name
        files = [str(path) for path in native_sources(library) if path.suffix != ".h"]
        ends = ["-lm", *(["-lstdc++"] if LIBRARIES[library] else [])]
        command = [compiler, *FLAGS, *files, "-o", str(made), *ends]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise OSError(f"{compiler} cannot compile the CPU kernels: {said}")
        os.replace(made, final)
    return final


def _library_name(library: str) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in native_sources(library):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"sqft_{library}_{platform.machine().lower()}_{digest.hexdigest()[:16]}.so"


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sqft"
