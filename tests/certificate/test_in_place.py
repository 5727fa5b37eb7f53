"""Trained scales and norms are proven, and every way to damage them is found."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft.adapters import attach_adapters, codes_digest, merge_adapters, merge_norms
from sqft.certificate import check_provenance
from sqft.certificate.adapter import read_adapter
from sqft.certificate.coverage import file_digests
from sqft.certificate.in_place import merged_digest
from sqft.certificate.stored import StoredModel
from sqft.checks import Check
from sqft.models import load_trainable, open_checkpoint, read_masks, write_model
from sqft.sections import AdapterSection
from tests.merged_models import MergedDirectories

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
LINEAR, NORM = "model.layers.0.mlp.up_proj", "model.layers.1.input_layernorm"
KINDS: dict[str, dict[str, Any]] = {
    "scales": {"method": "scales"},
    "both": {"method": "qa_sparse_peft", "train_scales": True, "train_norms": True, "ranks": [4]},
    "sparse": {"method": "sparse_peft", "train_norms": True, "ranks": [4]},
}


@pytest.fixture
def trained(merges: Any, tmp_path: Path) -> Callable[..., tuple[MergedDirectories, str]]:
    """`trained(kind, **changes)`: a merge written by the library, and the digest of what was trained."""

    def make(kind: str, **changes: Any) -> tuple[MergedDirectories, str]:
        base = merges(quantized=kind != "sparse", **changes).base
        section = AdapterSection(**KINDS[kind])
        model = attach_adapters(load_trainable(base, base_precision=section.loaded_as), section)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        found = MergedDirectories(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        shutil.copytree(base, found.base)
        model.save_pretrained(found.adapter)
        linears = {name: merged.weight for name, merged in merge_adapters(model).items()}
        others = {f"{name}.weight": weight for name, weight in merge_norms(model).items()}
        masks = read_masks(base)
        write_model(found.merged, open_checkpoint(base), linears, others=others, masks=masks)
        return found, codes_digest(model)

    return make


def provenance(directories: MergedDirectories, digest: str) -> list[Check]:
    lineage = {"base": file_digests(directories.base), "adapter": file_digests(directories.adapter)}
    places = (directories.merged, directories.base, directories.adapter)
    return check_provenance(*places, trained_digest=digest, lineage=lineage)


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def rewrite(path: Path, key: str, change: Callable[[torch.Tensor], Any]) -> None:
    tensors = load_file(path)
    change(tensors[key])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("changes", [{}, {"bits": 3}, {"symmetric": False}, {"group_size": -1}, {"bits": 8}])
@pytest.mark.parametrize("kind", ["scales", "both"])
def test_trained_scales_are_proven(kind: str, changes: dict[str, Any], trained: Any) -> None:
    directories, digest = trained(kind, **changes)
    checks = provenance(directories, digest)
    assert not failed(checks), checks
    model = StoredModel(directories.merged)
    assert merged_digest(model, read_adapter(directories.adapter)) == digest
    (check,) = [check for check in checks if check.name == "scales and norms"]
    assert "14 linears" in check.detail
    assert "5 norms" in check.detail


def test_trained_norms_of_a_16_bit_model_are_proven(trained: Any) -> None:
    directories, digest = trained("sparse")
    assert not failed(provenance(directories, digest))


@pytest.mark.parametrize("kind", ["scales", "both"])
def test_another_scale_is_found(kind: str, trained: Any) -> None:
    directories, digest = trained(kind)
    rewrite(directories.merged / WEIGHTS, f"{LINEAR}.weight_scale", lambda t: t[3, 1].mul_(1.25))
    assert failed(provenance(directories, digest)) == {"scales and norms", "trained"}


@pytest.mark.parametrize("kind", ["scales", "both", "sparse"])
def test_another_norm_is_found(kind: str, trained: Any) -> None:
    directories, digest = trained(kind)
    rewrite(directories.merged / WEIGHTS, f"{NORM}.weight", lambda t: t[3].mul_(1.25))
    assert failed(provenance(directories, digest)) == {"scales and norms", "trained"}


def test_a_code_that_was_not_trained_is_found(trained: Any) -> None:
    directories, digest = trained("scales")
    rewrite(directories.merged / WEIGHTS, f"{LINEAR}.weight_packed", lambda t: t[3, 1].bitwise_xor_(1))
    assert failed(provenance(directories, digest)) == {"other tensors", "scales and norms", "trained"}


def test_another_adapter_is_found(trained: Any) -> None:
    directories, digest = trained("scales")
    key = f"base_model.model.{LINEAR}.sqft_scale"
    rewrite(directories.adapter / ADAPTER, key, lambda t: t[3, 1].mul_(1.25))
    assert failed(provenance(directories, digest)) == {"scales and norms"}


def test_an_adapter_that_lost_a_scale_is_found(trained: Any) -> None:
    directories, digest = trained("scales")
    path = directories.adapter / ADAPTER
    tensors = load_file(path)
    del tensors[f"base_model.model.{LINEAR}.sqft_scale"]
    save_file(tensors, path)
    assert failed(provenance(directories, digest)) == {"identity", "grid", "other tensors", "trained"}


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_that_no_grid_has_is_no_pass(value: float, trained: Any) -> None:
    directories, digest = trained("scales")
    key = f"base_model.model.{LINEAR}.sqft_scale"
    rewrite(directories.adapter / ADAPTER, key, lambda t: t[3, 1].fill_(value))
    (check,) = provenance(directories, digest)
    assert not check.passed
    assert LINEAR in check.detail


BASE_KEYS = {"codes": f"{LINEAR}.weight_packed", "grid": f"{LINEAR}.weight_scale", "norms": f"{NORM}.weight"}


@pytest.mark.parametrize("part", BASE_KEYS)
def test_another_base_is_found(part: str, trained: Any) -> None:
    directories, digest = trained("scales")
    change = (lambda t: t[3, 1].bitwise_xor_(1)) if part == "codes" else (lambda t: t.mul_(2))
    rewrite(directories.base / WEIGHTS, BASE_KEYS[part], change)
    (check,) = [check for check in provenance(directories, digest) if check.name == "identity"]
    assert not check.passed
    assert part in check.detail
