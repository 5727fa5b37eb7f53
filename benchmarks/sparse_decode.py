"""What zeros buy when a CPU decodes: products of packed sparse weights beside ggml's Q4_0, layer by layer.

    python -m benchmarks.sparse_decode --json FILE [--quick] [--shapes 4096x14336 ...] [--batches 1 4 8]
                                       [--instructions avx2] [--gguf FILE --packed DIR --plain DIR]

Weights of random steps, some 160 MB of each kind, are walked through in turn, so that every product reads
from memory. ggml's kernel is the one that llama.cpp takes for a repacked Q4_0 weight (gemv_q4_0_8x8 and, for
batches, gemm_q4_0_8x8), called in the wheel of xllamacpp, which is built for AVX2; ours are held to AVX2
too, unless --instructions says otherwise. Both quantize the vector inside the time. All weights lie in huge
pages, ggml's as well. One thread is timed by its own clock, which other programs disturb least; with two,
each does half of the rows, by the wall clock. Ratios are taken inside a round, and given as quartiles.
A product of 576 columns takes some 20 microseconds, of which Python's calls are a good part, for all alike.

--gguf, --packed, --plain: the same model as a Q4_0 file, as a packed directory and as it was before; tokens a
second end to end, with the runner of `sqft bench`: llama.cpp with and without our kernels, transformers from
the packed form and with float32 weights.
"""

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import (
    check,
    checks_table,
    environment,
    make_parser,
    markdown_table,
    parse_options,
    ratio,
    write_result,
)

from sqft.kernels.packed_matrix import LAYOUTS, HugePages, Layout, PackedMatrix, use_instruction_set
from sqft.kernels.reference import multiply_reference
from sqft.ops import mask_pattern
from sqft.runtimes.speed import Artefact, measure_speed

WALKED = 160 << 20  # bytes of each kind of weight
SHAPES = ["576x576", "1536x576", "576x1536", "4096x4096", "14336x4096", "4096x14336"]
REACH_SHAPE = "4096x14336"
KINDS: tuple[Layout, ...] = ("dense", "window2", "window3", "window332", "index4", "mask8", "mask", "bytes")
GGML = "ggml Q4_0"
Job = Callable[[], None]


