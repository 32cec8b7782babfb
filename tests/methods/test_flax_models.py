"""Models of other makes, in Linen and in NNX, tuned through `materialize` by the same methods."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxft.errors import JaxftError
from jaxft.methods import Probe, bitfit, chain, full, hft, lisa, lora, lt_sft, merge
from jaxft.partition import Roles, combine, weights_by_path
from jaxft.stacking import stack_layers
from jaxft.testing import Trial, check_frozen, check_identity, check_init, check_law, check_memory, check_trains
from jaxft.weights import materialize

BATCHES = [
    {"x": x, "y": np.argmax(x @ np.random.default_rng(9).normal(size=(12, 5)), -1)}
    for x in np.random.default_rng(0).normal(size=(3, 32, 12)).astype(np.float32)
]


def as_loss(apply_fn):
    def loss(params, batch, rng):
        losses = optax.softmax_cross_entropy_with_integer_labels(apply_fn(materialize(params), batch["x"]), batch["y"])
        return losses.sum(), jnp.asarray(losses.size, jnp.float32), {}

    return loss


# --- Linen: residual blocks in a scan, called by other names ---------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.gelu(nn.Dense(24, name="widen")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(16, name="narrow")(hidden), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(5, name="classifier")(x)


LINEN_ROLES = Roles(
    names={"linear": "blocks.{widen,narrow}.kernel", "head": "classifier.kernel"},
    categories={
        "kernel": ("blocks.widen.kernel", "blocks.narrow.kernel"),
        "norm": ("blocks.norm.scale", "blocks.norm.bias"),
        "bias": ("blocks.widen.bias", "blocks.narrow.bias"),
    },
    stacked=("blocks",),
)


@functools.cache
def linen():
    model = Linen()
    params = model.init(jax.random.key(0), BATCHES[0]["x"])["params"]
    return params, as_loss(lambda params, x: model.apply({"params": params}, x)), LINEN_ROLES


# --- NNX: a plain list of blocks, not stacked, with a leaf of its own kind -------------------------------------------


class Mixer(nnx.Module):
    def __init__(self, rngs):
        self.mix = nnx.Linear(16, 16, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(16))

    def __call__(self, x):
        return x + self.gain * jnp.tanh(self.mix(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(12, 16, rngs=rngs)
        self.mixers = nnx.List([Mixer(rngs) for _ in range(3)])
        self.out = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for mixer in self.mixers:
            x = mixer(x)
        return self.out(x)


NNX_ROLES = Roles(names={"linear": "mixers.*.mix.kernel", "head": "out.kernel"}, categories={}, stacked=())


@functools.cache
def nnx_model():
    graphdef, state = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)

    def apply_fn(params, x):
        filled = jax.tree.map(lambda a: a, state)  # a copy: filling it changes it in place
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graphdef, filled)(x)

    return nnx.to_pure_dict(state), as_loss(apply_fn), NNX_ROLES


@functools.cache
def stacked_nnx():
    """The same model for methods that choose among layers: they see a stack, the model its list."""
    params, _, _ = nnx_model()
    stacked, unstack = stack_layers(params, "mixers")
    _, loss, _ = nnx_model()
    roles = Roles(
        names={"linear": "layers.mix.kernel", "head": "out.kernel"},
        categories={"kernel": ("layers.mix.kernel",), "norm": ("layers.gain",)},
    )
    return stacked, lambda params, *rest: loss(unstack(materialize(params)), *rest), roles


METHODS = {
    "linen-full": (linen, full()),
    "linen-lora": (linen, lora(rank=2)),
    "linen-hft": (linen, hft(rounds=3)),
    "linen-hft-layer": (linen, hft(level="layer", embeddings="train")),
    "linen-lisa": (linen, lisa(num_layers=2, period=2, always="stem|classifier")),
    "linen-bitfit": (linen, bitfit()),
    "linen-lt-sft": (linen, lt_sft(budget=50, search_steps=2, on="blocks")),
    "linen-lora+full": (linen, chain(lora(rank=2, on="blocks[1:].widen.kernel"), full(on="classifier|blocks[0].norm"))),
    "nnx-full": (nnx_model, full(on="mixers|out")),
    "nnx-lora": (nnx_model, chain(lora(rank=2), full(on="out|gain"))),
    "nnx-layers": (nnx_model, full(on="mixers[1:]")),
    "nnx-bitfit": (nnx_model, bitfit(on="**.kernel")),
    "nnx-hft": (stacked_nnx, hft(rounds=2)),
    "nnx-lisa": (stacked_nnx, lisa(num_layers=2, period=2, always="stem|out")),
    "nnx-lt-sft": (nnx_model, lt_sft(budget=50, search_steps=2, on="mixers.*.mix.kernel")),
}


@pytest.mark.parametrize("name", METHODS)
def test_any_flax_model_is_tuned_through_materialize(name):
    model, method = METHODS[name]
    params, loss, roles = model()
    trial = Trial(method, params, loss, BATCHES, roles=roles)
    for check in (check_init, check_identity, check_law, check_frozen, check_trains, check_memory):
        check(trial)
    plain = merge(trial.end_tuned, roles=roles)
    names = set(weights_by_path(plain))
    assert names == set(weights_by_path(params)), "merged: ordinary parameters of the same model"


def test_training_learns():
    params, loss, roles = linen()
    trial = Trial(lora(rank=4), params, loss, BATCHES, roles=roles, steps=40)
    losses = [e.loss for e in trial.events]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("method", [hft(), lisa()])
def test_methods_of_stacked_layers_say_that_there_are_none(method):
    params, *_ = nnx_model()
    with pytest.raises(JaxftError, match="no stacked matrix|have none of"):
        method.init(jax.random.key(0), params, Probe(roles=NNX_ROLES))


def test_layers_are_stacked_and_taken_apart():
    params, *_ = nnx_model()
    stacked, unstack = stack_layers(params, "mixers")
    assert stacked["layers"]["mix"]["kernel"].shape == (3, 16, 16)
    jax.tree.map(np.testing.assert_array_equal, unstack(stacked), params)
    named = {"stem": params["stem"], "block_10": params["mixers"][1], "block_9": params["mixers"][0]}
    stacked, unstack = stack_layers(named, "block_*", name="blocks")
    np.testing.assert_array_equal(stacked["blocks"]["gain"][0], named["block_9"]["gain"])
    jax.tree.map(np.testing.assert_array_equal, unstack(stacked), named)
    listed = {"blocks": [params["mixers"][0], params["mixers"][1]]}
    stacked, unstack = stack_layers(listed, "blocks")
    jax.tree.map(np.testing.assert_array_equal, unstack(stacked), listed)


def test_layers_that_make_no_stack_are_refused():
    params, *_ = nnx_model()
    with pytest.raises(JaxftError, match=r'no layers "mixer" .*did you mean "mixers"'):
        stack_layers(params, "mixer")
    with pytest.raises(JaxftError, match="no layers"):
        stack_layers(params, "stem")
    with pytest.raises(JaxftError, match="a key of the parameters already"):
        stack_layers(params, "mixers", name="stem")
    other = {**params["mixers"][1], "gain": jnp.ones(3)}
    with pytest.raises(JaxftError, match=r"layer 1 of \"mixers\" has gain: f.*\[3\], layer 0 f.*\[16\]"):
        stack_layers({"mixers": [params["mixers"][0], other]}, "mixers")


def test_layers_of_a_list_are_selected_by_range():
    params, *_ = nnx_model()
    tuned = full(on="mixers[1:]").init(jax.random.key(0), params, Probe(roles=NNX_ROLES))
    trained = weights_by_path(tuned.trainable)
    assert trained and all(p.startswith(("mixers.1", "mixers.2")) for p in trained)
    assert combine(tuned)["mixers"][0]["mix"]["kernel"] is params["mixers"][0]["mix"]["kernel"]
