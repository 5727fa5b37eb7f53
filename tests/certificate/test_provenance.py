import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft.certificate import check_provenance, write_certificate
from sqft.certificate.adapter import Adapter
from sqft.certificate.coverage import file_digests
from sqft.certificate.in_place import merged_digest
from sqft.certificate.provenance import _base_weight, _round_storage
from sqft.certificate.stored import StoredModel
from sqft.checks import Check
from tests.merged_models import MergedDirectories

Merge = Callable[..., MergedDirectories]
WEIGHTS = "model.safetensors"


def adapted_names(directories: MergedDirectories) -> list[str]:
    keys = load_file(directories.adapter / "adapter_model.safetensors")
    return sorted({key.removeprefix("base_model.model.").rpartition(".")[0] for key in keys})


def digest_of(directories: MergedDirectories) -> str:
    names: Any = dict.fromkeys(adapted_names(directories))
    return merged_digest(StoredModel(directories.merged), Adapter({}, names))


def provenance(directories: MergedDirectories, digest: str | None = None) -> list[Check]:
    digest = digest or digest_of(directories)
    return check_provenance(
        directories.merged,
        directories.base,
        directories.adapter,
        trained_digest=digest,
        lineage=lineage(directories),
    )


def lineage(directories: MergedDirectories) -> dict[str, dict[str, str]]:
    return {"base": file_digests(directories.base), "adapter": file_digests(directories.adapter)}


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
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
        ("llama", {"quantized": False, "stored_masks": False}),
    ],
)
def test_a_merge_is_its_base_plus_its_adapter(merges: Merge, arch: str, changes: dict[str, Any]) -> None:
    checks = provenance(merges(arch, **changes))
    assert not failed(checks), checks
    assert {check.name for check in checks} == {
        "lineage", "identity", "settings", "strangers", "grid", "mask", "other tensors", "recomputed",
        "scales and norms", "trained",
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

    original = digest_of(directories)
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
    config = json.loads(path.read_text())
    config["identity"] |= {"base": "0" * 64, "grid": "0" * 64}
    path.write_text(json.dumps(config))
    (check,) = [check for check in provenance(directories) if check.name == "identity"]
    assert not check.passed
    assert "base and grid" in check.detail


def test_an_adapter_that_lost_its_identity_is_found(merge_copy: Merge) -> None:
    directories = merge_copy()
    path = directories.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["identity"]["mask"]
    path.write_text(json.dumps(config))
    assert failed(provenance(directories)) == {"identity"}
    del config["identity"]
    path.write_text(json.dumps(config))
    assert failed(provenance(directories)) == {"identity"}


def test_numbers_that_are_not_finite_are_found(merge_copy: Merge) -> None:
    directories = merge_copy(quantized=False)
    name = adapted_names(directories)[0]
    weights, factors = directories.merged / WEIGHTS, directories.adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    rewrite(weights, lambda t: t[f"{name}.weight"][3, 2].fill_(float("nan")))
    assert "recomputed" in failed(provenance(directories))
    weights.write_bytes(whole)
    assert not failed(provenance(directories))
    rewrite(factors, lambda t: t[f"base_model.model.{name}.sqft_B"].fill_(float("nan")))
    (check,) = provenance(directories)
    assert not check.passed
    assert "NaN" in check.detail


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "much"])
def test_a_scaling_that_is_no_number_is_found(merge_copy: Merge, alpha: Any) -> None:
    directories = merge_copy()
    path = directories.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha": alpha}))
    assert failed(provenance(directories)) == {"recomputed"}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("size", [3e2, 1e4, 1e18])
def test_an_update_too_large_to_be_checked_is_no_pass(
    merge_copy: Merge, quantized: bool, size: float
) -> None:
    directories = merge_copy(quantized=quantized)
    name = f"base_model.model.{adapted_names(directories)[0]}"

    def cancel(tensors: dict[str, torch.Tensor]) -> None:
        """Two ranks whose sum is the old update, and whose rounding errors are large."""
        low, high = tensors[f"{name}.sqft_A"], tensors[f"{name}.sqft_B"]
        low, high = torch.cat([low, low[:1], -low[:1]]), torch.cat([high, high[:, :1], high[:, :1]], 1)
        low[-2:] *= size
        high[:, -2:] = high[:, -2:].sign() * size
        tensors[f"{name}.sqft_A"], tensors[f"{name}.sqft_B"] = low, high

    rewrite(directories.adapter / "adapter_model.safetensors", cancel)
    (check,) = [check for check in provenance(directories) if check.name == "recomputed"]
    assert not check.passed
    assert "too large" in check.detail


def test_files_other_than_those_that_were_merged_are_found(merge_copy: Merge, merges: Merge) -> None:
    directories = merge_copy()
    recorded = lineage(merges())

    def problems() -> str:
        checks = check_provenance(directories.merged, directories.base, directories.adapter, lineage=recorded)
        (check,) = [check for check in checks if check.name == "lineage"]
        return "" if check.passed else check.detail

    (directories.adapter / "README.md").write_text("a card")
    (directories.base / "manifest.json").write_text("{}")
    (directories.base / "LICENSE").write_text("any")
    assert not problems()
    shutil.copy(directories.base / WEIGHTS, directories.base / "more.safetensors")
    assert "base: more.safetensors was not there" in problems()
    (directories.base / "more.safetensors").unlink()
    config = directories.adapter / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    assert "adapter: adapter_config.json is another" in problems()
    (directories.base / "tokenizer.json").unlink()
    assert "base: tokenizer.json is missing" in problems()


def test_the_lineage_in_the_certificate_counts(merge_copy: Merge) -> None:
    directories = merge_copy()
    digest = digest_of(directories)
    recorded = lineage(directories)
    write_certificate(directories.merged, [], lineage=recorded, trained_digest=digest)

    def verify() -> set[str]:
        return failed(check_provenance(directories.merged, directories.base, directories.adapter))

    assert not verify()
    config = directories.base / "config.json"
    config.write_text(config.read_text() + " ")
    assert verify() == {"lineage"}
    write_certificate(directories.merged, [], lineage={"base": recorded["base"]}, trained_digest=digest)
    assert verify() == {"lineage"}


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_a_zero_without_a_stored_mask_is_read_as_the_smallest_normal_number(
    merge_copy: Merge, dtype: str
) -> None:
    directories = merge_copy(quantized=False, stored_masks=False)
    torch_dtype = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    name = adapted_names(directories)[0]
    key = f"{name}.weight"
    rewrite(directories.base / WEIGHTS, lambda t: t.update({key: t[key].to(torch_dtype)}))
    base = StoredModel(directories.base)
    stored = base.tensors.values(key)
    assert int((stored == 0).sum()) == 3
    read = _base_weight(base, name, quantized=False, nudged=True)
    assert (read[stored == 0] == torch.finfo(torch_dtype).tiny).all()
    assert np.array_equal(read[stored != 0], stored[stored != 0])
    assert np.array_equal(_base_weight(base, name, quantized=False, nudged=False), stored)


def test_a_missing_digest_or_file_is_not_a_pass(merge_copy: Merge) -> None:
    directories = merge_copy()
    checks = check_provenance(directories.merged, directories.base, directories.adapter)
    assert failed(checks) == {"lineage", "trained"}
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
