"""Evaluation sets -> a finite list of batches, the last one filled up with rows of weight 0."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from jaxft.data.columns import Conversation, Question, RowError
from jaxft.data.config import EvaluationSetConfig, FormatConfig
from jaxft.data.examples import load_examples, parse_rows
from jaxft.data.packing import Batch, empty_batch, fill_row, one_per_row, pack_in_order
from jaxft.data.pipeline import local_rows
from jaxft.data.report import DataReport, SourceReport, check_sources
from jaxft.data.sources import BadRow
from jaxft.data.templates import Template, check_bos, render, resolve_template, tokenize_rendered
from jaxft.errors import JaxftError

if TYPE_CHECKING:  # a second to import
    from transformers import PreTrainedTokenizerBase

DRAW_SEED = 0  # which examples max_examples takes must not change from run to run


class EvaluationBatches(list[Batch]):
    """The batches, and the `report` of what was read."""

    def __init__(self, batches: Iterable[Batch], report: DataReport):
        super().__init__(batches)
        self.report = report


def evaluation_batches(
    config: EvaluationSetConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    batch_size: int,
    data: FormatConfig | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> EvaluationBatches:
    """The process-local rows of all batches of an evaluation set, in file order.

    Keys and shapes as in `train_batches`, and the same number of batches on every process. A sum over batches of
    weights * loss does not depend on batch_size or process_count. With `task: multiple_choice` every row is one choice
    after its question, weights are 1 on the tokens of the choice, and there are three more keys, int32[rows]:
    `question` (-1 for filling), `choice`, `correct` (the right choice of the row's question).

    Args:
        data: the format options that hold where the set has none of its own (`data` section of the run).

    Raises:
        JaxftError: as `train_batches`.
    """
    first_row, rows = local_rows(batch_size, process_index, process_count)
    text_format = config.text_format(data or FormatConfig())
    if config.task == "multiple_choice":
        # Choices are compared by what they say, not by how likely the model is to end there.
        template = resolve_template(text_format.model_copy(update={"loss_on": "last"}), tokenizer)
        return _multiple_choice(config, template, text_format, seq_len, batch_size, first_row, rows)
    template = resolve_template(text_format, tokenizer)
    examples, sources = load_examples([config], template, seq_len=seq_len, truncation=text_format.truncation)
    check_sources(sources, on_error=text_format.on_error, truncation=text_format.truncation, seq_len=seq_len)
    members = _draw(len(examples), config.max_examples)
    lengths = examples.lengths[members]
    packing = pack_in_order(lengths, seq_len) if config.packing else one_per_row(len(members))
    steps = -(-len(packing) // batch_size)
    batches = []
    for step in range(steps):
        batch = empty_batch(rows, seq_len)
        for row in range(rows):
            index = step * batch_size + first_row + row
            if index < len(packing):
                fill_row(batch, row, [examples[members[i]] for i in packing.row(index)])
        batches.append(batch)
    efficiency = int(lengths.sum()) / (len(packing) * seq_len)
    return EvaluationBatches(batches, _report(seq_len, batch_size, sources, len(packing), efficiency, batches))


def _draw(count: int, wanted: int | None) -> np.ndarray:
    """Indices in order of `wanted` out of `count` examples, the same in every run."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.sort(np.random.Generator(np.random.Philox(DRAW_SEED)).permutation(count)[:wanted])


def _multiple_choice(
    config: EvaluationSetConfig,
    template: Template,
    text_format: FormatConfig,
    seq_len: int,
    batch_size: int,
    first_row: int,
    rows: int,
) -> EvaluationBatches:
    report = SourceReport(config.label)
    questions: list[tuple[Question, list[tuple[np.ndarray, np.ndarray]]]] = []
    for place, example in parse_rows(config, report):
        if not isinstance(example, Question):
            raise JaxftError(f"{config.label}: task: multiple_choice needs columns question, choices and answer")
        try:
            choices = [_choice(example.question, choice, template) for choice in example.choices]
        except RowError as error:
            report.malformed.append(BadRow(place, str(error)))
            continue
        longest = max(len(tokens) for tokens, _ in choices)
        if longest > seq_len:
            report.too_long.append((place, longest))
            if text_format.truncation == "drop":
                report.dropped_too_long += 1
                continue
            report.truncated += 1
        # The choice is at the end: what does not fit is cut from the start of the question.
        questions.append((example, [(tokens[-seq_len:], mask[-seq_len:]) for tokens, mask in choices]))
    report.examples = len(questions)
    check_sources([report], on_error=text_format.on_error, truncation=text_format.truncation, seq_len=seq_len)
    questions = [questions[i] for i in _draw(len(questions), config.max_examples)]
    flat = [
        (q, c, question.answer, choice)
        for q, (question, choices) in enumerate(questions)
        for c, choice in enumerate(choices)
    ]
    report.lengths = np.array([len(tokens) for *_, (tokens, _) in flat], np.int64)
    report.tokens = int(report.lengths.sum())
    report.trained_tokens = int(sum(mask[1:].sum() for *_, (_, mask) in flat))
    steps = -(-len(flat) // batch_size)
    batches = []
    for step in range(steps):
        batch = empty_batch(rows, seq_len)
        batch |= {"question": np.full(rows, -1, np.int32)} | {
            n: np.zeros(rows, np.int32) for n in ("choice", "correct")
        }
        for row in range(rows):
            index = step * batch_size + first_row + row
            if index < len(flat):
                question, choice, correct, piece = flat[index]
                fill_row(batch, row, [piece])
                batch["question"][row], batch["choice"][row], batch["correct"][row] = question, choice, correct
        batches.append(batch)
    efficiency = report.tokens / (len(flat) * seq_len)
    return EvaluationBatches(batches, _report(seq_len, batch_size, [report], len(flat), efficiency, batches))


def _report(
    seq_len: int, batch_size: int, sources: list[SourceReport], rows: int, efficiency: float, batches: list[Batch]
) -> DataReport:
    largest = max((int(batch["tokens"].max()) for batch in batches), default=0)
    steps = len(batches)
    return DataReport(seq_len, batch_size, sources, rows, efficiency, steps, total_steps=steps, largest_token=largest)


def _choice(question: str, choice: str, template: Template) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of a choice after its question, without the end-of-turn token."""
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": choice})
    [(tokens, mask)] = tokenize_rendered(template, [render(template, Conversation(messages))])
    check_bos(template, tokens)
    ends = np.isin(tokens, list(template.tokenizer.added_tokens_decoder))
    return tokens, mask & ~ends
