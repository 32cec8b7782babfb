"""What was selected: counts by layer and weight, for every selecting method, and the picture of them."""

import functools
import math

import jax
import numpy as np
import pytest

from jaxft.methods import Probe, chain, count_trainable, full, get_method, hft, lora, select, skip_tuning
from jaxft.partition import DECODER_ROLES
from jaxft.picture import draw_selection
from jaxft.selected import selected
from tests.methods.tiny import LOSS, batches, params

KEY = jax.random.key(0)
PROBE = Probe(
    loss_fn=LOSS, batches=lambda: iter(batches()), trainer=lambda p, m, s: jax.tree.map(lambda w: w + w**2, p)
)


@functools.cache
def found(name: str):
    entry = get_method(name)
    tuned = entry.build(**entry.example).init(KEY, params(), PROBE)
    return tuned, selected(tuned, DECODER_ROLES)


def total(record) -> float:
    inside = (record.shares * np.array(record.sizes)).sum()
    return inside + sum(share * size for share, size in record.others.values())


PLAIN = (
    "hft",
    "lisa",
    "badam",
    "skip-tuning",
    "paca",
    "s2ft",
    "apet",
    "sara",
    "lt-sft",
    "lift-principal-weights",
    "smt",
)


@pytest.mark.parametrize("name", [*PLAIN, "progressive-freezing", "gmt", "shira", "spiel"])
def test_the_shares_add_up_to_what_trains(name):
    tuned, record = found(name)
    assert record.columns[:7] == tuple([f"attn.{m}" for m in "qkvo"] + ["mlp.gate", "mlp.up", "mlp.down"])
    assert math.isclose(total(record), count_trainable(tuned), rel_tol=1e-9)
    assert record.shares.shape == (4, len(record.columns)) and (record.shares <= 1).all()
    assert record.is_partial == (name != "gmt")


def test_the_layers_are_those_that_train():
    record = selected(skip_tuning(skip=3).init(KEY, params(), PROBE), DECODER_ROLES)
    np.testing.assert_array_equal(record.shares, np.repeat([[0.0], [0], [0], [1]], len(record.columns), 1))
    assert record.others["head.kernel"][0] == 1 and record.others["embed.embedding"][0] == 0
    rows = selected(select("magnitude", "row", 8, on="layers[1:2].mlp.up").init(KEY, params(), PROBE), DECODER_ROLES)
    assert rows.shares[1, rows.columns.index("mlp.up")] == 0.25 and rows.shares.sum() == 0.25
    assert rows.record()["category_shares"]["mlp"] == [0, pytest.approx(0.25 / 3, abs=1e-6), 0, 0]


def test_full_tuning_and_low_rank_updates_select_nothing_but_a_chain_may():
    for method in (full(), lora(rank=2)):
        assert not selected(method.init(KEY, params(), PROBE), DECODER_ROLES).is_partial
    both = selected(chain(lora(rank=2, on="@attention"), hft()).init(KEY, params(), PROBE), DECODER_ROLES)
    assert both.is_partial and not both.shares[:, :4].any() and both.shares[:, 4:7].sum() == 6


def test_the_picture_is_a_png():
    made = draw_selection(found("hft")[1].record(), "hft on a tiny model")
    assert made.startswith(b"\x89PNG") and len(made) > 5000
