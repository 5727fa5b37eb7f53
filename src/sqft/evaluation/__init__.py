"""Measuring a model: loss and accuracy on held-out items, perplexity, and lm-evaluation-harness."""

from sqft.evaluation.accuracy import AccuracyResult, evaluate_accuracy
from sqft.evaluation.harness import evaluate_tasks
from sqft.evaluation.intervals import Difference, paired_difference
from sqft.evaluation.items import evaluate_items
from sqft.evaluation.loss import LossResult, PerplexityResult, evaluate_loss, evaluate_perplexity

__all__ = [
    "AccuracyResult",
    "Difference",
    "LossResult",
    "PerplexityResult",
    "evaluate_accuracy",
    "evaluate_items",
    "evaluate_loss",
    "evaluate_perplexity",
    "evaluate_tasks",
    "paired_difference",
]
