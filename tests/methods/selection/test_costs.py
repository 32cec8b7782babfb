"""What trains little holds little: bytes of gradients and optimizer state against full tuning's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.methods import (
    Probe,
    apet,
    badam,
    count_trainable,
    full,
    locft_bf,
    lt_sft,
    paca,
    pivotal_parameters_tuning,
    sara,
    smt,
    spt,
    wrap_optimizer,
)
from jaxft.models import DecoderConfig, LanguageModel
from jaxft.partition import combine, weights_by_path
from jaxft.weights import BlockSplit, Packed, SparseDelta, materialize

KEY = jax.random.key(0)
MODEL = LanguageModel(DecoderConfig("llama", 256, 64, 128, 24, 4, 2, 16))


@functools.cache
def params() -> dict:
    return MODEL.init(KEY)


def uneven(w) -> jax.Array:
    """Gradients and changes double with each third layer, so that selections by them are uneven."""
    return (2.0 ** (jnp.arange(w.shape[0]) // 3)).reshape(-1, *(1,) * (w.ndim - 1))


class Given(Probe):
    """Answers that cost nothing: what matters here is where methods put what they find."""

    def gradients_of(self, params, paths, n=1, transform=lambda g: g):
        weights = weights_by_path(params)
        found = {}
        for p in paths:
            w = materialize(weights[p])
            g = jax.random.normal(jax.random.key(len(p)), w.shape)
            found[p] = transform(g * uneven(w) if w.ndim > 2 else g)
        return found


PROBE = Given(
    trainer=lambda given, m, s: jax.tree.map(lambda w: w + jnp.sin(1e4 * w) * (uneven(w) if w.ndim > 2 else 1), given),
    total_steps=4,
)
METHODS = {
    "apet": apet(count=40_000),
    "badam": badam(),
    "locft-bf": locft_bf(),
    "lt-sft": lt_sft(budget=0.05, search_steps=1),
    "paca": paca(rank=3),
    "pivotal": pivotal_parameters_tuning(budget=0.02, search_steps=1),
    "sara": sara(budget=0.05),
    "smt": smt(budget=0.05, size=8, batches=1, on="@linear"),
    "spt": spt(budget=0.05, rank=1, threshold=float("inf")),
}


def held(method) -> tuple[int, int]:
    """(trained parameters, bytes of gradients and of Adam's state)."""
    tuned = method.init(KEY, params(), PROBE)
    state = jax.eval_shape(wrap_optimizer(method, optax.adamw(1e-3)).init, tuned.trainable)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((tuned.trainable, state)))
    return count_trainable(tuned), size


@functools.cache
def whole() -> tuple[int, int]:
    return held(full())


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_five_percent_holds_at_most_fifteen(name):
    trained, size = held(METHODS[name])
    assert trained <= 0.05 * whole()[0] * 1.001, f"{name} trains {trained / whole()[0]:.1%}: the test wants little"
    assert size <= 0.15 * whole()[1], f"{name} trains {trained / whole()[0]:.2%} and holds {size / whole()[1]:.1%}"


def test_uneven_selections_are_packed_and_mean_the_same():
    """Packed end to end or padded to the longest: the same entries, the same model."""
    tuned = smt(budget=40, size=8, batches=1, on="@linear").init(KEY, params(), PROBE)
    nodes = {p: w for p, w in weights_by_path(combine(tuned)).items() if isinstance(w, BlockSplit | SparseDelta)}
    packed = {p: w for p, w in nodes.items() if isinstance(w.blocks, Packed)}
    assert packed and count_trainable(tuned) == 40 * 64
    moved = tuned._replace(trainable=jax.tree.map(lambda x: x + 1, tuned.trainable))
    for path, w in weights_by_path(materialize(combine(moved))).items():
        changed = np.asarray(w) - np.asarray(weights_by_path(params())[path])
        expected = 64 * int((nodes[path].index < np.prod(w.shape[1:]) // 64).sum()) if path in nodes else 0
        assert (changed != 0).sum() == expected, path
    for path, w in packed.items():
        assert w.blocks.values.shape[0] < w.index.size, path
