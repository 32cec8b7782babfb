"""What trains: selectors over parameter paths, masks at five granularities, and the cut into trained and frozen.

One polarity everywhere: **True trains**. A hole in either half of a cut is `None`.

Selectors are strings over dotted paths (`layers.attn.q.kernel`):

| written | matches |
|---|---|
| `attn.q` | any path with the consecutive segments `attn`, `q` |
| `mlp.*` | `*` and `?` match within one segment; `**` matches any number of segments |
| `attn.{q,v}` | alternatives within a segment |
| `layers[8:16].mlp` | a range of layers of a stacked leaf (also `layers[3]`, `layers[-4:]`, `layers[::2]`) |
| `a|b` | either |
| `attn|!attn.q` | a term after `!` excludes |
| `@attention` | a role, see `Roles` |
"""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxft.errors import JaxftError, nearest
from jaxft.weights import (
    BlockSplit,
    Node,
    RowSplit,
    SiteModule,
    SparseDelta,
    Tree,
    Weight,
    gather_blocks,
    gather_rows,
    materialize,
    merged,
    split_layers,
)

# --- roles ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Roles:
    """What the parts of a model are called, so that methods need not know the model.

    `names` maps a role to a selector, `categories` to the selectors of the matrices of which a fraction is drawn
    together, `stacked` lists top-level keys whose leaves carry a leading layer axis, `consumers` maps a norm to the
    projections that read its output (for folding a shift into their biases).
    """

    names: dict[str, str]
    categories: dict[str, tuple[str, ...]]
    stacked: tuple[str, ...] = ("layers",)
    consumers: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def is_stacked(self, path: str) -> bool:
        return path.split(".", 1)[0] in self.stacked


DECODER_ROLES = Roles(
    names={
        "attention": "layers.attn.{q,k,v,o}.kernel",
        "mlp": "layers.mlp.{gate,up,down}.kernel|layers.mlp.experts.{gate,up,down}.kernel",
        "linear": "layers.attn.{q,k,v,o}.kernel|layers.mlp.{gate,up,down}.kernel|"
        "layers.mlp.experts.{gate,up,down}.kernel",
        "experts": "layers.mlp.experts.{gate,up,down}.kernel",
        "router": "layers.mlp.router.kernel",
        "norm": "layers.*_norm.scale|layers.attn.*_norm.scale|final_norm.scale",
        "bias": "**.bias",
        "embedding": "embed.embedding",
        "head": "head.kernel",
    },
    categories={
        "attention": tuple(f"layers.attn.{m}.kernel" for m in "qkvo"),
        "mlp": tuple(f"layers.mlp.{part}{m}.kernel" for part in ("", "experts.") for m in ("gate", "up", "down")),
        "norm": tuple(f"layers.{post}{part}_norm.scale" for post in ("", "post_") for part in ("attn", "mlp")),
        "qk_norm": ("layers.attn.q_norm.scale", "layers.attn.k_norm.scale"),
        "bias": tuple(f"layers.attn.{m}.bias" for m in "qkvo"),
        "mlp_bias": tuple(f"layers.mlp.{m}.bias" for m in ("gate", "up", "down")),
    },
    consumers={
        "attn_norm": ("attn.q", "attn.k", "attn.v"),
        "mlp_norm": ("mlp.gate", "mlp.up", "mlp.router", "mlp.experts.gate", "mlp.experts.up"),
    },
)

# --- paths ------------------------------------------------------------------------------------------------------------


def key_name(key: Any) -> str:
    """The name of one step of a pytree path: dict key, attribute, or position."""
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def is_weight(x: Any) -> bool:
    """Whether `x` is a place a selector can name: an array, a node or a mark on one (site modules are places too)."""
    return isinstance(x, (Node, Trains))


def weights_by_path(params: Tree) -> dict[str, Weight]:
    """The arrays and nodes of a parameter tree by dotted path, in tree order."""
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    return {".".join(key_name(k) for k in path): w for path, w in flat}


