"""bf16 frozen weights and activations under fp32 masters, for every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.methods import get_method, methods
from jaxft.partition import combine
from jaxft.training.loss import language_model_loss
from jaxft.training.precision import Precision, cast_tuned
from tests.methods.tiny import KINDS, MIXTURE, MODEL, OF_EXPERTS, batches, mixture_trial, params, trial
from tests.methods.tiny import LOSS as EXACT
from tests.weights.test_law import equations

LOSS = language_model_loss(MODEL, compute_dtype=jnp.bfloat16, remat="none", chunks=1)
ROWS = len(batches()[0]["tokens"])


def cut(name):
    entry = get_method(name)
    method = entry.build(**entry.example)
    tried = (mixture_trial if name in OF_EXPERTS else trial)(method)
    tuned = method.init(jax.random.key(0), tried.params, tried.probe)
    return cast_tuned(tuned, Precision("float32", "bfloat16", "bfloat16"))


@pytest.mark.parametrize("name", KINDS)
def test_bf16_frozen_and_fp32_trainable(name):
    tuned = cut(name)
    assert {w.dtype for w in jax.tree.leaves(tuned.trainable)} == {jnp.dtype("float32")}

    def loss(trainable):
        total, weight, _ = LOSS(combine(tuned._replace(trainable=trainable)), batches()[0], jax.random.key(0))
        return total / weight

    value, gradients = jax.jit(jax.value_and_grad(loss))(tuned.trainable)
    exact, weight, _ = jax.jit(EXACT)(combine(tuned), batches()[0], jax.random.key(0))
    np.testing.assert_allclose(value, exact / weight, rtol=0.02)
    for g in jax.tree.leaves(gradients):
        assert g.dtype == jnp.float32 and np.isfinite(g).all()


def wide(tree, model=MODEL) -> set[str]:
    """Primitives whose results have the shape of activations and are float32."""
    hidden = jax.make_jaxpr(lambda t: model.hidden(t, batches()[0]["tokens"], dtype=jnp.bfloat16, remat="none"))(tree)
    return {
        e.primitive.name
        for e, _ in equations(hidden.jaxpr)
        for v in e.outvars
        if v.aval.shape[:1] == (ROWS,) and v.aval.shape[-1:] in ((32,), (48,)) and v.aval.dtype == jnp.float32
    }


@pytest.mark.parametrize("name", methods())
def test_fp32_masters_do_not_widen_bf16_activations(name):
    model = MIXTURE if name in OF_EXPERTS else MODEL
    base = wide(params(model=model), model)  # of any model: rows of a float32 embedding as they are read, and norms
    assert base and "dot_general" not in base
    more = wide(combine(cut(name)), model) - base
    assert not more, f"{name} makes float32 activations: {more}"
