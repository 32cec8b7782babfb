"""SPT: sensitivity decides between single entries and a low-rank update."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, path_key, rewrite
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import fisher
from jaxft.methods.selection.select import Measure, choose, cut_units
from jaxft.methods.selection.units import divisible, positions
from jaxft.partition import Tuned, layer_mask, masked_node, split
from jaxft.weights import LowRank, Tree, Weight


@register(
    "spt",
    title="Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning",
    url="https://arxiv.org/abs/2303.08566",
    family="selection",
    learning_rate=1e-3,
    example={"budget": 0.3, "rank": 2, "batches": 2},
)
def spt(
    budget: float | int = 0.01, rank: int = 8, threshold: float | None = None, batches: int = 8, on: str = "@linear"
) -> Method:
    """Spend a budget where the loss is most sensitive: as LoRA on matrices with many sensitive entries, else entrywise.

    s_n = mean g_n^2, the loss reduction of a small step of entry n; the top tau of the model are sensitive. A matrix
    (of one layer) with at least sigma of them gets W' = W + A B (rank r), any other trains its sensitive entries:
    `LowRank(SparseDelta(base, values [L, k], indices [L, k]), a, b)`, a and b `Split` over the layers that have them.

    Notes:
        The total stays within tau as long as sigma is at least the size of the low-rank update, r * (d_in + d_out), its
        default. sigma = 0 gives LoRA everywhere, infinity entries only.

    Args:
        budget: tau, a fraction of the selected entries or a count.
        rank: of the structured update.
        threshold: sigma, sensitive entries from which a matrix gets the structured update; its size by default.
        batches: calibration batches.
        on: selector of the matrices.
    """
    if rank < 1:
        raise JaxftError(f"spt: rank={rank} must be at least 1")

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        everywhere = threshold is not None and threshold <= 0
        chosen = choose(rng, params, probe, Measure(fisher(batches)), budget, "model", on, keep_empty=everywhere)

        def cut(path: str, w: Weight) -> Weight:
            mask, counts = chosen[path]
            shape, stacked = tuple(w.shape), probe.roles.is_stacked(path)
            *stack, d_in, d_out = shape
            structured = counts >= (rank * (d_in + d_out) if threshold is None else threshold)
            entries, counts = mask & ~jnp.asarray(structured)[:, None], np.where(structured, 0, counts)
            k = int(counts.max())
            base = cut_units(w, positions(entries, divisible(k)), "element", 1, stacked, counts) if k else w
            if not structured.any():
                return base
            a = jax.random.uniform(path_key(rng, path), (*stack, d_in, rank), jnp.float32, -1, 1) / math.sqrt(d_in)
            b = jnp.zeros((*stack, rank, d_out), jnp.float32)
            layers: Any = structured if stacked else True
            factors = (masked_node(f, layer_mask(layers, f.shape), stacked=stacked, path=path) for f in (a, b))
            return LowRank(base, *factors)

        return split(rewrite(params, list(chosen), cut, roles=probe.roles, nodes=False))

    return Method(init)
