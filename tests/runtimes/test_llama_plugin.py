"""Sparse Q4_0 weights in llama.cpp: packed when the file is opened, the same answers."""

import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.errors import ExportError
from sqft.formats.gguf_model import write_gguf
from sqft.formats.weights import open_source
from sqft.kernels.native_build import BUILT_FOR, find_compiler
from sqft.runtimes import llama_plugin
from tests.merged_models import write_merge

pytest.importorskip("xllamacpp")
FITS = importlib.metadata.version("xllamacpp") == BUILT_FOR
runs = pytest.mark.skipif(not FITS or find_compiler() is None, reason="the plug-in cannot be built for this")
SCRIPT = """
import json, sys
from pathlib import Path
from sqft.runtimes.llama_cpp import LlamaCpp
from sqft.runtimes.llama_plugin import packed_tensors, use_packed_products
rows = []
for path in sys.argv[1:]:
    for packed in (True, False):
        use_packed_products(packed)
        model = LlamaCpp(Path(path), context=64, threads=2)
        row = [model.next_log_probabilities(list(range(5, 5 + n)), 300).tolist() for n in (1, 7, 20)]
        rows.append([sum(packed_tensors().values()), packed_tensors(), row])
print("RESULT" + json.dumps(rows))
"""


@runs
def test_packed_products_give_the_same_answers(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own, as llama.cpp decides about buffers once. Vectors alone and a prompt of 20."""
    files, patterns = [], ["16:32 window 2", "4:16", None]
    for i, pattern in enumerate(patterns):
        merged = write_merge(tiny_model_dir("llama"), tmp_path / str(i), pattern=pattern).merged
        files.append(tmp_path / f"{i}.gguf")
        write_gguf(open_source(merged), files[-1], head_type="auto")
    command = [sys.executable, "-c", SCRIPT, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout[done.stdout.index("RESULT") + 6 :])
    counts = [row[0] for row in rows]
    assert counts == [14, 14, 28, 28, 42, 42]  # the linears of two blocks each time, and none without it
    assert rows[-1][1]["window2"] == 14
    assert rows[-1][1]["index4"] == 14
    assert rows[-1][1]["dense"] == 14  # half of the weights, anywhere
    for packed, plain in zip(rows[::2], rows[1::2], strict=True):
        for found, expected in zip(packed[2], plain[2], strict=True):
            pairs = [pair for pair in zip(found, expected, strict=True) if pair != (-math.inf, -math.inf)]
            kl = sum(math.exp(b) * (b - a) for a, b in pairs)
            assert kl < 2e-3  # both round activations to 8 bits, not quite alike
            assert len(pairs) > 250


def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_plugin._plugin.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2027.1")
    with pytest.raises(ExportError, match=f"fit xllamacpp {BUILT_FOR}, and 2027.1 is installed"):
        llama_plugin.use_packed_products()


@pytest.mark.skipif(not FITS, reason="another version of xllamacpp is told first")
def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_plugin._plugin.cache_clear()
    monkeypatch.setattr(llama_plugin, "library_path", lambda name: None)
    with pytest.raises(ExportError, match="need a C and C"):
        llama_plugin.use_packed_products()
