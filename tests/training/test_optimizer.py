"""Optimizers and schedules by name: every one runs, and a wrong option is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import BaseModel, ValidationError

from jaxft.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    evaluation_parameters,
    make_optimizer,
    make_schedule,
    matrix_mask,
    optimizers,
    schedules,
)


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embed": {"embedding": jax.random.normal(keys[0], (6, 4))},
        "layers": {
            "attn_norm": {"scale": jnp.ones((3, 4))},
            "attn": {"q": {"kernel": jax.random.normal(keys[1], (3, 4, 4)), "bias": None}},
        },
        "final_norm": {"scale": jnp.ones(4)},
    }


def updated(optimizer, steps=1, gradient=lambda p: p):
    tree = params()
    state = optimizer.init(tree)
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    for _ in range(steps):
        value = 0.5 * optax.tree.norm(tree, squared=True)
        updates, state = update(jax.tree.map(gradient, tree), state, tree, value=value)
        tree = optax.apply_updates(tree, updates)
    return tree, state


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_every_optimizer_lowers_a_quadratic(name):
    required = {"noisy_sgd": {"seed": 0}}.get(name, {})
    finds_its_rate = name in ("dadapt_adamw", "dog", "dowg", "prodigy")  # slow at first, from a tiny estimate
    rate, steps = (1.0, 60) if finds_its_rate else (1e-2, 5)
    tree, state = updated(make_optimizer(OptimizerConfig(name=name, **required), rate), steps)
    tree = evaluation_parameters(state, tree)
    assert jax.tree.structure(tree) == jax.tree.structure(params())
    assert optax.tree.norm(tree) < optax.tree.norm(params())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamv"}, 'no optimizer "adamv": did you mean "adam"'),
        ({"name": "adamw", "weight_decy": 0.1}, 'has no option "weight_decy": did you mean "weight_decay"'),
        ({"name": "adamw", "b1": "high"}, '"b1" of optimizer "adamw" is \'high\': expected a number'),
        ({"name": "sgd", "nesterov": 1}, '"nesterov" of optimizer "sgd" is 1: expected true or false'),
        ({"name": "sgd", "learning_rate": 0.1}, 'has no option "learning_rate"'),
        ({"name": "adamw", "moment_dtype": "int8"}, 'moment_dtype = "int8"'),
        ({"name": "rprop", "moment_dtype": "bfloat16"}, "keeps no such moment with these options: drop moment_dtype"),
        ({"name": "sgd", "moment_dtype": "bfloat16"}, "keeps no such moment with these options"),
        ({"name": "lion", "second_moment_dtype": "bfloat16"}, "keeps no such moment"),
        ({"name": "lbfgs"}, 'no optimizer "lbfgs"'),
    ],
)
def test_a_wrong_optimizer_option_is_named(options, message):
    with pytest.raises(ValidationError) as caught:
        OptimizerConfig(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosin", "peak": 1.0}, 'no schedule "cosin": did you mean "cosine"'),
        ({"name": "cosine"}, 'schedule "cosine" needs the option "peak"'),
        ({"name": "cosine", "peak": 1.0, "warmpu": 3}, 'did you mean "warmup"'),
        ({"name": "constant", "peak": -1.0}, "is negative"),
        (-1e-3, "is negative"),
        ({"name": "linear", "peak": 1.0, "warmup": -2}, "warmup = -2"),
        ({"name": "linear_schedule", "init_value": 1.0}, 'needs the option "end_value"'),
    ],
)
def test_a_wrong_schedule_option_is_named(options, message):
    with pytest.raises(ValidationError) as caught:
        ScheduleConfig.model_validate(options)
    assert message in str(caught.value)


def values(config, steps, total=100):
    schedule = make_schedule(ScheduleConfig.model_validate(config), total)
    return [float(schedule(step)) for step in steps]


def test_schedules_by_short_form():
    np.testing.assert_allclose(values(1e-3, (0, 50, 200)), [1e-3] * 3)
    warmed = {"name": "linear", "peak": 1.0, "warmup": 5, "end": 0.1}
    np.testing.assert_allclose(values(warmed, (0, 4, 5, 100)), [0.2, 1, 1, 0.1], rtol=1e-5)
    fraction = {"name": "warmup_cosine_decay", "peak": 2.0, "warmup": 0.1}
    np.testing.assert_allclose(values(fraction, (0, 9, 10, 55, 100)), [0.2, 2, 2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(values({"name": "constant", "peak": 1.0, "warmup": 2}, (0, 1, 2)), [0.5, 1, 1])


def test_schedules_by_optax_name_last_as_long_as_the_run():
    named = {"name": "cosine_decay_schedule", "init_value": 1.0}
    np.testing.assert_allclose(values(named, (0, 50, 100)), [1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(values({**named, "decay_steps": 50}, (0, 25, 50)), [1, 0.5, 0], atol=1e-6)
    assert {"exponential_decay", "warmup_cosine_decay_schedule", "linear_onecycle_schedule"} <= set(schedules())


def test_a_schedule_serialises_with_its_options():
    class Section(BaseModel):
        learning_rate: ScheduleConfig

    section = Section.model_validate({"learning_rate": {"name": "cosine", "peak": 1.0, "warmup": 0.1}})
    assert section.model_dump()["learning_rate"] == {"name": "cosine", "peak": 1.0, "warmup": 0.1}
    assert Section.model_validate(section.model_dump()) == section
    assert Section.model_validate({"learning_rate": 1e-3}).learning_rate.options() == {"peak": 1e-3}


def test_decay_leaves_norms_and_biases_alone_stacked_or_not():
    mask = matrix_mask(params())
    assert mask["embed"]["embedding"] and mask["layers"]["attn"]["q"]["kernel"]
    assert not mask["layers"]["attn_norm"]["scale"] and not mask["final_norm"]["scale"]
    zero = lambda p: jnp.zeros_like(p)  # noqa: E731
    before = params()
    for decay_vectors in (False, True):
        config = OptimizerConfig(name="adamw", weight_decay=0.5, decay_vectors=decay_vectors)
        after, _ = updated(make_optimizer(config, 0.1), gradient=zero)
        kernel = after["layers"]["attn"]["q"]["kernel"]
        np.testing.assert_allclose(kernel, 0.95 * before["layers"]["attn"]["q"]["kernel"], rtol=1e-6)
        kept = 0.95 if decay_vectors else 1.0
        np.testing.assert_allclose(after["layers"]["attn_norm"]["scale"], kept * np.ones((3, 4)), rtol=1e-6)
        np.testing.assert_allclose(after["final_norm"]["scale"], kept * np.ones(4), rtol=1e-6)


FIRST, SECOND = ("mu", "m", "trace"), ("nu", "n")


def dtypes(state, fields):
    """Of the arrays that a state of optax keeps in these fields."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {a.dtype.name for keys, a in leaves if any(getattr(k, "name", None) in fields for k in keys)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"b2": 0.95}),
        ("muon", {"adam_b2": 0.95}),  # its Adam, for what is no matrix
        ("adan", {}),
        ("lion", None),
        ("sgd", {"momentum": 0.9}),
        ("rmsprop", {}),
    ],
)
def test_moments_are_kept_in_their_dtype_and_the_numbers_are_close(name, options):
    keeps_first, keeps_second = name != "rmsprop", name not in ("lion", "sgd")
    given = {"moment_dtype": "bfloat16"} if keeps_first else {}
    given |= {"second_moment_dtype": "bfloat16"} if keeps_second else {}
    gradient = lambda p: jnp.cos(3 * p)  # noqa: E731
    after, state = updated(make_optimizer(OptimizerConfig(name=name, **given, **(options or {})), 1e-2), 3, gradient)
    plain, wide = updated(make_optimizer(OptimizerConfig(name=name, **(options or {})), 1e-2), 3, gradient)
    if keeps_first:
        assert dtypes(state, FIRST) == {"bfloat16"} and dtypes(wide, FIRST) == {"float32"}
    if keeps_second:
        assert dtypes(state, SECOND) == {"bfloat16"} and dtypes(wide, SECOND) == {"float32"}
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), plain, params())
    scale = 0.03 * max(map(float, jax.tree.leaves(moved)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=scale), after, plain)


