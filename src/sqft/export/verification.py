"""Checking an artefact again, long after it was exported."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqft.artifacts import EXPORT_RECORD, MANIFEST, MASKS, SEAL, digest_file, digest_files, unseal
from sqft.certificate.answers import hidden_names
from sqft.checks import Check, require_unchanged, run_check
from sqft.errors import ExportError
from sqft.export.model_export import check_stored
from sqft.export.table import find_format
from sqft.formats.gguf_model import changed_tokenizer_keys, gguf_path
from sqft.formats.weights import open_source
from sqft.models import load_tokenizer

__all__ = ["check_export"]

NOT_CHECKED = (EXPORT_RECORD, f"{EXPORT_RECORD}.sig", "README.md", MANIFEST)  # the record, and documents
OF_NO_EFFECT = ("_name_or_path", "transformers_version")


def check_export(directory: Path, merged_dir: Path | None = None) -> list[Check]:
    """Check an artefact's files against the digests taken when it was exported.

    merged_dir: the model that was exported; then every code is read back and compared with it too, and so
    are tokenizer, masks, and every file with that of an export made anew.
    """
    steps: list[tuple[str, Callable[[], str]]] = [("digests", lambda: _check_digests(directory))]
    if merged_dir is not None:
        steps.append(("codes", lambda: _check_codes(directory, merged_dir)))
        steps.append(("tokenizer", lambda: _check_tokenizer(directory, merged_dir)))
        steps.append(("masks", lambda: _check_masks(directory, merged_dir)))
        steps.append(("made anew", lambda: _check_made_anew(directory, merged_dir)))
    return [run_check(name, step) for name, step in steps]


def _check_digests(directory: Path) -> str:
    record = json.loads((directory / EXPORT_RECORD).read_text(encoding="utf-8"))
    try:
        recorded = (unseal(record) if SEAL in record else record)["files"]  # 0.1.0 wrote no seal
    except ValueError as error:
        raise ExportError(f"{EXPORT_RECORD} is damaged: {error}") from None
    found = digest_files(directory)
    for ours in NOT_CHECKED:
        recorded.pop(ours, None)
        found.pop(ours, None)
    return require_unchanged(recorded, found, hidden_names(directory))


def _check_codes(directory: Path, merged_dir: Path) -> str:
    record = _model_record(directory)
    if record.get("damage"):
        raise ExportError("the artefact was requantized, so its codes are not those of the merged model")
    source = open_source(merged_dir)
    head = record.get("head_option", "auto")
    compared = check_stored(source, directory, record["format"], head_type=head)
    rounded = "" if head == "auto" else f", embedding and head rounded to {head}"
    return f"{compared.codes} codes and {compared.weights} other weights equal the merged model's{rounded}"


def _check_tokenizer(directory: Path, merged_dir: Path) -> str:
    source = open_source(merged_dir)
    if _model_record(directory)["format"] == "gguf":
        other = changed_tokenizer_keys(source, gguf_path(directory))
    else:
        found = _tokenizer_parts(load_tokenizer(directory))
        expected = _tokenizer_parts(source.tokenizer)
        other = [key for key, value in expected.items() if found[key] != value]
    if other:
        raise ExportError(f"the tokenizer is not the merged model's: {', '.join(other)}")
    return "the merged model's"


def _tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "tokens": sorted(tokenizer.get_vocab().items()),
        "rules": None if backend is None else backend.to_str(),
        "special tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "chat template": tokenizer.chat_template,
    }


def _check_masks(directory: Path, merged_dir: Path) -> str:
    ours, theirs = directory / MASKS, merged_dir / MASKS
    if _model_record(directory)["format"] != "compressed-tensors" or not theirs.is_file():
        return "none in this artefact"
    if not ours.is_file():
        raise ExportError(f"{MASKS} is missing")
    if digest_file(ours) != digest_file(theirs):
        raise ExportError(f"{MASKS} is not the merged model's")
    return "the merged model's"


def _check_made_anew(directory: Path, merged_dir: Path) -> str:
    """Export once more, and compare what came out: the graph and tokenizers, settings, and every other file.

    Libraries that write files should therefore have the versions they had at the export.
    """
    record = _model_record(directory)
    if record.get("damage"):
        raise ExportError("the artefact was requantized; export it again to compare")
    with tempfile.TemporaryDirectory() as folder:
        anew = Path(folder)
        find_format(record["format"]).write(open_source(merged_dir), anew, record.get("head_option", "auto"))
        names = (digest_files(directory).keys() | digest_files(anew).keys()) - set(NOT_CHECKED)
        other = [name for name in sorted(names) if not _same_file(directory / name, anew / name)]
    if other:
        raise ExportError(f"files that are not as an export of this model has them: {', '.join(other)}")
    return f"{len(names)} files are those of an export made now"


def _same_file(first: Path, second: Path) -> bool:
    if not (first.is_file() and second.is_file()):
        return False
    if digest_file(first) == digest_file(second):
        return True
    if first.suffix != ".json":
        return False
    values = [json.loads(path.read_text(encoding="utf-8")) for path in (first, second)]
    plain = [{k: v for k, v in value.items() if k not in OF_NO_EFFECT} for value in values]
    return plain[0] == plain[1]


def _model_record(directory: Path) -> dict[str, Any]:
    """What an export wrote of itself. Raises: ExportError if it is an adapter's."""
    record: dict[str, Any] = json.loads((directory / EXPORT_RECORD).read_text(encoding="utf-8"))
    if record.get("adapter"):
        raise ExportError("an adapter is not a merged model; verify it without --merged")
    return record
