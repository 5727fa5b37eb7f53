"""Writing a model directory block by block, and the files of ours that lie beside the weights."""

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqft.artifacts import FACTS, LATENT, MASKS, write_json
from sqft.errors import ModelError
from sqft.models.beside import copy_kept_files, read_config
from sqft.models.checkpoint import SINGLE, SPARSE_FILE, Checkpoint
from sqft.models.packing import (
    pack_weight,
    packed_specs,
    quantization_config,
    unpack_weight,
)
from sqft.models.tensorfile import TensorFile, TensorSpec
from sqft.ops import GridSpec, QuantizedWeight, pack_mask, unpack_mask

__all__ = [
    "CheckpointWriter",
    "StoredLatents",
    "StoredMasks",
    "read_latents",
    "read_masks",
    "write_masks",
    "write_model",
]

STATE = "resume.safetensors"


class CheckpointWriter:
    """Writes a model directory like `source` with some linears replaced, one finished tensor at a time.

    `prepare` declares what will be replaced, then `write_linear` takes each, and `close` copies the rest
    from the source and adds config and tokenizer. Until `close` the directory has no config.json, so it
    cannot be taken for a model. A writer on a directory that an interrupted run left goes on in its files,
    with the tensors that `take_over` finds whole; what else such a run needs lies in `state_path`, until
    `close` is through.
    """

    def __init__(self, directory: Path, source: Checkpoint) -> None:
        self.directory = Path(directory)
        self.source = source
        self._grid: GridSpec | None = None
        self._quantized: set[str] = set()
        self._weights: TensorFile | None = None
        self._masks: TensorFile | None = None
        self._latents: TensorFile | None = None

    @property
    def state_path(self) -> Path:
        """A file for what an interrupted run goes on from."""
        return self.directory / STATE

    @property
    def digests(self) -> dict[str, dict[str, str]]:
        """The sha256 of every tensor that is written, by file and tensor."""
        return {file.path.name: dict(file.digests) for file in self._files}

    @property
    def _files(self) -> list[TensorFile]:
        return [file for file in (self._weights, self._masks, self._latents) if file is not None]

    def prepare(
        self, *, quantized: Iterable[str] = (), grid: GridSpec | None = None,
        masked: Iterable[str] = (), latent: Iterable[str] = (), halves: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """Declare the linears that become quantized (on `grid`), those with a stored mask or latent, and the
        tensors, by full name, that become float16."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._grid, self._quantized = grid, set(quantized)
        masked, latent = list(masked), list(latent)
        shapes = self.source.linears
        specs: dict[str, TensorSpec] = {}
        stored_packed = set(self.source.quantized_names)
        for name in self.source.names:
            linear = name.rpartition(".")[0]
            if linear not in stored_packed | self._quantized or name == f"{linear}.bias":
                specs[name] = (self.source.dtype(name), self.source.shape(name))
        for linear in stored_packed - self._quantized:
            specs[f"{linear}.weight"] = (self.source.storage_dtype, shapes[linear])
        specs |= {name: (torch.float16, self.source.shape(name)) for name in halves}
        if grid is not None:
            for linear in self._quantized:
                specs |= packed_specs(linear, shapes[linear], grid)
        self._weights = TensorFile(self.directory / SINGLE, specs, {"format": "pt"})
        if masked:
            self._masks = _mask_file(self.directory, {name: shapes[name] for name in masked})
        if latent and grid is not None:
            dtype = torch.uint8 if grid.bits <= 4 else torch.int16
            self._latents = TensorFile(
                self.directory / LATENT, {name: (dtype, shapes[name]) for name in latent}, {"format": "pt"}
            )

    def write_linear(
        self,
        name: str,
        weight: Tensor | QuantizedWeight,
        *,
        mask: Bool[Tensor, "out in"] | None = None,
        latent: Tensor | None = None,
    ) -> None:
        """Write the finished weight of one linear; a plain one is cast to the dtype it has in the source."""
        if self._weights is None:
            self.prepare()
        assert self._weights is not None
        if isinstance(weight, QuantizedWeight):
            assert self._grid is not None, name
            for key, value in pack_weight(name, weight, self._grid.scale_dtype).items():
                self._weights.write(key, value)
        else:
            key = f"{name}.weight"
            self._weights.write(key, weight.to(self._weights.specs[key][0]))
        if mask is not None:
            self.write_mask(name, mask)
        if latent is not None and self._latents is not None:
            self._latents.write(name, latent)

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is not a linear's, cast to its declared dtype, or that of the source."""
        if self._weights is None:
            self.prepare()
        assert self._weights is not None
        self._weights.write(name, tensor.to(self._weights.specs[name][0]))

    def write_mask(self, name: str, mask: Bool[Tensor, "out in"]) -> None:
        """Write a mask (True = kept), if this linear was declared as masked."""
        if self._masks is not None:
            self._masks.write(name, pack_mask(mask))

    def read_written(self, name: str) -> Tensor | None:
        """A parameter as the model computes with it, dequantized if it is quantized; None if not written."""
        assert self._weights is not None
        if name in self._weights.digests:
            return self._weights.read(name)
        if f"{name}_packed" not in self._weights.digests or self._grid is None:
            return None
        return unpack_weight(name.removesuffix(".weight"), self._weights.read, self._grid).dequantize()

    def take_over(self, block: str, digests: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether the files still hold a block as an interrupted run wrote it, tensor by tensor.

        digests: as that run's `digests` were. If so, the block counts as written; if not, write it again.
        """
        start = f"{block}."
        return all(
            file.holds(name, digest)
            for file in self._files
            for name, digest in digests[file.path.name].items()
            if name.startswith(start)
        )

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        for file in self._files:
            file.sync()

    def close(self, facts: Mapping[str, Any] | None = None) -> None:
        """Copy everything not written from the source; write config, tokenizer and `facts` (sqft.json)."""
        if self._weights is None:
            self.prepare()
        assert self._weights is not None
        for name in self._weights.specs:
            if name not in self._weights.digests:
                linear = name.rpartition(".")[0]
                assert linear not in self._quantized or name == f"{linear}.bias", f"{name} was never written"
                stored = name in self.source.names
                value = self.source.tensor(name) if stored else self.source.weight(linear)
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ModelError(f"{self.source.directory}: {name} holds NaN or infinity; fetch it again")
                self._weights.write(name, value.to(self._weights.specs[name][0]))
        copy_kept_files(self.source.directory, self.directory)
        if self.source.trust_remote_code:
            for code in self.source.directory.glob("*.py"):
                shutil.copyfile(code, self.directory / code.name)
        if facts is not None:
            write_json(self.directory / FACTS, dict(facts))
        config = read_config(self.source.directory)
        config.pop("quantization_config", None)
        if self._grid is not None and self._quantized:
            ignore = sorted(set(self.source.linears) - self._quantized)
            config["quantization_config"] = quantization_config(self._grid, ignore)
        write_json(self.directory / "config.json", config)
        self.state_path.unlink(missing_ok=True)


def write_model(
    directory: Path,
    source: Checkpoint,
    linears: Mapping[str, Tensor | QuantizedWeight],
    *,
    others: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory like `source` with these linears replaced, for instance by merged ones.

    others: tensors that replace those of the source too, by their full name, for instance trained norms.
    Quantized linears of the source that are not among `linears` are kept as they are.

    Raises: ModelError if the quantized weights do not share bits, group size and symmetry.
    """
    writer = CheckpointWriter(directory, source)
    quantized = {name: weight for name, weight in linears.items() if isinstance(weight, QuantizedWeight)}
    kept = [name for name in source.quantized_names if name not in linears]
    grids = {weight.grid(source.grid) for weight in quantized.values()}
    if source.grid is not None and (kept or quantized):
        grids = {source.grid} | {g for g in grids if g.layout != source.grid.layout}
    if len({grid.layout for grid in grids}) > 1:
        raise ModelError(
            f"quantized weights of one model must share bits, group size and symmetry, not {grids}"
        )
    grid = max(grids, key=lambda g: g.scale_dtype != torch.bfloat16) if grids else None
    writer.prepare(quantized=[*quantized, *kept], grid=grid, masked=masks or ())
    for name, weight in linears.items():
        writer.write_linear(name, weight, mask=(masks or {}).get(name))
    for name in kept:
        writer.write_linear(name, source.quantized(name), mask=(masks or {}).get(name))
    for name in set(masks or ()) - set(linears) - set(kept):
        writer.write_mask(name, (masks or {})[name])
    for name, tensor in (others or {}).items():
        writer.write_tensor(name, tensor)
    writer.close(facts)


def write_masks(directory: Path, masks: Mapping[str, Bool[Tensor, "out in"]]) -> None:
    """Write masks (True = kept), bit-packed, as sqft_masks.safetensors."""
    file = _mask_file(Path(directory), {name: (m.shape[0], m.shape[1]) for name, m in masks.items()})
    for name, mask in masks.items():
        file.write(name, pack_mask(mask))


class StoredMasks(Mapping[str, Tensor]):
    """The stored masks (True = kept) by linear, each read when it is asked for; empty if there are none.

    They stand in a file of their own, or, in a directory that is packed, beside the codes that are kept.
    """

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, tuple[Path, str, int]] = {}  # file, tensor, columns
        own, end = Path(directory) / MASKS, ".weight_mask"
        for path in [own] if own.is_file() else sorted(Path(directory).glob(f"{SPARSE_FILE}*.safetensors")):
            with _opened(path) as file:
                stated = file.metadata() or {}
                for key in file.keys():  # noqa: SIM118
                    if path == own:
                        self._places[key] = (path, key, int(stated[key].split(",")[1]))
                    elif key.endswith(end):
                        name = key.removesuffix(end)
                        shape = file.get_tensor(f"{name}.weight_shape")
                        self._places[name] = (path, key, int(shape[1]))

    def __getitem__(self, name: str) -> Bool[Tensor, "out in"]:
        path, key, columns = self._places[name]
        with _opened(path) as file:
            return unpack_mask(file.get_tensor(key), columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, IndexError, ValueError) as error:
        raise ModelError(f"{path} is truncated or damaged ({error}); write it again") from error


def read_masks(directory: Path) -> dict[str, Bool[Tensor, "out in"]]:
    """The stored masks (True = kept) by linear; empty if the directory has none.

    Raises: ModelError if the file is damaged.
    """
    return dict(StoredMasks(directory))


class StoredLatents(Mapping[str, Tensor]):
    """The stored latent codes by linear, each read when it is asked for; empty if there are none."""

    def __init__(self, directory: Path) -> None:
        self._path, self._names = Path(directory) / LATENT, list[str]()
        if self._path.is_file():
            with _opened(self._path) as file:
                self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._path) as file:
            value: Tensor = file.get_tensor(name)
            return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_latents(directory: Path) -> dict[str, Tensor]:
    """The stored latent codes by linear; empty if the directory has none.

    Raises: ModelError if the file is damaged.
    """
    return dict(StoredLatents(directory))


def _mask_file(directory: Path, shapes: Mapping[str, tuple[int, int]]) -> TensorFile:
    specs: dict[str, TensorSpec] = {
        name: (torch.uint8, (rows, math.ceil(columns / 8))) for name, (rows, columns) in shapes.items()
    }
    sizes = {name: f"{rows},{columns}" for name, (rows, columns) in shapes.items()}
    return TensorFile(directory / MASKS, specs, {"format": "pt", **sizes})
