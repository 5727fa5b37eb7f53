"""Size, time to first token, decode speed and peak memory of artefacts, side by side in their runtimes.

Each artefact runs in a process of its own, so that its peak memory is its own; the processes take turns, so
that a busy machine slows all of them alike. Figures are medians over rounds.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sqft.artifacts import PACK_RECORD
from sqft.errors import ExportError
from sqft.formats.openvino import XML
from sqft.progress import SILENT, Progress
from sqft.runtimes.hf import open_in_transformers
from sqft.runtimes.llama_cpp import LlamaCpp
from sqft.runtimes.llama_plugin import use_packed_products
from sqft.runtimes.openvino import OpenVinoModel

__all__ = ["Artefact", "SpeedRow", "llama_cpp_speed", "measure_speed", "open_artefact"]


@dataclass(frozen=True)
class Artefact:
    """What is measured. adapter: a plain LoRA applied at run time (PEFT directory, or GGUF for llama.cpp)."""

    name: str
    path: Path
    runtime: str
    adapter: Path | None = None

    @property
    def size_bytes(self) -> int:
        """Weights on disk, the adapter's included."""
        return sum(_weight_bytes(path) for path in (self.path, self.adapter) if path is not None)


@dataclass(frozen=True)
class SpeedRow:
    """One artefact in one runtime. tokens_per_second: of every round, whose median is decode_speed.

    peak_bytes: what the process grew by from before the model was opened; 0 where the system does not tell.
    """

    name: str
    runtime: str
    size_bytes: int
    first_token_seconds: float
    decode_speed: float
    peak_bytes: int
    tokens_per_second: list[float]


def open_artefact(
    path: Path, name: str | None = None, adapter: Path | None = None, *, packed_products: bool = False
) -> Artefact:
    """Say what a path is. adapter: in PEFT's files for transformers, in GGUF (or its directory) for GGUF.

    packed_products: run GGUF files with the plug-in that packs sparse weights (`runtimes.llama_plugin`).

    Raises: ExportError if no runtime here opens it, or the adapter is of another runtime.
    """
    name = name or path.resolve().name
    if path.suffix == ".gguf" or list(path.glob("*.gguf")):
        file = path if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))[0]
        runtime = "llama.cpp + sqft" if packed_products else "llama.cpp"
        return Artefact(name, file, runtime, None if adapter is None else _gguf_adapter(adapter))
    if (path / XML).is_file():
        if adapter is not None:
            raise ExportError("an adapter beside an OpenVINO model is not measured; use its merged form")
        return Artefact(name, path, "openvino")
    if (path / PACK_RECORD).is_file():
        if adapter is not None:
            raise ExportError("an adapter beside a packed model is not measured; use its merged form")
        return Artefact(name, path, "transformers + sqft")
    if (path / "config.json").is_file():
        if adapter is not None and not (adapter / "adapter_config.json").is_file():
            raise ExportError(
                f"{adapter} is not a PEFT adapter, as {path} needs; give the one that was trained"
            )
        return Artefact(name, path, "transformers", adapter)
    raise ExportError(f"{path} is neither a model directory, nor a GGUF file, nor an OpenVINO model")


def _gguf_adapter(path: Path) -> Path:
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if not found or not found[0].is_file():
        raise ExportError(
            f"llama.cpp needs an adapter in GGUF, not {path}: sqft export {path} --to gguf --base DIR"
        )
    return found[0]


