"""SSF: the count of what trains, and a merge that reproduces the tuned forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, count_trainable, merge, ssf, unmerged_sites
from jaxft.models import LanguageModel
from jaxft.partition import combine
from tests.methods.tiny import CONFIG, MODEL, batches, params

KEY = jax.random.key(0)
CHANNELS = 32 + 16 + 16 + 32 + 48 + 48 + 32 + 2 * 32


def noised(tuned):
    leaves, treedef = jax.tree.flatten(tuned.trainable)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [w + 0.2 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
    return tuned._replace(trainable=treedef.unflatten(moved))


def hidden(model, tree):
    return jax.jit(model.hidden)(tree, batches()[0]["tokens"])


def test_two_numbers_a_channel_train():
    assert count_trainable(ssf().init(KEY, params(), Probe())) == 4 * 2 * CHANNELS
    assert count_trainable(ssf(shift=False).init(KEY, params(), Probe())) == 4 * CHANNELS


@pytest.mark.parametrize("biased", [False, True])
def test_merged_weights_compute_the_tuned_forward_pass(biased):
    model = LanguageModel(CONFIG.replace(qkv_bias=biased, mlp_bias=biased))
    tree = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape), model.init(KEY))
    tuned = noised(ssf().init(KEY, tree, Probe()))
    merged = merge(tuned)
    assert unmerged_sites(merged) == [] and unmerged_sites(combine(tuned))
    assert all(isinstance(w, jax.Array) for w in jax.tree.leaves(merged))
    want = hidden(model, combine(tuned))
    assert np.abs(want - hidden(model, tree)).max() > 0.1
    np.testing.assert_allclose(hidden(model, merged), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_what_no_weight_can_hold_stays_at_its_site(shift):
    tuned = noised(ssf(on="final_norm|attn.o", shift=shift).init(KEY, params(), Probe()))
    merged = merge(tuned)
    assert unmerged_sites(merged) == ["final_norm"]
    np.testing.assert_allclose(hidden(MODEL, merged), hidden(MODEL, combine(tuned)), rtol=1e-4, atol=1e-5)


def test_some_layers_only_is_refused():
    with pytest.raises(JaxftError, match="some layers only"):
        ssf(on="layers[1:].attn.q").init(KEY, params(), Probe())


def test_activations_keep_their_dtype():
    tuned = ssf().init(KEY, params("bfloat16"), Probe())
    out = jax.eval_shape(lambda p: MODEL.hidden(p, batches()[0]["tokens"], dtype=jnp.bfloat16), combine(tuned))
    assert out.dtype == jnp.bfloat16
