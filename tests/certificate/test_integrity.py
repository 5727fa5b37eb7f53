import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft.certificate import Check, check_integrity, require_passed, write_certificate
from sqft.certificate.reference import compute_logits, write_reference
from sqft.errors import CertificateError
from sqft.models import load_model
from tests.merged_models import MergedDirectories

Merge = Callable[..., MergedDirectories]
TOKENS = [list(range(4, 24)), [9, 200, 7]]
WEIGHTS = "model.safetensors"


def certify(directory: Path) -> Path:
    write_reference(directory, load_model(directory, dtype=torch.float32), TOKENS)
    write_certificate(directory, [])
    return directory


def failed(directory: Path, *, redigest: bool = False) -> set[str]:
    """redigest: as if whoever damaged the model also wrote new digests."""
    if redigest:
        write_certificate(directory, [])
    return {check.name for check in check_integrity(directory) if not check.passed}


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("mistral", {"symmetric": False}),
        ("phi3", {}),
        ("llama", {"quantized": False}),
        ("llama", {"bits": 3, "sparsity": 0.0}),
    ],
)
def test_an_undamaged_model_passes(merge_copy: Merge, arch: str, changes: dict[str, Any]) -> None:
    directory = certify(merge_copy(arch, **changes).merged)
    (directory / "README.md").write_text("a model card, written later")
    checks = check_integrity(directory)
    require_passed(checks, directory)
    assert [check.name for check in checks] == ["record", "digests", "tensors", "codes", "zeros", "logits"]


NAME = "model.layers.0.self_attn.v_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "code": (lambda t: t[f"{NAME}.weight_packed"][1, 1].bitwise_xor_(1 << 6), "logits"),
    "scale": (lambda t: t[f"{NAME}.weight_scale"][1, 1].mul_(1.5), "logits"),
    "missing tensor": (lambda t: t.pop(f"{NAME}.weight_scale"), "tensors"),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "logits"),
    "NaN": (lambda t: t["model.norm.weight"][3].fill_(float("nan")), "tensors"),
    "negative scale": (lambda t: t[f"{NAME}.weight_scale"][1, 1].mul_(-1), "codes"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damaged_weights_are_caught_twice(merge_copy: Merge, damage: str) -> None:
    directory = certify(merge_copy().merged)
    change, caught_by = DAMAGE[damage]
    rewrite(directory / WEIGHTS, change)
    assert {"digests", caught_by} <= failed(directory)
    assert caught_by in failed(directory, redigest=True)


def test_a_changed_zero_point_is_caught(merge_copy: Merge) -> None:
    directory = certify(merge_copy(symmetric=False).merged)
    rewrite(directory / WEIGHTS, lambda t: t[f"{NAME}.weight_zero_point"][0, 0].bitwise_xor_(1))
    assert {"digests", "zeros", "logits"} <= failed(directory)
    assert {"zeros", "logits"} <= failed(directory, redigest=True)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_changed_mask_bit_is_caught(merge_copy: Merge, quantized: bool) -> None:
    directory = certify(merge_copy(quantized=quantized).merged)
    masks = directory / "sqft_masks.safetensors"
    stated = {name: "32,64" for name in load_file(masks)}

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME].bitwise_xor_(255)

    tensors = load_file(masks)
    flip(tensors)
    save_file(tensors, masks, metadata=stated)
    assert {"digests", "zeros"} <= failed(directory)
    assert "zeros" in failed(directory, redigest=True)


@pytest.mark.parametrize(
    ("made", "stated"),
    [
        (None, "1:4"),
        ("2:4", "1:4"),
        ("16:32", "16:32 window 2"),
        ("16:32", "16:32 window 3"),
        ("16:32 window 3", "16:32 window 2"),
        ("4:16", "16:32 window 2"),
        ("12:32", "12:32 window 3-3-2"),
    ],
)
def test_a_broken_pattern_is_caught(merge_copy: Merge, made: str | None, stated: str) -> None:
    directory = merge_copy(pattern=made).merged
    (directory / "sqft.json").write_text(json.dumps({"pattern": stated}))
    assert failed(certify(directory)) == {"zeros"}


@pytest.mark.parametrize("pattern", ["2:4", "16:32 window 2", "16:32 window 3", "12:32 window 3-3-2"])
def test_a_pattern_that_holds_is_stated(merge_copy: Merge, pattern: str) -> None:
    directory = merge_copy(pattern=pattern).merged
    (directory / "sqft.json").write_text(json.dumps({"pattern": pattern}))
    (zeros,) = [check for check in check_integrity(certify(directory)) if check.name == "zeros"]
    assert zeros.passed
    assert zeros.detail.endswith(f"pattern {pattern}")


def test_another_tokenizer_is_caught(merge_copy: Merge) -> None:
    directory = certify(merge_copy().merged)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace("Ġ", "G"))
    assert failed(directory) == {"digests"}


def test_truncated_missing_and_added_files_are_caught(merge_copy: Merge) -> None:
    directory = certify(merge_copy().merged)
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[:-100])
    assert {"digests", "tensors", "logits"} <= failed(directory)
    (directory / WEIGHTS).write_bytes(b"garbage!" + whole)
    assert {"digests", "tensors", "logits"} <= failed(directory)
    (directory / WEIGHTS).write_bytes(whole)
    assert not failed(directory)
    shutil.copy(directory / WEIGHTS, directory / "model-00001-of-00002.safetensors")
    assert "digests" in failed(directory)
    (directory / "model-00001-of-00002.safetensors").unlink()
    (directory / "sqft_reference.safetensors").unlink()
    assert failed(directory) == {"digests", "logits"}


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_opens_only_where_that_is_trusted(
    merge_copy: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = merge_copy().merged
    write_reference(directory, load_model(directory, dtype=torch.float32), TOKENS)
    (directory / "own.py").write_text(OWN_CODE)
    config = json.loads((directory / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    write_certificate(directory, [])
    checks = check_integrity(directory)
    assert [check.name for check in checks if not check.passed] == ["logits"]
    assert "needs Python code that comes with it" in checks[-1].detail
    require_passed(check_integrity(directory, trust_remote_code=True), directory)


def test_a_model_without_certificate_fails(merges: Merge) -> None:
    assert "digests" in failed(merges().merged)


def test_require_passed_says_what_failed(tmp_path: Path) -> None:
    require_passed([Check("digests", True, "fine")], tmp_path)
    with pytest.raises(CertificateError, match=r"zeros \(3 are not 0\)"):
        require_passed([Check("digests", True, ""), Check("zeros", False, "3 are not 0")], tmp_path)
    with pytest.raises(CertificateError, match="nothing was checked"):
        require_passed([], tmp_path)


def test_logits_are_those_of_the_last_positions(merges: Merge) -> None:
    model = load_model(merges().merged, dtype=torch.float32)
    logits = compute_logits(model, TOKENS)
    assert logits.shape == (4 + 3, 288)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor(TOKENS[:1])).logits[0, -4:]
    assert torch.equal(logits[:4], whole)
