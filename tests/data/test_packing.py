"""Packing loses nothing, exceeds nothing, and lays rows out as the batch contract says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.packing import empty_batch, fill_row, one_per_row, pack_best_fit, pack_in_order, reassign

CAPACITY = 12
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(LENGTHS)
def test_every_example_once_and_no_row_over_the_limit(lengths):
    for packing in (pack_best_fit(lengths, CAPACITY), pack_in_order(lengths, CAPACITY)):
        assert sorted(packing.members.tolist()) == list(range(len(lengths)))
        rows = [packing.row(i).tolist() for i in range(len(packing))]
        assert all(rows) and all(sum(lengths[i] for i in row) <= CAPACITY for row in rows)


@settings(max_examples=100, deadline=None)
@given(LENGTHS)
def test_in_order_keeps_the_order_and_best_fit_wastes_less_than_half(lengths):
    assert pack_in_order(lengths, CAPACITY).members.tolist() == list(range(len(lengths)))
    # Any two rows together hold more than one row's capacity, or the second would have gone into the first.
    assert len(pack_best_fit(lengths, CAPACITY)) <= 2 * -(-sum(lengths) // CAPACITY)


def test_best_fit_takes_the_tightest_row():
    rows = [pack_best_fit([7, 6, 5, 4, 2], 11).row(i).tolist() for i in range(3)]
    assert sorted(map(sorted, rows[:2])) == [[0, 3], [1, 2]] and rows[2] == [4]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.randoms(use_true_random=False))
def test_reassigned_rows_have_the_same_lengths_and_every_example_once(lengths, random):
    packing = pack_best_fit(lengths, CAPACITY)
    permutation = list(range(len(lengths)))
    random.shuffle(permutation)
    lengths = np.array(lengths)
    other = reassign(packing, lengths, np.array(permutation))
    assert sorted(other.members.tolist()) == list(range(len(lengths)))
    np.testing.assert_array_equal(lengths[other.members], lengths[packing.members])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=12))
def test_layout_of_rows(examples):
    """Read back from the batch alone, every example is as it was; 0 and 9 stand for pad and eos ids."""
    examples = [
        (np.array([t for t, _ in pairs], np.int32), np.array([m for _, m in pairs], bool)) for pairs in examples
    ]
    packing = pack_best_fit([len(tokens) for tokens, _ in examples], CAPACITY)
    batch = empty_batch(len(packing), CAPACITY)
    for row in range(len(packing)):
        fill_row(batch, row, [examples[i] for i in packing.row(row)])
    for row in range(len(packing)):
        for segment, i in enumerate(packing.row(row), 1):
            tokens, trained = examples[i]
            where = np.flatnonzero(batch["segment_ids"][row] == segment)
            assert where.tolist() == list(range(where[0], where[0] + len(tokens)))
            np.testing.assert_array_equal(batch["tokens"][row, where], tokens)
            np.testing.assert_array_equal(batch["positions"][row, where], np.arange(len(tokens)))
            np.testing.assert_array_equal(batch["targets"][row, where[:-1]], tokens[1:])
            np.testing.assert_array_equal(batch["weights"][row, where[:-1]], trained[1:].astype(np.float32))
            assert batch["weights"][row, where[-1]] == 0
        padding = batch["segment_ids"][row] == 0
        assert all(not batch[name][row, padding].any() for name in batch)
        assert np.all(np.diff(np.flatnonzero(~padding)) == 1)


def test_types_and_the_unpacked_layout():
    batch = empty_batch(2, 4)
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "weights": "float32",
    }
    assert [one_per_row(3).row(i).tolist() for i in range(3)] == [[0], [1], [2]]


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cannot hold 5"):
        fill_row(empty_batch(1, 4), 0, [(np.arange(5), np.ones(5, bool))])
