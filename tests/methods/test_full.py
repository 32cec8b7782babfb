"""Full tuning, and any fixed selection of weights and layers."""

import jax
import numpy as np
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, chain, count_trainable, full, lora
from jaxft.partition import combine, weights_by_path
from jaxft.weights import Split, materialize
from tests.methods.tiny import params

KEY = jax.random.key(0)


def test_everything_trains_and_nothing_is_rewritten():
    tuned = full().init(KEY, params(), Probe())
    assert not jax.tree.leaves(tuned.frozen)
    for a, b in zip(jax.tree.leaves(combine(tuned)), jax.tree.leaves(params()), strict=True):
        assert a is b


def test_a_range_of_layers_trains_as_a_split():
    tuned = full(on="layers[-2:].mlp|final_norm").init(KEY, params(), Probe())
    assert count_trainable(tuned) == 2 * 3 * 32 * 48 + 32
    weights = weights_by_path(combine(tuned))
    assert isinstance(weights["layers.mlp.up.kernel"], Split)
    assert weights["layers.mlp.up.kernel"].is_trainable.tolist() == [False, False, True, True]
    np.testing.assert_array_equal(
        materialize(weights["layers.mlp.up.kernel"]), params()["layers"]["mlp"]["up"]["kernel"]
    )


def test_a_chain_gives_each_method_what_is_left():
    method = chain(full(on="layers[:2].mlp.up"), lora(rank=2, on="layers[2:].attn"))
    tuned = method.init(KEY, params(), Probe())
    assert count_trainable(tuned) == 2 * 32 * 48 + 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16))
    with pytest.raises(JaxftError, match="already taken by an earlier method"):
        chain(full(on="embed"), full(on="embed")).init(KEY, params(), Probe())
    rest = chain(full(on="embed"), full()).init(KEY, params(), Probe())
    assert not jax.tree.leaves(rest.frozen)
