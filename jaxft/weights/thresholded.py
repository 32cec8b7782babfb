"""`Thresholded`: a frozen weight whose entries are switched off where a trained score falls below a threshold."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxft.weights.core import (
    Node,
    Weight,
    by_materializing_linear,
    linear_rule,
    materialize,
    materialize_rule,
    node,
    specs,
    specs_rule,
    static,
)
from jaxft.weights.ragged import by_materializing_ragged, ragged_linear_rule


@node
class Thresholded(Node):
    """`base * 1[scores > threshold]`, the step differentiated as if it were the identity (straight through).

    `curvature`, where given, is what a method remembers of each entry (a Fisher information); it does not act here.
    """

    keep_dtype = True

    base: Weight
    scores: Float[Array, "..."]
    curvature: Float[Array, "..."] | None = None
    threshold: float = static(default=5e-3)


@materialize_rule.register
def _(w: Thresholded) -> Array:
    base = jax.lax.stop_gradient(materialize(w.base))
    on = (w.scores > w.threshold).astype(w.scores.dtype)
    # The second term is zero, bit for bit, and has the derivative of the scores.
    return base * (on + (w.scores - jax.lax.stop_gradient(w.scores))).astype(base.dtype)


linear_rule.register(Thresholded, by_materializing_linear)
ragged_linear_rule.register(Thresholded, by_materializing_ragged)


@specs_rule.register
def _(w: Thresholded, spec: PartitionSpec) -> Thresholded:
    return Thresholded(specs(w.base, spec), spec, None if w.curvature is None else spec, w.threshold)
