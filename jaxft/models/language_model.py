"""A language model: tokens to hidden states to scores. A batch flows `embed -> layers -> final_norm -> logits`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jaxft.models.architecture import Decoder, logical_axes
from jaxft.models.attention import PROMPT_SEGMENT
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import rms_norm, run_layers
from jaxft.models.sharding import constrain, from_residual, mesh_axes, moved, spec_of
from jaxft.weights import (
    RowSplit,
    Tree,
    embed,
    embed_rule,
    is_node,
    linear,
    materialize,
    parted,
    prompt_embeddings,
    site,
    unembed,
    unembed_parted,
    unembed_rule,
    value,
)
from jaxft.weights.reduction import (
    exchanged,
    matmul_of_columns,
    scattered_in,
    stages_for,
    stages_of_exchange,
)


def head_of(model: Any, params: Tree) -> Tree:
    """What `model.logits` is given of `params`, for calls in pieces: `model.head(params)`, all of it without such."""
    return model.head(params) if hasattr(model, "head") else params


def parted_head_of(model: Any, params: Tree) -> tuple[Tree, Int[Array, " vocab"] | None]:
    """`model.parted_head(params)`; the head as it is without such."""
    return model.parted_head(params) if hasattr(model, "parted_head") else (head_of(model, params), None)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder language model: a config, and pure functions of a params tree (docs/architecture.md).

    `generation_config` is what a checkpoint says about sampling from it; it takes no part in the model's identity.
    """

    config: DecoderConfig
    generation_config: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    def init(self, rng: Key[Array, ""], dtype: Any = jnp.float32) -> Tree:
        """Fresh params of `dtype`: normal(`initializer_range`) matrices, zero biases, norm scales of one."""
        decoder = Decoder(self.config, dtype=dtype, rngs=nnx.Rngs(params=rng))
        return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))

    def abstract(self, dtype: Any = jnp.float32) -> Tree:
        """The params tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), dtype))

    def logical_axes(self) -> Tree:
        """For each leaf of the params a tuple with the names of its dimensions (`architecture.logical_axes`), which
        `jaxft.distributed` maps to mesh axes."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(self.abstract())
        return treedef.unflatten([logical_axes([key.key for key in path]) for path, _ in flat])

    def hidden(
        self,
        params: Tree,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "#batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        *,
        dtype: Any = jnp.float32,
        remat: str = "block",
        attention: str = "auto",
        cache: dict | None = None,
        routing: bool = False,
    ) -> Any:
        """Hidden states `[batch, seq, dim]` of `dtype` after the final norm; with a cache, `(hidden, cache)`.
        With `routing`, `(hidden, Routing)`: where a mixture of experts sent its tokens, by layer.

        Without `segment_ids` a row is one segment; without `positions` they restart at 0 in every segment. Params may
        be of any dtype and hold weight nodes; a soft prompt at the site "prompt" precedes every row and every segment
        sees it, so that packed rows mean what their segments mean apart.
        """
        config = self.config
        if cache is not None and segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None] if segment_ids is None else positions_in_segments(segment_ids)
            positions = positions if cache is None else positions + cache["length"] - cache["prompt"]
        x = self._scaled(_look_up(tokens, params["embed"]["embedding"]).astype(dtype))
        # Looked up where each slice of the table is, then exchanged once; without this XLA replicates the activations.
        x = constrain(x, "replicas", "sequence", "embed")
        x = _exchange(site(params, "embed", x))
        prompt = prompt_embeddings(params)
        length = 0 if prompt is None else prompt.shape[0]
        positions = positions + length
        if prompt is not None and cache is None:
            prompt = self._scaled(prompt.astype(dtype))
            x, positions, segment_ids = _prepend(prompt, x, positions, segment_ids)
        held = {"prompt": length} if cache is None else {"cache": cache}
        x, cache, routed = run_layers(
            config, params["layers"], x, positions, segment_ids, remat=remat, implementation=attention, **held
        )
        x = from_residual(site(params, "final_norm", rms_norm(x, params["final_norm"], config)))
        x = x if cache is not None else x[:, length:]
        if routing:
            return x, routed
        return x if cache is None else (x, cache)

    def head(self, params: Tree) -> Tree:
        """What `logits` reads of `params`, to be taken once where it is called for many pieces of a sequence.

        A tied table is stored divided by width, for the look-up. On a mesh it becomes an array divided by vocabulary,
        as a head is: else each piece would gather it. Nodes that have an `unembed` rule of their own stay.
        """
        if "parted" in params:
            return params
        if head := params.get("head"):
            return {"head": head}
        table = params["embed"]["embedding"]
        divided = mesh_axes("vocab", self.config.vocab_size) is not None
        if divided and type(table) not in unembed_rule.registry:
            table = constrain(materialize(table), "vocab", None)
        return {"embed": {"embedding": table}}

    def parted_head(self, params: Tree) -> tuple[Tree, Int[Array, " vocab"] | None]:
        """`head`, for those whom the order of scores does not concern, and where the score of each word will be.

        Of a tied table of which some rows train those lie together, on each device that holds a part, so that a
        gradient is computed for them alone. Otherwise scores are where they belong, and there is nothing to say (None).
        """
        table = None if "head" in params else params["embed"]["embedding"]
        axes = mesh_axes("vocab", self.config.vocab_size) or ()
        parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
        if not isinstance(table, RowSplit) or table.axis != -2 or table.index.shape[0] % parts:
            return self.head(params), None
        words, rows, place = parted(table, parts)
        return {"parted": (constrain(words, "vocab", None), constrain(rows, "vocab", None, None))}, place

    def logits(self, params: Tree, hidden: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
        """Scores of the next token in fp32, computed in the dtype of `hidden`; a head of its own or a tied one."""
        # The vocabulary is divided over `fsdp` too, where the batch was: hidden states are gathered, the head never is.
        middle = (None,) * (hidden.ndim - 3)
        layout = ("replicas", *middle, "sequence") if hidden.ndim > 2 else ("replicas",) * (hidden.ndim - 1)
        divided = mesh_axes("vocab", self.config.vocab_size) is not None
        params = self.head(params)
        head = params.get("head", {})
        whole = None if "parted" in params else head["kernel"] if head else params["embed"]["embedding"]
        is_array = whole is not None and not is_node(whole)
        stages = stages_for(hidden) if is_array and mesh_axes("vocab", self.config.vocab_size) == ("fsdp",) else ()
        if divided and not stages:  # the gradient goes back divided as the batch is
            hidden = moved(hidden, (*layout, None), ("batch", *layout[1:], None))
        with scattered_in(None):  # over `fsdp` lie the columns of a head, not its rows
            if whole is None:
                table, rows = params["parted"]
                scores = unembed_parted(hidden, table.astype(hidden.dtype), rows)
            elif stages:
                scores = matmul_of_columns(hidden, (whole if head else whole.T).astype(hidden.dtype), stages)
            else:
                scores = linear(hidden, whole) if head else unembed(hidden, whole)
        scores = (constrain(scores, *layout, "vocab") if divided else scores).astype(jnp.float32)
        scores = scores + value(head["bias"], jnp.float32) if "bias" in head else scores
        cap = self.config.final_logit_softcapping
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def _scaled(self, embeddings: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        """Embeddings as the layers read them. The factor is rounded to the compute dtype, as in transformers; virtual
        tokens take it too, being rows like those of the table."""
        if not self.config.scale_embeddings:
            return embeddings
        return embeddings * jnp.asarray(math.sqrt(self.config.hidden_size), embeddings.dtype)

    def init_cache(self, params: Tree, batch: int, length: int, *, dtype: Any = jnp.float32) -> Any:
        """An empty key/value cache for `length` tokens in each of `batch` rows, to be passed to `hidden`.

        Tokens are appended for all rows at once; rows of unequal length are padded with segment 0. A soft prompt is in
        the cache from the start: it attends to itself only, so its keys and values do not depend on what follows.
        """
        config, prompt = self.config, prompt_embeddings(params)
        held = 0 if prompt is None else prompt.shape[0]
        shape = (config.num_layers, batch, held + length, config.num_kv_heads, config.head_dim)
        cache = {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "positions": jnp.zeros((batch, held + length), jnp.int32),
            "segment_ids": jnp.zeros((batch, held + length), jnp.int32),
            "length": jnp.zeros((), jnp.int32),
            "prompt": jnp.asarray(held, jnp.int32),
        }
        if prompt is not None:
            x = jnp.broadcast_to(self._scaled(prompt.astype(dtype)), (batch, *prompt.shape))
            segment_ids = jnp.full((batch, held), PROMPT_SEGMENT, jnp.int32)
            _, filled, _ = run_layers(config, params["layers"], x, jnp.arange(held)[None], segment_ids, cache=cache)
            return filled
        return cache


def _look_up(tokens: Int[Array, "batch seq"], table: Any) -> Float[Array, "batch seq dim"]:
    """`embed`. Each device looks up the slice of the width that it has, and adds up the gradient of that slice.

    Left alone, XLA sums the gradient of a tied table on all devices. Of one copy it only has to be told where the
    gradient lies. With 64 copies of 64 slices it would gather the table all the same; so each device does it by itself
    where there are copies, which takes a little more memory.
    """
    if type(table) in embed_rule.registry:
        return embed(tokens, table)
    table = materialize(table)
    words, width = (mesh_axes(name, size) for name, size in zip(("words", "embed"), table.shape, strict=True))
    rows = spec_of(tokens.shape, ("replicas", "sequence"))
    if words or not width or rows[0] is None:
        return embed(tokens, constrain(table, "words", "embed"))
    return jax.shard_map(embed, in_specs=(rows, PartitionSpec(None, width)), out_specs=PartitionSpec(*rows, width))(
        tokens, table
    )


def _exchange(x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
    """`x`, which is divided by width, divided as the batch is."""
    stages = stages_of_exchange(x.shape[-1])
    if not stages or "fsdp" not in (mesh_axes("batch", x.shape[0]) or ()):
        return constrain(x, "batch", "sequence", None)
    layouts = (("replicas", "sequence", "embed"), ("batch", "sequence", None))
    return exchanged(x, stages, *(spec_of(x.shape, names) for names in layouts))


def _prepend(prompt: Array, x: Array, positions: Array, segment_ids: Array | None) -> tuple[Array, Array, Array]:
    """Put the virtual tokens in front of every row; `positions` are shifted already."""
    batch, seq, _ = x.shape
    held = prompt.shape[0]
    segment_ids = jnp.ones((batch, seq), jnp.int32) if segment_ids is None else segment_ids
    x = jnp.concatenate([jnp.broadcast_to(prompt, (batch, *prompt.shape)), x], axis=1)
    in_front = jnp.broadcast_to(jnp.arange(held), (positions.shape[0], held))
    positions = jnp.concatenate([in_front, positions], axis=1)
    in_front = jnp.full((batch, held), PROMPT_SEGMENT, segment_ids.dtype)
    return x, positions, jnp.concatenate([in_front, segment_ids], axis=1)


def positions_in_segments(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that restart at 0 wherever the segment id changes."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
