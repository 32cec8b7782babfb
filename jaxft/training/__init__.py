"""The train step, the loop around it, and what a run writes."""

from jaxft.training.loop import ProfileConfig, TrainingConfig, train
from jaxft.training.metrics import LoggingConfig, read_metrics
from jaxft.training.preemption import Interrupted
from jaxft.training.report import Report, report_markdown

__all__ = [
    "Interrupted",
    "LoggingConfig",
    "ProfileConfig",
    "Report",
    "TrainingConfig",
    "read_metrics",
    "report_markdown",
    "train",
]