def map_weights(fn: Callable[[str, Weight], Weight], params: Tree) -> Tree:
    """`params` with every array or node `w` at dotted path `p` replaced by `fn(p, w)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: fn(".".join(key_name(k) for k in path), w), params, is_leaf=is_weight
    )


# --- selectors --------------------------------------------------------------------------------------------------------

Selector = str | Iterable[str] | Callable[[str, Weight], bool]

_RANGE = re.compile(r"^(?P<name>[^\[\]]+)\[(?P<index>-?\d+|-?\d*:-?\d*(?::-?\d*)?)\]$")


class _Term(NamedTuple):
    segments: tuple[tuple[re.Pattern | None, slice | None], ...]  # pattern None means `**`
    exclude: bool
    text: str
    role: tuple["_Term", ...] = ()  # the terms of a role, which exclude within the role only


def _braces(text: str) -> list[str]:
    """Brace alternatives written out: `a{b,c}` -> `ab`, `ac`."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    head, tail = text[: found.start()], text[found.end() :]
    return [w for option in found.group(1).split(",") for w in _braces(head + option.strip() + tail)]


def _slice(text: str) -> slice:
    if ":" not in text:
        start = int(text)
        return slice(start, start + 1 or None)
    return slice(*(int(t) if t else None for t in text.split(":")))


@functools.lru_cache(maxsize=1024)
def _parse(selector: str, roles: tuple[tuple[str, str], ...]) -> tuple[_Term, ...]:
    terms = []
    for raw in selector.split("|"):
        exclude, text = raw.strip().startswith("!"), raw.strip().lstrip("!").strip()
        if not text:
            raise JaxftError(f'empty term in selector "{selector}"')
        if text.startswith("@"):
            known = dict(roles)
            if text[1:] not in known:
                raise JaxftError(f'unknown role "{text}" in selector "{selector}": {nearest(text[1:], known)}')
            terms.append(_Term((), exclude, text, _parse(known[text[1:]], roles)))
            continue
        if text.count("{") != text.count("}") or text.count("[") != text.count("]"):
            raise JaxftError(f'unbalanced brackets in selector term "{text}"')
        for plain in _braces(text):
            segments: list[tuple[re.Pattern | None, slice | None]] = []
            for segment in plain.split("."):
                if segment == "**":
                    segments.append((None, None))
                    continue
                ranged = _RANGE.match(segment)
                if not ranged and ("[" in segment or not segment):
                    raise JaxftError(
                        f'cannot read "{segment}" in selector term "{text}": expected a name, a pattern with * and ?, '
                        "or a layer range such as layers[8:16]"
                    )
                name, where = (ranged["name"], _slice(ranged["index"])) if ranged else (segment, None)
                segments.append((re.compile(fnmatch.translate(name)), where))
            terms.append(_Term(tuple(segments), exclude, plain))
    return tuple(terms)


def _match_run(segments: tuple, names: tuple[str, ...]) -> list[slice] | None:
    """The layer ranges met if `segments` match a run at the start of `names`, else None."""
    if not segments:
        return []
    pattern, where = segments[0]
    if pattern is None:
        for skip in range(len(names) + 1):
            rest = _match_run(segments[1:], names[skip:])
            if rest is not None:
                return rest
        return None
    if not names or not pattern.match(names[0]):
        return None
    if where is not None and len(names) > 1 and names[1].lstrip("-").isdigit():  # unstacked: layers.3.attn
        if not _in_slice(int(names[1]), where):
            return None
        return _match_run(segments[1:], names[2:])
    rest = _match_run(segments[1:], names[1:])
    return None if rest is None else ([where] if where is not None else []) + rest


def _in_slice(index: int, where: slice) -> bool:
    if (where.start or 0) < 0 or (where.stop or 0) < 0:
        raise JaxftError("a layer range counted from the end needs stacked layers; write it with positive numbers")
    return (
        index >= (where.start or 0)
        and (where.stop is None or index < where.stop)
        and ((index - (where.start or 0)) % (where.step or 1) == 0)
    )


def _layers_of(term: _Term, names: tuple[str, ...], w: Weight) -> np.ndarray | bool:
    """True, False, or the layers `bool[L]` that a term selects of the weight at a path."""
    if term.role:
        return _chosen(term.role, names, w, set())
    for start in range(len(names)):
        ranges = _match_run(term.segments, names[start:])
        if ranges is None:
            continue
        if not ranges:
            return True
        shape = shape_of(w)
        mask = np.ones(shape[0] if shape else 0, bool)
        for where in ranges:
            chosen = np.zeros_like(mask)
            chosen[where] = True
            mask &= chosen
        return mask
    return False


