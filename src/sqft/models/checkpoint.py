"""A model directory, opened without reading its weights: names, shapes, and one tensor at a time."""

import json
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sqft.errors import ModelError, first_line
from sqft.models.beside import read_config
from sqft.models.blocks import decoder_blocks, is_linear
from sqft.models.experts import separate_experts
from sqft.models.other_names import RenamedFile, stored_names
from sqft.models.packing import (
    packed_specs,
    read_grid,
    unpack_qparams,
    unpack_weight,
)
from sqft.models.sparse_packing import STEPS, head_specs, sparse_specs, unpack_codes, unpack_head
from sqft.models.tokenizer import quiet_transformers
from sqft.ops import GridSpec, QuantizedWeight
from sqft.ops.head_grid import head_weight
from sqft.untrusted import check_regular

__all__ = [
    "Checkpoint",
    "build_skeleton",
    "open_checkpoint",
    "open_config",
    "read_generation",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Counts in a config.json that libraries act on before any weight is read, and the largest that is believed.
LIMITS = {name: 10_000 for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers")}
LIMITS |= {"num_labels": 1_000_000, "vocab_size": 100_000_000}
# Packed files have this in their names in place of "model", so that programs that cannot read them find none.
SPARSE_FILE = "packed"
PACKED, KEPT = ".weight_packed", ".weight_kept"  # end the names of codes: all of them, or those that are kept
CODES_ENDS = (PACKED, KEPT)
WEIGHT = ".weight"
EXPERT = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True)
class Checkpoint:
    """A model directory with safetensors; open one with `open_checkpoint`.

    names: every stored tensor; an embedding or head in steps of 8 bits counts as its weight.
    block_names: the decoder blocks in order, as "model.layers.0".
    storage_dtype: of the linears inside the blocks. grid: that of the quantized linears, or None.
    """

    directory: Path
    config: Any
    names: tuple[str, ...]
    block_names: tuple[str, ...]
    storage_dtype: torch.dtype
    grid: GridSpec | None
    trust_remote_code: bool = False
    _files: dict[str, Path] = field(default_factory=dict, repr=False)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, read from the memory-mapped file.

        Raises: ModelError if it is not there.
        """
        if name in self._files:
            value: Tensor = _handle(self._handles, self._files[name]).get_tensor(name)
            return value
        if self.stored_as_steps(name):
            return head_weight(unpack_head(name.removesuffix(WEIGHT), self.tensor))
        raise ModelError(f"{self.directory} has no tensor {name}")

    def stored_as_steps(self, name: str) -> bool:
        """Whether the weight of an embedding or head is stored as steps of 8 bits."""
        return name.endswith(WEIGHT) and name.removesuffix(WEIGHT) + STEPS in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor, read from the header."""
        if self.stored_as_steps(name):
            name = name.removesuffix(WEIGHT) + STEPS
        handle = _handle(self._handles, self._files[name])
        return tuple(handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a stored tensor, read from the header."""
        if self.stored_as_steps(name):
            return torch.float16
        return _stored_dtype(self._handles, self._files, name)

    @cached_property
    def quantized_names(self) -> tuple[str, ...]:
        """The quantized linears, by full name."""
        return tuple(
            name.removesuffix(end) for name in self.names for end in CODES_ENDS if name.endswith(end)
        )

    def quantized(self, name: str) -> QuantizedWeight:
        """One quantized linear: its codes and grid."""
        if self.grid is None:
            raise ModelError(f"{self.directory} is not quantized")
        if f"{name}{KEPT}" not in self._files:
            return unpack_weight(name, self.tensor, self.grid)
        qparams = unpack_qparams(name, self.tensor, self.grid)
        codes, _ = unpack_codes(name, self.tensor, self.linears[name][1], self.grid.bits, qparams.zero_point)
        return QuantizedWeight(codes, qparams)

    def weight(self, name: str) -> Tensor:
        """The weight of a linear: as it is stored, or float32 out of its codes."""
        if name in self.quantized_names:
            return self.quantized(name).dequantize()
        return self.tensor(f"{name}.weight")

    def skeleton(self) -> PreTrainedModel:
        """The model with its parameters on the meta device (no memory) and its buffers in place."""
        return build_skeleton(self.config, self.trust_remote_code)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of the model, by full name."""
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.skeleton().named_modules()
            if isinstance(module, nn.Linear)
        }

    @cached_property
    def tied_weights(self) -> dict[str, str]:
        """Weights that share another weight's tensor, as a tied head does the embedding's; and which one."""
        return tied_weights(self.skeleton())


def tied_weights(skeleton: PreTrainedModel) -> dict[str, str]:
    """The weights of a model that share the tensor of another weight, and which one."""
    return dict(getattr(skeleton, "all_tied_weights_keys", None) or {})


def open_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model directory and check that its files hold exactly the tensors its architecture needs.

    Raises: ModelError, in one line, if the directory is not a model, a file is truncated, or a tensor is
    missing, unexpected, or of another shape than the architecture's.
    """
    directory = Path(directory)
    config = open_config(directory, trust_remote_code)
    read_generation(directory)
    grid_config = getattr(config, "quantization_config", None)
    grid = (
        read_grid(grid_config if isinstance(grid_config, dict) else grid_config.to_dict())
        if grid_config
        else None
    )
    handles: dict[Path, Any] = {}
    files = {
        name: path
        for path in _tensor_paths(directory)
        for name in _handle(handles, path).keys()  # noqa: SIM118
    }
    skeleton = build_skeleton(config, trust_remote_code)
    stored = stored_names(skeleton, files)
    for path in {files[name] for name in stored.values()}:
        handles[path] = RenamedFile(handles[path], stored)
    files |= {own: files.pop(name) for own, name in stored.items()}
    blocks = tuple(decoder_blocks(skeleton))
    _check_tensors(directory, skeleton, files, handles, grid)
    inside = next(n for n, m in decoder_blocks(skeleton)[blocks[0]].named_modules() if is_linear(m))
    first = f"{blocks[0]}.{inside}"
    ends = [end for end in ("weight", "weight_scale") if f"{first}.{end}" in files]
    dtype = _stored_dtype(handles, files, f"{first}.{ends[0]}")
    packed = sorted(name for name in files if name.endswith(".weight_scale"))
    if grid is not None and packed:
        grid = replace(grid, stored_dtype=_stored_dtype(handles, files, packed[0]))
    in_bytes = [name.removesuffix(STEPS) for name in files if name.endswith(STEPS)]
    parts = {part for name in in_bytes for part in head_specs(name, (0, 0))}
    names = tuple(sorted({*files, *(f"{name}{WEIGHT}" for name in in_bytes)} - parts))
    return Checkpoint(directory, config, names, blocks, dtype, grid, trust_remote_code, files, handles)


def open_config(directory: Path, trust_remote_code: bool) -> Any:
    """The configuration of a model directory. Raises: ModelError if it is missing or not understood."""
    path, values = directory / "config.json", read_config(directory)
    for name, most in LIMITS.items():
        number = values.get(name)
        if isinstance(number, int) and number > most:
            raise ModelError(f"{path}: {name} is {number:,}; no model has more than {most:,}")
    if "auto_map" in values and not trust_remote_code:
        raise ModelError(
            f"{directory} needs Python code that comes with it; set model.trust_remote_code to run it"
        )
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if not isinstance(config.dtype, torch.dtype | None):
            raise TypeError(f"dtype is {config.dtype!r}")
        return config
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"{path} is of no architecture that transformers knows: {first_line(error)}"
        ) from error
    except Exception as error:  # of many kinds: a setting of the wrong type meets code that computes with it
        raise _wrong_setting(directory, error) from error


def read_generation(directory: Path) -> GenerationConfig | None:
    """The generation settings of a model directory, if it has any. Raises: ModelError if they are damaged."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    try:
        with quiet_transformers():
            return GenerationConfig.from_pretrained(directory)
    except Exception as error:  # of many kinds: a setting of the wrong type meets code that computes with it
        raise ModelError(f"{path} is damaged ({first_line(error)}); mend it or remove it") from error


def build_skeleton(config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """A model with its parameters on the meta device. Raises: ModelError if it is not a language model."""
    try:
        values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
        plain = type(config).from_dict(values)
        with init_empty_weights(include_buffers=False), no_init_weights(), quiet_transformers():
            model = AutoModelForCausalLM.from_config(
                plain, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        kind = type(config).__name__
        raise ModelError(
            f"{kind} has no causal language model in transformers; use a decoder model"
        ) from error
    except Exception as error:
        raise _wrong_setting(Path(config._name_or_path), error) from error
    separate_experts(model)
    model.tie_weights()
    return model.eval()


def _wrong_setting(directory: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    path = directory / "config.json"
    return ModelError(f"{path} has a setting that no model can have ({type(error).__name__}: {reason})")


def _tensor_paths(directory: Path) -> list[Path]:
    start = "model" if any((directory / name).is_file() for name in (INDEX, SINGLE)) else SPARSE_FILE
    index = directory / INDEX.replace("model", start)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [directory / name for name in names]
            outside = next((name for name in names if Path(name).name != name), None)
            if outside is not None:
                raise ModelError(f"{index} names {outside!r}, which is not a file of this directory")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged ({error}); fetch the model again") from None
    else:
        single = directory / SINGLE.replace("model", start)
        paths = [single if single.is_file() else directory / SINGLE]
    for path in paths:
        if not path.is_file():
            unsafe = any(directory.glob("*.bin"))
            hint = "; only safetensors are read, convert the .bin files" if unsafe else ""
            raise ModelError(f"{directory} has no {path.name}{hint}")
    return paths


def _handle(handles: dict[Path, Any], path: Path) -> Any:
    if path not in handles:
        try:
            check_regular(path)
            handles[path] = safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is truncated or damaged ({error}); fetch or write it again") from error
    return handles[path]


def _stored_dtype(handles: dict[Path, Any], files: dict[str, Path], name: str) -> torch.dtype:
    stored = _handle(handles, files[name]).get_slice(name).get_dtype()
    if stored not in _TORCH_DTYPES:
        raise ModelError(f"{files[name]}: {name} is of the type {stored}, which cannot be read")
    return _TORCH_DTYPES[stored]


def _check_tensors(
    directory: Path,
    skeleton: PreTrainedModel,
    files: dict[str, Path],
    handles: dict[Path, Any],
    grid: GridSpec | None,
) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    tied = tied_weights(skeleton)
    modules = dict(skeleton.named_modules())
    for name in {n.removesuffix(end) for n in files for end in CODES_ENDS if n.endswith(end)}:
        if grid is None:
            raise ModelError(
                f"{directory} holds packed weights but its config.json has no quantization_config"
            )
        if name in modules and is_linear(modules[name]):
            rows, columns = expected.pop(f"{name}.weight")
            expected |= {n: shape for n, (_, shape) in packed_specs(name, (rows, columns), grid).items()}
            if f"{name}{KEPT}" in files:  # the mask says how many are kept
                del expected[f"{name}{PACKED}"]
                kept = _handle(handles, files[f"{name}{KEPT}"]).get_slice(f"{name}{KEPT}").get_shape()
                shapes = sparse_specs(name, (rows, columns), grid.bits, 0)
                expected |= {n: shape for n, (_, shape) in shapes.items()} | {f"{name}{KEPT}": tuple(kept)}
    for name in [n.removesuffix(STEPS) for n in files if n.endswith(STEPS)]:
        if f"{name}{WEIGHT}" in expected:
            rows, columns = expected.pop(f"{name}{WEIGHT}")
            expected |= {n: shape for n, (_, shape) in head_specs(name, (rows, columns)).items()}
    missing = sorted(name for name in expected if name not in files and name not in tied)
    extra = sorted(
        name for name in files if name not in expected and not name.endswith("rotary_emb.inv_freq")
    )
    if missing and extra:
        raise ModelError(_other_layout(directory, type(skeleton).__name__, missing, extra))
    if missing:
        raise ModelError(f"{directory} lacks {len(missing)} tensors of its architecture, first {missing[0]}")
    if extra:
        kind = type(skeleton).__name__
        raise ModelError(
            f"{directory} holds {len(extra)} tensors that {kind} does not have, first {extra[0]}"
        )
    for name, shape in expected.items():
        if name in files:
            stored = tuple(_handle(handles, files[name]).get_slice(name).get_shape())
            if stored != shape:
                raise ModelError(f"{directory}: {name} has shape {stored}, the architecture has {shape}")


_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _other_layout(directory: Path, kind: str, missing: list[str], extra: list[str]) -> str:
    """What to say of files that hold other tensors than the architecture has; both are told."""
    if any(EXPERT.search(name) for name in extra):
        return (
            f"{directory}: {kind} stores its experts one by one and computes with all of them in one tensor "
            f"({missing[0]}), which sqft cannot compress or write back; take a model without experts"
        )
    return (
        f"{directory}: {kind} has {missing[0]}, and the files hold {extra[0]} and no such tensor: the "
        "architecture renames tensors when it loads them, which sqft does not follow, or config.json is of "
        "another model; take a model whose files have the architecture's own names"
    )
