"""The conformance checks find methods that are wrong, and say what is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxft import testing
from jaxft.methods import build
from tests.methods.tiny import trial

BITFIT = build(["bitfit"])


@functools.cache
def stuck():
    """A trial in which nothing trains: the learning rate is zero."""
    return trial(BITFIT, learning_rate=0.0)


def with_update(update):
    """A trial of bitfit with an update after every second step. The update gets `(tuned, opt_state)`."""
    method = BITFIT._replace(update=lambda rng, *given: update(*given[:2]), due=lambda step, _: step % 2 == 0)
    return trial(method)


def compiles_again(tuned, opt_state):
    jax.jit(lambda x: x + 1)(jnp.zeros(3))
    return tuned, opt_state


def changes_frozen(tuned, opt_state):
    return tuned._replace(frozen=jax.tree.map(lambda x: x * 2, tuned.frozen)), opt_state


def constant_of_a_program(rng, params, probe):
    jax.jit(lambda: params["final_norm"]["scale"].sum())()
    return BITFIT.init(rng, params, probe)


def of_a_count(count, rng, params, probe):
    tuned = BITFIT.init(rng, params, probe)
    return tuned._replace(trainable=jax.tree.map(lambda x: x + next(count), tuned.trainable))


def test_an_init_that_compiles_anew():
    with pytest.raises(AssertionError, match="a second init compiled [12] programs"):
        testing.check_init(trial(BITFIT._replace(init=constant_of_a_program)))


def test_an_init_that_depends_on_more_than_its_arguments():
    init = functools.partial(of_a_count, itertools.count())
    with pytest.raises(AssertionError, match=r"two inits from one key differ: .* differs"):
        testing.check_init(trial(BITFIT._replace(init=init)))


def test_a_start_that_is_the_identity_against_what_is_declared():
    with pytest.raises(AssertionError, match="declared to change outputs at the start"):
        testing.check_identity(trial(BITFIT, identity=False))


def test_a_run_in_which_nothing_moves():
    with pytest.raises(AssertionError, match="training changed nothing to speak of"):
        testing.check_law(stuck())
    with pytest.raises(AssertionError, match="trains and did not move"):
        testing.check_trains(stuck())


def test_an_update_that_changes_what_is_frozen():
    with pytest.raises(AssertionError, match=r"update 2 changed \d+ frozen entries of "):
        testing.check_frozen(with_update(changes_frozen))


def test_an_update_that_compiles_each_time():
    with pytest.raises(AssertionError, match=r"the updates after steps \[4, 6\] compiled again"):
        testing.check_compilation(with_update(compiles_again))


def test_updates_that_a_run_is_too_short_for():
    short = with_update(lambda tuned, opt_state: (tuned, opt_state))
    short.steps = 3
    with pytest.raises(AssertionError, match="a run of 3 steps has 1 updates"):
        testing.check_compilation(short)


def test_bits_are_compared_not_values():
    with pytest.raises(AssertionError, match=r"weights: \['a'\] differs"):
        testing.assert_same_bits({"a": jnp.zeros(2)}, {"a": -jnp.zeros(2)}, "weights")
    with pytest.raises(AssertionError, match="weights: the trees have different structures"):
        testing.assert_same_bits({"a": jnp.zeros(2)}, {"b": jnp.zeros(2)}, "weights")
