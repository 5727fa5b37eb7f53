import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft.certificate import check_provenance
from sqft.certificate.checks import Check
from sqft.certificate.provenance import _round_storage, merged_digest
from sqft.certificate.stored import StoredModel
from tests.merged_models import MergedDirectories

Merge = Callable[..., MergedDirectories]


def adapted_names(directories: MergedDirectories) -> list[str]:
    keys = load_file(directories.adapter / "adapter_model.safetensors")
    return sorted({key.removeprefix("base_model.model.").rpartition(".")[0] for key in keys})


def provenance(directories: MergedDirectories, digest: str | None = None) -> list[Check]:
    digest = digest or merged_digest(StoredModel(directories.merged), adapted_names(directories))
    return check_provenance(directories.merged, directories.base, directories.adapter, trained_digest=digest)


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("mistral", {"symmetric": False, "group_size": 64}),
        ("phi3", {"group_size": -1}),
        ("llama", {"bits": 3}),
        ("llama", {"bits": 2, "symmetric": False}),
        ("llama", {"bits": 8}),
        ("llama", {"sparsity": 0.0}),
        ("llama", {"quantized": False}),
        ("phi3", {"quantized": False}),
    ],
)
def test_a_merge_is_its_base_plus_its_adapter(merges: Merge, arch: str, changes: dict[str, Any]) -> None:
    checks = provenance(merges(arch, **changes))
    assert not failed(checks), checks
    assert {check.name for check in checks} == {
        "identity", "grid", "mask", "other tensors", "recomputed", "trained"
    }  # fmt: skip


def test_few_codes_are_undecided(merges: Merge) -> None:
    (check,) = [check for check in provenance(merges()) if check.name == "recomputed"]
    total = int(check.detail.split()[0])
    undecided = int(check.detail.split("equal, ")[1].split()[0])
    assert undecided < 1e-4 * total


@pytest.mark.parametrize("quantized", [True, False])
def test_one_changed_weight_is_found(merge_copy: Merge, quantized: bool) -> None:
    directories = merge_copy(quantized=quantized)
    name = adapted_names(directories)[0]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = f"{name}.weight_packed" if quantized else f"{name}.weight"
        tensors[key].view(torch.int32 if quantized else torch.int16)[3, 2] ^= 1

    original = merged_digest(StoredModel(directories.merged), adapted_names(directories))
    rewrite(directories.merged / "model.safetensors", change)
    assert failed(provenance(directories, original)) == {"recomputed", "trained"}


def test_a_changed_grid_is_found(merge_copy: Merge) -> None:
    directories = merge_copy()
    name = adapted_names(directories)[0]
    rewrite(directories.merged / "model.safetensors", lambda t: t[f"{name}.weight_scale"][0, 0].mul_(2))
    assert "grid" in failed(provenance(directories))


def test_a_change_where_no_adapter_is_is_found(merge_copy: Merge) -> None:
    directories = merge_copy()
    rewrite(directories.merged / "model.safetensors", lambda t: t["model.norm.weight"].mul_(2))
    assert failed(provenance(directories)) == {"other tensors"}


def test_another_adapter_is_found(merge_copy: Merge) -> None:
    directories = merge_copy()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.mul_(1.5)

    rewrite(directories.adapter / "adapter_model.safetensors", change)
    assert failed(provenance(directories)) == {"recomputed"}


def test_another_mask_is_found(merge_copy: Merge, merges: Merge) -> None:
    directories = merge_copy()
    other = merges(sparsity=0.25).merged / "sqft_masks.safetensors"
    (directories.merged / "sqft_masks.safetensors").write_bytes(other.read_bytes())
    assert "mask" in failed(provenance(directories))


def test_an_adapter_for_another_base_is_found(merge_copy: Merge) -> None:
    directories = merge_copy()
    path = directories.adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"identity": {"base": "0" * 64, "grid": "0" * 64}}
    path.write_text(json.dumps(config))
    (check,) = [check for check in provenance(directories) if check.name == "identity"]
    assert not check.passed
    assert "base and grid" in check.detail


def test_a_missing_digest_or_file_is_not_a_pass(merge_copy: Merge) -> None:
    directories = merge_copy()
    checks = check_provenance(directories.merged, directories.base, directories.adapter)
    assert failed(checks) == {"trained"}
    (directories.base / "sqft_latent.safetensors").unlink()
    assert "recomputed" in failed(provenance(directories))
    (directories.adapter / "adapter_model.safetensors").unlink()
    assert failed(check_provenance(directories.merged, directories.base, directories.adapter)) == {"files"}


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_rounding_to_storage_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(4096, dtype=torch.float64) * torch.logspace(-9, 4, 4096, dtype=torch.float64)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11], dtype=torch.float64)
    values = torch.cat([values, ties, torch.zeros(1, dtype=torch.float64)]).float().double()
    expected = values.float().to(dtype).double().numpy()
    assert np.array_equal(_round_storage(values.numpy(), name), expected)
