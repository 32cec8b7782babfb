"""Data: sources -> examples -> tokens -> packed batches.

The path of a row through the files: `sources` reads it, `columns` recognises it, `templates` writes it as text and
tokens with a mask of what trains, `examples` collects, `packing` lays it out in rows, `pipeline` orders rows
into batches.
"""

from jaxft.data.config import DataConfig, EvaluationSetConfig, FormatConfig, RowsConfig, SourceConfig
from jaxft.data.evaluation import EvaluationBatches, evaluation_batches
from jaxft.data.pipeline import TrainBatches, inspect, train_batches
from jaxft.data.report import DataReport, SourceReport, check_vocabulary
from jaxft.data.sources import locate
from jaxft.data.templates import read_template

__all__ = [
    "DataConfig",
    "DataReport",
    "EvaluationBatches",
    "EvaluationSetConfig",
    "FormatConfig",
    "RowsConfig",
    "SourceConfig",
    "SourceReport",
    "TrainBatches",
    "check_vocabulary",
    "evaluation_batches",
    "inspect",
    "locate",
    "read_template",
    "train_batches",
]
