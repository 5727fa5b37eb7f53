"""Time and memory of compressing SmolLM2-135M, beside llm-compressor on the same tokens.

    python -m benchmarks.compression_speed [DATA_DIR] --peer-python PEER/bin/python --json FILE [--quick]

llm-compressor needs older libraries than sqft, hence an environment of its own, with the same torch:

    python -m venv PEER
    PEER/bin/python -m pip install torch==2.13.0 llmcompressor==0.14.0.1

Each side runs alone in its own process, in turn, on the same model directory, token ids (validation.txt of
DATA_DIR; with --quick, a short story if none is given) and number of threads, in float32: Wanda at 50 %,
and dense GPTQ to symmetric INT4 in groups of 64 without reordering of columns. llm-compressor is called as
its users call it, with the defaults of `oneshot`. "compress" is that call on a loaded model; ours is
`sparsify_model` or `quantize_model`, which also reads and writes every block, and keeps what a resumed run
needs. Of 8 sequences or more, ours keeps the last out of its statistics and measures the layers' errors on
it; llm-compressor, which measures none, gets the sequences before it, so that both take statistics of the
same tokens. "whole" adds loading and saving. Memory is the peak resident set up to the end of "compress",
libraries included. That both did the same work is checked on the written models: zeros or distinct values
in a group, and log-perplexity on test.txt.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import (
    SMALL_MODEL,
    check,
    checks_table,
    environment,
    make_parser,
    markdown_table,
    parse_options,
    ratio,
    read_text,
    write_result,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqft.compression import quantize_model, sparsify_model
from sqft.compression.walk import HELD_OUT_FROM
from sqft.models import (
    CheckpointWriter,
    load_model,
    load_tokenizer,
    open_checkpoint,
    resolve_model,
    target_linears,
)
from sqft.sections import ModelSection, QuantizeSection, SparsifySection

JOBS = {"wanda": "Wanda 50 %", "gptq": "dense GPTQ, INT4"}
SIDES = {"sqft": "sqft", "peer": "llm-compressor"}
GROUP_SIZE = 64
WINDOW = 512  # tokens of test text
AT_MOST, AIM = 0.8, 0.4  # of llm-compressor's time
SAME_WORK = 0.02  # nats by which ours may be worse: faster must not be because it does less


def compress(job: str, directory: Path, tokens: Path, out: Path) -> dict[str, Any]:
    """Our side: what each part took, and the peak of memory up to the end of compression."""
    ids = load_file(tokens)["tokens"]
    started = time.perf_counter()
    source = open_checkpoint(directory)
    writer = CheckpointWriter(out, source)
    opened = time.perf_counter()
    if job == "wanda":
        sparsify_model(source, SparsifySection(method="wanda", sparsity=0.5), ids, writer)
    else:
        quantize_model(source, None, QuantizeSection(method="gptq", group_size=GROUP_SIZE), ids, writer)
    compressed = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    writer.close()
    saved = time.perf_counter()
    seconds = {"load": opened - started, "compress": compressed - opened, "save": saved - compressed}
    return {"seconds": seconds, "peak_bytes": peak, "threads": torch.get_num_threads()}


def statistic_rows(ids: Tensor) -> Tensor:
    """The sequences that ours takes its statistics of: all but one that errors are measured on."""
    return ids[:-1].clone() if len(ids) >= HELD_OUT_FROM else ids


class Race:
    """The two sides, run in turn on one model and one file of tokens."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.directory = resolve_model(ModelSection(source=options.model), options.cache)
        tokenizer = load_tokenizer(self.directory)

        def tokens(name: str, rows: int, length: int) -> Tensor:
            ids: Tensor = tokenizer(read_text(options.data, name), return_tensors="pt").input_ids[0]
            if len(ids) < rows * length:
                sys.exit(f"{name} has {len(ids)} tokens, {rows * length} are asked for")
            return ids[: rows * length].reshape(rows, length).clone()

        self.tokens, self.peer_tokens = work / "tokens.safetensors", work / "peer-tokens.safetensors"
        ids = tokens("validation.txt", options.sequences, options.length)
        seen = statistic_rows(ids)
        self.statistic_tokens = seen.numel()
        save_file({"tokens": ids}, self.tokens)
        save_file({"tokens": seen}, self.peer_tokens)
        self.test = tokens("test.txt", options.windows, WINDOW)

    def run(self, job: str, side: str) -> dict[str, Any]:
        """One run in a process of its own. Its model stays in `self.output(job, side)`."""
        out = self.output(job, side)
        tokens = self.tokens if side == "sqft" else self.peer_tokens
        common = [job, str(self.directory), str(tokens), str(out), str(self.options.threads)]
        if side == "sqft":
            command = [sys.executable, "-m", "benchmarks.compression_speed", "--job", *common]
        else:
            script = Path(__file__).with_name("compression_peer.py")
            command = [str(self.options.peer_python), str(script), *common, str(GROUP_SIZE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{SIDES[side]}, {job}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        found["seconds"]["whole"] = sum(found["seconds"].values())
        return found

    def output(self, job: str, side: str) -> Path:
        """Where a side's model lies."""
        return self.work / f"{job}-{side}"

    def proof(self, job: str, side: str) -> dict[str, float]:
        """What a written model is: its zeros, the most values in a group, and its log-perplexity."""
        model = load_model(self.output(job, side))
        names = target_linears(model, None, [])
        weights = [model.get_parameter(f"{name}.weight").detach() for name in names]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        values = max(
            len(group.unique()) for weight in weights[:7] for group in weight.view(-1, GROUP_SIZE)[:64]
        )
        with torch.no_grad():
            losses = [float(model(window[None], labels=window[None]).loss) for window in self.test]
        return {
            "zeros": zeros / sum(weight.numel() for weight in weights),
            "values_in_a_group": values,
            "log_perplexity": statistics.mean(losses),
        }


def measure(race: Race, rounds: int) -> dict[str, Any]:
    """Every job of both sides in every round, and what came out."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {job: {side: [] for side in SIDES} for job in JOBS}
    for turn in range(rounds):
        for job in JOBS:
            for side in SIDES if turn % 2 == 0 else reversed(SIDES):
                runs[job][side].append(race.run(job, side))
                seconds = runs[job][side][-1]["seconds"]["compress"]
                print(f"round {turn + 1}, {SIDES[side]}, {JOBS[job]}: {seconds:.1f} s", file=sys.stderr)
    rows = []
    for job, sides in runs.items():
        of = {
            side: {part: [run["seconds"][part] for run in found] for part in found[0]["seconds"]}
            for side, found in sides.items()
        }
        peaks = {side: statistics.median(run["peak_bytes"] for run in found) for side, found in sides.items()}
        rows.append(
            {
                "job": job,
                "seconds": of,
                "peak_bytes": peaks,
                "ratio": ratio(of["sqft"]["compress"], of["peer"]["compress"]),
                "ratio_whole": ratio(of["sqft"]["whole"], of["peer"]["whole"]),
                "ratio_memory": peaks["sqft"] / peaks["peer"],
                "models": {side: race.proof(job, side) for side in SIDES},
            }
        )
    return {"rounds": rounds, "rows": rows, "checks": checks(rows)}


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The aims, and whether the two sides did the same work."""
    found = []
    for row in rows:
        name, models = JOBS[row["job"]], row["models"]
        found.append(check(f"{name}: time / llm-compressor", row["ratio"], at_most=AT_MOST, aim=AIM))
        found.append(check(f"{name}: peak memory / llm-compressor", row["ratio_memory"], at_most=1.0))
        worse = models["sqft"]["log_perplexity"] - models["peer"]["log_perplexity"]
        found.append(check(f"{name}: log-perplexity over llm-compressor's", worse, at_most=SAME_WORK))
        if row["job"] == "wanda":
            worst = max(abs(model["zeros"] - 0.5) for model in models.values())
            found.append(check(f"{name}: zeros, distance from 50 %", worst, at_most=0.001))
        else:
            most = max(model["values_in_a_group"] for model in models.values())
            found.append(check(f"{name}: distinct values in a group", most, at_most=16))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The rows as a Markdown table: seconds as median (least-most)."""
    rows: list[list[str]] = []

    def seconds(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"

    for row in report["rows"]:
        for side, title in SIDES.items():
            parts, model = row["seconds"][side], row["models"][side]
            cells = [JOBS[row["job"]], title, seconds(parts["compress"]), seconds(parts["whole"])]
            cells += [f"{row['peak_bytes'][side] / 1e9:.2f}", f"{model['zeros']:.2%}"]
            rows.append([*cells, f"{model['log_perplexity']:.4f}"])
        ratios = [f"**{row['ratio']:.2f}**", f"{row['ratio_whole']:.2f}", f"{row['ratio_memory']:.2f}"]
        rows.append(["", "ratio", *ratios, "", ""])
    columns = ["job", "by", "compress, s", "whole, s", "peak memory, GB", "zeros", "log-perplexity"]
    return markdown_table(columns, rows)


def main() -> None:
    """Run, print, write."""
    if sys.argv[1:2] == ["--job"]:
        job, directory, tokens, out, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        print(json.dumps(compress(job, Path(directory), Path(tokens), Path(out))))
        return
    parser = make_parser(__doc__, quick="2 rounds, 1,024 calibration tokens", json_required=True)
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA_DIR")
    parser.add_argument("--peer-python", type=Path, required=True, help="the interpreter with llm-compressor")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--sequences", type=int, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, default=8, help="test windows of 512 tokens")
    parser.add_argument("--model", default=SMALL_MODEL)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sqft-benchmark-models")
    options = parse_options(parser)
    if options.data is None and not options.quick:
        parser.error("give DATA_DIR: without it there is only text enough for --quick")
    options.rounds = options.rounds or (2 if options.quick else 3)
    options.sequences = options.sequences or (4 if options.quick else 16)
    facts = environment(llmcompressor=peer_version(options.peer_python))
    with tempfile.TemporaryDirectory(prefix="sqft-compression-speed-") as work:
        race = Race(options, Path(work))
        report = measure(race, options.rounds)
    report |= {
        "model": options.model,
        "calibration_tokens": options.sequences * options.length,
        "statistic_tokens": race.statistic_tokens,
        "environment": facts,
    }
    write_result(options.json, report)
    print(markdown(report) + "\n\n" + checks_table(report["checks"]))


def peer_version(python: Path) -> str:
    """The version of llm-compressor that an interpreter has."""
    code = "from importlib.metadata import version; print(version('llmcompressor'))"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{python} has no llm-compressor; see the first lines of benchmarks/compression_speed.py")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
