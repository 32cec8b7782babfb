"""The train step: normalisation, what changes and what does not, its memory."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from jaxft.distributed import MeshConfig, make_mesh, shard_batch
from jaxft.errors import JaxftError
from jaxft.methods import Method, bitfit, full, hft, lora
from jaxft.models import DecoderConfig, LanguageModel
from jaxft.partition import combine
from jaxft.training.loss import language_model_loss
from jaxft.training.precision import Precision
from jaxft.training.state import abstract, init_state, parameters, shardings_of, tuned_of
from jaxft.training.step import make_train_step, micro_batches

VOCAB, LAYERS, DIM, HIDDEN = 48, 2, 16, 40
MODEL = LanguageModel(DecoderConfig("llama", VOCAB, DIM, HIDDEN, LAYERS, 2, 1, 8))
LOSS = language_model_loss(MODEL)
METHODS = {"full": full(), "hft": hft(), "lora": lora(rank=2), "bitfit": bitfit()}


@functools.cache
def params():
    return MODEL.init(jax.random.key(0))


def make_batch(seed=0, rows=8, seq_len=12):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, seq_len + 1)).astype(np.int32)
    length = rng.integers(2, seq_len + 1, (rows, 1))  # uneven masks
    inside = np.arange(seq_len) < length
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (inside * rng.uniform(0.1, 1, (rows, seq_len))).astype(np.float32),
        "segment_ids": inside.astype(np.int32),
    }


def start(method, optimizer, precision=Precision(), devices=1, **options):  # noqa: B008
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    state, frozen = init_state(
        method,
        params(),
        optimizer,
        jax.random.key(1),
        mesh,
        logical_axes=MODEL.logical_axes(),
        precision=precision,
    )
    options = {"shardings": shardings_of(state), **options}
    return state, frozen, functools.partial(make_train_step, method=method, optimizer=optimizer, **options), mesh


def snapshot(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differences(a, b):
    return sum(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_accumulation_equals_the_big_batch_with_uneven_masks():
    batch = make_batch()
    results = {}
    for accumulation in (1, 2, 8):
        state, frozen, make, _ = start(full(), optax.sgd(1.0), accumulation=accumulation)
        state, metrics = make(LOSS)(state, frozen, batch)
        results[accumulation] = snapshot((state.trainable, metrics))
    for accumulation in (2, 8):
        for a, b in zip(jax.tree.leaves(results[1]), jax.tree.leaves(results[accumulation]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_loss_is_the_weighted_mean_over_the_whole_batch():
    batch = make_batch()
    state, frozen, make, _ = start(full(), optax.sgd(0.0), accumulation=4)
    _, metrics = make(LOSS)(state, frozen, batch)
    logits = MODEL.logits(params(), MODEL.hidden(params(), batch["tokens"], segment_ids=batch["segment_ids"]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    expected = np.sum(losses * batch["weights"]) / np.sum(batch["weights"])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert metrics["target_tokens"] == np.sum(batch["weights"] > 0)
    assert metrics["real_tokens"] == np.sum(batch["segment_ids"] > 0)
    assert metrics["padded_tokens"] == batch["tokens"].size


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(JaxftError, match="accumulation = 3 does not divide a batch of 8 rows"):
        micro_batches(make_batch(), 3)


# --- what changes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_frozen_leaves_are_an_argument_and_never_a_result(name):
    optimizer = optax.adamw(1e-2)
    state, frozen, make, _ = start(METHODS[name], optimizer)
    before, trained = snapshot(frozen), snapshot(state.trainable)
    step = make(LOSS, schedule=lambda count: 1e-2)
    compiled = step.lower(abstract(state), abstract(frozen), make_batch()).compile()
    # Everything that comes back is state or a scalar: the base is not copied.
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state._replace(rng=jax.random.key_data(state.rng)))]
    assert compiled.memory_analysis().output_size_in_bytes < sum(sizes) + 4096
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(sizes) - 4096  # and the state is updated in place
    for i in range(3):
        state, metrics = step(state, frozen, make_batch(i))
    assert_equal(before, snapshot(frozen))
    assert differences(trained, state.trainable) == len(jax.tree.leaves(trained))
    assert int(state.step) == 3 and int(state.skipped) == 0
    assert metrics["learning_rate"] == np.float32(1e-2)


@pytest.mark.parametrize("name", ["hft", "lora"])
def test_grad_norm_is_that_of_the_trainable_gradients(name):
    batch = make_batch()
    state, frozen, make, _ = start(METHODS[name], optax.sgd(0.0))
    tuned = tuned_of(state, frozen)

    def mean(trainable):
        total, weight, _ = LOSS(combine(tuned._replace(trainable=trainable)), batch, None)
        return total / weight

    expected = optax.tree.norm(jax.jit(jax.grad(mean))(tuned.trainable))
    _, metrics = make(LOSS, clip_norm=1e-3)(state, frozen, batch)
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-5)


def test_clipping_bounds_the_update():
    state, frozen, make, _ = start(full(), optax.sgd(1.0))
    before = snapshot(state.trainable)
    state, metrics = make(LOSS, clip_norm=0.01)(state, frozen, make_batch())
    assert metrics["grad_norm"] > 0.01
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.trainable, before))
    np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


def test_no_array_of_a_frozen_matrix_shape_is_computed():
    """With LoRA no equation of the step makes an array of the shape of a stacked frozen kernel."""
    state, frozen, make, _ = start(lora(rank=2), optax.adamw(1e-2))
    text = str(jax.make_jaxpr(make(LOSS))(state, frozen, make_batch()))
    assert f"f32[{LAYERS},{DIM},2]" in text
    for shape in (f"f32[{LAYERS},{DIM},{HIDDEN}] =", f"f32[{LAYERS},{HIDDEN},{DIM}] =", f"f32[{VOCAB},{DIM}] ="):
        assert shape not in text
    state, frozen, make, _ = start(full(), optax.adamw(1e-2))
    assert f"f32[{LAYERS},{DIM},{HIDDEN}] =" in str(jax.make_jaxpr(make(LOSS))(state, frozen, make_batch()))


# --- steps that must do nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(platform, monkeypatch):
    monkeypatch.setattr(sys.modules[make_train_step.__module__], "platform", lambda: platform)
    state, frozen, make, _ = start(full(), optax.adamw(1e-2))
    step = make(LOSS, schedule=optax.linear_schedule(1.0, 0.0, 10), clip_norm=1.0)
    state, _ = step(state, frozen, make_batch())
    before = snapshot((state.trainable, state.opt_state))
    bad = make_batch(1)
    bad["weights"][0, 0] = np.inf
    state, metrics = step(state, frozen, bad)
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert_equal(before, snapshot((state.trainable, state.opt_state)))
    assert int(state.step) == 2 and int(state.skipped) == 1
    state, metrics = step(state, frozen, make_batch(2))
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0 and int(state.skipped) == 1
    assert differences(before[0], state.trainable) > 0
    np.testing.assert_allclose(metrics["learning_rate"], 0.9)  # the second update that was made


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_without_targets_is_a_finite_step_of_zero(accumulation):
    state, frozen, make, _ = start(full(), optax.sgd(1.0), accumulation=accumulation)
    before = snapshot(state.trainable)
    batch = make_batch()
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = make(LOSS)(state, frozen, batch)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped"] == 0
    assert_equal(before, snapshot(state.trainable))


# --- methods ----------------------------------------------------------------------------------------------------------


def test_penalty_batch_and_gradients_of_a_method_are_applied():
    def penalty(tuned):
        return 0.5 * optax.tree.norm(tuned.trainable, squared=True)

    def silence(rng, batch):
        return {**batch, "weights": jnp.zeros_like(batch["weights"])}

    seen = []

    def halve(optimizer):
        seen.append(optimizer)
        return optax.chain(optax.scale(0.5), optimizer)

    method = Method(full().init, penalty=penalty, batch=silence, gradients=halve)
    state, frozen, make, _ = start(method, optax.sgd(0.1))
    before = snapshot(state.trainable)
    state, metrics = make(LOSS)(state, frozen, make_batch())
    # no token counts, so the gradient is that of the penalty: the weights themselves
    assert metrics["loss"] == 0
    np.testing.assert_allclose(metrics["penalty"], 0.5 * optax.tree.norm(before, squared=True), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.95 * b, rtol=1e-5), snapshot(state.trainable), before)
    assert len(seen) == 2  # the same treatment for state and step


def test_a_method_that_needs_gradients_gets_them_before_clipping():
    method = full()._replace(needs=frozenset({"gradients"}))
    state, frozen, make, _ = start(method, optax.sgd(1.0))
    before = snapshot(state.trainable)
    state, metrics = make(LOSS)(state, frozen, make_batch())
    moved = jax.tree.map(lambda old, new: old - new, before, snapshot(state.trainable))
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, g, atol=1e-6), moved, snapshot(metrics["gradients"]))
    _, metrics = make(LOSS, clip_norm=1e-6)(*start(method, optax.sgd(1.0))[:2], make_batch())
    np.testing.assert_allclose(optax.tree.norm(metrics["gradients"]), metrics["grad_norm"], rtol=1e-5)


def test_another_draw_of_the_same_half_compiles_nothing():
    optimizer = optax.sgd(1e-2)
    traces = []

    def counting(params, batch, rng):
        traces.append(1)
        return LOSS(params, batch, rng)

    method = hft()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step = None
    for seed in (0, 1):
        state, frozen = init_state(
            method, params(), optimizer, jax.random.key(seed), mesh, logical_axes=MODEL.logical_axes()
        )
        step = step or make_train_step(counting, method, optimizer, shardings=shardings_of(state))
        state, _ = step(state, frozen, make_batch())
        count = len(traces)
        state, _ = step(state, frozen, make_batch(1))
        assert len(traces) == count
    assert count == len(traces) > 0 and step._cache_size() <= 2


# --- any model --------------------------------------------------------------------------------------------------------


def test_any_flax_model_and_loss_train():
    module = linen.Dense(1)
    weights = module.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    y = x @ np.array([[1.0], [-2.0], [3.0]], np.float32) + 0.5

    def squares(params, batch, rng):
        error = module.apply({"params": params}, batch["x"]) - batch["y"]
        return jnp.sum(error**2), jnp.asarray(batch["x"].shape[0], jnp.float32), {}

    optimizer = optax.adam(0.1)
    mesh = make_mesh(MeshConfig())
    state, frozen = init_state(full(), weights, optimizer, jax.random.key(0), mesh)
    step = make_train_step(squares, full(), optimizer, shardings=shardings_of(state))
    batch = shard_batch({"x": x, "y": y}, mesh)
    for _ in range(200):
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)  # many collectives in flight can starve the few threads of a CPU
    assert metrics["loss"] < 1e-3
    np.testing.assert_allclose(parameters(state, frozen)["bias"], [0.5], atol=0.02)


# --- precision and memory ---------------------------------------------------------------------------------------------


def test_small_updates_of_a_bfloat16_model_are_not_lost():
    precision = Precision(param_dtype="float32", frozen_dtype="bfloat16", compute_dtype="bfloat16")
    state, frozen, make, _ = start(full(), optax.sgd(1.0), precision)
    assert {a.dtype for a in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    before = snapshot(state.trainable)

    def toward(params, batch, rng):  # moves every weight by 1e-4 of itself a step
        return 1e-4 * 0.5 * optax.tree.norm(params, squared=True), jnp.ones(()), {}

    step = make(toward)
    for _ in range(100):
        state, _ = step(state, frozen, {"x": np.zeros((1, 1), np.float32)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b * (1 - 1e-4) ** 100, rtol=1e-4), state.trainable, before)


def test_masters_frozen_and_compute_dtypes_are_separate():
    precision = Precision(param_dtype="float32", frozen_dtype="bfloat16")
    state, frozen, make, _ = start(hft(), optax.adamw(1e-2), precision)
    floats = [a for a in jax.tree.leaves(frozen) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {a.dtype for a in floats} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    state, metrics = make(language_model_loss(MODEL, compute_dtype=jnp.bfloat16))(state, frozen, make_batch())
    assert {a.dtype for a in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert np.isfinite(metrics["loss"])


def test_an_unknown_dtype_names_the_nearest():
    with pytest.raises(JaxftError, match='did you mean "float32"'):
        Precision(param_dtype="flaot32")


def test_frozen_leaves_are_the_arrays_that_came_in():
    state, frozen, _, _ = start(lora(rank=2), optax.sgd(1.0))
    base = frozen["layers"]["mlp"]["up"]["kernel"].base
    assert base.unsafe_buffer_pointer() == params()["layers"]["mlp"]["up"]["kernel"].unsafe_buffer_pointer()


def test_micro_batches_cost_one_micro_batch_and_one_gradient_tree():
    optimizer = optax.sgd(1e-2)

    def temp(rows, accumulation):
        state, frozen, make, _ = start(full(), optimizer, accumulation=accumulation)
        step = make(language_model_loss(MODEL, chunks=1))
        compiled = step.lower(abstract(state), abstract(frozen), make_batch(rows=rows, seq_len=64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    gradients = sum(a.size * 4 for a in jax.tree.leaves(params()))
    one, eight, all_at_once = temp(16, 1), temp(128, 8), temp(128, 1)
    inputs = 128 * 64 * 4 * 4  # the batch itself, cut in eight
    assert eight <= one + gradients + inputs
    assert eight < all_at_once / 3
