"""What was read and what became of it: counts per source, lengths, packing, every malformed row."""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxft.data.sources import BadRow, Place
from jaxft.errors import JaxftError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tab and newline
SHOWN_ROWS = 10  # malformed rows quoted in an error message; the report has them all


@dataclass
class SourceReport:
    """Counts of one source. rows = malformed + readable; readable rows become examples or are dropped."""

    name: str
    rows: int = 0
    malformed: list[BadRow] = field(default_factory=list)
    too_long: list[tuple[Place, int]] = field(default_factory=list)  # place and length of rows over seq_len
    dropped_too_long: int = 0
    dropped_untrained: int = 0
    truncated: int = 0
    conversations: int = 0  # rows that are a prompt and an answer, or messages; the others are plain text
    control_tokens: int = 0  # rows whose own text holds a special token of the tokenizer
    control_token_place: Place | None = None  # the first of them
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def to_dict(self) -> dict[str, Any]:
        percentiles = {}
        if len(self.lengths):
            names = ("min", "p50", "p90", "p99", "max")
            percentiles = dict(zip(names, map(int, np.percentile(self.lengths, (0, 50, 90, 99, 100))), strict=True))
        return {
            "name": self.name,
            "rows": self.rows,
            "malformed": len(self.malformed),
            "dropped_too_long": self.dropped_too_long,
            "dropped_untrained": self.dropped_untrained,
            "truncated": self.truncated,
            "conversations": self.conversations,
            "control_tokens": self.control_tokens,
            "examples": self.examples,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_percent": round(100 * self.trained_tokens / max(self.tokens, 1), 2),
            "lengths": percentiles,
        }


@dataclass(frozen=True)
class ShownExample:
    """One example decoded: pieces of text in order, each with whether its tokens train."""

    place: str
    tokens: int
    pieces: tuple[tuple[str, bool], ...]

    def to_dict(self) -> dict[str, Any]:
        pieces = [{"text": text, "trained": trained} for text, trained in self.pieces]
        return {"place": self.place, "tokens": self.tokens, "pieces": pieces}


@dataclass
class DataReport:
    """The report of `inspect`, also kept by the batches as `.report`. Printable with rich, and as a dictionary."""

    seq_len: int
    batch_size: int
    sources: list[SourceReport]
    rows_per_epoch: int = 0
    packing_efficiency: float = 0.0  # tokens over row capacity
    steps_per_epoch: int = 0
    largest_token: int = 0
    total_steps: int | None = None  # None: as many as the training asks
    warnings: list[str] = field(default_factory=list)
    shown: list[ShownExample] = field(default_factory=list)

    @property
    def malformed(self) -> list[BadRow]:
        return [bad for source in self.sources for bad in source.malformed]

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def trained_tokens(self) -> int:
        return sum(source.trained_tokens for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON types."""
        return {
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "rows_per_epoch": self.rows_per_epoch,
            "packing_efficiency": round(self.packing_efficiency, 4),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "sources": [source.to_dict() for source in self.sources],
            "warnings": self.warnings,
            "malformed": [{"place": str(bad.place), "reason": bad.reason} for bad in self.malformed],
            "examples": [example.to_dict() for example in self.shown],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colored = console.color_system is not None  # else brackets tell what trains
        for example in self.shown:
            text = Text()
            for piece, trained in example.pieces:
                piece = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", piece)  # data must not drive the terminal
                shown = piece if colored or not trained else f"⟦{piece}⟧"
                text.append(shown, style="bold green" if trained else "dim")
            how = "green" if colored else "those in ⟦⟧"
            yield Panel(text, title=f"{example.place}: {example.tokens} tokens, {how} train", title_align="left")
        table = Table("", *(source.name for source in self.sources))
        counts = [source.to_dict() for source in self.sources]
        for name in counts[0] if counts else ():
            if name not in ("name", "lengths"):
                label = "trained %" if name == "trained_percent" else name.replace("_", " ")
                table.add_row(label, *(f"{count[name]:,}" for count in counts))
        for name in ("min", "p50", "p90", "p99", "max"):
            table.add_row(f"length {name}", *(f"{count['lengths'].get(name, 0):,}" for count in counts))
        yield table
        steps = f"{self.steps_per_epoch:,} batches"
        if self.total_steps != self.steps_per_epoch:  # more than one pass, or no end
            steps = f"{self.steps_per_epoch:,} steps an epoch"
            steps += f", {self.total_steps:,} in all" if self.total_steps is not None else ""
        yield Text(
            f"{self.rows_per_epoch:,} rows of {self.seq_len} tokens, {self.packing_efficiency:.1%} full; "
            f"{self.batch_size} rows a batch: {steps}"
        )
        for warning in self.warnings:
            yield Text(f"warning: {warning}", style="yellow")
        for bad in self.malformed:
            yield Text(f"malformed: {bad}", style="red")


def check_vocabulary(report: DataReport, vocab_size: int) -> None:
    """Raises JaxftError for tokens that the model has no embedding of: looking them up would give NaN in silence."""
    if report.largest_token >= vocab_size:
        raise JaxftError(
            f"the tokenizer made token {report.largest_token} of the data, but the model embeds {vocab_size} "
            f"tokens, 0 to {vocab_size - 1}: the tokenizer is not the one that belongs to this model"
        )


def check_sources(sources: list[SourceReport], *, on_error: str, truncation: str, seq_len: int) -> None:
    """Raises JaxftError for what the policies call an error: malformed rows, rows too long, nothing left to train."""
    malformed = [bad for source in sources for bad in source.malformed]
    if malformed and on_error == "raise":
        files = len({bad.place.file for bad in malformed})
        raise JaxftError(
            f"{len(malformed)} malformed row{'s' * (len(malformed) > 1)} in {files} file{'s' * (files > 1)}:\n"
            + "\n".join(f"  {bad}" for bad in malformed[:SHOWN_ROWS])
            + (f"\n  ... and {len(malformed) - SHOWN_ROWS} more" if len(malformed) > SHOWN_ROWS else "")
            + "\nRepair them, or set on_error: skip to leave them out and count them"
        )
    too_long = [item for source in sources for item in source.too_long]
    if too_long and truncation == "error":
        raise JaxftError(
            f"{len(too_long)} example{'s' * (len(too_long) > 1)} longer than seq_len={seq_len} tokens:\n"
            + "\n".join(f"  {place}: {length} tokens" for place, length in too_long[:SHOWN_ROWS])
            + (f"\n  ... and {len(too_long) - SHOWN_ROWS} more" if len(too_long) > SHOWN_ROWS else "")
            + "\nRaise seq_len, or set truncation: drop or truncate"
        )
    for source in sources:
        if not source.examples:
            raise JaxftError(
                f"{source.name}: no example left to train on: {source.rows} rows read, {len(source.malformed)} "
                f"malformed, {source.dropped_too_long} dropped as longer than seq_len={seq_len}, "
                f"{source.dropped_untrained} dropped because "
                "none of their tokens trains (an answer that truncation cut off, or an empty text)"
            )
