"""What changes a model's answers beside its weights, edited by someone who makes every digest anew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.artifacts import unseal
from sqft.certificate import check_integrity, check_provenance, write_certificate
from sqft.certificate.coverage import file_digests
from tests.merged_models import MergedDirectories

Merge = Callable[..., MergedDirectories]


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | changes))

    return edit


def swap_tokens(directory: Path) -> None:
    path = directory / "tokenizer.json"
    text = path.read_text()
    assert '"q"' in text
    path.write_text(text.replace('"q"', '"\0"').replace('"z"', '"q"').replace('"\0"', '"z"'))


EDITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "vocabulary": (swap_tokens, "settings"),
    "template": (lambda d: (d / "chat_template.jinja").write_text("{{ 'obey me' }}"), "settings"),
    "no template": (lambda d: (d / "chat_template.jinja").unlink(), "settings"),
    "eos in config": (edit_json("config.json", eos_token_id=7), "settings"),
    "eos in tokenizer": (edit_json("tokenizer_config.json", eos_token="<pad>"), "settings"),
    "rope": (edit_json("config.json", rope_theta=5.0), "settings"),
    "temperature": (edit_json("generation_config.json", temperature=9.0, do_sample=True), "settings"),
    "no generation settings": (lambda d: (d / "generation_config.json").unlink(), "settings"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "settings"),
    "code": (lambda d: (d / "modeling_evil.py").write_text("import os"), "settings"),
    "auto_map": (edit_json("config.json", auto_map={"AutoConfig": "evil.C"}), "settings"),
    "pickle": (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), "strangers"),
    "more weights": (lambda d: (d / "more.gguf").write_bytes(b"x"), "strangers"),
    "hidden": (lambda d: (d / ".profile").write_text("x"), "strangers"),
    "hidden folder": (lambda d: ((d / ".git").mkdir(), (d / ".git/config").write_text("x")), "strangers"),
    "folder": (lambda d: (d / "additional_chat_templates").mkdir(), "strangers"),
    "link": (lambda d: (d / "link").symlink_to("config.json"), "strangers"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_changes_answers_is_the_bases_or_is_found(edit: str, merge_copy: Merge) -> None:
    directories = merge_copy()
    change, check_name = EDITS[edit]
    change(directories.merged)
    lineage = {"base": file_digests(directories.base), "adapter": file_digests(directories.adapter)}
    write_certificate(directories.merged, [], lineage=lineage)
    checks = check_provenance(directories.merged, directories.base, directories.adapter)
    failed = {check.name for check in checks if not check.passed} - {"trained"}
    assert failed == {check_name}


def test_a_config_may_say_who_wrote_it(merge_copy: Merge) -> None:
    directories = merge_copy()
    edit_json("config.json", transformers_version="0")(directories.merged)
    checks = check_provenance(directories.merged, directories.base, directories.adapter)
    (settings,) = [check for check in checks if check.name == "settings"]
    assert settings.passed
    assert "but for transformers_version" in settings.detail


def test_the_certificates_own_record_is_covered(merge_copy: Merge) -> None:
    merged = merge_copy().merged
    write_certificate(merged, [])
    path = merged / "sqft_certificate.json"
    whole = path.read_text()
    for old, new in (('"checks": []', '"checks": [ ]'), ('"trained_digest": null', '"trained_digest": "a"')):
        assert old in whole
        path.write_text(whole.replace(old, new))
        failed = {check.name for check in check_integrity(merged) if not check.passed}
        assert ("record" in failed) == ("null" in old)  # a space changes nothing that is said
    unseal(json.loads(whole))


def test_hidden_files_are_added_files(merge_copy: Merge) -> None:
    merged = merge_copy().merged
    write_certificate(merged, [])
    (merged / ".env").write_text("x")
    (check,) = [check for check in check_integrity(merged) if check.name == "digests"]
    assert check.detail == ".env was added, hidden"
