"""Sources -> tokenised examples, held in a few flat arrays, and the counts of what was left out on the way."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.data.columns import Conversation, Document, Example, Question, RowError, convert, detect_layout
from jaxft.data.config import RowsConfig
from jaxft.data.report import ShownExample, SourceReport
from jaxft.data.sources import BadRow, Place, Row, read_rows
from jaxft.data.templates import (
    Rendered,
    Template,
    check_bos,
    render,
    tokenize_documents,
    tokenize_rendered,
)
from jaxft.errors import JaxftError

DETECT_ROWS = 256  # rows looked at to tell a source's layout
CHUNK_ROWS = 512  # rows tokenised at once: the tokenizer works on them in parallel


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, one after another in flat arrays: example i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: np.ndarray  # int32[total]
    trained: np.ndarray  # bool[total]: the token is a target with loss
    offsets: np.ndarray  # int64[num_examples + 1]
    source: np.ndarray  # int32[num_examples]: index into the sources
    file: np.ndarray  # int32[num_examples]: index into files
    line: np.ndarray  # int64[num_examples]
    files: tuple[tuple[str, str], ...]  # name and unit (see Place)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.trained[part]

    def place(self, index: int) -> Place:
        name, unit = self.files[self.file[index]]
        return Place(name, int(self.line[index]), unit)


def parse_rows(source: RowsConfig, report: SourceReport) -> Iterator[tuple[Place, Example]]:
    """The readable rows of a source as examples; rows and malformed ones are counted in `report`.

    Raises:
        JaxftError: there is no row at all, or the columns are of no known layout.
    """
    rows = iter(read_rows(source))
    first = list(itertools.islice(rows, DETECT_ROWS))
    if not first:
        raise JaxftError(f"{source.label}: no rows")
    readable = [row.values for row in first if isinstance(row, Row)]
    layout = None
    for row in itertools.chain(first, rows):
        report.rows += 1
        if isinstance(row, BadRow):
            report.malformed.append(row)
            continue
        if layout is None:
            try:
                layout = detect_layout(readable or [row.values], source.columns)
            except JaxftError as error:
                raise JaxftError(f"{source.label}: {error}") from None
        try:
            yield row.place, convert(row.values, layout, source.columns)
        except RowError as error:
            report.malformed.append(BadRow(row.place, str(error)))


def _windows(length: int, seq_len: int) -> Iterator[slice]:
    """Consecutive windows of at most seq_len tokens. Each starts on the last token of the one before, which is the
    context of the first prediction and not a target again: so every token but the first is a target exactly once."""
    return (slice(at, min(at + seq_len, length)) for at in range(0, length - 1, seq_len - 1))


def _fit(
    tokens: np.ndarray,
    trained: np.ndarray,
    is_document: bool,
    place: Place,
    seq_len: int,
    truncation: str,
    report: SourceReport,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pieces of one example that go into rows, after the truncation policy; what is left out is counted."""
    pieces = [(tokens, trained)]
    if len(tokens) > seq_len:
        report.too_long.append((place, len(tokens)))
        if truncation == "drop":
            report.dropped_too_long += 1
            return []
        report.truncated += 1
        parts = _windows(len(tokens), seq_len) if is_document else [slice(0, seq_len)]
        pieces = [(tokens[part], trained[part]) for part in parts]
    kept = [piece for piece in pieces if piece[1][1:].any()]  # the first token of a sequence is never a target
    report.dropped_untrained += len(pieces) - len(kept)
    return kept


