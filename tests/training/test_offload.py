"""What waits in host memory changes where arrays are, and nothing else."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.checkpoint import Checkpointer
from jaxft.config import impossible
from jaxft.distributed import MeshConfig, make_mesh, shard_batch
from jaxft.distributed.sharding import to_host_memory
from jaxft.errors import JaxftError
from jaxft.methods import build
from jaxft.models import DecoderConfig, LanguageModel
from jaxft.training import read_metrics, train
from jaxft.training.loss import language_model_loss
from jaxft.training.offload import in_turns
from jaxft.training.optimizer import OptimizerConfig, make_optimizer
from jaxft.training.state import init_state, shardings_of
from jaxft.training.step import make_train_step
from jaxft.weights.memory import HOST_MEMORY, fetch
from tests.training.tiny import tiny_config, write_tiny

MODEL = LanguageModel(DecoderConfig("llama", 64, 32, 64, 2, 8, 4, 4))
ROWS, SEQ = 8, 16


def batch(seed):
    tokens = np.random.default_rng(seed).integers(0, 64, (ROWS, SEQ + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((ROWS, SEQ), np.float32)}


def kinds(tree):
    """Of matrices of layers."""
    return {a.sharding.memory_kind for a in jax.tree.leaves(tree) if a.ndim >= 3}


def steps(method, offload, count=3):
    """State and frozen half after some steps on a mesh of 8 devices."""
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    method, optimizer = build(method), optax.adamw(1e-2)
    axes = MODEL.logical_axes()
    arguments = (MODEL.init(jax.random.key(0)), optimizer, jax.random.key(1), mesh)
    state, frozen = init_state(method, *arguments, logical_axes=axes, offload=offload)
    loss = language_model_loss(MODEL, remat="block")
    step = make_train_step(loss, method, optimizer, clip_norm=1.0, shardings=shardings_of(state))
    with jax.set_mesh(mesh):
        for seed in range(count):
            state, _ = step(state, frozen, shard_batch(batch(seed), mesh))
    return state, frozen


# Scanned and indexed stacks, factors beside them; moments that a method holds where they are.
CASES = [
    [{"name": "lora", "rank": 4, "on": "@attention"}, {"name": "hft"}],
    {"name": "progressive-freezing"},
]


@pytest.mark.parametrize("method", CASES)
def test_steps_are_the_same_wherever_arrays_wait(method):
    offloaded, frozen = steps(method, ("optimizer", "frozen"))
    expected, _ = steps(method, ())
    assert kinds(offloaded.opt_state) == {HOST_MEMORY}
    assert kinds(offloaded.trainable) == {"device"}
    assert kinds(frozen["layers"]) <= {HOST_MEMORY} and kinds(frozen["embed"]) == set()
    assert int(offloaded.skipped) == 0
    for a, b in zip(jax.tree.leaves(offloaded.opt_state), jax.tree.leaves(expected.opt_state), strict=True):
        assert a.dtype == b.dtype
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), offloaded.trainable, expected.trainable)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "prodigy", "schedule_free_adamw"])
def test_any_optimizer_takes_turns(name):
    """Moments of a parameter, factored ones, numbers that all parameters share, parameters kept in the state."""
    optimizer = make_optimizer(OptimizerConfig(name=name), 1e-2)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    shapes = {"layers": {"q": (3, 8, 16), "k": (3, 8, 8), "scale": (3, 8)}, "embed": (32, 8)}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params, gradients = (jax.tree.map(lambda s: draw(*s), shapes, is_leaf=is_shape) for _ in range(2))
    state = optimizer.init(params)
    one = NamedSharding(make_mesh(MeshConfig(data=1), jax.devices()[:1]), PartitionSpec())
    places = to_host_memory(state, jax.tree.map(lambda a: one, state))

    def update(gradients, params, state):
        extra = {"value": jnp.float32(1.0)}
        updates, state = optax.with_extra_args_support(optimizer).update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    turned = jax.jit(in_turns(update, places), out_shardings=(one, places))
    expected = found = (params, state)
    found = jax.device_put(found, (one, places))
    for _ in range(3):
        expected, found = jax.jit(update)(gradients, *expected), turned(gradients, *found)
    assert kinds(found[1]) == {HOST_MEMORY}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fetch(found), expected)


def test_a_run_resumes_bit_by_bit(tmp_path, capsys):
    """Checkpoints are taken from host memory and restored into it, through a new draw of the layers that train."""
    directory = write_tiny(tmp_path)
    sections = {
        "method": {"name": "hft", "rounds": 2},
        "evaluation": {"sets": {}},
        "training": {"steps": 6, "learning_rate": 1e-2, "offload": ["optimizer", "frozen"]},
        "checkpoint": {"every": 2, "keep_last": 9},
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(tiny_config(directory, whole, **sections))
    shutil.copytree(whole, resumed)
    for name in ("report.json", "checkpoints/4", "checkpoints/6"):
        path = resumed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(tiny_config(directory, resumed, **sections))
    assert "resuming after step 2" in capsys.readouterr().out
    found = []
    for output in (whole, resumed):
        with Checkpointer(output / "checkpoints") as checkpointer:
            leaves = checkpointer.record(6)["leaves"]
        losses = {r["step"]: r["loss"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r}
        found.append((leaves, losses))
    assert found[0] == found[1]


def test_what_cannot_wait_in_host_memory_is_refused():
    with pytest.raises(JaxftError, match='offload holds "optimiser": did you mean "optimizer"'):
        steps({"name": "full"}, ("optimiser",), count=0)


def test_layers_that_would_stay_on_the_device_are_refused(tmp_path):
    """Without recomputation the backward pass holds what the forward pass fetched: all layers."""
    directory, short = write_tiny(tmp_path), {"steps": 1, "learning_rate": 1e-2, "offload": ["frozen"]}
    problems = {}
    for remat in ("none", "block"):
        config = tiny_config(directory, tmp_path / "run", training=short, model={"path": "nano", "remat": remat})
        problems[remat] = impossible(config)
    assert problems["block"] == []
    ((key, text),) = problems["none"]
    assert key == ("training", "offload") and "expected model.remat block, attention, dots or offload" in text
