"""What a run reads and how it becomes tokens: the `data` section and one entry of `evaluation.sets`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jaxft.data.columns import COLUMN_NAMES
from jaxft.errors import nearest

Format = Literal["auto", "jsonl", "json", "parquet", "csv", "text", "dataset"]
LossOn = Literal["answers", "all", "last"]
Truncation = Literal["error", "drop", "truncate"]
OnError = Literal["raise", "skip"]


class RowsConfig(BaseModel):
    """Where rows come from and which of them to take."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, Field(min_length=1)] = Field(
        description="A file, a glob, a directory of files, a directory written by datasets' save_to_disk, "
        "a Hugging Face dataset id, or builtin:<name>."
    )
    name: str | None = Field(default=None, description="Name in reports; null: the path.")
    format: Format = Field(default="auto", description="File format; auto goes by the file name's ending.")
    split: str | None = Field(
        default=None,
        description="Split of a Hugging Face dataset; null: train, or the only one there is. Not for plain files.",
    )
    subset: str | None = Field(default=None, description="Configuration (subset) name of a Hugging Face dataset.")
    sample_by: Literal["document", "paragraph", "line"] = Field(
        default="document",
        description="What one row of a text file is: the whole file, a paragraph (blank lines apart), a line.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Names known to jaxft mapped to the column names in the rows, "
        "e.g. {prompt: question, completion: answer}.",
    )
    holdout: float | int | None = Field(
        default=None,
        description="Rows set apart for evaluation: a fraction (0.05) or a count (500). Chosen by a hash of the row, "
        "so it does not depend on the seed and equal rows stay on one side.",
    )
    part: Literal["train", "holdout"] = Field(
        default="train", description="Which side of `holdout` to read. Ignored when holdout is null."
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Read at most this many rows, from the first on, after `part` is taken."
    )

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in COLUMN_NAMES:
                raise ValueError(f"{name!r} is not a column jaxft knows; {nearest(name, COLUMN_NAMES)}")
        return columns

    @model_validator(mode="after")
    def _check_holdout(self) -> "RowsConfig":
        value = self.holdout
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(
                f"holdout={value} as a fraction must lie between 0 and 1; a count is written as an integer"
            )
        if isinstance(value, int) and value < 1:
            raise ValueError(f"holdout={value} as a count must be at least 1")
        if self.part == "holdout" and value is None:
            raise ValueError("part: holdout needs holdout: a fraction or a count")
        return self

    @property
    def label(self) -> str:
        return self.name or self.path


class SourceConfig(RowsConfig):
    """One source of training rows."""

    weight: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Share of this source in the batches' rows, relative to the other sources' weights. Null for all: "
        "the sources are read as one, every example once an epoch. With weights, small sources repeat sooner.",
    )


class FormatConfig(BaseModel):
    """How rows become tokens, and what to do with rows that cannot."""

    model_config = ConfigDict(extra="forbid")

    loss_on: LossOn = Field(
        default="answers",
        description="Tokens that train: every answer with its end-of-turn token, all tokens, or the last answer only. "
        "Rows of plain `text` train on all tokens.",
    )
    truncation: Truncation = Field(
        default="truncate",
        description="An example longer than seq_len is an error, is dropped and counted, or is truncated and counted. "
        "truncate cuts conversations on the right and splits `text` into consecutive windows.",
    )
    on_error: OnError = Field(
        default="raise", description="A malformed row stops the run with its file and line, or is skipped and counted."
    )
    chat_template: str | None = Field(
        default=None,
        description="Path of a .jinja file, a template string, or `plain` (contents joined by newlines, answers ended "
        "by eos). Null: the tokenizer's own; a tokenizer without one gets `plain` for instruction rows.",
    )
    chat_template_options: dict[str, Any] = Field(
        default_factory=dict, description="Variables handed to the chat template, e.g. {enable_thinking: false}."
    )
    system: str | None = Field(
        default=None, description="System message for every conversation; replaces the row's own."
    )
    add_eos: bool = Field(
        default=True,
        description="End `text` documents and plain-format answers with the eos token. Templates end turns themselves.",
    )


class DataConfig(FormatConfig):
    """Training data: sources, format, packing and order."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(description="Where the rows come from.")
    seq_len: Annotated[int, Field(ge=2)] = Field(default=1024, description="Tokens in a row of the batch.")
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=8, description="Rows of a global batch (over all processes) a step."
    )
    packing: bool = Field(default=True, description="Put several examples in a row; they do not see each other.")
    shuffle: bool = Field(
        default=True, description="Draw a new order every epoch from the run's seed; false: keep the files'."
    )
    epochs: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Stop after this many passes; null: go on for as many steps as the training asks."
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Processes that prepare batches ahead of the step; 0: threads, enough in nearly every case.",
    )

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> "DataConfig":
        without = [source.label for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"either every source has a weight or none: no weight for {', '.join(without)}")
        return self


class EvaluationSetConfig(RowsConfig):
    """One named evaluation set. Format options left null are those of the `data` section."""

    kind: Literal["target", "retained"] = Field(
        default="target", description="target: what the run should learn; retained: what it should not forget."
    )
    task: Literal["perplexity", "multiple_choice"] = Field(
        default="perplexity",
        description="multiple_choice needs columns question, choices and answer (an index, a letter or the choice).",
    )
    max_examples: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Evaluate on this many examples, drawn once and for all; null: on all."
    )
    packing: bool = Field(
        default=True, description="Several examples in a row; the measure is the same, the batches are fewer."
    )
    loss_on: LossOn | None = Field(default=None, description="As in data.")
    truncation: Truncation | None = Field(default=None, description="As in data.")
    on_error: OnError | None = Field(default=None, description="As in data.")
    chat_template: str | None = Field(default=None, description="As in data.")
    chat_template_options: dict[str, Any] | None = Field(default=None, description="As in data.")
    system: str | None = Field(default=None, description="As in data.")
    add_eos: bool | None = Field(default=None, description="As in data.")

    def text_format(self, data: FormatConfig) -> FormatConfig:
        """The set's own format options over those of the `data` section."""
        own = {name: getattr(self, name) for name in FormatConfig.model_fields}
        base = {name: getattr(data, name) for name in FormatConfig.model_fields}
        return FormatConfig(**(base | {name: value for name, value in own.items() if value is not None}))
