"""What zeros buy when a CPU decodes: products of packed sparse weights beside ggml's Q4_0, layer by layer.

    python -m benchmarks.sparse_decode --json FILE [--quick] [--shapes 4096x14336 ...] [--batches 1 4 8]
                                       [--instructions avx2] [--models DIR ...]

Weights of random steps, some 160 MB of each kind, are walked through in turn, so that every product reads
from memory. ggml's kernel is the one that llama.cpp takes for a repacked Q4_0 weight (gemv_q4_0_8x8 and, for
batches, gemm_q4_0_8x8), called in the wheel of xllamacpp, which is built for AVX2; ours are held to AVX2
too, unless --instructions says otherwise. For single vectors OpenVINO's INT4 in the same groups and torch's
float32 stand beside, with whatever instructions they take. ggml's kernel and ours quantize the vector inside
the time, and their weights lie in huge pages. One thread is timed by its own clock, which other programs
disturb least; with two, each does half of the rows, by the wall clock. Ratios are taken inside a round, and
given as quartiles.
A product of 576 columns takes some 20 microseconds, of which Python's calls are a good part, for all alike.

--models: directories that hold one model as merged/, packed/ and gguf/model.gguf, for instance that of
`benchmarks.random_llama`; tokens a second end to end, with the runner of `sqft bench`: llama.cpp with and
without our kernels, transformers from the packed form and with float32 weights. Heads are on 8 bits in all
but the last.
"""

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
from benchmarks.decode_rivals import WALKED, Ggml, OpenVinoLinears, TorchLinear

from sqft.kernels.packed_matrix import LAYOUTS, HugePages, Layout, PackedMatrix, use_instruction_set
from sqft.kernels.reference import multiply_reference
from sqft.ops import mask_pattern
from sqft.runtimes.speed import Artefact, measure_speed