def load_examples(
    sources: Sequence[RowsConfig], template: Template, *, seq_len: int, truncation: str
) -> tuple[Examples, list[SourceReport]]:
    """Reads and tokenises all sources, in order. Whether a count is an error is the caller's to say (`check_sources`).

    Raises:
        JaxftError: a source is missing, empty, of unknown columns, or has messages and the tokenizer no chat template.
    """
    reports = []
    tokens: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    lengths: list[int] = []
    which: list[int] = []
    files: list[int] = []
    lines: list[int] = []
    file_index: dict[tuple[str, str], int] = {}
    for number, source in enumerate(sources):
        report = SourceReport(source.label)
        reports.append(report)
        first = len(lengths)
        for chunk in _batched(parse_rows(source, report), CHUNK_ROWS):
            for place, is_document, ids, mask in _tokenize(chunk, template, source, report):
                for piece_ids, piece_mask in _fit(ids, mask, is_document, place, seq_len, truncation, report):
                    tokens.append(piece_ids)
                    trained.append(piece_mask)
                    lengths.append(len(piece_ids))
                    which.append(number)
                    files.append(file_index.setdefault((place.file, place.unit), len(file_index)))
                    lines.append(place.line)
        report.malformed.sort(key=lambda bad: (bad.place.file, bad.place.line))  # some are found when rendered
        report.examples = len(lengths) - first
        report.lengths = np.array(lengths[first:], np.int64)
        report.tokens = int(report.lengths.sum())
        report.trained_tokens = int(sum(mask[1:].sum() for mask in trained[first:]))
    examples = Examples(
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        trained=np.concatenate([np.zeros(0, bool), *trained]),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        source=np.array(which, np.int32),
        file=np.array(files, np.int32),
        line=np.array(lines, np.int64),
        files=tuple(file_index),
    )
    return examples, reports


def _batched(items: Iterator, size: int) -> Iterator[tuple]:
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def _tokenize(
    chunk: Sequence[tuple[Place, Example]], template: Template, source: RowsConfig, report: SourceReport
) -> Iterator[tuple[Place, bool, np.ndarray, np.ndarray]]:
    """Place, whether it is a document, tokens and mask of each row of a chunk, in order."""
    documents: list[tuple[int, str]] = []
    rendered: list[tuple[int, Rendered]] = []
    for i, (place, example) in enumerate(chunk):
        if _holds_special_tokens(example, template):
            report.control_tokens += 1
            report.control_token_place = report.control_token_place or place
        if isinstance(example, Document):
            documents.append((i, example.text))
            continue
        report.conversations += 1
        if isinstance(example, Question):  # as training text: the question and its right answer
            answer = {"role": "assistant", "content": example.choices[example.answer]}
            example = Conversation(({"role": "user", "content": example.question}, answer))
        check_messages_allowed(example, template, source)
        try:
            rendered.append((i, render(template, example)))
        except RowError as error:
            report.malformed.append(BadRow(place, str(error)))
    done = dict(zip((i for i, _ in documents), tokenize_documents(template, [t for _, t in documents]), strict=True))
    done |= dict(zip((i for i, _ in rendered), tokenize_rendered(template, [r for _, r in rendered]), strict=True))
    for i, (place, example) in enumerate(chunk):
        if i in done:
            ids, mask = done[i]
            try:
                check_bos(template, ids)
            except RowError as error:
                report.malformed.append(BadRow(place, str(error)))
                continue
            yield place, isinstance(example, Document), ids, mask


def _holds_special_tokens(example: Example, template: Template) -> bool:
    if isinstance(example, Document):
        return template.special.search(example.text) is not None
    if isinstance(example, Question):
        return False
    return any(template.special.search(message["content"]) for message in example.messages)


def check_messages_allowed(example: Conversation, template: Template, source: RowsConfig) -> None:
    """Raises JaxftError for messages where the tokenizer has no chat template and the config asks for none."""
    if example.from_messages and template.plain and not template.plain_messages:
        raise JaxftError(
            f"{source.label} holds messages and the tokenizer has no chat template. Set chat_template to a .jinja file,"
            " a template string or plain (contents joined by newlines, answers ended by eos)"
        )


def show_example(examples: Examples, index: int, template: Template) -> ShownExample:
    """An example decoded in runs of tokens that train and that do not."""
    tokens, trained = examples[index]
    trained = trained & (np.arange(len(tokens)) > 0)
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    pieces = tuple(
        (template.tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False), bool(trained[a]))
        for a, b in itertools.pairwise(borders)
    )
    return ShownExample(str(examples.place(index)), len(tokens), pieces)
