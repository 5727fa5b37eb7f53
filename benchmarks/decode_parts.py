"""Where a decoded token's time goes in llama.cpp: blocks against the rest, and other builds than the wheel.

    python -m benchmarks.deploy --parts speed --work DIR        # writes the two GGUF files
    python -m benchmarks.decode_parts --work DIR [--threads N] [--json FILE] [--llama-bench PROGRAM ...]

Both files are cut to fewer blocks and decoded side by side; a line through the medians gives the time of a
block and of everything else. PROGRAM is llama.cpp's own llama-bench, built by the reader (-DGGML_NATIVE=ON,
or OFF with -DGGML_AVX2=ON and its like); it samples nothing, and runs in a new process every round.
"""

import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import environment, make_parser, markdown_table, parse_options, write_result
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from sqft.runtimes.speed import measure_speed, open_artefact

DEPTHS = (1, 10, 20, 30)  # of 30 blocks
TOKENS = 64
FILES = {"F16": "gguf-f16", "Q4_0 (head Q8_0)": "gguf-q8_0"}


def cut(source: Path, target: Path, blocks: int) -> None:
    """A GGUF file with the first blocks only."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = blocks if key.endswith(".block_count") else field.contents()
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, field.types[0], inner)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < blocks:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure_depths(work: Path, threads: int) -> list[dict[str, Any]]:
    """ms a token at every depth, and the line through them, for each file."""
    tokens_ms: dict[str, list[float]] = {name: [] for name in FILES}
    with tempfile.TemporaryDirectory() as directory:
        for blocks in DEPTHS:
            artefacts = []
            for name, folder in FILES.items():
                target = Path(directory) / f"{folder}-{blocks}.gguf"
                cut(work / folder / "model.gguf", target, blocks)
                artefacts.append(open_artefact(target, name))
            for row in measure_speed(artefacts, new_tokens=TOKENS, rounds=5, threads=threads):
                tokens_ms[row.name].append(1e3 / row.decode_speed)
    rows = []
    for name, times in tokens_ms.items():
        block, rest = np.polyfit(DEPTHS, times, 1)
        rows.append({"file": name, "threads": threads, "ms": times, "block": block, "rest": rest})
    return rows


def measure_builds(work: Path, programs: list[Path], threads: list[int]) -> list[dict[str, Any]]:
    """Decode speed of both files by llama-bench, 9 processes each, in turn."""
    jobs = [(program, count, name) for program in programs for count in threads for name in FILES]
    speeds: dict[tuple[Path, int, str], list[float]] = {job: [] for job in jobs}
    for _ in range(9):
        for program, count, name in jobs:
            model = work / FILES[name] / "model.gguf"
            counts = ["-p", "0", "-n", str(TOKENS), "-d", str(TOKENS), "-t", str(count), "-r", "1"]
            command = [str(program), "-m", str(model), *counts, "-o", "json"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            speeds[program, count, name].append(json.loads(done.stdout)[0]["avg_ts"])
    rows = []
    for program in programs:
        for count in threads:
            plain, packed = (speeds[program, count, name] for name in FILES)
            ratios = statistics.quantiles([b / a for a, b in zip(plain, packed, strict=True)], n=4)
            medians = statistics.median(plain), statistics.median(packed)
            rows.append({"build": program.name, "threads": count, "speeds": medians, "ratios": ratios})
    return rows


def main() -> None:
    """Measure with one thread and with all, print Markdown tables, write the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where benchmarks.deploy left its files")
    parser.add_argument("--llama-bench", type=Path, nargs="*", default=[], metavar="PROGRAM")
    arguments = parse_options(parser)
    threads = sorted({arguments.threads, 1}, reverse=True)
    result: dict[str, Any] = {"environment": environment(), "checks": []}
    result["depths"] = [row for count in threads for row in measure_depths(arguments.work, count)]
    rows = []
    for row in result["depths"]:
        times = [f"{value:.2f}" for value in row["ms"]]
        rows.append([row["threads"], row["file"], *times, f"{row['block']:.3f}", f"{row['rest']:.2f}"])
    depths = [f"{blocks} blocks" for blocks in DEPTHS]
    print(markdown_table(["threads", "file", *depths, "ms a block", "ms the rest"], rows))
    result["builds"] = measure_builds(arguments.work, arguments.llama_bench, threads)
    rows = []
    for row in result["builds"]:
        low, middle, high = row["ratios"]
        speeds = [f"{value:.1f}" for value in row["speeds"]]
        rows.append([row["build"], row["threads"], *speeds, f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    if rows:
        print("\n" + markdown_table(["llama-bench", "threads", *FILES, "ratio (quartiles)"], rows))
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
