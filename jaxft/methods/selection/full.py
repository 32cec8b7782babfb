"""Full fine-tuning, or any fixed selection of whole weights and layers."""

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxft.methods.base import Method, rewrite
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.partition import Tuned, layer_mask, masked_node, split
from jaxft.weights import Tree, Weight


@register(
    "full",
    title="Full fine-tuning: every parameter, or every selected one, trains",
    url="",
    family="selection",
)
def full(on: str = "**") -> Method:
    """Train every selected parameter: theta <- theta - update(gradient).

    The baseline of every comparison, and the plainest selection: `on="layers[-4:]"` trains the last four layers.

    Args:
        on: selector of what trains (see `jaxft.partition`); everything by default.
    """

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        def cut(path: str, w: jax.Array, layers: bool | np.ndarray) -> Weight:
            return masked_node(w, layer_mask(layers, w.shape), stacked=probe.roles.is_stacked(path), path=path)

        return split(rewrite(params, on, cut, roles=probe.roles, nodes=False, layers=True))

    return Method(init)
