"""Presets written from the vocabulary alone are the presets, bit for bit, through re-selection too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.methods import Probe, build, select
from jaxft.methods.selection.freezeasguard import freezeasguard, guard
from jaxft.partition import combine, unmarked, weights_by_path
from jaxft.weights import Packed, SparseDelta
from tests.methods.selection.toy import KEY, STEPS, dense, params, train

# A preset, and the same in `select` (and `full`, where whole weights train throughout), each as a configuration.
PRESETS = {
    "after-lora": (
        [{"name": "lora", "rank": 2, "on": "@attention"}, {"name": "paca", "rank": 3, "on": "@mlp"}],
        [
            {"name": "lora", "rank": 2, "on": "@attention"},
            {"name": "select", "score": "random", "granularity": "row", "budget": 3, "on": "@mlp"},
        ],
    ),
    "apet": ({"name": "apet", "count": 30}, {"score": "random", "budget": 30, "per": "model"}),
    "badam": (
        {"name": "badam", "period": 1},
        {
            "score": "cyclic",
            "granularity": "layer",
            "budget": 1,
            "on": "layers",
            "period": 1,
            "optimizer_state": "reset",
        },
    ),
    "badam-random": (
        {"name": "badam", "period": 2, "order": "random", "start": 2},
        {
            "score": {"name": "cyclic", "order": "random", "start": 2},
            "granularity": "layer",
            "budget": 1,
            "on": "layers",
            "period": 2,
            "optimizer_state": "reset",
        },
    ),
    "cofitune-without-damping": (
        {"name": "cofitune", "first": 1, "last": 3, "soft": 0},
        {"granularity": "matrix", "budget": 4, "on": "layers[1:3].mlp.{up,down}.kernel"},
    ),
    "esft": (
        {"name": "esft", "p": 0.6, "batches": 2},
        {
            "score": {"name": "gate", "batches": 2},
            "granularity": "expert",
            "budget": {"cover": 0.6},
            "on": "@experts",
        },
    ),
    "hft": (
        {"name": "hft", "rounds": 2, "embeddings": "freeze"},
        {
            "score": "balanced",
            "granularity": "matrix",
            "budget": 0.5,
            "per": "category",
            "on": "layers",
            "rounds": 2,
            "optimizer_state": "reset",
        },
    ),
    "hft-of-layers": (
        {"name": "hft", "level": "layer", "rounds": 4, "embeddings": "freeze", "optimizer_state": "carry"},
        {"score": "random", "granularity": "layer", "budget": 0.5, "on": "layers", "rounds": 4},
    ),
    "hft-of-the-model": (
        {"name": "hft", "level": "model", "rounds": 2, "embeddings": "freeze"},
        {
            "score": "random",
            "granularity": "matrix",
            "budget": 0.5,
            "on": "layers",
            "rounds": 2,
            "optimizer_state": "reset",
        },
    ),
    "layer-freezing": (
        {"name": "layer-freezing", "num_layers": 2},
        {"granularity": "layer", "budget": 2, "on": "layers[-2:]"},
    ),
    "lift": (
        {"name": "lift-principal-weights", "rank": 2, "budget": 0.1, "period": 2},
        {"score": {"name": "low_rank", "rank": 2}, "budget": 0.1, "period": 2},
    ),
    "lisa": (
        {"name": "lisa", "num_layers": 2, "period": 1},
        [
            {"name": "full", "on": "embed|head|final_norm", "missing": "skip"},
            {
                "name": "select",
                "score": "random",
                "granularity": "layer",
                "budget": 2,
                "on": "layers",
                "period": 1,
                "optimizer_state": "reset",
            },
        ],
    ),
    "locft-bf": (
        {"name": "locft-bf", "layer": -2},
        {"granularity": "matrix", "budget": 1, "on": "layers[-2].mlp.down.kernel"},
    ),
    "lt-sft": (
        {"name": "lt-sft", "budget": 50, "search_steps": 5},
        {"score": {"name": "change", "steps": 5}, "budget": 50, "per": "model", "on": "layers"},
    ),
    "paca": ({"name": "paca", "rank": 3}, {"score": "random", "granularity": "row", "budget": 3}),
    "pivotal-parameters-tuning": (
        {"name": "pivotal-parameters-tuning", "budget": 0.25, "search_steps": 5},
        {
            "score": {"name": "change", "steps": 5, "relative": True},
            "granularity": "matrix",
            "reduction": "norm",
            "budget": 0.25,
        },
    ),
    "s2ft": (
        {"name": "s2ft", "channels": 0.25, "heads": 1, "head_dim": 4, "score": "magnitude"},
        [
            {"name": "select", "granularity": "row", "budget": 0.25, "on": "layers.mlp.down.kernel"},
            {"name": "select", "granularity": "row", "budget": 1, "size": 4, "on": "layers.attn.o.kernel"},
        ],
    ),
    "sara-without-adjustment": (
        {"name": "sara", "budget": 0.2, "nuclear": 0, "adjustments": 0},
        {"score": "magnitude", "lowest": True, "budget": 0.2, "per": "model"},
    ),
    "shira": ({"name": "shira", "rank": 2}, {"score": "random", "budget": {"rank": 2}}),
    "skip-tuning": (
        {"name": "skip-tuning", "skip": 1},
        [
            {"name": "full", "on": "final_norm|head"},
            {"name": "select", "granularity": "layer", "budget": 3, "on": "layers[1:]"},
        ],
    ),
    "smt": (
        {"name": "smt", "budget": 10, "size": 4, "batches": 2},
        {
            "score": {"name": "gradient", "batches": 2},
            "granularity": "block",
            "size": 4,
            "budget": 10,
            "per": "model",
            "on": "layers.attn.{q,k,v}.kernel",
        },
    ),
    "spiel-without-regrowth": (
        {"name": "spiel", "budget": 5, "period": STEPS, "start": "gradient", "batches": 2},
        {"score": {"name": "gradient", "batches": 2}, "budget": 5},
    ),
    "spt-of-entries": (
        {"name": "spt", "budget": 60, "threshold": float("inf"), "batches": 2},
        {"score": {"name": "fisher", "batches": 2}, "budget": 60, "per": "model"},
    ),
}


def same(one, other, given=None) -> None:
    before = {p: np.asarray(w) for p, w in weights_by_path(params() if given is None else given).items()}
    for (first, _), (second, _) in zip(train(one, given), train(other, given), strict=True):
        weights, others = dense(first), dense(second)
        for path, w in weights.items():
            np.testing.assert_array_equal(w, others[path], err_msg=path)
        moved = [w != before[path] for path, w in weights.items()]
        assert any(m.any() for m in moved) and not all(m.all() for m in moved)
        before = weights


@pytest.mark.parametrize("name", PRESETS)
def test_the_vocabulary_alone_reproduces_a_preset(name):
    preset, spec = PRESETS[name]
    other = spec if isinstance(spec, list) else {"name": "select", **spec}
    same(build(preset), build(other), params(experts=True) if name == "esft" else None)


PLANNED = ("apet", "badam", "hft", "hft-of-layers", "hft-of-the-model", "lisa", "paca", "shira")


@pytest.mark.parametrize("name", PLANNED)
def test_what_is_drawn_at_random_is_planned_as_it_runs(name):
    """Shapes do not wait for the weights, which `jaxft plan` does not have."""
    method = build(PRESETS[name][0])
    planned = jax.eval_shape(lambda given: method.init(KEY, given, Probe(total_steps=STEPS)), params())
    made = method.init(KEY, params(), Probe(total_steps=STEPS))
    assert jax.tree.structure(planned) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(made), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize("spread", ["model", "layer", "leaf", "category"])
def test_noise_is_not_computed_to_plan_with_a_shared_budget(spread):
    """A stack of 70 thousand million entries: their noise would be 280 GB. Rows of different counts are packed."""
    shapes = {"layers": {"attn": {"q": {"kernel": jax.ShapeDtypeStruct((80, 24576, 36864), jnp.bfloat16)}}}}
    method = build({"name": "select", "score": "random", "budget": 4000, "per": spread, "on": "**"})
    planned = jax.eval_shape(lambda given: method.init(KEY, given, Probe(total_steps=STEPS)), shapes)
    cut = unmarked(combine(planned))["layers"]["attn"]["q"]["kernel"]
    assert isinstance(cut, SparseDelta) and isinstance(cut.values, Packed) == (spread != "layer")
    trained = sum(leaf.size for leaf in jax.tree.leaves(planned.trainable))
    assert trained == 80 * 4000 if spread == "layer" else 4000 <= trained < 1.1 * 4000


def test_a_preset_with_a_score_of_its_own_is_select_with_that_score():
    options = {"illegal": "illegal", "frozen": 0.75, "guard_steps": 2, "batches": 1}
    rates = {"user_rate": 1e-3, "mask_rate": 0.2}
    same(freezeasguard(**options), select(guard(**options, **rates), "matrix", 0.25, per="model", lowest=True))
