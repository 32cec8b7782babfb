"""Weight gradients summed in stages over a mesh: the sums that XLA makes, as reduce-scatters, where they are used."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.distributed import MeshConfig, make_mesh
from jaxft.distributed.mesh import torus_stages
from jaxft.weights import (
    Axes,
    BlockSplit,
    RowSplit,
    SparseDelta,
    layer_slice,
    linear,
    ragged_linear,
    reduction,
    split_layers,
)
from jaxft.weights.core import scan_layers
from jaxft.weights.ragged import UNDIVIDED
from jaxft.weights.reduction import (
    BATCH_AXES,
    exchanged,
    matmul_of_columns,
    scattered_in,
    stages_for,
    stages_of_exchange,
)

LAYERS, DIM = 4, 16


@pytest.fixture
def few_are_many(monkeypatch):
    """What is done with many chips is done with eight."""
    monkeypatch.setattr(reduction, "FEWEST", 2)
    return monkeypatch


def stack():
    return jax.random.normal(jax.random.key(0), (LAYERS, DIM, DIM)) / 4


def many_entries():
    """A third of the entries of every layer, of the rows of every chip, and padding in any place."""
    k = DIM**2 // 3
    indices = np.stack([np.random.default_rng(i).permutation(DIM**2 + 9)[:k] for i in range(LAYERS)])
    indices = jnp.asarray(np.minimum(indices, DIM**2))
    values = jax.random.normal(jax.random.key(5), indices.shape) / 8
    return SparseDelta(stack(), jnp.where(indices < DIM**2, values, 0), indices)


NODES = {
    "array": stack,
    "split": lambda: split_layers(stack(), jnp.array([True, False, False, True]), 2),
    "few-entries": lambda: SparseDelta(stack(), jnp.full((4, 3), 0.1), jnp.tile(jnp.array([3, 40, DIM**2]), (4, 1))),
    "many-entries": many_entries,
}


def loss(w, x):
    def block(x, layer, _):
        return jnp.tanh(linear(x, layer)), None

    return jnp.sum(jnp.square(scan_layers(jax.checkpoint(block), w, x, None)[0]))


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [
        ({"fsdp": 8}, (2, 4)),
        ({"fsdp": 8}, (2, 2, 2)),
        ({"data": 2, "fsdp": 4}, (2, 2)),
        ({"data": 2, "fsdp": 4}, (4,)),
        ({"fsdp": 4, "sequence": 2}, (2, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NODES)
def test_gradients_are_those_of_one_device(name, sizes, stages, few_are_many):
    mesh, w = make_mesh(MeshConfig(**{"data": 1, **sizes})), NODES[name]()
    x = jax.random.normal(jax.random.key(1), (8, 6, DIM))
    expected = jax.grad(loss, argnums=(0, 1), allow_int=True)(w, x)
    rows = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    places = jax.tree.map(lambda a: rows if a.ndim == 3 else NamedSharding(mesh, PartitionSpec()), w)
    tokens = NamedSharding(mesh, PartitionSpec(("data", "expert", "fsdp"), "sequence"))

    @jax.jit
    def gradients(w, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), scattered_in(stages):
            return jax.grad(loss, argnums=(0, 1), allow_int=True)(w, x)

    placed = jax.device_put(w, places), jax.device_put(x, tokens)
    text = str(jax.make_jaxpr(gradients)(*placed))
    assert ("reduce_scatter" in text) == (name != "few-entries"), "these have no gradient of a matrix"
    assert "all_gather" in text
    found = gradients(*placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [
        ({"fsdp": 8}, ()),
        ({"fsdp": 8}, (2, 4)),
        ({"fsdp": 8}, (2, 2, 2)),
        ({"expert": 2, "fsdp": 4}, (2, 2)),
        ({"data": 2, "fsdp": 4}, (2, 2)),
    ],
    ids=str,
)
def test_gradients_of_experts_are_those_of_one_device(sizes, stages):
    """Summed where they will lie: never on all devices, however many groups there are."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    axes = Axes(tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1))
    groups = 6
    w = jax.random.normal(jax.random.key(0), (groups, DIM, 2 * DIM))
    x = jax.random.normal(jax.random.key(1), (8, 12, DIM))
    counts = jax.nn.one_hot(jax.random.randint(jax.random.key(2), (8, 12), 0, groups), groups, dtype=jnp.int32).sum(1)

    def loss(w, x, axes=UNDIVIDED):
        return jnp.sum(jnp.tanh(ragged_linear(x, w, counts, axes)))

    expected = jax.grad(loss, argnums=(0, 1))(w, x)
    place = NamedSharding(mesh, PartitionSpec("expert", "fsdp"))

    @functools.partial(jax.jit, out_shardings=(place, None))
    def gradients(w, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), scattered_in(stages):
            return jax.grad(loss, argnums=(0, 1))(w, x, axes)

    placed = jax.device_put(w, place), jax.device_put(x, NamedSharding(mesh, PartitionSpec(axes.shards)))
    text = str(jax.make_jaxpr(gradients)(*placed))
    assert text.count("reduce_scatter[") == max(len(stages), 1) + ("expert" in sizes)
    assert ("psum" in text) == ("data" in sizes) and ("all_gather" in text) == (len(stages) == 3)
    for found, one in zip(gradients(*placed), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stages", [(2, 4), (2, 2, 2)], ids=str)
def test_large_matrices_are_gathered_in_stages_on_three_axes_only(stages, few_are_many):
    few_are_many.setattr(reduction, "SMALL", 0)
    mesh, x = make_mesh(MeshConfig(fsdp=8)), jnp.ones((8, 6, DIM))

    def gradient(w):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), scattered_in(stages):
            return jax.grad(loss)(w, x)

    text = str(jax.make_jaxpr(gradient)(stack()))
    assert "reduce_scatter" in text and ("all_gather" in text) == (len(stages) == 3)


