"""`Grafted`: entry by entry, the value of one model or that of another."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxft.weights.core import (
    Node,
    Tree,
    Weight,
    by_materializing_linear,
    linear_rule,
    materialize_rule,
    node,
    specs_rule,
)
from jaxft.weights.ragged import by_materializing_ragged, ragged_linear_rule


@node
class Grafted(Node):
    """`gamma * tuned + (1 - gamma) * base`, with `gamma` near 1 on `start` and near 0 elsewhere, moved by `logits`.

    gamma = start (1 - sigmoid(S)) + (1 - start) sigmoid(S), exactly 0 or 1 where |S| is large.
    """

    keep_dtype = True

    base: Float[Array, "..."]
    tuned: Float[Array, "..."]
    start: Bool[Array, "..."]
    logits: Float[Array, "..."]


def graft_share(w: Grafted) -> Float[Array, "..."]:
    """gamma, the part of the tuned value in each entry, float32 in [0, 1]."""
    flip = jax.nn.sigmoid(w.logits)
    return jnp.where(w.start, 1 - flip, flip)


def rounded(tree: Tree) -> Tree:
    """Grafted weights as plain ones: the tuned value where gamma exceeds one half, else the base value, bit for bit."""

    def one(w: Weight) -> Weight:
        return jnp.where(graft_share(w) > 0.5, w.tuned, w.base) if isinstance(w, Grafted) else w

    return jax.tree.map(one, tree, is_leaf=lambda w: isinstance(w, Grafted))


@materialize_rule.register
def _(w: Grafted) -> Array:
    share = graft_share(w)
    mixed = (share * w.tuned + (1 - share) * w.base).astype(w.base.dtype)
    return jnp.where(w.tuned == w.base, w.base, mixed)  # no rounding where there is nothing to choose


linear_rule.register(Grafted, by_materializing_linear)
ragged_linear_rule.register(Grafted, by_materializing_ragged)


@specs_rule.register
def _(w: Grafted, spec: PartitionSpec) -> Grafted:
    return Grafted(spec, spec, spec, spec)
