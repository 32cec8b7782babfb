"""Probe: losses, gradients and activations, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, hft, lora
from jaxft.partition import combine, weights_by_path
from jaxft.weights import materialize
from tests.methods.tiny import LOSS, batches, params, trial

PROBE = Probe(loss_fn=LOSS, batches=lambda: iter(batches()))
KEY = jax.random.key(0)


def mean_loss(tree, batch):
    total, weight, _ = LOSS(tree, batch, KEY)
    return total / weight


def test_loss_is_the_mean_over_batches():
    want = np.mean([mean_loss(params(), b) for b in batches()[:2]])
    np.testing.assert_allclose(PROBE.loss(params(), 2), want, rtol=1e-6)


def test_gradients_are_those_of_jax():
    each = [jax.grad(mean_loss)(params(), b) for b in batches()[:2]]
    for transform in (lambda g: g, jnp.square):
        got = PROBE.gradients(params(), 2, transform)
        for g, *parts in zip(*map(jax.tree.leaves, (got, *each)), strict=True):
            want = sum(map(transform, parts)) / 2
            np.testing.assert_allclose(g, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


def test_gradients_reach_what_a_method_froze():
    tuned = hft().init(KEY, params(), Probe())
    got, want = PROBE.gradients(combine(tuned)), PROBE.gradients(params())
    for path, g in weights_by_path(got).items():
        w = weights_by_path(want)[path]
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-5 * np.abs(w).max())


def test_activations_are_the_inputs_of_the_matrices():
    """Of a model small enough to write out: two layers of tanh(x @ w), and a head."""

    def forward(tree, x):
        from jaxft.weights import linear, scan_layers

        x, _ = scan_layers(lambda x, layer, _: (jnp.tanh(linear(x, layer["w"]["kernel"])), None), tree["layers"], x)
        return x, linear(x, tree["head"]["kernel"])

    def loss(tree, batch, rng):
        _, y = forward(tree, batch["tokens"])
        return jnp.sum(y**2), jnp.asarray(7.0), {}

    keys = jax.random.split(KEY, 4)
    tree = {
        "layers": {"w": {"kernel": jax.random.normal(keys[0], (2, 6, 6))}},
        "head": {"kernel": jax.random.normal(keys[1], (6, 3))},
    }
    xs = [jax.random.normal(k, (5, 6)) for k in keys[2:]]
    probe = Probe(loss_fn=loss, batches=lambda: iter([{"tokens": x} for x in xs]))

    got = probe.activations(tree, 2, on="layers.w|head")
    x = jnp.concatenate(xs)
    inputs = [x, jnp.tanh(x @ tree["layers"]["w"]["kernel"][0])]
    inputs.append(jnp.tanh(inputs[1] @ tree["layers"]["w"]["kernel"][1]))
    rms = [
        jnp.sqrt(jnp.sum(i**2, axis=0) / x.size) for i in inputs
    ]  # `tokens` has features here: the probe counts them
    np.testing.assert_allclose(got["layers.w.kernel"], jnp.stack(rms[:2]), rtol=1e-5)
    np.testing.assert_allclose(got["head.kernel"], rms[2], rtol=1e-5)


def test_activations_of_a_decoder():
    from tests.methods.tiny import MODEL

    got = PROBE.activations(params(), 1, on="attn.q|mlp.gate|mlp.up|head")
    assert got["layers.attn.q.kernel"].shape == (4, 32)
    np.testing.assert_allclose(got["layers.mlp.gate.kernel"], got["layers.mlp.up.kernel"], rtol=1e-5)
    batch = batches()[0]
    hidden = MODEL.hidden(params(), batch["tokens"], batch["positions"], batch["segment_ids"])
    want = jnp.sqrt(jnp.mean(hidden**2, axis=(0, 1)))
    np.testing.assert_allclose(got["head.kernel"], want, rtol=1e-4)
    # The first layer reads the normalised embeddings of all tokens, padding too.
    x = params()["embed"]["embedding"][batch["tokens"]]
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * params()["layers"]["attn_norm"]["scale"][0]
    want = jnp.sqrt(jnp.mean(normed**2, axis=(0, 1)))
    np.testing.assert_allclose(got["layers.attn.q.kernel"][0], want, rtol=1e-4)
    tuned = lora(rank=2).init(KEY, params(), Probe())
    of_nodes = PROBE.activations(combine(tuned), 1, on="attn.q")
    np.testing.assert_allclose(of_nodes["layers.attn.q.kernel"], got["layers.attn.q.kernel"], rtol=1e-5)


def test_train_returns_plain_arrays_that_moved():
    probe = trial(lora(rank=2)).probe
    trained = probe.train(params(), lora(rank=2, on="attn.q"), 2)
    assert jax.tree.structure(trained) == jax.tree.structure(params()) == jax.tree.structure(materialize(trained))
    moved = {p for p, w in weights_by_path(trained).items() if (w != weights_by_path(params())[p]).any()}
    assert moved == {"layers.attn.q.kernel"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Probe().loss(params()), "give its probe a loss_fn and batches"),
        (lambda: Probe().gradients(params()), "give its probe a loss_fn and batches"),
        (lambda: Probe().train(params(), None, 1), "give its probe a trainer"),
        (lambda: PROBE.loss(params(), 9), "asked for 9 calibration batches and there are 3"),
    ],
)
def test_what_a_probe_lacks_it_says(call, message):
    with pytest.raises(JaxftError, match=message):
        call()
