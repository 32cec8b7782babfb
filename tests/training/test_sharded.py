"""The same losses on every mesh, for full, HFT and LoRA, packed or not, with or without accumulation."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxft.distributed import MeshConfig, ShardingReport, make_mesh, shard_batch
from jaxft.methods import full, hft, lora
from jaxft.models import DecoderConfig, LanguageModel
from jaxft.training.loss import language_model_loss
from jaxft.training.state import init_state, shardings_of
from jaxft.training.step import make_train_step

STEPS, ROWS, SEQ, VOCAB = 20, 16, 16, 64
# 8 heads so that tensor=4 divides queries, keys and values; qk-norm, biases and an untied head take part.
MODEL = LanguageModel(DecoderConfig("qwen3", VOCAB, 32, 64, 2, 8, 4, 4, qk_norm=True, qkv_bias=True))
METHODS = {"full": full(), "hft": hft(), "lora": lora(rank=4)}
MESHES = {
    "data=8": MeshConfig(),
    "fsdp=8": MeshConfig(fsdp=8),
    "fsdp=2,tensor=4": MeshConfig(fsdp=2, tensor=4),
    "fsdp=2,sequence=2,tensor=2": MeshConfig(fsdp=2, sequence=2, tensor=2),
}


@functools.cache
def params():
    return MODEL.init(jax.random.key(0))


@functools.cache
def batches(packed):
    """A periodic language, so that there is something to learn; two segments and padding in a packed row."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(STEPS):
        start, stride = rng.integers(0, VOCAB, (ROWS, 1)), rng.integers(1, 4, (ROWS, 1))
        tokens = ((start + stride * np.arange(SEQ + 1)) % VOCAB).astype(np.int32)
        segments = np.ones((ROWS, SEQ), np.int32)
        if packed:
            segments[:, 6:] = 2
            segments[:, 14:] = 0
        positions = np.arange(SEQ) - (6 * (segments == 2) + 14 * (segments == 0))
        weights = (rng.uniform(size=(ROWS, SEQ)) < 0.7) & (segments > 0)
        out.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "weights": weights.astype(np.float32),
                "segment_ids": segments,
                "positions": positions.astype(np.int32),
            }
        )
    return out


def losses(method, config, accumulation):
    """Losses of 20 steps, unpacked and packed, with one compilation."""
    mesh = make_mesh(config or MeshConfig(), None if config else jax.devices()[:1])
    optimizer, report = optax.adamw(3e-3), ShardingReport()
    step, out = None, []
    for packed in (False, True):
        state, frozen = init_state(
            method, params(), optimizer, jax.random.key(1), mesh, logical_axes=MODEL.logical_axes(), report=report
        )
        step = step or make_train_step(
            language_model_loss(MODEL),
            method,
            optimizer,
            accumulation=accumulation,
            clip_norm=1.0,
            shardings=shardings_of(state),
        )
        for batch in batches(packed):
            state, metrics = step(state, frozen, shard_batch(batch, mesh))
            out.append(float(metrics["loss"]))
        assert int(state.skipped) == 0
    return np.array(out).reshape(2, STEPS), report


@functools.cache
def one_device(name):
    return losses(METHODS[name], None, 1)[0]


@pytest.mark.parametrize("name", METHODS)
def test_one_device_with_accumulation_equals_without(name):
    np.testing.assert_allclose(losses(METHODS[name], None, 2)[0], one_device(name), rtol=1e-5)
    assert np.all(one_device(name)[:, -1] < one_device(name)[:, 0])  # and it learns


# Every mesh and every method both with and without accumulation; half of the square, since compiling is what costs.
CASES = [(m, n, 1 + (i + j) % 2) for i, m in enumerate(MESHES) for j, n in enumerate(METHODS)]


@pytest.mark.parametrize(("mesh", "name", "accumulation"), CASES)
def test_every_mesh_gives_the_losses_of_one_device(mesh, name, accumulation):
    found, report = losses(METHODS[name], MESHES[mesh], accumulation)
    np.testing.assert_allclose(found, one_device(name), rtol=1e-5)
    assert not report.replicated, str(report)  # these shapes divide everywhere