def test_moments_of_bfloat16_parameters_may_be_float32():
    tree = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    config = OptimizerConfig(name="adamw", moment_dtype="float32", second_moment_dtype="float32")
    state = make_optimizer(config, 1e-3).init(tree)
    assert dtypes(state, FIRST) == dtypes(state, SECOND) == {"float32"}
    assert dtypes(make_optimizer(OptimizerConfig(name="adamw"), 1e-3).init(tree), SECOND) == {"bfloat16"}


def test_a_bfloat16_second_moment_falls_or_is_refused():
    """What the bound on `b2` is for: a bfloat16 number times 0.999 is the same number."""
    config = OptimizerConfig(name="adam", second_moment_dtype="bfloat16", b2=0.99)
    _, state = updated(make_optimizer(config, 0.0), 1)
    optimizer = make_optimizer(config, 0.0)
    still = jax.tree.map(jnp.zeros_like, params())
    _, later = optimizer.update(still, state, params())
    before, after = (s[0].nu["embed"]["embedding"] for s in (state, later))
    assert np.all(np.asarray(after < before)[np.asarray(before) > 0])
    assert jnp.all((before.astype(jnp.float32) * 0.999).astype(jnp.bfloat16) == before)
    with pytest.raises(ValidationError, match="with b2 = 0.999: .*expected b2 of at most 0.99, or float32"):
        OptimizerConfig(name="adam", second_moment_dtype="bfloat16")


def test_muon_treats_the_layers_of_a_stack_one_by_one():
    gradient = lambda p: jnp.cos(3 * p)  # noqa: E731
    after, _ = updated(make_optimizer(OptimizerConfig(name="muon"), 0.1), gradient=gradient)
    before = params()["layers"]["attn"]["q"]["kernel"]
    moved = after["layers"]["attn"]["q"]["kernel"] - before
    for layer in range(3):
        single = optax.contrib.muon(0.1)
        matrix = {"w": before[layer]}
        updates, _ = single.update({"w": gradient(before[layer])}, single.init(matrix), matrix)
        np.testing.assert_allclose(moved[layer], updates["w"], rtol=1e-4, atol=1e-6)
