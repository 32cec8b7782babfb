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
        ({"name": "rprop", "moment_dtype": "bfloat16"}, "cannot choose the dtype of its moments"),
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


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adan"])
def test_moment_dtype(name):
    if name == "adan":  # has no such option
        with pytest.raises(ValidationError):
            OptimizerConfig(name=name, moment_dtype="bfloat16")
        return
    state = make_optimizer(OptimizerConfig(name=name, moment_dtype="bfloat16"), 1e-3).init(params())
    assert jnp.dtype("bfloat16") in {a.dtype for a in jax.tree.leaves(state)}
    state = make_optimizer(OptimizerConfig(name=name), 1e-3).init(params())
    assert jnp.dtype("bfloat16") not in {a.dtype for a in jax.tree.leaves(state)}


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
