"""Packed directories: sparse INT4 weights stored as mask and kept codes, and unpacked again bit for bit.

docs/format.md is the specification. Weight files stay safetensors files; in them a mask
and the kept codes take the place of all codes (`models/sparse_packing.py`). sqft_packed.json holds what
else is needed to write every original file again, and digests of all files, before and after. No more than
one tensor is in memory.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sqft
from sqft.artifacts import MASKS, PACK_RECORD, digest_file, digest_files, seal, unseal, write_json
from sqft.directories import check_destination, new_directory
from sqft.errors import ExportError, ModelError, first_line
from sqft.models import Checkpoint, StoredMasks, head_weights, open_checkpoint
from sqft.models.checkpoint import INDEX, PACKED, SPARSE_FILE, WEIGHT
from sqft.models.packing import (
    PACKED_METHOD,
    PACKED_VERSION,
    check_packed_version,
    pack_weight,
)
from sqft.models.sparse_packing import head_specs, pack_codes, pack_head, sparse_specs, sparse_takes_less
from sqft.models.tensorfile import TensorFile, TensorSpec
from sqft.progress import SILENT, Progress

__all__ = [
    "PackResult",
    "check_packed",
    "check_restored",
    "list_files",
    "pack_model",
    "read_record",
    "unpack_model",
]

CONFIG = "config.json"
HEADER_LIMIT = 100_000_000  # bytes, as safetensors has it


@dataclass(frozen=True)
class PackResult:
    """What packing did.

    bytes_before, bytes_after: of weight files and masks. linears, weights, kept: of what is packed.
    """

    directory: Path
    bytes_before: int
    bytes_after: int
    linears: int
    weights: int
    kept: int


def pack_model(directory: Path, output_dir: Path, progress: Progress = SILENT) -> PackResult:
    """Write a packed copy of a model directory, and check that everything can be written again from it.

    Raises: ExportError if there is nothing to pack, a pruned weight is not zero, the output would destroy
    something, or what was packed does not give the original back; ModelError if the directory is not a whole
    model.
    """
    checkpoint = open_checkpoint(directory)
    if (directory / PACK_RECORD).is_file():
        raise ExportError(f"{directory} is packed already")
    if not checkpoint.quantized_names:
        raise ExportError(
            f"{directory} has no integer weights; only sparse models on an integer grid are packed"
        )
    check_destination(output_dir, directory)
    masks = StoredMasks(directory)
    kept = _count_kept(checkpoint, masks)
    if not kept:
        raise ExportError(f"no linear of {directory} is sparse enough for packing to make it smaller")
    weights = sorted(directory.glob("model*.safetensors"))
    replaced = {path.name for path in weights} | {CONFIG, INDEX}
    implied = set(masks) == set(kept)
    if implied and len(masks):
        replaced.add(MASKS)
    originals = {name: path for path in list_files(directory) if (name := path.name) in replaced}
    with new_directory(output_dir) as partial, progress.task("pack", 2 * len(kept)) as advance:
        for path in list_files(directory):
            if path not in originals.values():
                _copy(path, partial / path.relative_to(directory))
        record: dict[str, Any] = {"version": PACKED_VERSION, "written_by": f"sqft {sqft.__version__}"}
        record["originals"] = {name: _original(path) for name, path in sorted(originals.items())}
        for path in weights:
            advance(_write_packed(checkpoint, path, partial / _packed_name(path.name), masks, kept))
        _write_texts(partial, record["originals"])
        record["files"] = digest_files(partial)
        written = [partial / _packed_name(path.name) for path in weights]
        record["bytes"] = {path.name: path.stat().st_size for path in written}
        write_json(partial / PACK_RECORD, seal(record))
        for name, original in record["originals"].items():
            if _digest(_restored(partial, name, original)) != original["sha256"]:
                raise ExportError(f"{name} would not come back bit for bit; sqft did not write it")
        advance(len(kept))
        after = sum(record["bytes"].values())
    return PackResult(
        output_dir,
        sum(path.stat().st_size for name, path in originals.items() if name not in (CONFIG, INDEX)),
        after,
        len(kept),
        sum(rows * columns for rows, columns in (checkpoint.linears[name] for name in kept)),
        sum(kept.values()),
    )


def unpack_model(directory: Path, output_dir: Path, progress: Progress = SILENT) -> None:
    """Write the directory that was packed, every file as it was.

    Raises: ModelError if the directory is not packed, of another version, or not as it was written;
    ExportError if the output would destroy something.
    """
    record = check_packed(directory)
    check_destination(output_dir, directory)
    originals = record["originals"]
    with new_directory(output_dir) as partial, progress.task("unpack", len(originals)) as advance:
        for path in list_files(directory):
            if path.name not in {*map(_packed_name, originals), PACK_RECORD}:
                _copy(path, partial / path.relative_to(directory))
        for name, original in originals.items():
            with (partial / name).open("wb") as file:
                file.writelines(_restored(directory, name, original))
            if digest_file(partial / name) != original["sha256"]:
                raise ModelError(f"{directory}: {name} cannot be restored as it was; fetch the model again")
            advance(1)


def read_record(directory: Path) -> dict[str, Any]:
    """What sqft_packed.json says. Raises: ModelError if it is missing, damaged or of another version."""
    path = directory / PACK_RECORD
    if not path.is_file():
        raise ModelError(f"{directory} is not packed: it has no {PACK_RECORD}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            check_packed_version(values)
        record = unseal(values)
        if any(Path(name).name != name or name in ("", ".", "..") for name in record["originals"]):
            raise ValueError("it names files elsewhere")
        headers = [original["header"] for original in record["originals"].values()]
        sizes = record["bytes"].values()
        if not all(type(h) is str for h in headers) or not all(type(size) is int for size in sizes):
            raise ValueError("it does not say what it should")
        digests = [*record["files"].values(), *(o["sha256"] for o in record["originals"].values())]
        if not all(type(digest) is str for digest in digests):
            raise ValueError("it does not say what it should")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}); fetch the model again") from None
    return record


def check_packed(directory: Path) -> dict[str, Any]:
    """The record of a packed directory whose files are all as they were written.

    Raises: ModelError, in one line, if one is missing, was changed or added.
    """
    record = read_record(directory)
    expected = record["files"]
    found = {name: digest for name, digest in digest_files(directory).items() if name != PACK_RECORD}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} was added" for name in sorted(found.keys() - expected.keys())]
    changed = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    problems += [f"{name} is truncated or was changed" for name in changed]
    if problems:
        raise ModelError(f"{directory}: {', '.join(problems)}; fetch the model again")
    return record


def check_restored(directory: Path) -> dict[str, str]:
    """The digests of the original files, each as it comes back from a packed directory.

    Raises: ModelError if one does not come back as it was.
    """
    record = check_packed(directory)
    for name, original in record["originals"].items():
        if _digest(_restored(directory, name, original)) != original["sha256"]:
            raise ModelError(f"{directory}: {name} cannot be restored as it was; fetch the model again")
    packed = {_packed_name(name) for name in record["originals"]}
    others = {name: digest for name, digest in record["files"].items() if name not in packed}
    return others | {name: original["sha256"] for name, original in record["originals"].items()}


def _digest(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def list_files(directory: Path) -> list[Path]:
    """Every file below a directory but hidden ones."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return [p for p in found if not any(part.startswith(".") for part in p.relative_to(directory).parts)]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _packed_name(name: str) -> str:
    """The name of a weight file, or of their index, in a packed directory."""
    is_weights = name.startswith("model") and (name.endswith(".safetensors") or name == INDEX)
    return name.replace("model", SPARSE_FILE, 1) if is_weights else name


