"""Full fine-tuning, or any fixed selection of whole weights and layers."""

from typing import Literal

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxft.methods.base import Method, rewrite, stop_below
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.units import check_choice
from jaxft.partition import Tuned, layer_mask, masked_node, select, split
from jaxft.weights import Tree, Weight

Missing = Literal["refuse", "skip"]


@register(
    "full",
    title="Full fine-tuning: every parameter, or every selected one, trains",
    url="",
    family="selection",
)
def full(on: str = "**", missing: Missing = "refuse") -> Method:
    """Train every selected parameter: theta <- theta - update(gradient).

    The baseline of every comparison, and the plainest selection: `on="layers[-4:]"` trains the last four layers.

    Args:
        on: selector of what trains (see `jaxft.partition`); everything by default.
        missing: whether a term that matches nothing (a tied head) is refused or passed over.
    """
    check_choice("full: missing", missing, Missing)

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        found = select(params, on, roles=probe.roles, allow_empty=missing == "skip")
        if not found:
            return split(params)

        def cut(path: str, w: jax.Array, _: bool | np.ndarray) -> Weight:
            mask = layer_mask(found[path], w.shape)
            return masked_node(w, mask, stacked=probe.roles.is_stacked(path), path=path)

        chosen = on if missing == "refuse" else list(found)
        tuned = split(rewrite(params, chosen, cut, roles=probe.roles, nodes=False, layers=True))
        return stop_below(tuned, found, probe.roles)

    return Method(init)
