"""The model and the data on which methods are tried: a Llama of 4 layers, width 32, grouped heads, an untied head."""

import functools

import jax
import numpy as np

from jaxft.methods import Method
from jaxft.models import DecoderConfig, LanguageModel
from jaxft.testing import Trial
from jaxft.training.loss import language_model_loss

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_ids=(2,),
)
MODEL = LanguageModel(CONFIG)
# The same with four experts, of which a token goes to two, for methods that choose experts.
MIXTURE = LanguageModel(
    CONFIG.replace(model_type="mixtral", num_experts=4, num_experts_per_token=2, moe_intermediate_size=24)
)
OF_EXPERTS = ("esft",)
# One method for each kind of rewrite. What is costly to compile is tried on these; conformance is tried on all.
KINDS = ("full", "hft", "lora", "bitfit", "lt-sft", "ssf", "prompt-tuning")
LOSS = language_model_loss(MODEL, remat="none", chunks=1)
MIXTURE_LOSS = language_model_loss(MIXTURE, remat="none", chunks=1)


@functools.cache
def params(dtype: str = "float32", model: LanguageModel = MODEL) -> dict:
    """Weights large enough that every part shows in the loss."""
    made = model.init(jax.random.key(7))
    return jax.tree.map(lambda w: (w * 5 if w.ndim > 2 else w).astype(dtype), made)


@functools.cache
def batches(count: int = 3, rows: int = 8, seq: int = 16) -> tuple[dict, ...]:
    """Packed rows of two segments and some padding."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        tokens = rng.integers(3, 64, (rows, seq + 1)).astype(np.int32)
        cut = rng.integers(4, seq - 4, (rows, 1))
        place = np.arange(seq)[None]
        segments = np.where(place < cut, 1, np.where(place < seq - 2, 2, 0)).astype(np.int32)
        made.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "weights": ((segments > 0) & (place != cut - 1)).astype(np.float32),
                "segment_ids": segments,
                "positions": np.where(place < cut, place, place - cut).astype(np.int32),
            }
        )
    return tuple(made)


def trial(method: Method, **fields) -> Trial:
    return Trial(method, params(), LOSS, batches(), logical_axes=MODEL.logical_axes(), **fields)


def mixture_trial(method: Method, **fields) -> Trial:
    given = params(model=MIXTURE)
    return Trial(method, given, MIXTURE_LOSS, batches(), logical_axes=MIXTURE.logical_axes(), **fields)