def measure_speed(
    artefacts: Sequence[Artefact],
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    rounds: int = 3,
    launches: int = 1,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> list[SpeedRow]:
    """Generate `new_tokens` greedily after a prompt, `rounds` times in turn after one round to warm up.

    launches: how often the processes are started anew, with that many rounds each; spreads the measurement
    over minutes, since a shared machine can be a fifth slower for as long.

    Raises: ExportError if an artefact cannot be opened or run.
    """
    count = threads or torch.get_num_threads()
    prompt = [100 + 7 * index % 150 for index in range(prompt_tokens)]
    with progress.task("bench", launches * (rounds + 1) * len(artefacts)) as advance:
        found = [_launch(artefacts, (prompt, new_tokens), rounds, count, advance) for _ in range(launches)]
    rows = []
    for artefact, runs in zip(artefacts, zip(*found, strict=True), strict=True):
        timings = [timing for each, _ in runs for timing in each]
        speeds = [speed for _, speed in timings]
        first = statistics.median(seconds for seconds, _ in timings)
        peak = max(peak for _, peak in runs)
        size, speed = artefact.size_bytes, statistics.median(speeds)
        rows.append(SpeedRow(artefact.name, artefact.runtime, size, first, speed, peak, speeds))
    return rows


def _launch(
    artefacts: Sequence[Artefact],
    request: tuple[list[int], int],
    rounds: int,
    threads: int,
    advance: Callable[[int], None],
) -> list[tuple[list[tuple[float, float]], int]]:
    """The timings of every artefact, one process each and without the first round, and its peak memory."""
    with _processes(artefacts, threads) as pipes:
        pairs = list(zip(artefacts, pipes, strict=True))
        turns: list[list[tuple[float, float]]] = []
        for _ in range(rounds + 1):
            turns.append([])
            for artefact, pipe in pairs:
                pipe.send(request)
                turns[-1].append(_receive(artefact, pipe))
                advance(1)
        peaks = []
        for artefact, pipe in pairs:
            pipe.send(None)
            peaks.append(_receive(artefact, pipe))
    return [(list(timing), peak) for timing, peak in zip(zip(*turns[1:], strict=True), peaks, strict=True)]


@contextmanager
def _processes(artefacts: Sequence[Artefact], threads: int) -> Iterator[list[Connection]]:
    """One process for each artefact, opened and waiting; all of them end with the context."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    try:
        for artefact in artefacts:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(artefact, theirs, threads), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        for artefact, pipe in zip(artefacts, pipes, strict=True):
            _receive(artefact, pipe)  # opened
        yield pipes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _receive(artefact: Artefact, pipe: Connection) -> Any:
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise ExportError(f"{artefact.runtime} died while it ran {artefact.path}") from None
    if kind == "error":
        raise ExportError(f"{artefact.runtime} cannot run {artefact.path}: {value}")
    return value


def _serve(artefact: Artefact, pipe: Connection, threads: int) -> None:
    """The process of one artefact: open it, run what is asked, tell the peak memory."""
    torch.set_num_threads(threads)
    try:
        before = _memory_bytes("VmRSS")
        runner = RUNNERS[artefact.runtime](artefact, threads)
        pipe.send(("opened", None))
        while (request := pipe.recv()) is not None:
            pipe.send(("timing", runner.run(*request)))
        pipe.send(("peak", max(_memory_bytes("VmHWM") - before, 0)))
    except Exception as error:  # the parent tells it in one line
        pipe.send(("error", f"{type(error).__name__}: {error}"))


class _LlamaCppRunner:
    def __init__(self, artefact: Artefact, threads: int) -> None:
        self._model = LlamaCpp(artefact.path, context=1024, threads=threads, lora_path=artefact.adapter)

    def run(self, prompt: list[int], num_tokens: int) -> tuple[float, float]:
        return llama_cpp_speed(self._model.generate(prompt, num_tokens))


def llama_cpp_speed(timings: dict[str, float]) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second after it, from the timings of llama.cpp's server.

    Its prompt time ends when the first token is sampled; what it calls predicted counts that token too, but
    not its time. Source: llama.cpp, `tools/server/server-context.cpp` (t_start_generation).
    """
    return timings["prompt_ms"] / 1e3, (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1e3


class _PackedLlamaCppRunner(_LlamaCppRunner):
    def __init__(self, artefact: Artefact, threads: int) -> None:
        use_packed_products()
        super().__init__(artefact, threads)


class _OpenVinoRunner:
    def __init__(self, artefact: Artefact, threads: int) -> None:
        self._model = OpenVinoModel(artefact.path / XML, exact=False, threads=threads)

    def run(self, prompt: list[int], num_tokens: int) -> tuple[float, float]:
        self._model.reset()
        start = time.perf_counter()
        token = int(self._model.logits(prompt)[-1].argmax())
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(num_tokens - 1):
            token = int(self._model.logits([token])[-1].argmax())
        return first, (num_tokens - 1) / (time.perf_counter() - start)


class _TransformersRunner:
    def __init__(self, artefact: Artefact, threads: int) -> None:
        packed = artefact.runtime == "transformers + sqft"
        self._model: Any = open_in_transformers(artefact.path, artefact.adapter, packed=packed)

    def run(self, prompt: list[int], num_tokens: int) -> tuple[float, float]:
        with torch.no_grad():
            start = time.perf_counter()
            out = self._model(input_ids=torch.tensor([prompt]), use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(num_tokens - 1):
                out = self._model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
        return first, (num_tokens - 1) / (time.perf_counter() - start)


RUNNERS: dict[str, Any] = {
    "llama.cpp": _LlamaCppRunner,
    "llama.cpp + sqft": _PackedLlamaCppRunner,
    "openvino": _OpenVinoRunner,
    "transformers": _TransformersRunner,
    "transformers + sqft": _TransformersRunner,
}


def _memory_bytes(field: str) -> int:
    """A field of this process's memory; 0 where the system does not tell."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def _weight_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    ends = (".safetensors", ".gguf", ".bin")
    return sum(p.stat().st_size for p in path.iterdir() if p.suffix in ends and "sqft_" not in p.name)