def _chosen(terms: tuple[_Term, ...], names: tuple[str, ...], w: Weight, used: set[str]) -> np.ndarray | bool:
    """What terms, applied in order, select of the weight at a path. The texts of those that meet it go to `used`."""
    mask: bool | np.ndarray = False
    for term in terms:
        hit = _layers_of(term, names, w)
        if hit is False or (hit is not True and not hit.any()):  # a range beyond the last layer meets nothing
            continue
        used.add(term.text)
        if term.exclude:
            mask = False if hit is True else (np.ones_like(hit) if mask is True else mask) & ~hit
        else:
            mask = True if hit is True or mask is True else (hit if mask is False else mask | hit)
    return mask


def shape_of(w: Weight) -> tuple[int, ...]:
    """The shape of the array that a weight (array, node, mark, abstract array) means."""
    if isinstance(w, Trains):
        return shape_of(w.value)
    if isinstance(w, SiteModule):
        return ()
    if isinstance(w, Node):
        if isinstance(w, SparseDelta | RowSplit | BlockSplit) or hasattr(w, "base"):
            return shape_of(w.base)
        return tuple(jax.eval_shape(materialize, unmarked(w)).shape)
    return tuple(w.shape)


def select(
    params: Tree, selector: Selector, *, roles: Roles = DECODER_ROLES, allow_empty: bool = False
) -> dict[str, bool | np.ndarray]:
    """The weights a selector names: path -> True, or `bool[L]` where it names a range of stacked layers.

    Args:
        params: parameter tree of arrays and nodes (shapes suffice).
        selector: a string (see the module), several, or a predicate `(path, weight) -> bool`.
        roles: the meaning of `@role` terms.
        allow_empty: return {} where nothing matches.

    Raises:
        JaxftError: a term cannot be read, a role is unknown, a term matches nothing (with the nearest paths).
    """
    weights = weights_by_path(params)
    if callable(selector):
        chosen: dict[str, bool | np.ndarray] = {p: True for p, w in weights.items() if selector(p, w)}
        if not chosen and not allow_empty:
            raise JaxftError(f"the selecting function chose none of {len(weights)} weights")
        return chosen
    text = selector if isinstance(selector, str) else "|".join(selector)
    terms = _parse(text, tuple(sorted(roles.names.items())))
    chosen, used = {}, set[str]()
    for path, w in weights.items():
        mask = _chosen(terms, tuple(path.split(".")), w, used)
        if mask is True or (isinstance(mask, np.ndarray) and mask.any()):
            chosen[path] = True if mask is True or mask.all() else mask
    unused = [t.text for t in terms if t.text not in used]
    if not allow_empty and (unused or not chosen):
        what = f'term "{unused[0]}" of selector "{text}"' if unused else f'selector "{text}"'
        raise JaxftError(f"{what} matches no weight: {nearest(unused[0] if unused else text, weights)}")
    return chosen


# --- marks, partition and combine -------------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Trains:
    """A mark: this array trains. Only inside a method's `init`; `split` cuts by it and it is gone."""

    value: Array


class Tuned(NamedTuple):
    """A model cut in two: two trees of the same structure with complementary holes (`None`).

    `state` is what a method remembers besides weights (a tuple of them for a chain).
    """

    trainable: Tree
    frozen: Tree
    state: Any = ()


def is_mark(x: Any) -> bool:
    return isinstance(x, Trains)


def is_hole(x: Any) -> bool:
    return x is None


def split(params: Tree, state: Any = ()) -> Tuned:
    """Cut a tree by its `Trains` marks."""
    trainable = jax.tree.map(lambda x: x.value if is_mark(x) else None, params, is_leaf=is_mark)
    frozen = jax.tree.map(lambda x: None if is_mark(x) else x, params, is_leaf=is_mark)
    return Tuned(trainable, frozen, state)


def mark(tuned: Tuned) -> Tree:
    """The tree of `combine` with a `Trains` mark on what trains; `split` is its inverse."""
    return jax.tree.map(lambda t, f: f if t is None else Trains(t), tuned.trainable, tuned.frozen, is_leaf=is_hole)


def combine(tuned: Tuned) -> Tree:
    """The parameters a model runs on; differentiable in `tuned.trainable`."""
    return merged(tuned.trainable, tuned.frozen)


def unmarked(params: Tree) -> Tree:
    """A tree without its `Trains` marks: what `materialize` and the model understand."""
    return jax.tree.map(lambda x: x.value if is_mark(x) else x, params, is_leaf=is_mark)


