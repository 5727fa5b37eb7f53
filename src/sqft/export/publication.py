"""A finished model on the Hugging Face hub: its files, a card, and what was measured of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.artifacts import CERTIFICATE, FACTS, REPORT
from sqft.errors import ExportError, ModelError, first_line
from sqft.marks import EVALUATIONS, changed_since, read_mark
from sqft.report.content import ModelRow, read_report
from sqft.report.summary import summary_table
from sqft.runtimes.commands import opening_code

__all__ = ["Publication", "describe_publication", "push_model"]

CARD = "README.md"
LOCAL = ("/", ".", "~", "package:")  # begin a model's source that is on no hub


@dataclass(frozen=True)
class Publication:
    """What goes to the hub. files: size in bytes by name in the repository, the card among them."""

    repo: str
    card: str
    files: dict[str, int]
    url: str | None = None


def describe_publication(directory: Path, repo: str) -> Publication:
    """What `push_model` would upload; nothing is sent.

    The card is the directory's README.md if it has one, as exports have; else it tells base, certificate,
    figures from the report beside, and how to open the model. What `sqft evaluate` wrote goes too, as the
    hub's pages read it.

    Raises: ModelError if there is no model, or it is not as it was written; ExportError for a wrong name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ExportError(
            f"{repo!r} is not a name on the hub, write USER/NAME: {first_line(error)}"
        ) from None
    if "/" not in repo:
        raise ExportError(f"{repo!r} lacks its owner; write USER/{repo}")
    paths = _files(directory)
    mark = read_mark(directory)
    changed = changed_since(directory, beside=(EVALUATIONS, CARD)) if mark is not None else None
    if changed is not None:
        raise ModelError(f"{directory} is not as it was written ({changed}); see sqft verify {directory}")
    card_path = directory / CARD
    card = card_path.read_text(encoding="utf-8") if card_path.is_file() else _card(directory, repo)
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    return Publication(repo, card, {CARD: len(card.encode())} | {k: v for k, v in sizes.items() if k != CARD})


def push_model(
    directory: Path, repo: str, *, private: bool = False, endpoint: str | None = None
) -> Publication:
    """Upload a model directory in one commit: all of it, or nothing. Returns what went, and where it is.

    private: of a repository that is made now. endpoint: of another hub than HF_ENDPOINT's.

    Raises: as `describe_publication`; ExportError if the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    planned = describe_publication(directory, repo)
    paths = _files(directory)
    operations = [CommitOperationAdd(CARD, planned.card.encode())]
    operations += [CommitOperationAdd(name, path) for name, path in paths.items() if name != CARD]
    hub = HfApi(endpoint=endpoint)
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.create_commit(repo, operations, commit_message=f"{directory.resolve().name}, by sqft")
    except LocalTokenNotFoundError:
        raise ExportError("you are not logged in to the hub; run: hf auth login") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = "; run: hf auth login" if status in (401, 403) else "; nothing was published, try again"
        raise ExportError(f"the hub refuses {repo} ({first_line(error)}){remedy}") from error
    except Exception as error:  # what the hub's client meets on its way has no common kind
        raise ExportError(
            f"{repo} cannot be uploaded ({first_line(error)}); nothing was published, try again"
        ) from error
    return Publication(repo, planned.card, planned.files, str(done.commit_url))


def _files(directory: Path) -> dict[str, Path]:
    """Every file to publish by its name there: no hidden ones, but for the results of evaluations."""
    known = ("config.json", "adapter_config.json", "openvino_model.xml")
    if not directory.is_dir():
        raise ModelError(f"there is no directory {directory}; name a merged model or an export")
    if not any((directory / name).is_file() for name in known) and not any(directory.glob("*.gguf")):
        raise ModelError(f"{directory} holds no model; name a merged model or an export")
    names = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in names.items()
        if name.parts[0] == EVALUATIONS or not any(part.startswith(".") for part in name.parts)
    }


def _card(directory: Path, repo: str) -> str:
    facts = _read(directory / FACTS)
    source = str(((facts.get("recipe") or {}).get("model") or {}).get("source") or "")
    on_hub = source.count("/") == 1 and not source.startswith(LOCAL) and not Path(source).exists()
    head = ["library_name: transformers", "tags: [sqft, sparse, int4]"]
    head += [f"base_model: {source}"] if on_hub else []
    parts = [
        "---\n" + "\n".join(head) + "\n---",
        f"# {repo.partition('/')[2]}",
        "A model that was tuned and merged by sqft.",
        _certificate(_read(directory / CERTIFICATE)),
    ]
    if (directory.parent / REPORT).is_file():
        data = read_report(directory.parent)
        header, *rows = summary_table(data)
        parts += ["## Evaluation", _table([header, *rows], data.models)]
    if (directory / "config.json").is_file():
        code = "\n".join(opening_code(directory)).replace(repr(str(directory)), repr(repo))
        parts += ["## Use", f"```python\n{code}\n```"]
    return "\n\n".join(parts) + "\n"


def _certificate(record: Mapping[str, Any]) -> str:
    checks = record.get("checks") or []
    if not checks:
        return "It carries no certificate."
    passed = sum(bool(check.get("passed")) for check in checks)
    return (
        f"Its certificate (`{CERTIFICATE}`) was written with {passed} of {len(checks)} checks passed. Repeat "
        "those of this directory with `sqft verify`."
    )


def _table(rows: list[list[str]], models: list[ModelRow]) -> str:
    head, *others = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in others]
    count = next((row.num_items for row in reversed(models) if row.num_items), None)
    note = f"\n\nMeasured on {count} held-out items; in brackets 95 % intervals." if count else ""
    return "\n".join(lines) + note


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
