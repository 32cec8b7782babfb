"""Examples -> batches: row `k` of epoch `e` is a function of (seed, e, k), so a position is one integer.

The path of a batch: `load_examples` tokenises the sources, `Order` says which examples stand in which row of which
step, `LocalBatches` lays out this process's rows of one step, and grain reads them ahead in threads or processes.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grain
import numpy as np
from absl import flags

from jaxft.data.config import DataConfig
from jaxft.data.examples import Examples, load_examples, show_example
from jaxft.data.packing import (
    Batch,
    Packing,
    empty_batch,
    fill_row,
    one_per_row,
    pack_best_fit,
    pack_in_order,
    reassign,
)
from jaxft.data.report import DataReport, check_sources
from jaxft.data.templates import Template, resolve_template
from jaxft.errors import JaxftError

if TYPE_CHECKING:  # a second to import
    from transformers import PreTrainedTokenizerBase

ENDLESS = 2**48  # steps of a run without a number of epochs
STATE_VERSION = 1


# ---- order -----------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Examples that are packed and shuffled together: all of them, or those of one weighted source."""

    members: np.ndarray  # int64[n]: indices of the examples
    lengths: np.ndarray  # int64[n]
    packing: Packing  # of 0..n-1; its number of rows is that of every epoch
    packed: bool
    shuffle: bool
    key: tuple[int, int]  # seed and number of the group
    _epochs: dict[int, tuple[Packing, np.ndarray]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.packing)

    def row(self, epoch: int, index: int) -> np.ndarray:
        """Indices of the examples in row `index` of an epoch. Each epoch has every example exactly once."""
        if not self.shuffle:
            return self.members[self.packing.row(index)]
        drawn = self._epochs.get(epoch)
        if drawn is None:
            drawn = self._draw(epoch)
            # Readers are threads: the dictionary is replaced, never changed. Two epochs, for the border between them.
            kept = sorted(self._epochs.items(), key=lambda item: item[0])[-1:]
            self._epochs = dict([*kept, (epoch, drawn)])
        packing, order = drawn
        return self.members[packing.row(order[index])]

    def _draw(self, epoch: int) -> tuple[Packing, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self.key, epoch])))
        order = rng.permutation(len(self.packing))
        if not self.packed:
            return self.packing, order
        return reassign(self.packing, self.lengths, rng.permutation(len(self.lengths))), order


def _group(examples: Examples, members: np.ndarray, number: int, config: DataConfig, seed: int) -> Group:
    lengths = examples.lengths[members]
    if not config.packing:
        packing = one_per_row(len(members))
    elif config.shuffle:
        packing = pack_best_fit(lengths, config.seq_len)
    else:
        packing = pack_in_order(lengths, config.seq_len)
    return Group(members, lengths, packing, config.packing, config.shuffle, (seed, number))