def has_marks(w: Weight) -> bool:
    return any(is_mark(x) for x in jax.tree.leaves(w, is_leaf=is_mark))


# --- masks ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A mask over blocks: `mask [..., d_in/p, d_out/q]` of blocks `shape = (p, q)`."""

    mask: np.ndarray
    shape: tuple[int, int]


Mask: TypeAlias = bool | np.ndarray | Array | Blocks
"""What trains of one leaf: a bool; an array broadcastable to the leaf (a layer mask is `[L, 1, 1]`, rows `[L, d_in, 1]`
or `[d_in, 1]`, columns `[L, 1, d_out]`, elements the full shape); or `Blocks`."""


def dense_mask(mask: Mask, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """A mask written out over every entry of a leaf of `shape`."""
    if isinstance(mask, Blocks):
        full = np.repeat(np.repeat(np.asarray(mask.mask), mask.shape[0], -2), mask.shape[1], -1)
        return np.broadcast_to(full, shape)
    return np.broadcast_to(np.asarray(mask, bool), shape)


def granularity(mask: Mask, shape: tuple[int, ...], stacked: bool = False) -> str:
    """The coarsest of leaf, layer, expert, row, column, block, element that expresses a mask over a leaf of `shape`."""
    if isinstance(mask, Blocks):
        return "block"
    mask = np.asarray(mask, bool)
    if mask.ndim and (mask.ndim != len(shape) or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True))):
        raise JaxftError(f"a mask of shape {mask.shape} does not broadcast to a leaf of shape {shape}")
    if mask.all() or not mask.any():
        return "leaf"
    varies = [m > 1 for m in mask.shape]
    if stacked and varies[0] and not any(varies[1:]):
        return "layer"
    matrix = varies[1:] if stacked else varies
    if len(matrix) == 2 and matrix == [True, False]:
        return "row"
    if len(matrix) == 2 and matrix == [False, True]:
        return "column"
    if len(matrix) == 3 and matrix == [True, False, False]:
        return "expert"
    return "element"


def _indices(mask: np.ndarray, what: str) -> tuple[np.ndarray, bool]:
    """Positions of the true entries along the last axis, `[..., k]`; padded with the axis length if counts differ."""
    counts = mask.sum(-1)
    k, n = int(counts.max()), mask.shape[-1]
    if n >= 2**31:
        raise JaxftError(f"{what}: {n} entries in one layer do not fit a 32-bit index")
    order = np.argsort(~mask, axis=-1, kind="stable")[..., :k]
    valid = np.arange(k) < counts[..., None]
    return np.where(valid, order, n).astype(np.int32), bool((counts == k).all())


