"""The contract: what a chain means, what happens to optimizer state, what the registry refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import (
    Method,
    Probe,
    Signals,
    build,
    chain,
    count_trainable,
    full,
    get_method,
    hft,
    lora,
    methods,
    register,
    wrap_optimizer,
)
from jaxft.methods.base import map_moments, path_key, restart_moments, rewrite, update_like
from jaxft.methods.registry import _REGISTRY
from jaxft.partition import DECODER_ROLES, Trains, Tuned, combine, map_weights, split, weights_by_path
from jaxft.weights import BlockSplit, SparseDelta
from tests.methods.tiny import params, trial

KEY = jax.random.key(0)


def adding(name: str, log: list, **fields) -> Method:
    """A method that trains the weight `name`, counts its updates and notes what it was called with."""

    def init(rng, params, probe):
        log.append(("init", name, jax.random.key_data(rng).tolist()))
        return split(rewrite(params, name, lambda _, w: Trains(w), roles=probe.roles), {"updates": jnp.zeros((), int)})

    def update(rng, tuned, opt_state, signals, step):
        log.append(("update", name, step))
        return tuned._replace(state={"updates": tuned.state["updates"] + 1}), opt_state

    return Method(init, update=update, **fields)


def test_a_chain_is_its_methods_in_order():
    log: list = []
    method = chain(
        adding("embed", log, due=lambda step, total: step % 2 == 0),
        adding("final_norm", log, due=lambda step, total: step == total - 1),
        full(on="head"),
    )
    tuned = method.init(KEY, params(), Probe(total_steps=4))
    assert [name for name in weights_by_path(tuned.trainable)] == ["embed.embedding", "final_norm.scale", "head.kernel"]
    assert log[0][2] != log[1][2], "each method has a key of its own"
    del log[:]
    signals = Signals(0.0, None, Probe(total_steps=4))
    for step in range(1, 5):
        if method.due(step, 4):
            tuned, _ = method.update(KEY, tuned, (), signals, step)
    assert log == [("update", "embed", 2), ("update", "final_norm", 3), ("update", "embed", 4)]
    assert [int(s["updates"]) for s in tuned.state[:2]] == [2, 1] and len(tuned.state) == 3


def test_a_chain_of_chains_and_of_one():
    one = full()
    assert chain(one) is one
    nested = chain(chain(full(on="embed"), full(on="head")), lora(rank=2))
    assert len(nested.init(KEY, params(), Probe()).state) == 2
    with pytest.raises(JaxftError, match="at least one"):
        chain()


def test_absent_fields_stay_absent():
    made = chain(full(on="embed"), lora(rank=2))
    assert made[1:] == (None, None, None, None, None, frozenset())
    assert chain(full(on="embed"), Method(full().init, needs=frozenset({"gradients"}))).needs == {"gradients"}


def test_penalties_add_up_and_see_their_own_state():
    def weighing(name, weight):
        def init(rng, params, probe):
            return split(rewrite(params, name, lambda _, w: Trains(w), roles=probe.roles), jnp.asarray(weight))

        return Method(init, penalty=lambda tuned: tuned.state * jnp.sum(jnp.ones(())))

    method = chain(weighing("embed", 2.0), full(on="head"), weighing("final_norm", 5.0))
    assert float(method.penalty(method.init(KEY, params(), Probe()))) == 7.0


def test_gradient_and_batch_treatments_apply_in_order():
    def doubling(optimizer):
        return optax.chain(optax.scale(2.0), optimizer)

    plus = optax.stateless(lambda g, p: jax.tree.map(lambda x: x + 1, g))
    method = chain(Method(full().init, gradients=plus), Method(full().init, gradients=doubling))
    optimizer = wrap_optimizer(method, optax.sgd(1.0))
    updates, _ = optimizer.update(jnp.asarray(3.0), optimizer.init(jnp.asarray(0.0)))
    assert float(updates) == -8.0  # (3 + 1) * 2
    assert wrap_optimizer(full(), optimizer) is optimizer

    def noting(symbol):
        return Method(
            full().init, batch=lambda rng, batch: {"seen": batch["seen"] + symbol, "rng": (*batch["rng"], rng)}
        )

    made = chain(noting("a"), full(), noting("b")).batch(KEY, {"seen": "", "rng": ()})
    assert made["seen"] == "ab" and (made["rng"][0] != made["rng"][1])


def test_the_train_step_obeys_penalty_gradients_and_batch():
    base = full(on="final_norm")

    def losses(method):
        return [e.loss for e in trial(method, steps=3).events]

    plain = losses(base)
    frozen_by_gradients = losses(base._replace(gradients=optax.set_to_zero()))
    assert frozen_by_gradients[0] == plain[0] and frozen_by_gradients[2] != plain[2]

    def pull(tuned):
        return 1e3 * sum(jnp.sum((w - 2.0) ** 2) for w in jax.tree.leaves(tuned.trainable))

    pulled = trial(base._replace(penalty=pull), steps=6, learning_rate=0.1)
    end = pulled.end_tuned.trainable["final_norm"]["scale"]
    assert pulled.events[0].loss == plain[0], "the reported loss is that of the data"
    assert (end > 1.3).all(), "the penalty pulled the scale to 2"

    def silence(rng, batch):
        return {**batch, "weights": batch["weights"] * jax.random.bernoulli(rng, 0.5, batch["weights"].shape)}

    assert losses(base._replace(batch=silence))[0] != plain[0]


def test_needs_gradients_gets_the_gradients_of_what_trains():
    seen = []

    def update(rng, tuned, opt_state, signals, step):
        seen.append(signals.gradients)
        return tuned, opt_state

    method = full(on="mlp.up")._replace(update=update, due=lambda step, total: True, needs=frozenset({"gradients"}))
    done = trial(method, steps=2)
    assert len([e for e in done.events if e.kind == "update"]) == 2
    assert jax.tree.structure(seen[0]) == jax.tree.structure(done.start_tuned.trainable)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(seen))


def test_rewrite_leaves_marked_weights_and_refuses_ranges():
    marked = map_weights(lambda p, w: Trains(w) if p.startswith("embed") else w, params())
    seen = []
    rewrite(marked, "**", lambda p, w: seen.append(p) or w, roles=DECODER_ROLES)
    assert "embed.embedding" not in seen and "head.kernel" in seen
    with pytest.raises(JaxftError, match="for some layers only"):
        rewrite(params(), "layers[1:]", lambda p, w: w, roles=DECODER_ROLES)


def test_keys_depend_on_the_path_only():
    assert (path_key(KEY, "a") == path_key(KEY, "a")) and (path_key(KEY, "a") != path_key(KEY, "b"))


def is_schedule(state) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


TRAINABLE = {"a": jnp.ones((2, 3)), "b": None, "c": {"d": jnp.ones(4)}}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(optax.linear_schedule(1.0, 0.0, 10)),
        optax.sgd(0.1, momentum=0.9),
        optax.lion(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.1, momentum=0.9)),
        optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
        optax.partition(
            {"m": optax.adam(0.1), "v": optax.sgd(0.1, momentum=0.9)}, {"a": "m", "b": None, "c": {"d": "v"}}
        ),
        optax.apply_if_finite(optax.adam(0.1), 3),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
    ],
    ids=["adamw", "sgd", "lion", "rmsprop", "inject", "partition", "apply_if_finite", "adafactor"],
)
def test_restarted_moments_are_those_of_a_fresh_optimizer(optimizer):
    fresh = optimizer.init(TRAINABLE)
    state = fresh
    for _ in range(3):
        _, state = optimizer.update(jax.tree.map(lambda x: x + 1, TRAINABLE), state, TRAINABLE)
    restarted = restart_moments(state, TRAINABLE)
    assert jax.tree.structure(restarted) == jax.tree.structure(fresh)
    for (path, new), first, old in zip(
        jax.tree_util.tree_leaves_with_path(restarted), jax.tree.leaves(fresh), jax.tree.leaves(state), strict=True
    ):
        counts_on = new.ndim == 0 and new == old
        assert counts_on or (new == first).all(), f"{path} is neither fresh nor a counter that keeps counting"
    schedules = [s.count for s in jax.tree.leaves(restarted, is_leaf=is_schedule) if is_schedule(s)]
    assert all(count == 3 for count in schedules), "a learning-rate schedule went back to its start"


@pytest.mark.parametrize("name", ["schedule_free_adamw", "prodigy", "rprop", "madgrad", "dog"])
def test_what_is_no_moment_restarts_where_its_optimizer_begins(name):
    """The iterate of schedule-free optimizers, the start of Prodigy, the step sizes of Rprop: zero would be wrong."""
    optimizer = (getattr(optax, name, None) or getattr(optax.contrib, name))(learning_rate=0.1)
    state, now = optimizer.init(TRAINABLE), jax.tree.map(lambda x: x + 3, TRAINABLE)
    for _ in range(2):
        _, state = optimizer.update(jax.tree.map(lambda x: x + 1, TRAINABLE), state, TRAINABLE)
    restarted = restart_moments(state, now, optimizer)
    jax.tree.map(np.testing.assert_array_equal, restarted, optimizer.init(now))


def test_map_moments_sees_each_moment_whole_and_nothing_else():
    optimizer = optax.adam(0.1)
    _, state = optimizer.update(TRAINABLE, optimizer.init(TRAINABLE))
    seen = []

    def double(moments):
        seen.append(moments)
        return jax.tree.map(lambda m: 2 * m, moments)

    doubled = map_moments(state, TRAINABLE, double)
    assert len(seen) == 2 and all(jax.tree.structure(m) == jax.tree.structure(TRAINABLE) for m in seen)
    np.testing.assert_array_equal(doubled[0].mu["a"], 2 * state[0].mu["a"])
    assert int(doubled[0].count) == 1


def test_update_like_compiles_once_and_keeps_the_layout():
    calls = []

    def fn(tuned, opt_state, arrays):
        calls.append(1)
        return tuned._replace(trainable=jax.tree.map(lambda w: w + arrays, tuned.trainable)), opt_state

    tuned = full(on="final_norm").init(KEY, params(), Probe())
    for i in range(3):
        tuned, _ = update_like(fn, tuned, (), np.float32(i))
    assert len(calls) == 1
    np.testing.assert_array_equal(tuned.trainable["final_norm"]["scale"], params()["final_norm"]["scale"] + 3)


def test_padding_is_not_counted():
    w = jnp.zeros((2, 4, 4))
    sparse = SparseDelta(w, Trains(jnp.zeros((2, 3))), jnp.asarray([[0, 1, 2], [5, 16, 16]]))
    block = BlockSplit(w, Trains(jnp.zeros((2, 2, 2, 2))), jnp.asarray([[0, 3], [1, 4]]))
    assert count_trainable(split({"a": sparse, "b": block})) == 4 + 3 * 4
    assert count_trainable(Tuned({"a": jnp.ones(3)}, {"a": None})) == 3


# --- registry ---------------------------------------------------------------------------------------------------------


def test_every_entry_is_described():
    for id, entry in methods().items():
        assert entry.summary.endswith("."), id
        assert all(option.help for option in entry.options), id
        assert entry.id in ("full", "select") or entry.url.startswith("https://"), id
        assert entry.build(**entry.example)


def test_building_by_configuration():
    assert build("full").init is not None
    tuned = build([{"name": "lora", "rank": 2, "on": "@attention"}, "hft"]).init(KEY, params(), Probe())
    kinds = {p: type(w).__name__ for p, w in weights_by_path(combine(tuned)).items()}
    assert kinds["layers.attn.q.kernel"] == "LowRank" and kinds["layers.mlp.up.kernel"] == "Split"
    assert get_method("hft").factory is hft


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lorra", r'unknown method "lorra": did you mean "lora"'),
        ({"name": "lora", "rnak": 3}, r'method "lora" has no option "rnak": did you mean "rank"'),
        ({"name": "lora", "rank": "many"}, r'method "lora", option rank=\'many\''),
        ({"name": "hft", "level": "row"}, r'method "hft", option level=\'row\''),
        ({"rank": 3}, r"a method needs a name, got the keys \['rank'\]"),
    ],
)
def test_wrong_specifications(spec, message):
    with pytest.raises(JaxftError, match=message):
        build(spec)


def test_registration_is_checked():
    def described(rank: int = 1) -> Method:
        """Something.

        Args:
            rank: of it.
        """
        return full()

    def required(rank: int) -> Method:
        """Something."""
        return full()

    def silent(rank: int = 1) -> Method:
        """Something."""
        return full()

    for id, factory, message in [
        ("Bad_Id", described, "lower case words"),
        ("lora", described, "is taken by"),
        ("new-one", required, "every option needs a default"),
        ("new-one", silent, r"\['rank'\] are not described"),
    ]:
        with pytest.raises(ValueError, match=message):
            register(id, title="", url="", family="selection")(factory)
        assert "new-one" not in _REGISTRY
