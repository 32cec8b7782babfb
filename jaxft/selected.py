"""What a cut selects: how many entries of every weight train in every layer."""

import dataclasses
import math
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Float

from jaxft.partition import Roles, Trains, Tuned, has_marks, is_mark, mark, select, shape_of, unmarked, weights_by_path
from jaxft.weights import (
    BlockSplit,
    Gated,
    LowRank,
    Node,
    RowSplit,
    SiteModule,
    SparseDelta,
    Split,
    Weight,
    num_layers,
)


@dataclasses.dataclass(frozen=True)
class Selected:
    """Shares of entries that train; entries of weights only, so the factors of a low-rank update are not among them.

    columns: names of the weights of a layer, by category where they have one.
    categories: the category of each column, "" for none.
    shares: `[layers, columns]`, from 0 (frozen) to 1 (all of it trains).
    sizes: entries of each column in one layer.
    others: weights outside the layers by path, as (share, entries).
    """

    columns: tuple[str, ...]
    categories: tuple[str, ...]
    shares: Float[np.ndarray, "layers columns"]
    sizes: tuple[int, ...]
    others: dict[str, tuple[float, int]]

    @property
    def is_partial(self) -> bool:
        """Whether some entries train and some do not: full tuning selects nothing, and neither does LoRA."""
        found = [*self.shares.reshape(-1), *(share for share, _ in self.others.values())]
        return any(s > 0 for s in found) and any(s < 1 for s in found)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON, with the share of every category in every layer."""
        by_category = {}
        for name in dict.fromkeys(c for c in self.categories if c):
            mine = np.array([c == name for c in self.categories])
            weights = np.array(self.sizes)[mine]
            by_category[name] = (self.shares[:, mine] @ weights / weights.sum()).round(6).tolist()
        return {
            "columns": list(self.columns),
            "categories": list(self.categories),
            "shares": self.shares.round(6).tolist(),
            "sizes": list(self.sizes),
            "category_shares": by_category,
            "others": {path: {"share": round(s, 6), "entries": n} for path, (s, n) in self.others.items()},
        }


def selected(tuned: Tuned, roles: Roles) -> Selected:
    """The shares of all weights of a cut that train."""
    params = mark(tuned)
    weights = {p: w for p, w in weights_by_path(params).items() if not isinstance(w, SiteModule)}
    stacked = {p: w for p, w in weights.items() if roles.is_stacked(p) and shape_of(w)}
    found = {
        path: name
        for name, selectors in roles.categories.items()
        for selector in selectors
        for path in select(unmarked(params), selector, roles=roles, allow_empty=True)
    }
    paths = [p for p in found if p in stacked] + [p for p in stacked if p not in found]
    layers = num_layers({p: unmarked(w) for p, w in stacked.items()}) if stacked else 0
    sizes = [math.prod(shape_of(stacked[p])[1:]) for p in paths]
    columns = [trained_entries(stacked[p], layers) / n for p, n in zip(paths, sizes, strict=True)]
    others = {}
    for path, w in weights.items():
        if path not in stacked:
            size = math.prod(shape_of(w))
            others[path] = (float(trained_entries(w, 1)[0]) / max(size, 1), size)
    names = [p.split(".", 1)[1].removesuffix(".kernel").removesuffix(".scale") for p in paths]
    shares = np.stack(columns, 1) if columns else np.zeros((0, 0))
    return Selected(tuple(names), tuple(found.get(p, "") for p in paths), shares, tuple(sizes), others)


def trained_entries(w: Weight, layers: int) -> Float[np.ndarray, " layers"]:
    """How many entries of a weight with marks train, in each of its layers (one, if it is not stacked)."""

    def marked(x: Any) -> bool:
        return is_mark(x) and bool(jax.tree.leaves(x))

    def each(count: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(count, np.float64), layers) if np.ndim(count) <= 1 else np.asarray(count)

    none = np.zeros(layers)
    if not has_marks(w):
        return none
    if isinstance(w, Trains):
        return each(w.value.size / layers)
    if isinstance(w, LowRank):
        return trained_entries(w.base, layers)
    if isinstance(w, Split):
        matrix = math.prod(shape_of(w)[1:])
        inner = none if marked(w.trainable) else trained_entries(w.trainable, layers)
        return each(np.asarray(w.is_trainable) * matrix) if marked(w.trainable) else inner
    if isinstance(w, Gated) and marked(w.value):
        return each(np.asarray(w.is_open) * (w.value.value.size / layers))
    own = none
    if isinstance(w, SparseDelta) and has_marks(w.values):
        matrix = math.prod(shape_of(w)[w.indices.ndim - 1 :])
        own = each(_held(w.indices, matrix))
    elif isinstance(w, RowSplit) and has_marks(w.rows):
        slices, entries = shape_of(w)[w.axis], math.prod(shape_of(w)[w.index.ndim - 1 :])
        own = each(_held(w.index, slices) * (entries // slices))
    elif isinstance(w, BlockSplit) and has_marks(w.blocks):
        block, matrix = math.prod(jax.tree.leaves(w.blocks)[0].shape[-2:]), math.prod(shape_of(w)[-2:])
        own = each(_held(w.index, matrix // block) * block)
    else:  # a node whose trained part has the shape of the weight, or stands around one that has
        parts = [getattr(w, f.name) for f in dataclasses.fields(cast(Any, w))] if isinstance(w, Node) else []
        return sum((trained_entries(part, layers) for part in parts if part is not None and _is_tree(part)), none)
    return own + trained_entries(w.base, layers)


def _held(index: jax.Array, n: int) -> np.ndarray:
    """How many indices `[(layers, (experts,)) k]` of each layer are below `n`: no padding."""
    flags = np.asarray(index < n)
    return flags.sum(tuple(range(min(1, flags.ndim - 1), flags.ndim)))


def _is_tree(part: Any) -> bool:
    return is_mark(part) or isinstance(part, Node)
