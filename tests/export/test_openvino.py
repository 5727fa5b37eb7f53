"""OpenVINO: what is written says the same as transformers, at every length and with padding, weight by weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sqft.errors import ExportError
from sqft.export import export_model
from sqft.export.openvino_ir import OpenVinoModel
from sqft.models import load_model

np = pytest.importorskip("numpy")
pytest.importorskip("openvino")
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:openvino"),
]
MergedDir = Callable[..., Path]
ModelDir = Callable[..., Path]
TOKENS = torch.randint(4, 288, (1, 72), generator=torch.Generator().manual_seed(5))


def share(found: Tensor, expected: Tensor) -> float:
    """Largest difference / largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def infer(model: OpenVinoModel, tokens: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
    model.reset()
    inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": positions}
    arrays = {name: value.numpy() for name, value in inputs.items()}
    result = model._request.infer(arrays | {"beam_idx": np.zeros(len(tokens), np.int32)})
    return torch.from_numpy(result["logits"].copy())


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("mistral", {"sliding_window": 20}),
        ("phi3", {"sliding_window": 20}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
        ("qwen2", {"sliding_window": 20}),
    ],
)
def test_sliding_windows_hold_beyond_their_length(
    tiny_model_dir: ModelDir, tmp_path: Path, arch: str, changes: dict[str, Any]
) -> None:
    directory = tiny_model_dir(arch, **changes)
    export_model(directory, "openvino", tmp_path / "ir")
    model = load_model(directory, dtype=torch.float32)
    runtime = OpenVinoModel(tmp_path / "ir")
    ids = TOKENS[0].tolist()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits[0]
        assert share(runtime.logits(ids), expected) < 1e-5
        runtime.reset()
        steps = [runtime.logits(ids[:30]), *(runtime.logits([token]) for token in ids[30:])]
        assert share(torch.cat(steps), expected) < 1e-5
        attention = torch.ones_like(TOKENS)
        attention[:, :9] = 0
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        expected = model(input_ids=TOKENS, attention_mask=attention, position_ids=positions).logits
        assert share(infer(runtime, TOKENS, attention, positions)[:, 9:], expected[:, 9:]) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sliding_window": 20}, "attention windows of gemma2"), ({"sliding_window": 512}, "the soft cap on")],
)
def test_attention_that_is_not_traced_is_refused(
    tiny_model_dir: ModelDir, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=f"openvino cannot hold the .*{message.removeprefix('the ')}"):
        export_model(tiny_model_dir("gemma2", **changes), "openvino", tmp_path / "ir")