def masked_node(w: Array, mask: Mask, *, stacked: bool = False, path: str = "") -> Weight:
    """The weight node with `Trains` marks that trains exactly the masked entries of an array, by the coarsest means.

    Leaf -> the array itself; layer -> `Split`; row, column, expert -> `RowSplit`; block -> `BlockSplit`; element ->
    `SparseDelta`. The mask is concrete (its counts are structure).
    """
    shape = tuple(w.shape)
    what = f'mask of "{path}"' if path else "mask"
    try:
        kind = granularity(mask, shape, stacked)
    except JaxftError as error:
        raise JaxftError(f"{what}: {error}") from None
    if kind == "leaf":
        return Trains(w) if np.any(np.asarray(mask)) else w
    if kind == "layer":
        chosen_layers = np.asarray(mask, bool).reshape(-1)
        cut = split_layers(w, jnp.asarray(chosen_layers), int(chosen_layers.sum()))
        return cut.replace(trainable=Trains(cut.trainable))
    layers = shape[:1] if stacked else ()
    if kind in ("row", "column", "expert"):
        axis = {"row": -2, "column": -1, "expert": -3}[kind]
        others = tuple(a for a in (-3, -2, -1)[3 - len(shape[len(layers) :]) :] if a != axis)
        flat = np.broadcast_to(np.asarray(mask, bool).squeeze(others), (*layers, shape[axis]))
        index, even = _indices(flat, what)
        if even or kind == "expert":
            index = jnp.asarray(index)
            return RowSplit(w, Trains(gather_rows(w, index, axis)), index, axis)
    if isinstance(mask, Blocks):
        p, q = mask.shape
        if len(shape) - stacked != 2 or shape[-2] % p or shape[-1] % q:
            raise JaxftError(f"{what}: blocks of {p} x {q} do not tile a matrix of {shape[-2:]}")
        tiles, chosen = (*layers, shape[-2] // p, shape[-1] // q), np.asarray(mask.mask, bool)
        if chosen.ndim != len(tiles) or any(m not in (1, n) for m, n in zip(chosen.shape, tiles, strict=True)):
            raise JaxftError(f"{what}: a block mask of shape {chosen.shape} does not broadcast to the tiles {tiles}")
        if not chosen.any():
            return w
        index, _ = _indices(np.broadcast_to(chosen, tiles).reshape(*layers, -1), what)
        gather = functools.partial(gather_blocks, p=p, q=q)
        blocks = (jax.vmap(gather) if stacked else gather)(w, jnp.asarray(index))
        return BlockSplit(w, Trains(blocks), jnp.asarray(index))
    return sparse_node(w, dense_mask(mask, shape), stacked=stacked, path=path)


def sparse_node(w: Array, mask: Bool[np.ndarray, "..."], *, stacked: bool = False, path: str = "") -> SparseDelta:
    """The `SparseDelta` that trains the masked entries of an array, starting from zero deltas (float32)."""
    layers = tuple(w.shape)[:1] if stacked else ()
    index, _ = _indices(mask.reshape(*layers, -1), f'mask of "{path}"')
    return SparseDelta(w, Trains(jnp.zeros(index.shape, jnp.float32)), jnp.asarray(index))


def partition(params: Tree, masks: Tree, *, roles: Roles = DECODER_ROLES) -> Tuned:
    """Cut `params` by a tree of masks: of the same structure, a prefix of it, or a dict path -> mask (others frozen).

    Raises:
        JaxftError: a mask does not fit its leaf, names no leaf, or nothing trains.
    """
    weights = weights_by_path(params)
    if not isinstance(masks, dict) or not set(masks) <= set(weights):
        unknown = set(masks) - set(weights) - set(params) if isinstance(masks, dict) else ()
        if unknown:
            raise JaxftError(f'no weight at "{min(unknown)}": {nearest(min(unknown), weights)}')
        masks = broadcast_prefix(masks, params)

    def rewrite(path: str, w: Weight) -> Weight:
        mask = masks.get(path, False)
        if isinstance(w, Trains) or (isinstance(mask, bool) and not mask):
            return w
        if isinstance(w, Node):
            raise JaxftError(f'"{path}" is a {type(w).__name__}: a mask cuts arrays only')
        return masked_node(w, mask, stacked=roles.is_stacked(path), path=path)

    tuned = split(map_weights(rewrite, params))
    if not jax.tree.leaves(tuned.trainable):
        raise JaxftError("the masks select nothing: no parameter would train")
    return tuned


def broadcast_prefix(masks: Tree, params: Tree) -> dict[str, Mask]:
    """A prefix tree of masks written out as path -> mask."""

    def is_leaf(m: Any) -> bool:
        return not isinstance(m, dict | list | tuple)

    out: dict[str, Mask] = {}
    try:
        full = jax.tree.map(
            lambda m, sub: jax.tree.map(lambda _: m, sub, is_leaf=is_weight), masks, params, is_leaf=is_leaf
        )
    except ValueError as error:
        raise JaxftError(f"the masks are not a prefix of the parameters: {error}") from None
    flat = jax.tree_util.tree_leaves_with_path(full, is_leaf=is_leaf)
    for path, m in flat:
        out[".".join(key_name(k) for k in path)] = m
    return out


def is_matrix(path: str, w: Weight) -> bool:
    """Whether a weight is a matrix, or a stack of them, and not a vector (or a stack: `[layers, dim]`) of scales."""
    return len(shape_of(w)) >= 2 and path.rpartition(".")[2] in ("kernel", "embedding")


def layer_mask(layers: bool | np.ndarray, shape: tuple[int, ...]) -> Mask:
    """A selection of `select` (True or `bool[L]`) as a mask of a leaf of `shape`."""
    return layers if isinstance(layers, bool) else np.asarray(layers).reshape(-1, *(1,) * (len(shape) - 1))


def selected_masks(params: Tree, selector: Selector, *, roles: Roles = DECODER_ROLES) -> dict[str, Mask]:
    """`select` as masks by path, ready for `partition`."""
    shapes = {p: shape_of(w) for p, w in weights_by_path(params).items()}
    return {p: layer_mask(m, shapes[p]) for p, m in select(params, selector, roles=roles).items()}
