"""One part in a process of its own: `python -m benchmarks.gpu.child PART FILE [--dry] [--skip ROW ...]`."""

import argparse
import importlib
from pathlib import Path

from benchmarks.gpu.interpreter import use_interpreter

__all__ = ["main"]


def main() -> None:
    """Run a part; its rows are appended to FILE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--skip", nargs="*", default=[])
    options = parser.parse_args()
    if options.dry:
        use_interpreter()
    from benchmarks.gpu.rows import Rows

    part = importlib.import_module(f"benchmarks.gpu.part_{options.part}")
    part.measure(Rows(options.file, skip=frozenset(options.skip), dry=options.dry))


if __name__ == "__main__":
    main()
