"""OpenVINO says what transformers says, at every length and padded, and is compared weight by weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sqft.errors import ExportError
from sqft.export import export_model
from sqft.export.fidelity import compare_codes
from sqft.formats.openvino import XML, read_openvino
from sqft.formats.weights import open_source
from sqft.models import load_model
from sqft.runtimes import OpenVinoModel

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
    runtime = OpenVinoModel(tmp_path / "ir" / XML)
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


@pytest.mark.parametrize("arch", ["mistral", "llama", "phi3"])
def test_every_weight_is_compared(merged_dir: MergedDir, tmp_path: Path, arch: str) -> None:
    result = export_model(merged_dir(arch, symmetric=False), "openvino", tmp_path / "ir")
    compared, state = result.code_comparison, load_model(merged_dir(arch, symmetric=False)).state_dict()
    assert compared.codes == sum(value.numel() for name, value in state.items() if "_proj.weight" in name)
    assert compared.codes + compared.weights == sum(value.numel() for value in state.values())
    assert compared.changed == compared.weights_changed == 0
    assert result.logit_comparison is not None
    assert result.logit_comparison.largest_share is not None
    assert result.logit_comparison.largest_share < 1e-5


def test_a_tied_head_is_compared_once(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    directory = tiny_model_dir("qwen2", tie_word_embeddings=True)
    compared = export_model(directory, "openvino", tmp_path / "ir").code_comparison
    assert compared.weights == sum(value.numel() for value in load_model(directory).parameters())
    assert compared.weights_changed == 0


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_changed_or_missing_plain_weight_is_told(
    tiny_model_dir: ModelDir, tmp_path: Path, name: str
) -> None:
    directory = tiny_model_dir()
    export_model(directory, "openvino", tmp_path / "ir")
    source, whole = open_source(directory), dict(read_openvino(open_source(directory), tmp_path / "ir"))
    weight = whole[name]
    assert isinstance(weight, Tensor)
    changed = whole | {name: weight + 1}
    assert compare_codes(source, changed.items()).weights_changed == weight.numel()
    del whole[name]
    with pytest.raises(ExportError, match=f"1 weights of the model are not in the artefact, first {name}"):
        compare_codes(source, whole.items())
