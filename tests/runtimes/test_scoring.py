"""Scores and greedy answers of llama.cpp and OpenVINO against transformers on the same weights."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.data import Example
from sqft.evaluation import evaluate_items
from sqft.evaluation.scoring import Row, score_rows
from sqft.export import export_model
from sqft.formats.openvino import XML
from sqft.models import load_model
from sqft.runtimes import LlamaCpp, OpenVinoModel

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:openvino"),
]


def open_runtime(kind: str, model: Path, directory: Path) -> Any:
    if kind == "gguf":
        pytest.importorskip("xllamacpp")
        export_model(model, "gguf", directory)
        return LlamaCpp(next(directory.glob("*.gguf")), context=128, threads=1)
    pytest.importorskip("openvino")
    export_model(model, "openvino", directory)
    return OpenVinoModel(directory / XML, threads=1, max_length=128)


@pytest.mark.parametrize("kind", ["gguf", "openvino"])
def test_a_runtime_scores_and_answers_as_transformers_does(
    kind: str, merged_dir: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = load_model(merged_dir())
    runtime = open_runtime(kind, merged_dir(), tmp_path / "export")
    prompt = tuple(tiny_tokenizer("what is 3 plus 4? é")["input_ids"])  # é: two tokens, half a character each
    answer = (*tiny_tokenizer(" 7")["input_ids"], tiny_tokenizer.eos_token_id)
    row = Row((*prompt, *answer[:-1]), [(p, t) for p, t in enumerate((*prompt, *answer)[1:])])
    (expected,), (found,) = score_rows(model, [row]), score_rows(runtime, [row])
    # llama.cpp multiplies INT4 weights by inputs rounded to 8 bits
    assert found == pytest.approx(expected, abs=0.2 if kind == "gguf" else 1e-3)
    (first,) = itertools.islice(runtime.greedy(prompt), 1)
    best = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    assert best[first] >= best.max() - (0.2 if kind == "gguf" else 1e-3)
    again = list(itertools.islice(runtime.greedy(prompt), 5))
    assert again[0] == first
    assert list(itertools.islice(runtime.greedy((*prompt, *again[:2])), 3)) == again[2:]
    item = Example("", "7", prompt, answer)
    loss, accuracy = evaluate_items(runtime, [item], tiny_tokenizer, max_new_tokens=4)
    exact, _ = evaluate_items(model, [item], tiny_tokenizer, max_new_tokens=4)
    assert loss.loss == pytest.approx(exact.loss, abs=0.2 if kind == "gguf" else 1e-3)
    assert accuracy is not None
    assert accuracy.num_items == 1
