"""Losses. A loss is `(params, batch, rng) -> (sum, weight, aux)`: sums over tokens, divided only by the train step.

The softmax cross-entropy here never forms the logits `[batch, seq, vocab]`: it walks over pieces of the sequence and,
when gradients are wanted, computes them in the same pass, so that the head's matmul runs three times (logits, gradient
of the hidden states, gradient of the head) and not four, as it would if the logits were recomputed. The idea is that of
Liger Kernel's fused linear cross-entropy (arXiv:2410.10989).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.models.language_model import parted_head_of
from jaxft.models.sharding import MESH_AXES, mesh_axes

Batch = dict[str, Array]
Loss = Callable[[Any, Batch, PRNGKeyArray], tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]]
Head = Callable[[Float[Array, "... dim"]], Float[Array, "... vocab"]]

CHUNK_ELEMENTS = 2**23  # logits held at once, per shard of the batch: 32 MiB in float32
# But never fewer tokens on a device, or reading the head would take longer than its products; up to 512 MiB.
CHUNK_TOKENS, MOST_ELEMENTS = 1024, 2**27
_FEWEST_TOKENS = 128  # of each shard, where a device computes with the tokens of several


class CrossEntropy(NamedTuple):
    """Sums over the tokens of a batch, float32 scalars.

    loss: weighted sum of token losses, differentiable in hidden states, head and weights.
    weight: sum of weights.
    correct: number of tokens of nonzero weight whose target has the highest logit.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]


