"""The figures of one model: loss, accuracy, perplexity, sparsity, size."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from sqft.adapters.identity import base_weight
from sqft.artifacts import LATENT, MASKS, REFERENCE, digest_json
from sqft.data import Example
from sqft.evaluation.harness import evaluate_tasks, main_figure
from sqft.evaluation.items import evaluate_items
from sqft.evaluation.loss import evaluate_general, evaluate_perplexity
from sqft.evaluation.paired import compare_correct, paired_difference
from sqft.evaluation.scoring import Scorable
from sqft.models import fused_weights, target_linears
from sqft.progress import Progress
from sqft.sections import EvaluateSection

__all__ = ["compare_models", "measure_model", "size_on_disk"]

WEIGHTS = ("*.safetensors",)
NOT_SERVED = (LATENT, MASKS, REFERENCE)


def measure_model(
    model: Scorable,
    tokenizer: Any,
    examples: Sequence[Example],
    section: EvaluateSection,
    *,
    chat_tasks: bool = False,
    samples: bool = False,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures of the report's row, figures of every item for paired comparison).

    chat_tasks, samples: chat and samples of `evaluate_tasks`. Zeros are counted in a module alone; another
    program keeps its weights to itself.
    """
    row: dict[str, Any] = {"sparsity": zero_share(model)} if isinstance(model, nn.Module) else {}
    items: dict[str, Any] = {}
    if examples:
        examples = examples[: section.max_items]
        loss, accuracy = evaluate_items(
            model,
            examples,
            tokenizer,
            batch_size=section.batch_size,
            max_new_tokens=section.max_new_tokens,
            progress=progress,
        )
        row |= {"loss": loss.loss, "loss_low": loss.low, "loss_high": loss.high, "num_items": loss.num_items}
        items["ids"] = [_item_id(example) for example in examples]
        items |= {"loss_sums": loss.sums, "answer_tokens": loss.counts}
        if accuracy is not None:
            row |= {"accuracy": accuracy.accuracy}
            row |= {"accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
            items |= {"correct": accuracy.correct, "answers": accuracy.answers}
            items |= {"expected": [example.answer for example in examples]}
            items |= {"prompts": [example.prompt for example in examples]}
    if section.general_text:
        general = evaluate_general(
            model,
            tokenizer,
            section.general_text,
            sequence_length=section.sequence_length,
            batch_size=section.batch_size,
            progress=progress,
        )
        row["general_loss"] = general.log_perplexity
        items |= {"general_sums": general.sums, "general_tokens": general.counts}
        items |= {"general_text": general.text}
    if section.perplexity:
        perplexity = evaluate_perplexity(
            model,
            Path(section.perplexity),
            tokenizer,
            num_tokens=section.perplexity_tokens,
            sequence_length=section.sequence_length,
            batch_size=section.batch_size,
            progress=progress,
        )
        row["perplexity"] = perplexity.perplexity
        items |= {"perplexity_sums": perplexity.sums, "perplexity_tokens": perplexity.counts}
        items |= {"log_perplexity_error": perplexity.standard_error, "perplexity_text": perplexity.text}
    if section.tasks:
        results = evaluate_tasks(
            model,
            tokenizer,
            section.tasks,
            data_dir=Path(section.tasks_data) if section.tasks_data else None,
            num_fewshot=section.num_fewshot,
            chat=chat_tasks,
            samples=samples,
            batch_size=section.batch_size,
            max_items=section.max_items,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        main = {task: main_figure(figures) for task, figures in results.items()}
        row["tasks"] = {f"{task} ({metric})": value for task, (metric, value) in main.items()}
        items["tasks"] = results
    return row, items


def zero_share(model: nn.Module) -> float:
    """The share of exact zeros among the weights inside the decoder blocks: linears, and fused experts."""
    linears = target_linears(model, None, []).items()
    weights = chain(
        (base_weight(module) for name, module in linears if not _of_adapter(name)),
        (weight for name, weight in fused_weights(model).items() if not _of_adapter(name)),
    )
    zeros = total = 0
    for weight in weights:
        zeros += int((weight == 0).sum())
        total += weight.numel()
    return zeros / total if total else 0.0


def _of_adapter(name: str) -> bool:
    """Whether a weight belongs to an adapter beside the base, stock PEFT's or ours."""
    return ".lora_" in name or ".sqft_" in name


def _item_id(example: Example) -> str:
    """What was asked and expected, so that figures of other items or prompts are told apart."""
    choices = len(example.choices_ids or ())
    return digest_json([example.prompt, example.answer, example.label, choices])[:16]


def size_on_disk(directory: Path) -> int:
    """Bytes of the weights that a runtime reads from a model or adapter directory."""
    files = {path for pattern in WEIGHTS for path in directory.glob(pattern)}
    return sum(path.stat().st_size for path in files if path.name not in NOT_SERVED)


def compare_models(items: dict[str, dict[str, Any]]) -> list[str]:
    """What compression cost, and the gap that remains to the dense reference, paired by item, one line each.

    items: the per-item figures that `measure_model` gave for each model.
    """
    before = "reconstructed" if "reconstructed" in items else "quantized"
    pairs = [
        ("quantized", "base", "compressed, before tuning, against the dense model"),
        ("sparse", "base", "pruned, before tuning, against the dense model"),
        ("reconstructed", "quantized", "reconstructed against compressed"),
        ("reconstructed", "base", "reconstructed, before tuning, against the dense model"),
        ("merged", before, "tuned and merged against before tuning"),
        ("tuned", "base", "tuned against the dense model"),
        ("quantized", "tuned", "compressed against the tuned model"),
        ("merged", "tuned", "merged against the tuned model"),
        ("merged", "dense_tuned", "merged against dense + LoRA"),
        ("adapted", "dense_tuned", "tuned against dense + LoRA"),
    ]
    notes = [
        f"{words}: {_difference(items[first], items[second])}"
        for first, second, words in pairs
        if "loss_sums" in items.get(first, {}) and "loss_sums" in items.get(second, {})
    ]
    dense = items.get("base", {})
    kinds = {
        "dense_tuned": "dense + LoRA",
        "tuned": "tuned",
        "adapted": "with its adapter",
        "merged": "merged",
    }
    for name, words in kinds.items():
        one = items.get(name, {})
        if "general_sums" in dense and one.get("general_text") == dense["general_text"]:
            gap = paired_difference(dense["general_sums"], one["general_sums"], one["general_tokens"])
            shown = f"{gap.difference:+.3f} nats a token ({gap.low:+.3f} to {gap.high:+.3f})"
            notes.append(f"general text, {words} against the dense model: {shown}")
    return notes


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    loss = paired_difference(second["loss_sums"], first["loss_sums"], first["answer_tokens"])
    parts = [f"loss {loss.difference:+.3f} nats ({loss.low:+.3f} to {loss.high:+.3f})"]
    if "correct" in first and "correct" in second:
        right = compare_correct(second["correct"], first["correct"])
        low, high = 100 * right.low, 100 * right.high
        parts.append(f"accuracy {100 * right.difference:+.1f} points ({low:+.1f} to {high:+.1f})")
    return ", ".join([*parts, f"{loss.num_items} items, paired"])
