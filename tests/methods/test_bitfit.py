"""BitFit: biases, and nothing else."""

import jax
import numpy as np
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, bitfit, chain, count_trainable, lora
from jaxft.models import LanguageModel
from jaxft.partition import combine, weights_by_path
from jaxft.weights import Split
from tests.methods.tiny import CONFIG, params

KEY = jax.random.key(0)


def trained(method, tree) -> list[str]:
    return list(weights_by_path(method.init(KEY, tree, Probe()).trainable))


def test_only_biases_train():
    names = trained(bitfit(), params())
    assert len(names) == 7 and all(n.endswith(".bias") for n in names)
    assert count_trainable(bitfit().init(KEY, params(), Probe())) == 4 * (32 + 16 + 16 + 32 + 48 + 48 + 32)


def test_biases_that_are_there_keep_their_values_and_others_start_at_zero():
    tree = LanguageModel(CONFIG.replace(qkv_bias=True)).init(KEY)
    tree = jax.tree.map(lambda w: w + 0.5, tree)
    weights = weights_by_path(combine(bitfit().init(KEY, tree, Probe())))
    np.testing.assert_array_equal(weights["layers.attn.q.bias"], tree["layers"]["attn"]["q"]["bias"])
    assert not weights["layers.attn.o.bias"].any()
    assert trained(bitfit(missing="skip"), tree) == [f"layers.attn.{m}.bias" for m in "kqv"]


def test_a_range_limits_it_to_those_layers():
    tuned = bitfit(on="layers[1:3].attn.q").init(KEY, params(), Probe())
    bias = combine(tuned)["layers"]["attn"]["q"]["bias"]
    assert isinstance(bias, Split) and bias.is_trainable.tolist() == [False, True, True, False]
    assert count_trainable(tuned) == 2 * 32


def test_no_bias_to_train_is_an_error():
    with pytest.raises(JaxftError, match=r"layers.attn.q.bias.* matches no weight"):
        bitfit(on="attn.q", missing="skip").init(KEY, params(), Probe())


def test_in_a_chain_it_leaves_the_matrices_to_others():
    tuned = chain(bitfit(), lora(rank=2)).init(KEY, params(), Probe())
    assert sum(n.endswith(".kernel") for n in weights_by_path(tuned.trainable)) == 7
    assert count_trainable(tuned) > count_trainable(bitfit().init(KEY, params(), Probe()))