def chunks_for(rows: int, seq_len: int, vocab: int, row_shards: int = 1, gathered: int = 1) -> int:
    """Into how many pieces (a power of two) to cut `seq_len` so that a piece's logits stay near `CHUNK_ELEMENTS`.

    A pass over a bfloat16 head whose gradient is summed in float32 moves 12 bytes for 6 FLOPs a token and entry: on a
    TPU v5e, of 240 FLOPs a byte, 480 tokens keep the matrix unit busy, on a v6e 1120 (`benchmarks/loss.py`).
    """
    fewest = max(_FEWEST_TOKENS, min(CHUNK_TOKENS, MOST_ELEMENTS // vocab) // gathered)
    tokens = max(fewest, CHUNK_ELEMENTS // vocab) * row_shards
    wanted = -(-rows * seq_len // tokens)
    return min(1 << (wanted - 1).bit_length(), seq_len)


def cross_entropy(
    hidden: Float[Array, "batch seq dim"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    head: Head,
    *,
    chunks: int | None = None,
    row_shards: int = 1,
    gathered: int = 1,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """Softmax cross-entropy of `head(hidden)` against `targets`, without ever holding all logits.

    `loss = sum_t weights_t * (logsumexp(logits_t) - logits_t[target_t] + z_loss * logsumexp(logits_t)**2)`, float32.

    Args:
        hidden: final hidden states, any floating dtype; the head's products run in it.
        targets: token ids. Where the weight is 0 any id will do.
        weights: loss weight of each target; a token of weight 0 contributes exactly 0, to gradients too.
        head: hidden states to logits. May close over traced parameters (arrays, weight nodes, a tied embedding): those
            being differentiated get their gradient, for others none is computed.
        chunks: pieces of the sequence; by default enough for 32 MiB of float32 logits, or 1024 tokens, per row shard.
        row_shards: over how many devices the batch is divided (for the default of `chunks`).
        gathered: of those, over how many the head is divided too, so that each computes with the tokens of all of them.
        z_loss: coefficient of the squared log-partition (PaLM, arXiv:2204.02311, section 5).
    """
    batch, seq_len, dim = hidden.shape
    if chunks is None:
        vocab = jax.eval_shape(head, jax.ShapeDtypeStruct((1, 1, dim), hidden.dtype)).shape[-1]
        chunks = chunks_for(batch, seq_len, vocab, row_shards, gathered)
    size = -(-seq_len // chunks)
    short = size * chunks - seq_len

    def cut(x: Array) -> Array:
        # Piece j holds positions j, j + chunks, ...: strided, so that a sequence divided over devices is cut on each.
        x = jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)) if short else x
        return jnp.moveaxis(x.reshape(batch, size, chunks, *x.shape[2:]), 2, 0)

    example = jax.ShapeDtypeStruct((batch, size, dim), hidden.dtype)
    pure_head, parameters = jax.closure_convert(head, example)
    weights = weights.astype(jnp.float32)
    loss, correct = _summed(pure_head, z_loss, cut(hidden), cut(targets), cut(weights), parameters)
    return CrossEntropy(loss, jnp.sum(weights), correct)


def _piece(head: Callable, z_loss: float, hidden: Array, targets: Array, weights: Array, parameters: list) -> tuple:
    """The weighted loss of one piece; aux: token losses and the number of correct tokens."""
    logits = head(hidden, *parameters).astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    partition = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]
    # A masked sum, not a gather: it partitions over a divided vocabulary without collecting the logits.
    chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    target = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    losses = partition - target + z_loss * jnp.square(partition)
    losses = jnp.where(weights == 0, 0, losses)  # 0 * inf would be nan
    correct = jnp.sum((target >= top[..., 0]) & (weights != 0), dtype=jnp.float32)
    return jnp.sum(weights * losses), (losses, correct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(head: Callable, z_loss: float, hidden: Array, targets: Array, weights: Array, parameters: list) -> tuple:
    def body(total: tuple, piece: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        loss, (_, correct) = _piece(head, z_loss, *piece, parameters)
        return (total[0] + loss, total[1] + correct), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), (hidden, targets, weights))[0]


def _summed_forward(head: Callable, z_loss: float, hidden: Any, targets: Any, weights: Any, parameters: list) -> tuple:
    perturbed = [p.perturbed for p in parameters]
    values = [p.value for p in parameters]

    def loss_of(hidden: Array, trained: list, targets: Array, weights: Array) -> tuple:
        left = iter(trained)
        merged = [next(left) if p else v for p, v in zip(perturbed, values, strict=True)]
        return _piece(head, z_loss, hidden, targets, weights, merged)

    trained = [v for p, v in zip(perturbed, values, strict=True) if p]

    def body(total: tuple, piece: tuple) -> tuple[tuple, tuple]:
        hidden, targets, weights = piece
        (loss, (losses, correct)), (dhidden, dtrained) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
            hidden, trained, targets, weights
        )
        sums = [s + d.astype(s.dtype) for s, d in zip(total[2], dtrained, strict=True)]
        return (total[0] + loss, total[1] + correct, sums), (dhidden, losses)

    zero = jnp.zeros((), jnp.float32)
    # Pieces are summed in float32 at least, whatever the head is stored in.
    sums = [jnp.zeros(t.shape, jnp.promote_types(t.dtype, jnp.float32)) for t in trained]
    (loss, correct, sums), (dhidden, losses) = jax.lax.scan(
        body, (zero, zero, sums), (hidden.value, targets.value, weights.value)
    )
    return (loss, correct), (dhidden, losses, _spread(sums, perturbed), values)


def _spread(items: list, mask: list[bool]) -> list:
    left = iter(items)
    return [next(left) if m else None for m in mask]


def _summed_backward(head: Callable, z_loss: float, residuals: tuple, cotangents: tuple) -> tuple:
    dhidden, losses, sums, values = residuals
    g = cotangents[0]
    if isinstance(g, SymbolicZero):
        g = jnp.zeros((), jnp.float32)
    dvalues = [None if s is None else (g * s).astype(v.dtype) for s, v in zip(sums, values, strict=True)]
    return (g * dhidden).astype(dhidden.dtype), None, g * losses, dvalues


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _gathered(vocab: int) -> int:
    """Of the devices that divide the rows of a batch, how many divide a head of `vocab` words, on the ambient mesh."""
    axes = set(mesh_axes("vocab", vocab) or ()) & set(MESH_AXES["batch"]) if vocab else set()
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def language_model_loss(
    model: Any,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "block",
    attention: str = "auto",
    z_loss: float = 0.0,
    chunks: int | None = None,
    row_shards: int = 1,
    router_aux_loss: float | None = None,
) -> Loss:
    """Next-token cross-entropy of a language model as `(params, batch, rng) -> (sum, weight, aux)`.

    Args:
        model: has `hidden(params, tokens, positions=, segment_ids=, dtype=, remat=, attention=)` and
            `logits(params, hidden)`; where it has `head(params)` too, `logits` gets that.
        compute_dtype: dtype of activations and matrix products.
        remat: what the backward pass recomputes, see the model.
        attention: the attention implementation, see the model.
        z_loss: see `cross_entropy`.
        chunks: see `cross_entropy`.
        row_shards: see `cross_entropy`.
        router_aux_loss: coefficient of the load-balancing loss of a mixture of experts, which is added to the mean
            token loss; None takes what `model.config` says, as transformers does: `router_aux_loss_coef` if
            `output_router_logits`. Its statistics are those of the tokens that are no padding, of one micro-batch.

    The batch has `tokens`, `targets`, `weights`, and optionally `positions` and `segment_ids`. `aux` counts tokens, as
    float32 sums: `correct`, `target_tokens` (nonzero weight), `real_tokens` (no padding), `padded_tokens` (all).

    Raises:
        JaxftError: a coefficient for a model without experts.
    """
    config: Any = getattr(model, "config", None)
    has_experts = bool(getattr(config, "num_experts", 0))
    if router_aux_loss and not has_experts:
        raise JaxftError(f"router_aux_loss = {router_aux_loss}: the model has no experts, expected 0 or null")
    if router_aux_loss is None:
        router_aux_loss = config.router_aux_loss_coef if has_experts and config.output_router_logits else 0.0

    def loss(params: Any, batch: Batch, rng: PRNGKeyArray) -> tuple[Array, Array, dict[str, Array]]:
        hidden = model.hidden(
            params,
            batch["tokens"],
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
            dtype=compute_dtype,
            remat=remat,
            attention=attention,
            **({"routing": True} if router_aux_loss else {}),
        )
        hidden, routing = hidden if router_aux_loss else (hidden, None)
        weights = batch["weights"]
        head, place = parted_head_of(model, params)
        found = cross_entropy(
            hidden,
            batch["targets"] if place is None else jnp.take(place, batch["targets"]),
            weights,
            lambda h: model.logits(head, h),
            chunks=chunks,
            row_shards=row_shards,
            gathered=_gathered(getattr(config, "vocab_size", 0)),
            z_loss=z_loss,
        )
        segments = batch.get("segment_ids")
        size = jnp.asarray(weights.size, jnp.float32)
        aux = {
            "correct": found.correct,
            "target_tokens": jnp.sum(weights != 0, dtype=jnp.float32),
            "real_tokens": size if segments is None else jnp.sum(segments > 0, dtype=jnp.float32),
            "padded_tokens": size,
        }
        total = found.loss
        if routing is not None:  # the train step divides by the weight
            total = total + router_aux_loss * routing.load_balancing_loss() * found.weight
        return total, found.weight, aux

    return loss
