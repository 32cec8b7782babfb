"""What is computed again of a layer, and its input in host memory: fetched an iteration ahead, the same gradients."""

import functools
import sys

import jax
import numpy as np
import pytest
from jax.extend.core import Literal, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from jaxft.methods import build
from jaxft.methods.probe import Probe
from jaxft.models import LanguageModel
from jaxft.models.attention import attention
from jaxft.partition import combine
from jaxft.training.loss import language_model_loss
from jaxft.weights import PROMPT, SoftPrompt, add_site
from jaxft.weights.training import in_training
from tests.methods.tiny import MIXTURE, MODEL, batches, params

LAYERS = MODEL.config.num_layers
OPTIONS = {"hft": {"rounds": 2}, "lora": {"dropout": 0.2}}


def cut(name, model=MODEL):
    method = build({"name": name, **OPTIONS.get(name, {})})
    tuned = method.init(jax.random.key(0), params(model=model), Probe())
    moved = jax.tree.map(lambda x: x + 0.1 * np.sin(np.arange(x.size, dtype=x.dtype)).reshape(x.shape), tuned.trainable)
    return tuned._replace(trainable=moved)  # away from the start, where the gradient of half a LoRA is zero


def loss_of(tuned, remat, model, trainable):
    params = in_training(combine(tuned._replace(trainable=trainable)), jax.random.key(2))
    total, weight, _ = language_model_loss(model, remat=remat, chunks=1)(params, batches()[0], jax.random.key(1))
    return total / weight


def gradient(tuned, remat, model=MODEL):
    return jax.jit(jax.grad(functools.partial(loss_of, tuned, remat, model)))(tuned.trainable)


@pytest.mark.parametrize(
    ("name", "model"),
    [("full", MIXTURE), ("hft", MODEL), ("lora", MODEL), ("prompt-tuning", MODEL), ("layer-freezing", MODEL)],
    ids=lambda value: value if isinstance(value, str) else value.config.model_type,
)
def test_gradients_are_those_of_layers_recomputed(name, model):
    tuned = cut(name, model)
    for a, b in zip(*(jax.tree.leaves(gradient(tuned, remat, model)) for remat in ("offload", "block")), strict=True):
        assert np.abs(np.asarray(b)).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def is_copy_to(equation, space):
    return equation.primitive.name == "device_put" and equation.outvars[0].aval.memory_space == space


@pytest.mark.parametrize("name", ["full", "bitfit", "lora", "hft"])
def test_no_gradient_is_computed_that_is_not_asked_for(name):
    tuned = cut(name)

    def products(remat):
        traced = jax.make_jaxpr(jax.grad(functools.partial(loss_of, tuned, remat, MODEL)))(tuned.trainable)
        return sum(e.primitive.name == "dot_general" for e in equations(traced.jaxpr))

    # The last projection of a layer that is computed again, three products with LoRA, is for nothing; XLA drops it.
    assert products("offload") <= products("block") + (3 if name == "lora" else 1)


def test_projections_of_experts_are_kept_with_dots():
    def products(remat):
        tuned = cut("full", MIXTURE)
        step = jax.jit(jax.grad(functools.partial(loss_of, tuned, remat, MIXTURE)))
        return sum(e.primitive.name == "ragged_dot_general" for e in equations(step.trace(tuned.trainable).jaxpr.jaxpr))

    assert products("dots") == products("none") < products("block")


def kernels(remat, implementation, name, prompt=0, **changes):
    """How often a kernel of attention stands in the gradient of a model of a row of 128 tokens."""
    model = LanguageModel(MODEL.config.replace(num_layers=2, **{"sliding_layers": (), **changes}))
    tokens = jax.ShapeDtypeStruct((1, 128), jax.numpy.int32)

    def loss(params, tokens):
        states = model.hidden(params, tokens, remat=remat, attention=implementation, dtype=jax.numpy.bfloat16)
        return jax.numpy.sum(states.astype(jax.numpy.float32))

    params = model.abstract()
    if prompt:
        embedding = jax.ShapeDtypeStruct((prompt, model.config.hidden_size), jax.numpy.float32)
        params = add_site(params, PROMPT, SoftPrompt(embedding), layers=None)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr
    found = list(equations(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]))
    labels = [e.params["name"] if e.primitive.name == "pallas_call" else e.primitive.name for e in found]
    return sum(label.startswith(name) for label in labels)


TWO_KINDS = {"sliding_window": 64, "sliding_layers": (True, False)}


@pytest.mark.parametrize("changes", [{}, TWO_KINDS, {"prompt": 3}], ids=["one", "two", "prompt"])
def test_the_result_of_attention_is_kept(changes):
    """Also where layers of two kinds have their attention in the branches of a conditional, and of a soft prompt."""
    kinds = 2 if changes == TWO_KINDS else 1
    for remat, times in {"block": 2, "attention": 1, "dots": 1, "none": 1}.items():
        assert kernels(remat, "splash", "splash_mha_fwd", **changes) == kinds * times, remat


@pytest.mark.parametrize(("remat", "times"), [("block", 2), ("attention", 1), ("dots", 1)])
def test_the_result_of_attention_of_cudnn_is_kept(remat, times, monkeypatch):
    """By name of an operation that is no part of JAX's interface; without a GPU it can be traced."""
    monkeypatch.setattr(sys.modules[attention.__module__], "platform", lambda: "gpu")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 90500)
    assert kernels(remat, "cudnn", "dot_product_attention_fwd_wrapper") == times


def test_an_input_is_fetched_beside_the_layer_above():
    tuned = cut("lora")
    traced = jax.make_jaxpr(jax.grad(functools.partial(loss_of, tuned, "offload", MODEL)))(tuned.trainable)
    scans = [e for e in equations(traced.jaxpr) if e.primitive.name == "scan" and e.params["length"] == LAYERS]
    forward, backward = sorted(scans, key=lambda e: e.params["reverse"])
    hidden = (8, 16, MODEL.config.hidden_size)

    def stacked(equation):
        avals = [v.aval for v in equation.outvars[equation.params["num_carry"] :]]
        return [a.memory_space for a in avals if a.shape == (LAYERS, *hidden)]

    assert stacked(forward) == [jax.memory.Space.Host], "one input of each layer is kept, in host memory"
    body = backward.params["jaxpr"].jaxpr
    fetches = [e for e in body.eqns if is_copy_to(e, jax.memory.Space.Device)]
    assert len(fetches) == 1 and fetches[0].outvars[0].aval.shape == hidden
    fetched = fetches[0].outvars[0]
    assert not [e for e in body.eqns if any(v is fetched for v in e.invars if not isinstance(v, Literal))]
    assert sum(v is fetched for v in body.outvars[: backward.params["num_carry"]]) == 1