@dataclass(frozen=True)
class Order:
    """Which examples stand in which row of which step, for all processes and all time."""

    groups: tuple[Group, ...]
    mixture: grain.MapDataset | None  # row number -> (group, row number within the group); None: one group
    batch_size: int
    epochs: int | None

    @property
    def rows_per_epoch(self) -> int:
        return sum(map(len, self.groups))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.batch_size)

    @property
    def total_steps(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.steps_per_epoch

    def row(self, step: int, index: int) -> np.ndarray:
        """Indices of the examples in row `index` of the global batch of `step`; empty past the end of an epoch."""
        epoch, step = divmod(step, self.steps_per_epoch)
        index += step * self.batch_size
        if index >= self.rows_per_epoch:
            return np.zeros(0, np.int64)
        if self.mixture is None:
            return self.groups[0].row(epoch, index)
        number, index = self.mixture[epoch * self.rows_per_epoch + index]
        group = self.groups[number]
        return group.row(*divmod(index, len(group)))


def _order(examples: Examples, config: DataConfig, seed: int) -> Order:
    if len(config.sources) == 1 or config.sources[0].weight is None:
        whole = _group(examples, np.arange(len(examples)), 0, config, seed)
        return Order((whole,), None, config.batch_size, config.epochs)
    members = [np.flatnonzero(examples.source == number) for number in range(len(config.sources))]
    groups = tuple(_group(examples, ids, number, config, seed) for number, ids in enumerate(members))
    endless = [_numbered(number) for number in range(len(groups))]
    mixture = grain.MapDataset.mix(endless, [float(source.weight or 1) for source in config.sources])
    return Order(groups, mixture, config.batch_size, config.epochs)


def _numbered(group: int) -> grain.MapDataset:
    return grain.MapDataset.range(ENDLESS).map(_Pair(group))


@dataclass(frozen=True)
class _Pair:
    group: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.group, index


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalBatches:
    """Step -> this process's rows of its global batch."""

    examples: Examples
    order: Order
    seq_len: int
    first_row: int
    num_rows: int

    def __call__(self, step: int) -> Batch:
        batch = empty_batch(self.num_rows, self.seq_len)
        for row in range(self.num_rows):
            members = self.order.row(step, self.first_row + row)
            fill_row(batch, row, [self.examples[i] for i in members])
        return batch


class TrainBatches:
    """Iterator over the process-local rows of the training batches, with a state that is one position.

    Attributes:
        steps_per_epoch: batches of an epoch, the last one filled up with rows of weight 0; the same on every process.
        total_steps: steps_per_epoch * epochs, or None where the config gives no epochs and the iterator has no end.
        report: what was read, dropped and packed.
    """

    def __init__(self, batches: LocalBatches, num_workers: int, digest: str, report: DataReport):
        self.steps_per_epoch = batches.order.steps_per_epoch
        self.total_steps = batches.order.total_steps
        self.report = report
        self._batches = batches
        self._num_workers = num_workers
        self._digest = digest
        self._step = 0
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._reader(self._step))
        batch = next(self._iterator)
        self._step += 1
        return batch

    def _reader(self, start: int) -> grain.IterDataset:
        stop = ENDLESS if self.total_steps is None else self.total_steps
        steps = grain.MapDataset.range(min(start, stop), stop).map(self._batches)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # grain's processes read absl flags, which only absl programs parse
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2)
            return steps.to_iter_dataset(options).mp_prefetch(workers)
        return steps.to_iter_dataset(options)

    def get_state(self) -> bytes:
        """The position, as JSON. The same on every process, for any number of processes and workers."""
        return json.dumps({"version": STATE_VERSION, "step": self._step, "data": self._digest}).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to a position saved by `get_state`; the cost does not depend on how far it is.

        Raises:
            JaxftError: the state is no position, or one in other data (other rows, order, seed or batch shape).
        """
        try:
            saved = json.loads(state)
            version, step, digest = saved["version"], int(saved["step"]), saved["data"]
        except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
            raise JaxftError(f"data state {state[:60]!r} is not one that get_state wrote") from error
        if version != STATE_VERSION or step < 0:
            raise JaxftError(f"data state of version {version}, step {step}; expected version {STATE_VERSION}")
        if digest != self._digest:
            raise JaxftError(
                f"the data is not what it was when this state was saved at step {step}: rows, tokenizer, seed, "
                "seq_len, batch_size, packing, shuffle or weights differ. Restore them to resume, or start a new run"
            )
        self.close()
        self._step = step

    def close(self) -> None:
        """Ends reading ahead. Iterating again goes on from the same position."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _digest(examples: Examples, config: DataConfig, seed: int) -> str:
    """Names everything that the order of the batches depends on."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (examples.tokens, examples.trained, examples.offsets, examples.source):
        digest.update(np.ascontiguousarray(array).data)
    settings = [seed, config.seq_len, config.batch_size, config.packing, config.shuffle]
    digest.update(json.dumps([*settings, [source.weight for source in config.sources]]).encode())
    return digest.hexdigest()


def local_rows(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    if not 0 <= process_index < process_count:
        raise JaxftError(f"process_index={process_index} is not one of {process_count} processes")
    if batch_size % process_count:
        raise JaxftError(
            f"batch_size={batch_size} rows cannot be split over {process_count} processes; "
            f"the nearest that can: {max(batch_size // process_count, 1) * process_count}"
        )
    rows = batch_size // process_count
    return process_index * rows, rows


def _warnings(examples: Examples, template: Template, report: DataReport) -> list[str]:
    found = []
    for source in report.sources:
        if source.malformed:
            found.append(f"{source.name}: {len(source.malformed)} of {source.rows} rows are malformed")
        if source.dropped_untrained:
            found.append(f"{source.name}: {source.dropped_untrained} examples dropped, none of their tokens trains")
        if source.dropped_too_long:
            found.append(f"{source.name}: {source.dropped_too_long} rows dropped, longer than seq_len={report.seq_len}")
        if source.control_tokens:
            found.append(
                f"{source.name}: {source.control_tokens} row{'s' * (source.control_tokens > 1)} with special tokens in "
                f"the text, which are read as such; the first: {source.control_token_place}"
            )
    if not template.plain and template.loss_on != "all" and len(examples):
        tokenizer = template.tokenizer
        short = np.flatnonzero(examples.lengths < report.seq_len)  # certainly not truncated
        ends = {int(tokens[mask][-1]) for tokens, mask in (examples[i] for i in short[:64]) if not mask.all()}
        for end in sorted(ends - {tokenizer.eos_token_id}):
            name = tokenizer.convert_ids_to_tokens(end)
            if end in tokenizer.added_tokens_decoder:
                found.append(f"answers end with {name!r}, eos is {tokenizer.eos_token!r}: generation must stop at both")
            else:
                found.append(f"answers end with the ordinary token {name!r}: the model will not learn where to stop")
    return found


def _prepare(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", seed: int, *, strict: bool
) -> tuple[Examples, Order, Template, DataReport]:
    template = resolve_template(config, tokenizer)
    examples, sources = load_examples(config.sources, template, seq_len=config.seq_len, truncation=config.truncation)
    if strict:
        check_sources(sources, on_error=config.on_error, truncation=config.truncation, seq_len=config.seq_len)
    order = _order(examples, config, seed)
    rows = order.rows_per_epoch
    report = DataReport(
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        sources=sources,
        rows_per_epoch=rows,
        packing_efficiency=len(examples.tokens) / max(rows * config.seq_len, 1),
        steps_per_epoch=order.steps_per_epoch,
        total_steps=order.total_steps,
        largest_token=int(examples.tokens.max(initial=0)),
    )
    report.warnings = _warnings(examples, template, report)
    if rows < config.batch_size:
        message = (
            f"{len(examples)} examples of {len(examples.tokens)} tokens fill {rows} rows of {config.seq_len}: less "
            f"than one batch of {config.batch_size} rows. Lower batch_size or seq_len, or give more data"
        )
        if strict:
            raise JaxftError(message)
        report.warnings.append(message)
    return examples, order, template, report


def train_batches(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Batches of training rows: dictionaries of `tokens`, `targets`, `segment_ids`, `positions` int32[rows, seq_len]
    and `weights` float32[rows, seq_len], where rows = batch_size / process_count.

    The global batch of a step depends on the data, the config and the seed only; process p gets rows
    [p * rows, (p + 1) * rows) of it.

    Raises:
        JaxftError: sources, rows or settings that cannot be used; see `jaxft.data.inspect` for all of them at once.
    """
    first_row, rows = local_rows(config.batch_size, process_index, process_count)
    examples, order, _, report = _prepare(config, tokenizer, seed, strict=True)
    batches = LocalBatches(examples, order, config.seq_len, first_row, rows)
    return TrainBatches(batches, config.num_workers, _digest(examples, config, seed), report)


def inspect(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", num_examples: int = 3, *, seed: int = 0
) -> DataReport:
    """Reads everything and reports it; malformed and overlong rows are listed, not raised.

    Raises:
        JaxftError: a source is missing, empty or of unknown columns, or the chat template is not valid.
    """
    examples, order, template, report = _prepare(config, tokenizer, seed, strict=False)
    shown: list[int] = []
    for row in range(order.rows_per_epoch):
        if len(shown) >= num_examples:
            break
        shown += order.row(row // order.batch_size, row % order.batch_size).tolist()
    report.shown = [show_example(examples, index, template) for index in shown[:num_examples]]
    return report
