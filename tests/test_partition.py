"""Selectors against a slow reference, and masks: cut, combine, count, at all five granularities."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.errors import JaxftError
from jaxft.methods import count_trainable
from jaxft.partition import (
    DECODER_ROLES,
    Blocks,
    Roles,
    Trains,
    Tuned,
    combine,
    dense_mask,
    granularity,
    mark,
    masked_node,
    partition,
    select,
    selected_masks,
    shape_of,
    split,
    unmarked,
    weights_by_path,
)
from jaxft.weights import BlockSplit, LowRank, RowSplit, SparseDelta, Split, materialize

L = 4
SHAPES = {  # in tree order: jax sorts the keys of a dict
    "embed.embedding": (12, 8),
    "final_norm.scale": (8,),
    "head.kernel": (8, 12),
    "layers.attn.q.bias": (L, 8),
    "layers.attn.q.kernel": (L, 8, 8),
    "layers.attn.q_norm.scale": (L, 2),
    "layers.attn.v.kernel": (L, 8, 4),
    "layers.attn_norm.scale": (L, 8),
    "layers.mlp.down.kernel": (L, 12, 8),
    "layers.mlp.up.kernel": (L, 8, 12),
}


def nested(flat: dict) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        home = tree
        for key in parents:
            home = home.setdefault(key, {})
        home[last] = leaf
    return tree


PARAMS = nested({p: jax.random.normal(jax.random.key(i), s) for i, (p, s) in enumerate(SHAPES.items())})
ABSTRACT = nested({p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()})

# --- selectors --------------------------------------------------------------------------------------------------------


def alternatives(text: str) -> list[str]:
    """`a{b,c}` -> `ab`, `ac`, one brace at a time."""
    if "{" not in text:
        return [text]
    start, stop = text.index("{"), text.index("}")
    return [w for o in text[start + 1 : stop].split(",") for w in alternatives(text[:start] + o + text[stop + 1 :])]


def reference_layers(term: str, path: str) -> np.ndarray:
    """Which of L layers a term selects of a path: the term as a regular expression, its range as a set."""
    chosen = np.zeros(L, bool)
    for plain in alternatives(term):
        layers, pattern = np.ones(L, bool), ""
        for segment in plain.split("."):
            name, _, index = segment.partition("[")
            if index:
                numbers = [int(n) if n else None for n in index[:-1].split(":")]
                if len(numbers) == 1:
                    inside = {numbers[0] % L} if -L <= numbers[0] < L else set()
                else:
                    inside = set(range(L)[slice(*numbers)])
                layers &= np.isin(np.arange(L), list(inside))
            if name == "**":
                pattern += r"(?:[^.]+\.)*"
            else:
                pattern += "".join({"*": "[^.]*", "?": "[^.]"}.get(c, re.escape(c)) for c in name) + r"\."
        if re.search(rf"(?:^|(?<=\.)){pattern}", f"{path}."):
            chosen |= layers
    return chosen


def reference_select(selector: str) -> dict[str, np.ndarray]:
    found = {}
    for path in SHAPES:
        mask = np.zeros(L, bool)
        for term in selector.split("|"):
            hit = reference_layers(term.removeprefix("!"), path)
            mask = mask & ~hit if term.startswith("!") else mask | hit
        if mask.any():
            found[path] = mask
    return found


ranges = st.sampled_from(["[0]", "[3]", "[-1]", "[1:3]", "[-2:]", "[::2]", "[:1]", "[2:9]", "[7:9]", "[1::2]"])
names = st.sampled_from(
    ["embed", "attn", "mlp", "q", "v", "up", "kernel", "bias", "scale", "final_norm"]
    + ["*", "*_norm", "q*", "?", "{q,v}", "{attn,mlp}", "{up,do?n}", "k*l", "**", "nothing"]
)
ranged = st.tuples(st.sampled_from(["layers", "l*"]), ranges).map("".join)
terms = st.builds(
    lambda bang, head, rest: bang + ".".join([*head, *rest]),
    st.sampled_from(["", "", "!"]),
    st.one_of(st.just([]), st.just(["layers"]), ranged.map(lambda s: [s])),
    st.lists(names, min_size=1, max_size=3),
)


@settings(max_examples=300)
@given(st.lists(terms, min_size=1, max_size=4).map("|".join))
def test_select_agrees_with_the_reference(selector):
    want = reference_select(selector)
    got = select(ABSTRACT, selector, allow_empty=True)
    assert list(got) == list(want)
    for path, layers in got.items():
        np.testing.assert_array_equal(np.broadcast_to(layers, L), want[path])
        assert layers is True or not layers.all(), "all layers are written True"


def test_selectors_by_hand():
    def chosen(selector):
        return list(select(ABSTRACT, selector))

    assert chosen("attn.q") == ["layers.attn.q.bias", "layers.attn.q.kernel"]
    assert chosen("attn.{q,v}.kernel") == ["layers.attn.q.kernel", "layers.attn.v.kernel"]
    assert chosen("attn|!attn.q") == ["layers.attn.q_norm.scale", "layers.attn.v.kernel"]
    assert chosen("attn|!attn|attn.v") == ["layers.attn.v.kernel"], "terms act in order"
    assert chosen("**") == list(SHAPES)
    assert chosen(["embed", "head"]) == ["embed.embedding", "head.kernel"]
    assert chosen(lambda path, w: w.shape[-1] == 12) == ["head.kernel", "layers.mlp.up.kernel"]
    assert chosen("layers.**.bias") == ["layers.attn.q.bias"]
    assert chosen("@attention") == ["layers.attn.q.kernel", "layers.attn.v.kernel"]
    assert chosen("@mlp|!mlp.up") == ["layers.mlp.down.kernel"]
    layers = select(ABSTRACT, "layers[1:3].attn.q.kernel|layers[-1].attn.q.kernel")["layers.attn.q.kernel"]
    assert layers.tolist() == [False, True, True, True]
    left = select(ABSTRACT, "layers.mlp.up|!layers[0]")["layers.mlp.up.kernel"]
    assert left.tolist() == [False, True, True, True]


def test_what_a_role_excludes_stays_within_the_role():
    roles = dataclasses.replace(DECODER_ROLES, names={"rest": "layers.attn|!attn.q", "upper": "layers[2:].attn.q"})

    def chosen(selector):
        return select(ABSTRACT, selector, roles=roles)

    assert list(chosen("@rest")) == ["layers.attn.q_norm.scale", "layers.attn.v.kernel"]
    assert list(chosen("layers.attn|!@rest")) == ["layers.attn.q.bias", "layers.attn.q.kernel"]
    assert list(chosen("attn.q.kernel|@rest"))[0] == "layers.attn.q.kernel", "a role adds, whatever it excludes"
    assert chosen("layers.attn.q.kernel|!@upper")["layers.attn.q.kernel"].tolist() == [True, True, False, False]


def test_ranges_of_layers_that_are_not_stacked():
    params = {"layers": {str(i): {"attn": {"q": jnp.zeros((2, 2))}} for i in range(4)}}
    assert list(select(params, "layers[1:3].attn")) == ["layers.1.attn.q", "layers.2.attn.q"]
    assert list(select(params, "layers[2]")) == ["layers.2.attn.q"]
    assert list(select(params, "layers.{0,3}")) == ["layers.0.attn.q", "layers.3.attn.q"]
    with pytest.raises(JaxftError, match="counted from the end needs stacked layers"):
        select(params, "layers[-1]")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("attm.q", r'selector "attm.q" matches no weight: .*layers.attn.q'),
        ("attn|mpl", r'term "mpl" of selector "attn\|mpl" matches no weight'),
        ("embed|layers[40:50]", r'term "layers\[40:50\]" .* matches no weight'),
        ("attn|!nothing", r'term "nothing" .* matches no weight'),
        ("@atention", r'unknown role "@atention".*did you mean "attention"'),
        ("attn.{q,v", "unbalanced brackets"),
        ("layers[a:b]", r'cannot read "layers\[a:b\]"'),
        ("attn..q", 'cannot read ""'),
        ("attn|", "empty term"),
        ("", "empty term"),
        ("!attn", "matches no weight"),
    ],
)
def test_selector_errors_name_the_term_and_the_nearest(selector, message):
    with pytest.raises(JaxftError, match=message):
        select(ABSTRACT, selector)


def test_a_predicate_that_chooses_nothing_is_an_error():
    with pytest.raises(JaxftError, match="chose none of 10 weights"):
        select(ABSTRACT, lambda path, w: False)
    assert select(ABSTRACT, lambda path, w: False, allow_empty=True) == {}


def test_roles_of_another_model():
    roles = Roles(names={"mixer": "blocks.mix"}, categories={}, stacked=("blocks",))
    params = {"blocks": {"mix": jnp.zeros((2, 3, 3))}, "out": jnp.zeros(3)}
    assert list(select(params, "@mixer", roles=roles)) == ["blocks.mix"]
    cut = partition(params, {"blocks.mix": np.array([True, False])[:, None, None]}, roles=roles)
    assert isinstance(combine(cut)["blocks"]["mix"], Split)


def test_shapes_of_marked_weights_and_nodes():
    tuned = partition(PARAMS, selected_masks(PARAMS, "layers[1:3].attn|embed"))
    marked = mark(tuned)
    assert {p: shape_of(w) for p, w in weights_by_path(marked).items()} == SHAPES
    # Selecting by a range over what an earlier method marked works; so does taking the marks off.
    assert select(marked, "layers[0].mlp.up")["layers.mlp.up.kernel"].tolist() == [True, False, False, False]
    for path, w in weights_by_path(materialize(unmarked(marked))).items():
        np.testing.assert_array_equal(w, weights_by_path(PARAMS)[path])


# --- masks ------------------------------------------------------------------------------------------------------------


@st.composite
def masks(draw, shape: tuple[int, ...], stacked: bool):
    """A mask of a leaf at a random granularity."""
    matrix = len(shape) - stacked == 2
    kinds = ["leaf", "element"] + ["layer"] * stacked + ["row", "column", "uneven rows", "block"] * matrix
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    part = draw(st.sampled_from([0.2, 0.5, 0.8]))

    def some(*size):
        return rng.random(size) < part

    layers = shape[:1] if stacked else ()
    if kind == "leaf":
        return draw(st.booleans())
    if kind == "element":
        return some(*shape)
    if kind == "layer":
        return some(L).reshape(-1, *(1,) * (len(shape) - 1))
    if kind == "block":
        return Blocks(some(*layers, shape[-2] // 4, shape[-1] // 2), (4, 2))
    if kind == "uneven rows":
        return some(*layers, shape[-2], 1)
    axis = -2 if kind == "row" else -1
    chosen = rng.permuted(np.broadcast_to(np.arange(shape[axis]) < shape[axis] // 2, (*layers, shape[axis])), axis=-1)
    return np.expand_dims(chosen, -1 if kind == "row" else -2)


@st.composite
def mask_trees(draw):
    chosen = draw(st.lists(st.sampled_from(list(SHAPES)), min_size=1, max_size=4, unique=True))
    return {p: draw(masks(SHAPES[p], p.startswith("layers."))) for p in chosen}


def plus_one(tuned: Tuned) -> Tuned:
    return tuned._replace(trainable=jax.tree.map(lambda x: x + 1, tuned.trainable))


@settings(max_examples=40)
@given(mask_trees())
def test_partition_trains_exactly_the_mask(chosen):
    dense = {p: dense_mask(m, SHAPES[p]) for p, m in chosen.items()}
    count = sum(int(m.sum()) for m in dense.values())
    if count == 0:
        with pytest.raises(JaxftError, match="select nothing"):
            partition(PARAMS, chosen)
        return
    tuned = partition(PARAMS, chosen)
    halves = [jax.tree_util.tree_leaves_with_path(half, is_leaf=lambda x: x is None) for half in tuned[:2]]
    for (path, t), (_, f) in zip(*halves, strict=True):
        assert (t is None) != (f is None), f"the holes are not complementary at {path}"
    assert count_trainable(tuned) == count
    whole = weights_by_path(materialize(combine(tuned)))
    moved = weights_by_path(materialize(combine(plus_one(tuned))))
    for path, w in weights_by_path(PARAMS).items():
        np.testing.assert_array_equal(whole[path], w)
        np.testing.assert_array_equal(moved[path] != w, dense.get(path, np.zeros(w.shape, bool)))
    again = split(mark(tuned), tuned.state)
    assert jax.tree.structure(again) == jax.tree.structure(tuned)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tuned), strict=True):
        assert a is b, "mark and split copy nothing"


NODES = {
    "leaf": (True, Trains),
    "layer": (np.array([1, 0, 1, 0], bool)[:, None, None], Split),
    "row": (np.array([1, 0, 1, 0, 0, 0, 0, 1], bool)[None, :, None], RowSplit),
    "column": (np.array([1, 0, 1, 0, 0, 0, 0, 1], bool)[None, None, :], RowSplit),
    "block": (Blocks(np.eye(4, 2, dtype=bool)[None], (2, 4)), BlockSplit),
    "element": (np.eye(8, dtype=bool)[None], SparseDelta),
}


@pytest.mark.parametrize("kind", NODES)
def test_a_mask_is_expressed_by_the_coarsest_node(kind):
    mask, cls = NODES[kind]
    w = PARAMS["layers"]["attn"]["q"]["kernel"]
    assert granularity(mask, w.shape, stacked=True) == kind
    assert isinstance(masked_node(w, mask, stacked=True), cls)
    if kind != "leaf":  # nothing larger than what trains is among what trains
        tuned = split({"w": masked_node(w, mask, stacked=True)})
        assert sum(x.size for x in jax.tree.leaves(tuned.trainable)) == dense_mask(mask, w.shape).sum()


def test_prefix_masks():
    tuned = partition(PARAMS, {"embed": True, "layers": False, "final_norm": {"scale": True}, "head": False})
    trained = [p for p, w in weights_by_path(tuned.trainable).items()]
    assert trained == ["embed.embedding", "final_norm.scale"]
    rows = np.array([1, 0, 0, 0], bool)[:, None, None]
    attn = {"q": {"kernel": rows, "bias": False}, "v": True, "q_norm": False}
    layers = {"attn": attn, "attn_norm": False, "mlp": False}
    tuned = partition(PARAMS, {"embed": False, "layers": layers, "final_norm": False, "head": False})
    assert count_trainable(tuned) == 8 * 8 + L * 8 * 4


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"embed.embedding": False}, "select nothing"),
        ({}, "select nothing"),
        ({"layers.attn.q.kernle": True}, r'no weight at "layers.attn.q.kernle": did you mean "layers.attn.q.kernel"'),
        ({"embed.embedding": np.ones((3, 1), bool)}, r'mask of "embed.embedding": .*\(3, 1\) does not broadcast'),
        ({"embed.embedding": np.eye(5, dtype=bool)}, r"\(5, 5\) does not broadcast"),
        ({"layers.attn.q.kernel": np.array([True, False, True, False])}, r"\(4,\) does not broadcast"),
        ({"head.kernel": Blocks(np.ones((2, 2), bool), (3, 6))}, "blocks of 3 x 6 do not tile"),
        ({"head.kernel": Blocks(np.ones((3, 3), bool), (4, 6))}, r"block mask of shape \(3, 3\) does not broadcast"),
        ({"final_norm.scale": Blocks(np.ones((1, 1), bool), (2, 2))}, "do not tile"),
        ({"embed": True, "nothing": True}, 'no weight at "nothing"'),
        ({"embed": {"embedding": True}}, "not a prefix of the parameters"),
    ],
)
def test_misfit_masks_are_refused(chosen, message):
    with pytest.raises(JaxftError, match=message):
        partition(PARAMS, chosen)


def test_a_mask_cuts_arrays_only():
    params = {"w": LowRank(jnp.ones((4, 4)), jnp.ones((4, 1)), jnp.ones((1, 4)))}
    with pytest.raises(JaxftError, match='"w" is a LowRank'):
        partition(params, {"w": True})
    assert isinstance(combine(partition({**params, "v": jnp.ones(3)}, {"v": True}))["w"], LowRank)


def test_selected_masks_cut_what_was_selected():
    tuned = partition(PARAMS, selected_masks(PARAMS, "layers[1:3].attn.v|head"))
    assert count_trainable(tuned) == 2 * 8 * 4 + 8 * 12
    w = combine(tuned)["layers"]["attn"]["v"]["kernel"]
    assert isinstance(w, Split) and w.is_trainable.tolist() == [False, True, True, False]


def test_combine_is_differentiable_in_what_trains():
    tuned = partition(PARAMS, selected_masks(PARAMS, "layers[0].mlp.up|final_norm"))

    def total(trainable):
        return sum(jnp.sum(w**2) for w in jax.tree.leaves(materialize(combine(tuned._replace(trainable=trainable)))))

    gradient = jax.grad(total)(tuned.trainable)
    for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(tuned.trainable), strict=True):
        np.testing.assert_allclose(g, 2 * w, rtol=1e-6)


def test_decoder_roles_name_what_they_say():
    assert set(DECODER_ROLES.names) >= {"attention", "mlp", "linear", "norm", "bias", "embedding", "head"}
    attention = {p for s in DECODER_ROLES.categories["attention"] for p in select(ABSTRACT, s, allow_empty=True)}
    assert attention == set(select(ABSTRACT, "@attention"))
