"""A mixture of experts in the place of the MLP: every token goes to its k best experts, and no token is dropped.

Tokens are sorted by expert and each expert multiplies its own run of rows (`jaxft.weights.ragged_linear`). On a mesh
every device sorts the tokens that it holds. The `expert` axis divides the experts, and the rows of a batch: tokens go
to the devices of their experts (`jaxft.models.expert_parallel`), whose matrices only `fsdp` gathers. Where experts or
tokens do not divide over it, every device gathers the matrices of all experts for its own tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.models.config import DecoderConfig
from jaxft.models.expert_parallel import across_experts, expert_axes
from jaxft.models.rematerialization import projected
from jaxft.models.sharding import from_residual, token_shards
from jaxft.weights import Axes, Observed, Tree, group_of_row, linear, ragged_linear, site, value

GATES = "mlp.router"  # the site at which gates `[batch, seq, experts]` pass: zero where a token does not go


class Routing(NamedTuple):
    """Where the router of a layer (or, stacked, of each) sent the real tokens of a batch; float32 sums over them.

    tokens: how many went to each expert.
    probability: of each expert, before the k best were chosen.
    count: how many tokens there were.
    """

    tokens: Float[Array, "*layers experts"]
    probability: Float[Array, "*layers experts"]
    count: Float[Array, "*layers"]

    def load_balancing_loss(self) -> Float[Array, ""]:
        """`E sum_e f_e p_e`: f the share of tokens that expert e got, p its mean probability, over all layers together.

        The auxiliary loss of the Switch Transformer (arXiv:2101.03961, equations 4 to 6) as transformers computes it
        with an attention mask: k if all is balanced, more if not. Only tokens of real segments count, so that neither
        padding nor the way rows are packed changes it.
        """
        experts, count = self.tokens.shape[-1], jnp.maximum(jnp.sum(self.count), 1)
        tokens, probability = (jnp.sum(x.reshape(-1, experts), 0) / count for x in (self.tokens, self.probability))
        return experts * jnp.sum(tokens * probability)


def mixture(
    config: DecoderConfig,
    layer: Tree,
    x: Float[Array, "batch seq dim"],
    is_real: Bool[Array, "batch seq"] | None,
    activation: Callable[[Array], Array],
) -> tuple[Float[Array, "batch seq dim"], Routing]:
    """The mixture of one layer, and where its tokens went. Where `is_real` is false the result is zero.

    y = sum over the k best e of g_e down_e(act(gate_e(x)) * up_e(x)), g = softmax(router(x)), divided by the sum of the
    k chosen ones if `norm_topk_prob`. The softmax is computed in fp32. `x` is laid out as the residual stream is: where
    `tensor` divides its positions, each device routes its own, and experts get those of all.
    """
    k, experts = config.num_experts_per_token, config.num_experts
    router = layer["mlp"]["router"]
    scores = linear(x, router["kernel"]).astype(jnp.float32)
    probabilities = jax.nn.softmax(scores + value(router["bias"], jnp.float32) if "bias" in router else scores)
    gates, chosen = jax.lax.top_k(probabilities, k)
    if config.norm_topk_prob:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    real = jnp.ones(x.shape[:2], jnp.float32) if is_real is None else is_real.astype(jnp.float32)
    gates = gates * real[..., None]
    is_chosen = (chosen[..., None] == jnp.arange(experts)).astype(jnp.float32)
    if GATES in layer.get("sites", {}):
        dense = site(layer, GATES, jnp.einsum("bske,bsk->bse", is_chosen, gates))
        gates = jnp.einsum("bske,bse->bsk", is_chosen, dense)
    routing = Routing(
        jnp.einsum("bske,bs->e", is_chosen, real), jnp.einsum("bse,bs->e", probabilities, real), jnp.sum(real)
    )

    spread, gather, shard_axes = token_shards(*x.shape[:2])
    rows, chosen, gates = spread(from_residual(x)), spread(chosen), spread(gates)
    shards, tokens, _ = rows.shape
    chosen = chosen.reshape(shards, tokens * k)
    order = jnp.argsort(chosen, axis=-1, stable=True)
    sizes = jnp.sum(chosen[..., None] == jnp.arange(experts), axis=1, dtype=jnp.int32)
    gates = jnp.take_along_axis(gates.reshape(shards, tokens * k), order, axis=-1)

    axes = Axes(shard_axes, expert_axes(shard_axes, experts))
    compute = functools.partial(_experts, activation, axes)
    if axes.groups:
        weights = {"mlp": {"experts": layer["mlp"]["experts"]}, "sites": _sites_of_experts(layer)}
        return gather(across_experts(compute, weights, rows, order, sizes, gates, axes)), routing
    return gather(_collect(compute(layer, _dispatch(rows, order, k), sizes, gates), order, k)), routing


def _experts(
    activation: Callable[[Array], Array],
    axes: Axes,
    layer: Tree,
    rows: Float[Array, "shards rows dim"],
    sizes: Int[Array, "shards experts"],
    gates: Float[Array, "shards rows"],
) -> Float[Array, "shards rows dim"]:
    """What the experts make of rows that are sorted by them, times the gate of each row.

    Where the last projection is a matrix and nothing else, its input takes the gate: the gradient of the gates then
    does not need what comes out of it, so that rematerialisation need not compute it again.
    """
    project = functools.partial(_project, layer, sizes=sizes, axes=axes)
    gates = gates[..., None]
    hidden = activation(project("gate", rows)) * project("up", rows)
    if is_gated_before_down(layer):
        return project("down", hidden * gates.astype(hidden.dtype))
    return project("down", hidden) * gates.astype(hidden.dtype)


def is_gated_before_down(layer: Tree) -> bool:
    """Whether the last projection of the experts of a layer (or of the stack of layers) is a matrix alone, of whose
    inputs no statistic is taken."""
    down = layer["mlp"]["experts"]["down"]
    is_alone = "bias" not in down and "mlp.experts.down" not in layer.get("sites", {})
    return is_alone and not isinstance(down["kernel"], Observed)


def _sites_of_experts(layer: Tree) -> Tree:
    return {name: module for name, module in layer.get("sites", {}).items() if name.startswith("mlp.experts.")}


def _project(layer: Tree, name: str, x: Array, *, sizes: Array, axes: Axes) -> Array:
    weights = layer["mlp"]["experts"][name]
    y = projected(ragged_linear(x, weights["kernel"], sizes, axes))
    if "bias" in weights:
        y = y + value(weights["bias"], y.dtype)[group_of_row(sizes, x.shape[1])]
    return site(layer, f"mlp.experts.{name}", y)


# The rows of tokens in the order of their experts, and back again. Each is the transpose of the other, and said to be
# so, or the gradients would be scattered where they can be gathered.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch(
    tokens: Float[Array, "shards tokens dim"], order: Int[Array, "shards rows"], k: int
) -> Float[Array, "shards rows dim"]:
    """The rows of experts: row r is token `order[r] // k`."""
    return jnp.take_along_axis(tokens, order[..., None] // k, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _collect(
    rows: Float[Array, "shards rows dim"], order: Int[Array, "shards rows"], k: int
) -> Float[Array, "shards tokens dim"]:
    """The sum of the k rows of every token."""
    back = jnp.argsort(order, axis=-1)[..., None]
    shards, count, dim = rows.shape
    return jnp.sum(jnp.take_along_axis(rows, back, axis=1).reshape(shards, count // k, k, dim), axis=2)


_dispatch.defvjp(lambda x, order, k: (_dispatch(x, order, k), order), lambda k, order, g: (_collect(g, order, k), None))
_collect.defvjp(lambda x, order, k: (_collect(x, order, k), order), lambda k, order, g: (_dispatch(g, order, k), None))
