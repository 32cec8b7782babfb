"""LISA: embedding, head and gamma random layers at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, Signals, chain, full, hft, lisa, lora
from jaxft.partition import combine, weights_by_path
from jaxft.weights import Split, materialize
from tests.methods.tiny import params, trial

KEY = jax.random.key(0)


def active(tuned) -> np.ndarray:
    masks = {
        np.asarray(w.is_trainable).tobytes(): w
        for w in weights_by_path(combine(tuned)).values()
        if isinstance(w, Split)
    }
    assert len(masks) == 1, "layers train whole"
    return np.asarray(next(iter(masks.values())).is_trainable)


def update(method, tuned, seed, opt_state=()):
    return method.update(jax.random.key(seed), tuned, opt_state, Signals(0.0, None, Probe(total_steps=100)), 20)


def test_due_every_period_but_not_at_the_end():
    method = lisa(num_layers=1, period=3)
    assert [s for s in range(1, 10) if method.due(s, 9)] == [3, 6]


def test_every_layer_is_active_as_often_as_another():
    method = lisa(num_layers=1)
    tuned = method.init(KEY, params(), Probe())
    times = np.zeros(4, int)
    for seed in range(80):
        tuned, _ = update(method, tuned, seed)
        assert active(tuned).sum() == 1
        times += active(tuned)
    assert (np.abs(times - 20) <= 16).all(), times  # 4 standard deviations
    for a, b in zip(jax.tree.leaves(materialize(combine(tuned))), jax.tree.leaves(params()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_is_proportional_to_the_active_layers():
    layer = sum(w[0].nbytes for w in jax.tree.leaves(params()["layers"]))
    rest = sum(w.nbytes for name, sub in params().items() if name != "layers" for w in jax.tree.leaves(sub))
    for gamma in (1, 2, 3):
        tuned = lisa(num_layers=gamma).init(KEY, params(), Probe())
        state = optax.adam(1e-3).init(tuned.trainable)
        assert sum(x.nbytes for x in jax.tree.leaves(state)) == 2 * (rest + gamma * layer) + 4


def test_all_layers_at_once_is_full_tuning_between_resets():
    every, whole = trial(lisa(num_layers=4, period=100), steps=4), trial(full(), steps=4)
    for a, b in zip(every.events, whole.events, strict=True):
        assert a.loss == b.loss
    ends = [weights_by_path(materialize(combine(t.end_tuned))) for t in (every, whole)]
    for path, w in ends[0].items():
        np.testing.assert_array_equal(w, ends[1][path])


def test_a_new_draw_restarts_all_moments_or_keeps_those_that_stay():
    for policy, count in (("reset", 0), ("carry", 1)):
        method = lisa(num_layers=2, optimizer_state=policy)
        tuned = method.init(KEY, params(), Probe())
        _, opt_state = optax.adam(1e-3).update(tuned.trainable, optax.adam(1e-3).init(tuned.trainable))
        _, moved = update(method, tuned, 1, opt_state)
        assert int(moved[0].count) == count
        assert bool(jnp.any(moved[0].mu["embed"]["embedding"])) == (policy == "carry")


def test_a_schedule_keeps_counting_through_a_reset():
    method, optimizer = lisa(num_layers=1), optax.adam(optax.linear_schedule(1.0, 0.0, 10))
    tuned = method.init(KEY, params(), Probe())
    _, opt_state = optimizer.update(tuned.trainable, optimizer.init(tuned.trainable))
    _, moved = update(method, tuned, 1, opt_state)
    assert (int(moved[0].count), int(moved[1].count)) == (0, 1)


def test_layers_of_another_method_are_not_its_to_redraw():
    method = chain(full(on="layers[:3].attn"), lisa(num_layers=1, period=2))
    tuned = method.init(KEY, params(), Probe())
    for seed in range(3):
        tuned, _ = method.update(jax.random.key(seed), tuned, (), Signals(0.0, None, Probe(total_steps=10)), 2)
        weights = weights_by_path(combine(tuned))
        assert weights["layers.attn.q.kernel"].is_trainable.tolist() == [True, True, True, False]
        assert weights["layers.mlp.up.kernel"].is_trainable.sum() == 1
        np.testing.assert_array_equal(
            materialize(weights["layers.attn.q.kernel"]), params()["layers"]["attn"]["q"]["kernel"]
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lisa(num_layers=5), "a budget of 5 is 5 of 4 layers"),
        (lambda: lisa(num_layers=0), "must be at least 1"),
        (lambda: chain(hft(), lora(rank=2), lisa()), "already taken|is left"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(JaxftError, match=message):
        make().init(KEY, params(), Probe())