def _count_kept(checkpoint: Checkpoint, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """The kept weights of every linear that a mask makes smaller.

    Raises: ExportError if a pruned weight is not zero.
    """
    assert checkpoint.grid is not None
    kept = {}
    for name in checkpoint.quantized_names:
        weight = checkpoint.quantized(name)
        size = weight.qparams.group_size(weight.codes.shape[1])
        nonzero = weight.codes != weight.qparams.zero_point.repeat_interleave(size, dim=1)
        mask = masks.get(name, nonzero)
        if bool((nonzero & ~mask).any()):
            raise ExportError(f"a pruned weight of {name} is not 0, so the model is damaged; merge it again")
        count = int(mask.sum())
        if sparse_takes_less((mask.shape[0], mask.shape[1]), checkpoint.grid.bits, count):
            kept[name] = count
    return kept


def _read_header(path: Path) -> tuple[str, list[str]]:
    """The header of a safetensors file, as text, and its tensors in the order of their bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > HEADER_LIMIT:
            raise ModelError(f"{path} is truncated or damaged; fetch it again")
        text = file.read(size).decode("utf-8")
    return text, _in_order(text)


def _in_order(header: str) -> list[str]:
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    return sorted(entries, key=lambda name: (entries[name]["data_offsets"], name))


def _original(path: Path) -> dict[str, Any]:
    """The record's entry for a file: its digest, and its header, which for a text file is the whole text."""
    text = _read_header(path)[0] if path.suffix == ".safetensors" else path.read_text(encoding="utf-8")
    return {"sha256": digest_file(path), "header": text}


def _write_packed(
    checkpoint: Checkpoint, source: Path, target: Path, masks: Mapping[str, Tensor], kept: Mapping[str, int]
) -> int:
    """Write one packed weight file; returns how many linears of it are packed."""
    assert checkpoint.grid is not None
    bits, specs, packed = checkpoint.grid.bits, dict[str, TensorSpec](), []
    names = _read_header(source)[1]
    heads = {name: _pack_head(checkpoint, name) for name in _plain_heads(checkpoint) if name in names}
    for name in names:
        linear = name.removesuffix(PACKED)
        if name.endswith(PACKED) and linear in kept:
            specs |= sparse_specs(linear, checkpoint.linears[linear], bits, kept[linear])
            packed.append(linear)
        elif heads.get(name):
            rows, columns = checkpoint.shape(name)
            specs |= head_specs(name.removesuffix(WEIGHT), (rows, columns))
        else:
            specs[name] = (checkpoint.dtype(name), checkpoint.shape(name))
    file = TensorFile(target, specs, {"format": "pt", PACKED_METHOD: str(PACKED_VERSION)})
    for name in names:
        if heads.get(name):
            for part, tensor in heads[name].items():
                file.write(part, tensor)
        elif name.removesuffix(PACKED) not in packed:
            file.write(name, checkpoint.tensor(name))
    for linear in packed:
        weight = checkpoint.quantized(linear)
        size = weight.qparams.group_size(weight.codes.shape[1])
        zero = weight.qparams.zero_point.repeat_interleave(size, dim=1)
        mask = masks.get(linear, weight.codes != zero)
        for name, tensor in pack_codes(linear, weight.codes, mask, bits).items():
            file.write(name, tensor)
    return len(packed)


def _plain_heads(checkpoint: Checkpoint) -> list[str]:
    """The weights of plain embeddings and heads; some embeddings also scale what they look up."""
    model = checkpoint.skeleton()
    modules = {name: model.get_submodule(name.removesuffix(WEIGHT)) for name in head_weights(model)}
    return [name for name, module in modules.items() if type(module) in (nn.Embedding, nn.Linear)]


def _pack_head(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The packed tensors of an embedding or head on a grid of 8 bits; of another one none."""
    return pack_head(name.removesuffix(WEIGHT), checkpoint.tensor(name)) or {}


def _write_texts(directory: Path, originals: Mapping[str, Any]) -> None:
    """config.json with another quantization, and the index of shards with the tensors that are there now."""
    config = json.loads(originals[CONFIG]["header"])
    config["quantization_config"] |= {
        "quant_method": PACKED_METHOD,
        "format": "sparse-packed",
        "version": PACKED_VERSION,
    }
    write_json(directory / CONFIG, config)
    if INDEX in originals:
        index = json.loads(originals[INDEX]["header"])
        files = sorted({_packed_name(name) for name in index["weight_map"].values()})
        index["weight_map"] = {name: file for file in files for name in _read_header(directory / file)[1]}
        write_json(directory / _packed_name(INDEX), index)


def _restored(directory: Path, name: str, original: Mapping[str, Any]) -> Iterator[memoryview]:
    """The bytes of an original file, piece by piece."""
    header = original["header"].encode("utf-8")
    if not name.endswith(".safetensors"):
        yield memoryview(header)
        return
    yield memoryview(len(header).to_bytes(8, "little") + header)
    try:
        checkpoint = open_checkpoint(directory)
        for key in _in_order(original["header"]):
            tensor = _tensor_of(checkpoint, name, key).contiguous().view(-1)
            yield tensor.view(torch.uint8).numpy().data
    except ModelError:
        raise
    except Exception as error:  # a damaged file fails in any way it likes
        raise ModelError(
            f"{directory}: {name} cannot be restored ({first_line(error)}); fetch the model again"
        ) from None


def _tensor_of(checkpoint: Checkpoint, file: str, key: str) -> Tensor:
    """One tensor of an original file."""
    linear = key if file == MASKS else key.removesuffix(PACKED)
    if file == MASKS:
        return checkpoint.tensor(f"{linear}.weight_mask")
    if key in checkpoint.names:
        return checkpoint.tensor(key)
    weight = checkpoint.quantized(linear)
    assert checkpoint.grid is not None
    return pack_weight(linear, weight, weight.qparams.scale.dtype)[f"{linear}{PACKED}"]
