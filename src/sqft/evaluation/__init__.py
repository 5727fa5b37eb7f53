"""Measuring a model: loss and accuracy on held-out items, perplexity, and lm-evaluation-harness."""

from sqft.evaluation.accuracy import AccuracyResult, evaluate_accuracy
from sqft.evaluation.harness import evaluate_tasks, find_task_data
from sqft.evaluation.items import evaluate_items
from sqft.evaluation.loss import (
    LossResult,
    PerplexityResult,
    evaluate_general,
    evaluate_loss,
    evaluate_perplexity,
    general_path,
)
from sqft.evaluation.paired import Difference, compare_correct, paired_difference

__all__ = [
    "AccuracyResult",
    "Difference",
    "LossResult",
    "PerplexityResult",
    "compare_correct",
    "evaluate_accuracy",
    "evaluate_general",
    "evaluate_items",
    "evaluate_loss",
    "evaluate_perplexity",
    "evaluate_tasks",
    "find_task_data",
    "general_path",
    "paired_difference",
]
