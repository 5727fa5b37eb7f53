import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from sqft.adapters import codes_digest
from sqft.certificate import certify_model, check_integrity, check_provenance
from sqft.checks import Check
from sqft.models import load_model, load_trainable
from tests.merged_models import MergedDirectories

TOKENS = [list(range(4, 24)), [9, 200, 7]]


def certify(directories: MergedDirectories, **options: Any) -> list[Check]:
    base = load_trainable(directories.base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, directories.adapter).eval()
    options = {"merged": load_model(directories.merged, dtype=torch.float32), "token_ids": TOKENS} | options
    return certify_model(
        directories.merged,
        base_dir=directories.base,
        adapter_dir=directories.adapter,
        adapted=adapted,
        **options,
    )


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("phi3", {"symmetric": False}),
        ("mistral", {"quantized": False}),
        ("llama", {"quantized": False, "stored_masks": False}),
    ],
)
def test_a_certified_model_can_be_verified_again(
    merge_copy: Callable[..., MergedDirectories], arch: str, changes: dict[str, Any]
) -> None:
    directories = merge_copy(arch, **changes)
    checks = certify(directories)
    assert all(check.passed for check in checks), checks
    again = check_integrity(directories.merged)
    again += check_provenance(directories.merged, directories.base, directories.adapter)
    assert all(check.passed for check in again), again
    assert {check.name for check in again} | {"adapted equals merged"} == {check.name for check in checks}
    certificate = json.loads((directories.merged / "sqft_certificate.json").read_text())
    assert certificate["lineage"]["adapter"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_merge_that_is_not_what_was_trained_fails(
    merge_copy: Callable[..., MergedDirectories], merges: Callable[..., MergedDirectories]
) -> None:
    directories = merge_copy()
    for path in directories.merged.glob("*.safetensors"):
        path.write_bytes((merges(group_size=64).merged / path.name).read_bytes())
    config: Path = directories.merged / "config.json"
    config.write_bytes((merges(group_size=64).merged / "config.json").read_bytes())
    failed = {check.name for check in certify(directories) if not check.passed}
    assert {"adapted equals merged", "grid", "recomputed", "trained"} <= failed


def test_the_digest_is_that_of_the_trained_model(merge_copy: Callable[..., MergedDirectories]) -> None:
    directories = merge_copy()
    base = load_trainable(directories.base, dtype=torch.float32)
    digest = codes_digest(PeftModel.from_pretrained(base, directories.adapter))
    assert all(check.passed for check in certify(directories, trained_digest=digest))
    failed = {check.name for check in certify(directories, trained_digest="0" * 64) if not check.passed}
    assert failed == {"trained", "record"}


def test_without_items_a_fixed_walk_is_compared(
    merge_copy: Callable[..., MergedDirectories], merges: Callable[..., MergedDirectories]
) -> None:
    directories = merge_copy()
    checks = certify(directories, token_ids=[[]])
    assert all(check.passed for check in checks), checks
    assert checks[0].detail.startswith("1 items")
    other = load_model(merges(group_size=64).merged, dtype=torch.float32)
    failed = {check.name for check in certify(directories, token_ids=[], merged=other) if not check.passed}
    assert "adapted equals merged" in failed