on_meshes = pytest.mark.parametrize(
    ("sizes", "stages"),
    [
        ({"fsdp": 8}, (2, 4)),
        ({"fsdp": 8}, (2, 2, 2)),
        ({"data": 2, "fsdp": 4}, (2, 2)),
        ({"fsdp": 4, "sequence": 2}, (2, 2)),
    ],
    ids=str,
)


@on_meshes
def test_tokens_are_exchanged_in_stages(sizes, stages, few_are_many):
    """From the chips that have some of their channels to those that have them whole, and gradients back."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    before, after = PartitionSpec("data", "sequence", "fsdp"), PartitionSpec(BATCH_AXES, "sequence")
    x = jax.device_put(jax.random.normal(jax.random.key(1), (16, 6, DIM)), NamedSharding(mesh, before))
    wanted = jax.random.normal(jax.random.key(2), x.shape)

    @jax.jit
    def moved(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), scattered_in(stages):
            assert stages_of_exchange(DIM) == stages
            move = functools.partial(exchanged, stages=stages, before=before, after=after)
            return move(x), jax.grad(lambda x: jnp.sum(move(x) * wanted))(x)

    y, gradient = moved(x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(gradient, wanted)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, after), 3)
    assert str(jax.make_jaxpr(moved)(x)).count("all_to_all[") == 3 * len(stages)


@on_meshes
def test_rows_are_gathered_for_divided_columns_and_their_gradient_is_scattered(sizes, stages):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    rows, columns = PartitionSpec(BATCH_AXES, "sequence"), PartitionSpec(None, "fsdp")
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(16, 6, DIM), (DIM, 24)]))
    placed = jax.device_put((x, w), (NamedSharding(mesh, rows), NamedSharding(mesh, columns)))

    def of(product, x, w):
        y = product(x, w)
        return jnp.sum(jnp.sin(y)), y

    @jax.jit
    def divided(x, w):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            product = functools.partial(matmul_of_columns, stages=stages)
            return jax.value_and_grad(functools.partial(of, product), (0, 1), has_aux=True)(x, w)

    expected = jax.value_and_grad(functools.partial(of, jnp.matmul), (0, 1), has_aux=True)(x, w)
    found = divided(*placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    (_, y), gradients = found
    places = (PartitionSpec(BATCH_AXES[:-1], "sequence", "fsdp"), rows, columns)
    for array, spec in zip((y, *gradients), places, strict=True):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)
    text = str(jax.make_jaxpr(divided)(*placed))
    assert text.count("all_gather[") == text.count("reduce_scatter[") == len(stages)


def test_frozen_weights_have_no_gradient_to_sum(few_are_many):
    mesh, x = make_mesh(MeshConfig(fsdp=8)), jnp.ones((8, 6, DIM))

    def of_input(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), scattered_in((2, 4)):
            return jax.grad(lambda x: loss(stack(), x))(x)

    assert "reduce_scatter" not in str(jax.make_jaxpr(of_input)(x))


@pytest.mark.parametrize(
    ("sizes", "shape", "stages"),
    [
        ({"fsdp": 8}, (8, 6, 16), (2, 4)),
        ({"fsdp": 8}, (4, 6, 16), ()),  # rows
        ({"fsdp": 8}, (8, 6, 12), ()),  # the matrix
        ({"fsdp": 4, "sequence": 2}, (8, 5, 16), ()),
        ({"fsdp": 4, "tensor": 2}, (8, 6, 16), ()),
        ({"fsdp": 8}, (48, 16), ()),
    ],
)
def test_what_does_not_divide_is_left_to_xla(sizes, shape, stages, few_are_many):
    mesh, x = make_mesh(MeshConfig(**{"data": 1, **sizes})), jnp.zeros(shape)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), scattered_in((2, sizes["fsdp"] // 2)):
        assert stages_for(x) == stages
        few_are_many.undo()
        assert stages_for(x) == (), "on so few XLA sums while it multiplies"


def devices(order):
    """A mesh axis over devices at these coordinates."""
    line = np.array([types.SimpleNamespace(coords=c) for c in order], object)
    return types.SimpleNamespace(axis_names=("fsdp",), devices=line)


def test_stages_are_the_sides_of_the_torus():
    box = [(x, y, 0) for x in range(4) for y in range(16)]
    assert torus_stages(devices(box)) == (4, 16)
    assert torus_stages(devices([(x, y, z) for z in range(4) for x in range(4) for y in range(4)])) == (4, 4, 4)
    assert torus_stages(devices(box[:1])) == ()
    assert torus_stages(devices([(x, y if x % 2 == 0 else 15 - y, 0) for x in range(4) for y in range(16)])) == ()
    assert torus_stages(devices([(2 * x, y, 0) for x in range(4) for y in range(16)])) == (), "no neighbours"
    assert torus_stages(make_mesh(MeshConfig(fsdp=8))) == (), "a CPU has no coordinates"


def of_two_layers():
    return layer_slice(split_layers(jnp.ones((2, DIM, 2 * DIM)), jnp.array([True, False]), 1), 0)


@pytest.mark.parametrize(
    ("make", "trained"),
    [
        (lambda: jnp.ones((DIM, 2 * DIM)), lambda w: w),
        (of_two_layers, lambda w: w.trainable),
        (lambda: RowSplit(jnp.ones((DIM, 2 * DIM)), jnp.ones((4, 2 * DIM)), jnp.arange(4), -2), lambda w: w.rows),
        (lambda: BlockSplit(jnp.ones((DIM, 2 * DIM)), jnp.ones((4, 4, 4)), jnp.arange(4)), lambda w: w.blocks),
        (lambda: SparseDelta(jnp.ones((DIM, 2 * DIM)), jnp.ones(2), jnp.arange(2)), lambda w: w.values),  # few of them
    ],
)
def test_the_gradient_of_a_weight_moves_no_tokens(make, trained):
    """Rows and positions that lie over different axes stay where they are: each device sums over its own."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    layouts = ("fsdp", "sequence"), ("fsdp", "sequence", "tensor")
    x, g = (
        jax.ShapeDtypeStruct((8, 64, d), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*layout)))
        for d, layout in zip((DIM, 2 * DIM), layouts, strict=True)
    )

    def gradient(w, x, g):
        return trained(jax.vjp(lambda w: linear(x, w), w)[1](g)[0])

    with jax.set_mesh(mesh):
        text = jax.jit(gradient).lower(make(), x, g).compile().as_text()
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    assert not [dims for dims in moved if math.prod(map(int, dims.split(","))) >= 8 * 64 * 4], moved
