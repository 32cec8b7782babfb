"""Which examples share a row of the batch, and how a row is laid out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Packing:
    """Rows of examples in compressed form: row `r` holds `members[offsets[r]:offsets[r + 1]]`."""

    members: np.ndarray  # int64[num_examples]
    offsets: np.ndarray  # int64[num_rows + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        return self.members[self.offsets[index] : self.offsets[index + 1]]


def _compress(rows: list[list[int]]) -> Packing:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Packing(np.array([i for row in rows for i in row], np.int64), offsets)


def one_per_row(count: int) -> Packing:
    return Packing(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack_in_order(lengths: Sequence[int] | np.ndarray, capacity: int) -> Packing:
    """Fills each row with the next examples for as long as they fit (next fit): the order is kept."""
    rows: list[list[int]] = []
    used = capacity + 1
    for i, length in enumerate(map(int, lengths)):
        if used + length > capacity:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += length
    return _compress(rows)


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> Packing:
    """Best-fit decreasing (Johnson 1974): longest example first, each into the fullest row that still has room.

    The rows with room are kept by how much they have, and the amounts present as the bits of one integer, so that the
    tightest fit is a shift and the lowest set bit.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    present = 0
    for i in order.tolist():
        length = int(lengths[i])
        fitting = present >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                present &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > length:
            with_room[room - length].append(row)
            present |= 1 << (room - length)
    return _compress(rows)


def reassign(packing: Packing, lengths: np.ndarray, permutation: np.ndarray) -> Packing:
    """The same rows with examples of equal length exchanged as `permutation` has it: a new company every epoch at no
    new packing. `permutation` int64[num_examples] is a random order of the examples."""
    canonical = np.argsort(-lengths, kind="stable")
    shuffled = permutation[np.argsort(-lengths[permutation], kind="stable")]
    replacement = np.empty_like(canonical)
    replacement[canonical] = shuffled
    return Packing(replacement[packing.members], packing.offsets)


def empty_batch(rows: int, seq_len: int) -> Batch:
    """A batch of padding: `tokens`, `targets`, `segment_ids`, `positions` int32[rows, seq_len], `weights` float32."""
    batch = {name: np.zeros((rows, seq_len), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return batch | {"weights": np.zeros((rows, seq_len), np.float32)}


def fill_row(batch: Batch, row: int, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes examples (tokens int32[n], trained bool[n]) one after another into a row of `batch`, in place.

    Segments count from 1 and positions restart in each. Targets are shifted within a segment, so its last token has no
    target and weight 0. Padding is told by segment 0, never by a token id.
    """
    at = 0
    for segment, (tokens, trained) in enumerate(examples, 1):
        end = at + len(tokens)
        if end > batch["tokens"].shape[1]:
            raise ValueError(f"row of {batch['tokens'].shape[1]} tokens cannot hold {end}")
        batch["tokens"][row, at:end] = tokens
        batch["targets"][row, at : end - 1] = tokens[1:]
        batch["weights"][row, at : end - 1] = trained[1:]
        batch["segment_ids"][row, at:end] = segment
        batch["positions"][row, at:end] = np.arange(len(tokens))
        at = end
