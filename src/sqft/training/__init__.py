"""Training with transformers.Trainer underneath: elastic ranks, exact resume."""

from sqft.training.arguments import check_arguments
from sqft.training.ranks import RankSampler
from sqft.training.record import StepRecord, TrainingRecord
from sqft.training.train import train_adapters

__all__ = ["RankSampler", "StepRecord", "TrainingRecord", "check_arguments", "train_adapters"]
