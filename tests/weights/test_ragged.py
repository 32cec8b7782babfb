"""The law of weight nodes for experts: row r of expert e is `x[r] @ materialize(w)[e]`, values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.distributed import MeshConfig, make_mesh, tree_shardings
from jaxft.partition import Trains, Tuned, combine, split
from jaxft.weights import (
    Axes,
    Node,
    Observed,
    RowSplit,
    SparseDelta,
    gather_rows,
    group_of_row,
    materialize,
    node,
    ragged_linear,
    scan_layers,
    specs,
    sum_rows,
)
from jaxft.weights.ragged import UNDIVIDED, _outer, _outer_tpu, _sum_rows_tpu
from jaxft.weights.rows import SOME_EXPERTS
from tests.weights.test_law import CASES, close, equations, packed_up, with_gradients

L, E, D, ROWS = 4, 3, 8, 6
SIZES = jnp.asarray([[2, 0, 4], [1, 5, 0]])  # of two shards; one expert without rows in each


def normal(seed: int, *shape: int) -> jax.Array:
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


def experts(path: str) -> Node:
    """A case of the law for matrices, as E different experts of each of L layers: masks of layers stay masks."""

    def stack(*a: jax.Array) -> jax.Array:
        varied = [x * (1 + 0.3 * i) if jnp.issubdtype(x.dtype, jnp.floating) else x for i, x in enumerate(a)]
        return jnp.stack(varied, 1) if a[0].ndim > 1 else a[0]

    return jax.tree.map(stack, *(CASES[path]() for _ in range(E)))


def row_split(index: jax.Array) -> RowSplit:
    base = normal(1, L, E, D, D)
    rows = gather_rows(base, index, -3) + jnp.where(index < E, 1.0, 0.0)[..., None, None] * normal(
        2, *index.shape, D, D
    )
    return RowSplit(base, Trains(rows), index, -3)


# The first case of every node, and those whose rule for experts is another.
OF_MATRICES = {type(make()): name for name, make in reversed(CASES.items())}
EXPERTS = {
    **{
        name: lambda name=name: experts(name)
        for name in [*OF_MATRICES.values(), "RowSplit-columns", "RowSplit-padded-rows", "LowRank-of-Splits"]
    },
    "RowSplit-experts": lambda: row_split(jnp.asarray([[2, 0], [1, 2], [0, 1], [2, 1]])),
    "RowSplit-experts-padded": lambda: row_split(jnp.asarray([[2, E], [E, E], [0, 1], [1, E]])),
    "RowSplit-rows-packed": lambda: packed_up(experts("RowSplit-padded-rows")),
    "RowSplit-experts-packed": lambda: packed_up(row_split(jnp.asarray([[2, E], [E, E], [0, 1], [1, E]])), E),
    "SparseDelta-over-all-experts": lambda: SparseDelta(
        normal(1, L, E, D, D),
        Trains(normal(3, L, 7)),
        jnp.asarray(np.stack([np.random.default_rng(i).permutation(E * D * D)[:7] for i in range(L)])),
    ),
}


def cut(name: str) -> Tuned:
    return split({"w": EXPERTS[name]()})


def chained(params, x, axes=UNDIVIDED, sizes=SIZES):
    return scan_layers(lambda x, layer, _: (jnp.tanh(ragged_linear(x, layer["w"], sizes, axes)), None), params, x)[0]


def chained_slow(params, x, sizes=SIZES):
    dense, group = materialize(params["w"]), group_of_row(sizes, ROWS)
    for layer in range(L):
        x = jnp.where((group < E)[..., None], jnp.tanh(jnp.einsum("sri,srio->sro", x, dense[layer][group])), 0)
    return x


@pytest.mark.parametrize("name", EXPERTS)
def test_law(name):
    x, tuned = normal(30, 2, ROWS, D), cut(name)
    fast, slow = jax.jit(lambda t, x: [with_gradients(f, t, x) for f in (chained, chained_slow)])(tuned, x)
    close(fast, slow)


@pytest.mark.parametrize("name", ["LowRank", "Split", "RowSplit-rows", "RowSplit-experts-padded", "SparseDelta"])
def test_on_a_mesh_with_experts_divided(name):
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    x, tuned = normal(31, 2, ROWS, D), cut(name)
    # Three experts do not divide over two devices; the matrices do.
    wanted = specs(combine(tuned)["w"], P(None, None, "expert", "tensor"))
    places = jax.tree.map(lambda s: NamedSharding(mesh, s), wanted, is_leaf=lambda s: isinstance(s, P))
    spread = jax.device_put(combine(tuned)["w"], places)
    halves = (
        jax.tree.map(lambda h, a: None if h is None else a, half["w"], spread, is_leaf=lambda h: h is None)
        for half in tuned[:2]
    )
    again = Tuned(*({"w": half} for half in halves))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda t, x: with_gradients(lambda p, x: chained(p, x, Axes(("data",))), t, x))(
            again, jax.device_put(x, NamedSharding(mesh, P("data")))
        )
    close(found, jax.jit(lambda t, x: with_gradients(chained_slow, t, x))(tuned, x))


OWN = jnp.asarray([[4, 0, 0], [0, 6, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 5]])  # of two times three devices


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *[(name, "data") for name in ("LowRank", "Split", "Gated", "RowSplit-rows", "BlockSplit", "Observed")],
        *itertools.product(("SparseDelta", "SparseDelta-over-all-experts"), ("data", "fsdp")),
        *itertools.product(("RowSplit-experts-padded", "RowSplit-experts-packed"), ("data", "fsdp")),
    ],
)
def test_on_a_mesh_where_rows_are_with_their_experts(name, other):
    """No device has a matrix of another, or rows for one; where it has fewer rows than there is room, zeros follow."""
    mesh = make_mesh(MeshConfig(expert=3, **{"data": 1, other: 2}), jax.devices()[:6])
    axes = Axes((other, "expert"), ("expert",))
    tuned, group = cut(name), group_of_row(OWN, ROWS)
    x = jnp.where((group < E)[..., None], normal(31, 6, ROWS, D), 0)
    places = tree_shardings(combine(tuned), {"w": ("layers", "expert", "embed", "mlp")}, mesh)
    spread = jax.device_put(combine(tuned), places)
    again = Tuned(
        *(
            jax.tree.map(lambda h, a: None if h is None else a, half, spread, is_leaf=lambda h: h is None)
            for half in tuned[:2]
        )
    )
    with jax.set_mesh(mesh):
        run = jax.jit(lambda t, x: with_gradients(lambda p, x: chained(p, x, axes, OWN), t, x))
        found = run(again, jax.device_put(x, NamedSharding(mesh, P(axes.shards))))
    close(found, jax.jit(lambda t, x: with_gradients(lambda p, x: chained_slow(p, x, OWN), t, x))(tuned, x))


def test_matrices_of_experts_that_train_divide_over_all_devices():
    made = specs(combine(cut("RowSplit-experts"))["w"], P(None, "expert", "fsdp", "tensor"))
    assert made.rows == P(None, None, ("fsdp", "expert"), "tensor"), "they lie where they like, not with their experts"


def test_sums_of_rows_by_index():
    index = jnp.asarray([[3, 129, 3, 0, 250, 129, 250], [249, 249, 7, 250, 128, 127, 3]])
    rows = normal(3, 2, 7, 40)
    expected = jnp.zeros((2, 250, 40)).at[jnp.arange(2)[:, None], index].add(rows, mode="drop")
    np.testing.assert_allclose(sum_rows(rows, index, 250), expected, rtol=1e-6, atol=1e-6)
    with pltpu.force_tpu_interpret_mode():
        found = _sum_rows_tpu(rows[0], index[0], 250)
    np.testing.assert_allclose(found, expected[0], rtol=1e-6, atol=1e-6)


def test_only_the_chosen_experts_have_a_weight_gradient():
    w = jax.tree.map(lambda a: a[0], combine(cut("RowSplit-experts"))["w"])

    def loss(rows, x):
        return jnp.sum(ragged_linear(x, w.replace(rows=rows), SIZES))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(w.rows, normal(1, 2, ROWS, D)).jaxpr
    products = [e for e, _ in equations(jaxpr) if e.primitive.name == "ragged_dot_general"]
    made = [e.outvars[0].aval.shape for e in products]
    assert made.count((2, D, D)) == 2 and (E, D, D) not in made, "a product for each shard, of the two experts alone"
    named = [e.outvars[0].aval.shape for e in products if SOME_EXPERTS in str(e.source_info.name_stack)]
    assert named == [(2, D, D)] * 2, "the plan knows them by name"


def test_the_kernel_for_tpu_is_the_same_product():
    x, g, sizes = normal(1, 250, 100), normal(2, 250, 130), jnp.asarray([10, 0, 190, 20])
    with pltpu.force_tpu_interpret_mode():
        found = _outer_tpu(x, g, sizes)
    np.testing.assert_allclose(found, _outer(x, g, sizes), rtol=1e-4, atol=1e-4)


def test_observed_counts_by_expert():
    x = normal(1, 2, ROWS, D)
    w = Observed(normal(2, E, D, D), jnp.zeros((E, D)))
    energy = jax.grad(lambda e: jnp.sum(ragged_linear(x, w.replace(energy=e), SIZES)))(w.energy)
    group = group_of_row(SIZES, ROWS)
    expected = [jnp.sum(jnp.where((group == e)[..., None], x**2, 0), axis=(0, 1)) for e in range(E)]
    np.testing.assert_allclose(energy, jnp.stack(expected), rtol=1e-5)


def test_a_node_without_a_rule_says_what_to_do():
    @node
    class Bare(Node):
        w: jax.Array

    with pytest.raises(TypeError, match="Bare has no `ragged_linear` rule: register one"):
        ragged_linear(normal(1, 2, ROWS, D), Bare(normal(2, E, D, D)), SIZES)