SHAPES = ["192x576", "576x576", "1536x576", "576x1536", "4096x4096", "14336x4096", "4096x14336"]
REACH_SHAPE = "4096x14336"
KINDS: tuple[Layout, ...] = ("dense", "window2", "window3", "window332", "index4", "mask8", "mask", "bytes")
GGML, OPENVINO, TORCH = "ggml Q4_0", "OpenVINO INT4", "torch float32"
Job = Callable[[], None]


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
    shape: str, batch: int, threads: int, kinds: list[Layout], rounds: int, bandwidth: float
) -> list[dict[str, Any]]:
    """A row for each kind of weight: bytes and time of 32 weights, and the ratio to ggml's.

    bandwidth: GB/s that so many threads read here.
    """
    rows, columns = (int(n) for n in shape.split("x"))
    x = torch.randn(batch, columns)
    ggml = Ggml(rows, columns)
    y, half = torch.empty(batch, rows), rows // 2 // 8 * 8
    ggml.multiply(x, y, 0, 0, rows)
    expected = multiply_reference(ggml.steps, ggml.scale, 32, x)
    worst = float((y - expected).abs().max() / expected.abs().max())
    assert worst < 1e-2, f"ggml's result differs by {worst}"
    weights = {kind: draw_packed(kind, rows, columns) for kind in kinds}
    names = [GGML, *kinds]
    if batch == 1:
        openvino, torchs = (
            OpenVinoLinears(ggml.steps, ggml.scale, threads),
            TorchLinear(ggml.steps, ggml.scale),
        )
        torch.set_num_threads(threads)
        names += [OPENVINO, TORCH]
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
            if name == TORCH:
                return len(torchs.copies), lambda copy: torchs.multiply(x, copy)
            if name == OPENVINO:  # one call walks through all of its copies
                return openvino.count, lambda copy: copy or openvino.multiply(x)
            found = weights[name]  # type: ignore[index]
            return len(found), lambda copy: found[copy].multiply(x, threads=threads)

        clock = time.thread_time if threads == 1 else time.perf_counter
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            for name, found in seconds.items():
                count, job = walk(name)
                start = clock()
                for copy in range(count):
                    job(copy)
                if turn:
                    found.append((clock() - start) / count)
    vectors = rows * columns / 32 * batch
    sizes = {name: found[0].num_bytes for name, found in weights.items()} | {GGML: ggml.bytes}
    if batch == 1:
        sizes |= {OPENVINO: openvino.bytes, TORCH: torchs.bytes}
    result = []
    for name, found in seconds.items():
        size = sizes[name]
        ratios = [a / b for a, b in zip(found, seconds[GGML], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4)
        result.append(
            {
                "shape": shape, "batch": batch, "threads": threads, "kind": name,
                "bytes": size / (rows * columns / 32),
                "ns": 1e9 * statistics.median(found) / vectors,
                "gb_per_second": size / statistics.median(found) / 1e9,
                "bandwidth_share": size / statistics.median(found) / 1e9 / bandwidth,
                "ratio": middle, "quartiles": [lower, upper],
                "to_dense": ratio(found, seconds["dense"]), "seconds": found,
            }
        )  # fmt: skip
    return result


def read_bandwidth(threads: int) -> float:
    """GB a second that so many threads read from huge pages, at best of ten."""
    memory = HugePages().keep(torch.ones(WALKED, dtype=torch.uint8)).view(torch.int64)
    best = 1e9
    clock = time.thread_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    for _ in range(10):
        start = clock()
        memory.sum()
        best = min(best, clock() - start)
    return WALKED / best / 1e9


def measure_end_to_end(model: Path, threads: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Tokens a second of the same weights in each runtime, one process each, in turn."""
    gguf = model / "gguf" / "model.gguf"
    artefacts = [
        Artefact("Q4_0", gguf, "llama.cpp"),
        Artefact("Q4_0", gguf, "llama.cpp + sqft"),
        Artefact("packed", model / "packed", "transformers + sqft"),
        Artefact("float32", model / "merged", "transformers"),
    ]
    found = measure_speed(artefacts, prompt_tokens=32, new_tokens=tokens, rounds=rounds, threads=threads)
    return [
        {
            "model": model.name, "name": row.name, "runtime": row.runtime, "threads": threads,
            "size_bytes": row.size_bytes,
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

    last = ends[-1]["model"] if ends else None  # the largest, if it is named last

    def end(runtime: str, other: str, threads: int) -> float | None:
        rows = [r for r in ends if (r["model"], r["threads"]) == (last, threads)]
        speeds = {r["runtime"]: r["tokens_per_second"] for r in rows}
        return ratio(speeds[other], speeds[runtime]) if {runtime, other} <= set(speeds) else None

    sparse, plain = "llama.cpp + sqft", "llama.cpp"
    packed, dense = "transformers + sqft", "transformers"
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
        "of reading",
        "/ ggml",
        "quartiles",
        "/ dense",
    ]
    cells = [
        [
            r["shape"], r["batch"], r["threads"], r["kind"], f"{r['bytes']:.1f}", f"{r['ns']:.2f}",
            f"{r['gb_per_second']:.1f}", f"{r['bandwidth_share']:.0%}", f"{r['ratio']:.2f}",
            "{:.2f}-{:.2f}".format(*r["quartiles"]), f"{r['to_dense']:.2f}",
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
        cells.append(
            [row["model"], row["runtime"], row["threads"], f"{row['size_bytes'] / 1e6:.0f} MB", first, speed]
        )
    return markdown_table(
        ["model", "runtime", "threads", "size", "first token", "tokens/s (quartiles)"], cells
    )


def main() -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__, quick="two shapes, batches of 1, few rounds")
    parser.add_argument("--shapes", nargs="*", default=None)
    parser.add_argument("--batches", nargs="+", type=int, default=None, help="1, or multiples of 4")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--instructions", default="avx2", choices=["plain", "avx2", "avx512"])
    parser.add_argument("--thread-counts", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--models", nargs="*", type=Path, default=[], metavar="DIR", help="the largest last")
    parser.add_argument("--tokens", type=int, default=32, help="that are generated in a round end to end")
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
    bandwidth = {threads: read_bandwidth(threads) for threads in options.thread_counts}
    reads = ", ".join(f"{n} threads read {speed:.1f} GB/s" for n, speed in bandwidth.items())
    print(f"{facts['processor']}, ours by {used}; {reads}")
    for shape in shapes:
        for batch in batches:
            for threads in options.thread_counts:
                kinds: list[Layout] = ["dense", *(k for k in options.kinds if k != "dense")]
                found = measure_shape(shape, batch, threads, kinds, rounds, bandwidth[threads])
                print(table(found), flush=True)
                rows += found
    for model in options.models:
        for threads in options.thread_counts:
            found = measure_end_to_end(
                model, threads, options.rounds or (3 if options.quick else 7), options.tokens
            )
            print(end_table(found), flush=True)
            ends += found
    checks = aims(rows, ends)
    print(checks_table(checks))
    facts["bandwidth"] = reads
    write_result(options.json, {"environment": facts, "rows": rows, "end_to_end": ends, "checks": checks})


if __name__ == "__main__":
    main()
