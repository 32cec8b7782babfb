"""LT-SFT: lottery-ticket sparse fine-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, rewrite
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.full import full
from jaxft.methods.selection.scores import budget_count, top_k_masks
from jaxft.methods.selection.select import cut_units
from jaxft.methods.selection.units import positions
from jaxft.partition import (
    Tuned,
    combine,
    dense_mask,
    has_marks,
    layer_mask,
    select,
    split,
    unmarked,
    weights_by_path,
)
from jaxft.weights import Packed, SparseDelta, Tree, Weight, is_node, materialize


@register(
    "lt-sft",
    title="Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
    url="https://arxiv.org/abs/2110.07560",
    family="selection",
    learning_rate=1e-3,
    example={"budget": 0.05, "search_steps": 3},
)
def lt_sft(budget: float = 0.05, search_steps: int = 100, on: str = "layers", l1: float = 0.0) -> Method:
    """Train the K entries that a full run moves most, from the pretrained start.

    Phase 1 trains everything for `search_steps` steps, theta0 -> theta1. The mask is the K largest |theta1 - theta0|
    over all selected weights together. Phase 2 rewinds to theta0 and trains those entries only: theta2 = theta0 + phi
    with phi a sparse vector of exactly K entries, `SparseDelta(base [L, ...], values [L, k], indices [L, k])`. Sparse
    vectors of several runs add up.

    Args:
        budget: K, a fraction of the selected entries below 1, a count from 1 on.
        search_steps: length of phase 1, on the same data with the same optimizer.
        on: selector of the candidates.
        l1: weight of the pull |phi| toward the start (mean over phi), 0 for none.
    """
    if search_steps < 1:
        raise JaxftError(f"lt-sft: search_steps={search_steps} must be at least 1")

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        start, weights = materialize(unmarked(params)), weights_by_path(params)
        chosen = select(params, on, roles=probe.roles)
        candidates = {p: m for p, m in chosen.items() if not is_node(weights[p]) and not has_marks(weights[p])}
        if not candidates:
            raise JaxftError(f'lt-sft: all that "{on}" selects is already taken by an earlier method of the chain')
        before, after = weights_by_path(start), weights_by_path(probe.train(start, full(on), search_steps))
        scores = {p: np.abs(np.asarray(after[p], np.float32) - np.asarray(before[p], np.float32)) for p in candidates}
        allowed = {p: dense_mask(layer_mask(m, scores[p].shape), scores[p].shape) for p, m in candidates.items()}
        total = sum(int(m.sum()) for m in allowed.values())
        scores = {p: np.where(allowed[p], s, -1) for p, s in scores.items()}  # layers outside a range rank last
        masks = top_k_masks(scores, budget_count(budget, total))
        masks = {p: m for p, m in masks.items() if m.any()}

        def cut(path: str, w: jax.Array) -> Weight:
            stacked = probe.roles.is_stacked(path)
            rows = jnp.asarray(masks[path]).reshape(w.shape[0] if stacked else 1, -1)
            return cut_units(w, positions(rows, int(rows.sum(-1).max())), "element", 1, stacked, packed=True)

        return split(rewrite(params, list(masks), cut, roles=probe.roles, nodes=False))

    def penalty(tuned: Tuned) -> Array:
        nodes = [w for w in jax.tree.leaves(combine(tuned), is_leaf=is_node) if isinstance(w, SparseDelta)]
        values = [jnp.abs(w.values.values if isinstance(w.values, Packed) else w.values) for w in nodes]
        return l1 * sum(jnp.sum(v) for v in values) / sum(v.size for v in values)

    return Method(init, penalty=penalty if l1 else None)