class Ggml:
    """ggml's product of a repacked Q4_0 weight, in the library that xllamacpp brings."""

    def __init__(self, rows: int, columns: int) -> None:
        import xllamacpp

        path = next(Path(str(xllamacpp.__file__)).parent.glob("xllamacpp*.so"))
        self.library = ctypes.CDLL(str(path))
        self.library.ggml_cpu_init()
        for name in ("ggml_gemv_q4_0_8x8_q8_0", "ggml_gemm_q4_0_8x8_q8_0"):
            getattr(self.library, name).argtypes = [
                ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p,
                ctypes.c_int, ctypes.c_int,
            ]  # fmt: skip
        for name in ("quantize_row_q8_0", "ggml_quantize_mat_q8_0_4x8"):
            getattr(self.library, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self.rows, self.columns = rows, columns
        self.steps = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
        self.scale = (torch.rand(rows, columns // 32) * 0.01 + 0.001).half().float()
        pages = HugePages()
        packed = self._repack()
        self.bytes = packed.numel()
        self.copies = [pages.keep(packed) for _ in range(max(1, WALKED // self.bytes))]

    def _repack(self) -> torch.Tensor:
        """block_q4_0x8: 8 scales, then 8 bytes of each of 8 rows in turn, nibbles with their top bit flipped.

        Source: ggml, `ggml-cpu/repack.cpp`, make_block_q4_0x8.
        """
        blocks = self.columns // 32
        codes = (self.steps + 8).to(torch.uint8).view(self.rows // 8, 8, blocks, 2, 16)
        nibbles = (codes[..., 0, :] | codes[..., 1, :] << 4) ^ 0x88  # (stripes, 8, blocks, 16)
        nibbles = nibbles.view(self.rows // 8, 8, blocks, 2, 8).permute(0, 2, 3, 1, 4).flatten(2)
        scale = self.scale.half().view(self.rows // 8, 8, blocks).permute(0, 2, 1).contiguous()
        return torch.cat([scale.view(torch.uint8).flatten(2), nibbles], dim=2).contiguous().view(-1)

    def multiply(self, x: torch.Tensor, y: torch.Tensor, copy: int, first: int, last: int) -> None:
        """Rows first..last of y = x times the weight, for one vector or a multiple of four."""
        batch, columns = x.shape
        quantized = torch.empty(batch * columns // 32 * 34 + 64, dtype=torch.uint8)
        at, size = quantized.data_ptr(), columns // 32 * 34
        if batch == 1:
            self.library.quantize_row_q8_0(x.data_ptr(), at, columns)
        else:
            for four in range(0, batch, 4):
                self.library.ggml_quantize_mat_q8_0_4x8(x[four].data_ptr(), at + four * size, columns)
        name = "ggml_gemv_q4_0_8x8_q8_0" if batch == 1 else "ggml_gemm_q4_0_8x8_q8_0"
        weight = self.copies[copy % len(self.copies)].data_ptr() + self.bytes // self.rows * first
        where = y.data_ptr() + 4 * first
        getattr(self.library, name)(columns, where, self.rows, weight, at, batch, last - first)


def draw_packed(kind: Layout, rows: int, columns: int) -> list[PackedMatrix]:
    """Some 160 MB of weights whose steps a layout holds; a mask is of half the weights, anywhere."""
    tile = min(rows, 256)
    low, high = (-127, 128) if kind == "bytes" else (-8, 8)
    steps = torch.randint(low, high, (tile, columns), dtype=torch.int8)
    if kind == "mask":
        steps *= torch.rand(tile, columns) < 0.5
    elif ":" in LAYOUTS[kind]:
        steps *= mask_pattern(torch.rand(tile, columns), LAYOUTS[kind])
    steps = steps.repeat(-(-rows // tile), 1)[:rows]
    scale = torch.full((rows, columns // 32), 0.0078125)
    first, memory = PackedMatrix.pack(steps, scale, kind), HugePages()
    copies = max(1, WALKED // first.num_bytes)
    return [
        PackedMatrix(kind, first.group_size, rows, columns, memory.keep(first.data)) for _ in range(copies)
    ]


def measure_shape(
    shape: str, batch: int, threads: int, kinds: list[Layout], rounds: int
) -> list[dict[str, Any]]:
    """A row for each kind of weight: bytes and time of 32 weights, and the ratio to ggml's."""
    rows, columns = (int(n) for n in shape.split("x"))
    x = torch.randn(batch, columns)
    ggml = Ggml(rows, columns)
    y, half = torch.empty(batch, rows), rows // 2 // 8 * 8
    ggml.multiply(x, y, 0, 0, rows)
    expected = multiply_reference(ggml.steps, ggml.scale, 32, x)
    worst = float((y - expected).abs().max() / expected.abs().max())
    assert worst < 1e-2, f"ggml's result differs by {worst}"
    weights = {kind: draw_packed(kind, rows, columns) for kind in kinds}
    with ThreadPoolExecutor(1) as other:

        def run_ggml(copy: int) -> None:
            if threads == 1:
                return ggml.multiply(x, y, copy, 0, rows)
            waiting = other.submit(ggml.multiply, x, y, copy, 0, half)
            ggml.multiply(x, y, copy, half, rows)
            waiting.result()

        def walk(name: str) -> tuple[int, Callable[[int], object]]:
            if name == GGML:
                return len(ggml.copies), run_ggml
            found = weights[name]  # type: ignore[index]
            return len(found), lambda copy: found[copy].multiply(x, threads=threads)

        clock = time.thread_time if threads == 1 else time.perf_counter
        seconds: dict[str, list[float]] = {name: [] for name in (GGML, *kinds)}
        for turn in range(rounds + 1):
            for name, found in seconds.items():
                count, job = walk(name)
                start = clock()
                for copy in range(count):
                    job(copy)
                if turn:
                    found.append((clock() - start) / count)
    vectors = rows * columns / 32 * batch
    result = []
    for name, found in seconds.items():
        size = ggml.bytes if name == GGML else weights[name][0].num_bytes  # type: ignore[index]
        ratios = [a / b for a, b in zip(found, seconds[GGML], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4)
        result.append(
            {
                "shape": shape, "batch": batch, "threads": threads, "kind": name,
                "bytes": size / (rows * columns / 32),
                "ns": 1e9 * statistics.median(found) / vectors,
                "gb_per_second": size / statistics.median(found) / 1e9,
                "ratio": middle, "quartiles": [lower, upper],
                "to_dense": ratio(found, seconds["dense"]), "seconds": found,
            }
        )  # fmt: skip
    return result


def read_bandwidth() -> float:
    """GB a second that one thread reads from huge pages, at best of ten."""
    memory = HugePages().keep(torch.ones(WALKED, dtype=torch.uint8)).view(torch.int64)
    best = 1e9
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(10):
        start = time.thread_time()
        memory.sum()
        best = min(best, time.thread_time() - start)
    torch.set_num_threads(threads)
    return WALKED / best / 1e9


def measure_end_to_end(
    gguf: Path, packed: Path | None, plain: Path | None, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Tokens a second of the same weights in each runtime, one process each, in turn."""
    artefacts = [Artefact("Q4_0", gguf, "llama.cpp"), Artefact("Q4_0", gguf, "llama.cpp + sqft")]
    if packed is not None:
        artefacts.append(Artefact("packed", packed, "transformers + sqft"))
        artefacts.append(Artefact("packed", packed, "transformers + sqft, 8-bit head"))
    if plain is not None:
        artefacts.append(Artefact("float32", plain, "transformers"))
    found = measure_speed(artefacts, prompt_tokens=32, new_tokens=32, rounds=rounds, threads=threads)
    return [
        {
            "name": row.name, "runtime": row.runtime, "threads": threads, "size_bytes": row.size_bytes,
            "first_token_seconds": row.first_token_seconds, "tokens_per_second": row.tokens_per_second,
        }
        for row in found
    ]  # fmt: skip


def aims(rows: list[dict[str, Any]], ends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was set out to be reached, beside what was measured."""

    def of(kind: str, threads: int, key: str = "ratio") -> float | None:
        place = (REACH_SHAPE, 1, threads, kind)
        return next(
            (r[key] for r in rows if (r["shape"], r["batch"], r["threads"], r["kind"]) == place), None
        )

    def end(runtime: str, other: str, threads: int) -> float | None:
        speeds = {r["runtime"]: r["tokens_per_second"] for r in ends if r["threads"] == threads}
        return ratio(speeds[other], speeds[runtime]) if {runtime, other} <= set(speeds) else None

    sparse, plain = "llama.cpp + sqft", "llama.cpp"
    packed, dense = "transformers + sqft, 8-bit head", "transformers"
    return [
        check("windows of 2 bits / ggml, one thread", of("window2", 1), at_most=0.65, aim="0.53"),
        check("windows of 2 bits / ggml, two threads", of("window2", 2), at_most=0.85, aim="0.78"),
        check("4:16 / ggml, one thread", of("index4", 1), at_most=0.45, aim="0.38"),
        check("windows of 2 bits / our dense", of("window2", 1, "to_dense"), at_most=0.82, aim="0.75"),
        check("llama.cpp, with / without, 2 threads", end(sparse, plain, 2), at_most=0.92, aim="0.85"),
        check("llama.cpp, with / without, 1 thread", end(sparse, plain, 1), at_most=0.80, aim="0.68"),
        check("transformers, packed / float32, 1 thread", end(packed, dense, 1), at_most=0.35, aim="0.25"),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """One line a kind of weight."""
    columns = [
        "shape",
        "batch",
        "threads",
        "weight",
        "bytes",
        "ns a 32",
        "GB/s",
        "/ ggml",
        "quartiles",
        "/ dense",
    ]
    cells = [
        [
            r["shape"], r["batch"], r["threads"], r["kind"], f"{r['bytes']:.1f}", f"{r['ns']:.2f}",
            f"{r['gb_per_second']:.1f}", f"{r['ratio']:.2f}", "{:.2f}-{:.2f}".format(*r["quartiles"]),
            f"{r['to_dense']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(columns, cells)


def end_table(ends: list[dict[str, Any]]) -> str:
    """One line a runtime and number of threads."""
    cells = []
    for row in ends:
        low, middle, high = statistics.quantiles(row["tokens_per_second"], n=4)
        speed = f"{middle:.1f} ({low:.1f}-{high:.1f})"
        first = f"{1e3 * row['first_token_seconds']:.0f} ms"
        cells.append([row["runtime"], row["threads"], f"{row['size_bytes'] / 1e6:.0f} MB", first, speed])
    return markdown_table(["runtime", "threads", "size", "first token", "tokens/s (quartiles)"], cells)


def main() -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__, quick="two shapes, batches of 1, few rounds")
    parser.add_argument("--shapes", nargs="*", default=None)
    parser.add_argument("--batches", nargs="+", type=int, default=None, help="1, or multiples of 4")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--instructions", default="avx2", choices=["plain", "avx2", "avx512"])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--plain", type=Path)
    options = parse_options(parser)
    rounds = options.rounds or (5 if options.quick else 11)
    shapes = (
        options.shapes
        if options.shapes is not None
        else (["576x1536", REACH_SHAPE] if options.quick else SHAPES)
    )
    batches = options.batches or ([1] if options.quick else [1, 4, 8])
    used = use_instruction_set(options.instructions)
    facts = environment("thread", instructions=used, huge_pages=str(hasattr(mmap, "MADV_HUGEPAGE")))
    facts["xllamacpp"] = version("xllamacpp")
    rows: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    bandwidth = read_bandwidth()
    print(f"{facts['processor']}, ours by {used}; one thread reads {bandwidth:.1f} GB/s")
    for shape in shapes:
        for batch in batches:
            for threads in (1, 2):
                rows += measure_shape(
                    shape, batch, threads, ["dense", *(k for k in options.kinds if k != "dense")], rounds
                )
                print(table(rows[-len(options.kinds) - 1 :]), flush=True)
    if options.gguf is not None:
        count = 3 if options.quick else 7
        for threads in (1, 2):
            ends += measure_end_to_end(options.gguf, options.packed, options.plain, threads, count)
        print(end_table(ends))
    checks = aims(rows, ends)
    print(checks_table(checks))
    facts["bandwidth"] = f"{bandwidth:.1f} GB/s, one thread"
    write_result(options.json, {"environment": facts, "rows": rows, "end_to_end": ends, "checks": checks})


if __name__ == "__main__":
    main()
