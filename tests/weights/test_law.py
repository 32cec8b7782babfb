"""The law of weight nodes: `linear(x, w) == x @ materialize(w)`, values and gradients, everywhere a model may run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.distributed import MeshConfig, make_mesh
from jaxft.partition import Trains, Tuned, combine, split
from jaxft.training.compilation import CompilationLog
from jaxft.weights import (
    Anchored,
    BlockSplit,
    Damped,
    Gated,
    Grafted,
    LowRank,
    Node,
    Observed,
    Packed,
    RowSplit,
    SiteModule,
    SparseDelta,
    Split,
    Thresholded,
    embed,
    gather_blocks,
    gather_flat,
    layer_slice,
    linear,
    linear_rule,
    materialize,
    node,
    pack,
    scan_layers,
    specs,
    split_layers,
    unembed,
)
from jaxft.weights import sparse as sparse_weights

L, D = 4, 8  # layers, and both sides of a matrix
MASK = np.array([True, False, False, True])


def normal(seed: int, *shape: int) -> jax.Array:
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


def matrices(seed: int = 0, layers: int = L) -> jax.Array:
    return normal(seed, layers, D, D)


def low_rank(base=None, seed: int = 10) -> LowRank:
    base = matrices() if base is None else base
    return LowRank(base, Trains(normal(seed, L, D, 4)), Trains(normal(seed + 1, L, 4, D)), 0.7)


def layers_split(stack=None) -> Split:
    cut = split_layers(matrices() if stack is None else stack, jnp.asarray(MASK), 2)
    return cut.replace(trainable=Trains(cut.trainable))


def rows(axis: int, base=None) -> RowSplit:
    index = jnp.asarray([[1, 5], [7, 0], [2, 3], [6, 4]])
    shape = (L, 2, D) if axis == -2 else (L, D, 2)
    return RowSplit(matrices() if base is None else base, Trains(normal(3, *shape)), index, axis)


def padded_rows(axis: int) -> RowSplit:
    w = rows(axis)
    index = w.index.at[1, 1].set(D).at[2].set(D)  # layer 1 has one slice, layer 2 none
    keep = jnp.expand_dims(index < D, -1 if axis == -2 else -2)
    return w.replace(index=index, rows=Trains(jnp.where(keep, w.rows.value, 0)))


def gated() -> Gated:
    return Gated(Trains(matrices()), jnp.asarray(MASK), jnp.ones(L, bool))


def sparse(base=None) -> SparseDelta:
    index = jnp.asarray(np.stack([np.random.default_rng(i).permutation(D * D)[:8] for i in range(L)]))
    index = index.at[1, 6:].set(D * D)  # padding: layer 1 has six entries
    return SparseDelta(matrices() if base is None else base, Trains(normal(4, L, 8)), index)


def blocks(base=None) -> BlockSplit:
    index = jnp.asarray([[0, 1, 2, 7], [3, 4, 5, 8], [6, 0, 8, 8], [7, 6, 5, 4]])  # 4 x 2 blocks of 2 x 4; 8 is padding
    values = jnp.where((index < 8)[..., None, None], normal(5, L, 4, 2, 4), 0)
    return BlockSplit(matrices() if base is None else base, Trains(values), index)


def packed_up(w: SparseDelta | BlockSplit | RowSplit, slices: int = D) -> SparseDelta | BlockSplit | RowSplit:
    """The same node, its rows of different counts end to end."""
    field, where, n, axis = {
        SparseDelta: ("values", "indices", D * D, -1),
        BlockSplit: ("blocks", "index", 8, -3),
        RowSplit: ("rows", "index", slices, getattr(w, "axis", None)),
    }[type(w)]
    index = np.asarray(getattr(w, where))
    rows = index.reshape(-1, index.shape[-1])
    rows = np.take_along_axis(rows, np.argsort(rows >= n, axis=1, kind="stable"), 1)  # padding comes last
    moved, start, held = pack((rows < n).sum(1), rows.shape[1])
    windows = jax.vmap(jnp.roll)(jnp.asarray(rows), moved)
    trained = jnp.moveaxis(getattr(w, field).value, axis, index.ndim - 1)
    array = trained.reshape(-1, *trained.shape[index.ndim :])[held]
    array = jnp.pad(array, ((0, -len(array) % 8), *((0, 0),) * (array.ndim - 1)))  # so that it divides over the mesh
    array = jnp.moveaxis(array, 0, axis)
    start = jnp.asarray(start.reshape(index.shape[:-1]))
    values = Packed(Trains(array), start, index.shape[-1], axis % array.ndim)
    return w.replace(**{field: values, where: windows.reshape(index.shape)})


def frozen_node_split() -> Split:
    cut = split_layers(matrices(), jnp.asarray(MASK), 2)
    base = LowRank(cut.frozen, normal(6, 2, D, 3), normal(7, 2, 3, D))
    return cut.replace(trainable=Trains(cut.trainable), frozen=base)


CASES = {
    "LowRank": low_rank,
    "Split": layers_split,
    "RowSplit-rows": functools.partial(rows, -2),
    "RowSplit-columns": functools.partial(rows, -1),
    "RowSplit-padded-rows": functools.partial(padded_rows, -2),
    "RowSplit-padded-columns": functools.partial(padded_rows, -1),
    "Gated": gated,
    "Damped": lambda: Damped(Trains(matrices()), jax.random.uniform(jax.random.key(9), (L, D, 1))),
    "Damped-over-Split": lambda: Damped(layers_split(), jax.random.uniform(jax.random.key(9), (L, 1, D))),
    "Grafted": lambda: Grafted(matrices(), matrices(1), normal(2, L, D, D) > 0, Trains(normal(3, L, D, D))),
    "Thresholded": lambda: Thresholded(matrices(), Trains(normal(3, L, D, D)), None, 0.1),
    "Thresholded-over-LowRank": lambda: Thresholded(
        low_rank().replace(a=normal(10, L, D, 4), b=normal(11, L, 4, D)), Trains(normal(3, L, D, D))
    ),
    "SparseDelta": sparse,
    "BlockSplit": blocks,
    "SparseDelta-packed": lambda: packed_up(sparse()),
    "BlockSplit-packed": lambda: packed_up(blocks()),
    "RowSplit-packed-rows": lambda: packed_up(padded_rows(-2)),
    "RowSplit-packed-columns": lambda: packed_up(padded_rows(-1)),
    "SparseDelta-packed-over-Split": lambda: packed_up(sparse(split_layers(matrices(), jnp.asarray(MASK), 2))),
    "Anchored": lambda: Anchored(Trains(matrices()), matrices(1)),
    "Observed": lambda: Observed(Trains(matrices()), jnp.zeros((L, D))),
    "LowRank-over-Split": lambda: low_rank(layers_split()),
    "LowRank-of-Splits": lambda: LowRank(
        matrices(), layers_split(normal(8, L, D, 4)), layers_split(normal(9, L, 4, D)), 2.0
    ),
    "LowRank-over-LowRank": lambda: low_rank(low_rank(seed=20)),
    "LowRank-over-LowRank-over-Split": lambda: low_rank(low_rank(layers_split(), seed=20)),
    "RowSplit-over-LowRank": lambda: rows(-2, low_rank().replace(a=normal(10, L, D, 4), b=normal(11, L, 4, D))),
    "SparseDelta-over-Split": lambda: sparse(split_layers(matrices(), jnp.asarray(MASK), 2)),
    "LowRank-over-BlockSplit": lambda: low_rank(blocks()),
    "Observed-over-LowRank": lambda: Observed(low_rank(), jnp.zeros((L, D))),
    "Split-of-frozen-LowRank": frozen_node_split,
}


def cut(name: str, dtype=jnp.float32, frozen_dtype=jnp.float32) -> Tuned:
    def to(tree, dtype):
        return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    tuned = split({"w": CASES[name]()})
    return Tuned(to(tuned.trainable, dtype), to(tuned.frozen, frozen_dtype))


def node_classes(root: type = Node) -> set[type]:
    found = set()
    for cls in root.__subclasses__():
        if cls.__module__.startswith("jaxft."):
            found |= {cls} | node_classes(cls)
    return found


def test_every_node_has_a_case():
    matrix_nodes = {cls for cls in node_classes() if not issubclass(cls, SiteModule) and cls is not Packed}  # a part
    assert matrix_nodes == {type(make()) for make in CASES.values()}


def close(fast, slow, tolerance=2e-5):
    fast, slow = jax.tree.leaves(fast), jax.tree.leaves(slow)
    assert len(fast) == len(slow) > 0
    for a, b in zip(fast, slow, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, float(np.abs(b).max())))


def with_gradients(fn, tuned: Tuned, x):
    """`fn(params, x)`, and its pullback of a fixed random cotangent to what trains and to `x`."""
    y, pull = jax.vjp(lambda t, x: fn(combine(tuned._replace(trainable=t)), x), tuned.trainable, x)
    keys = iter(jax.random.split(jax.random.key(5), 8))
    return y, pull(jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype), y))


def chained(params, x):
    """A model of L layers, each `tanh(x @ w)`, by the fast path under a scan."""
    return scan_layers(lambda x, layer, _: (jnp.tanh(linear(x, layer["w"])), None), params, x)[0]


def chained_slow(params, x):
    dense = materialize(params["w"])
    for layer in range(L):
        x = jnp.tanh(x @ dense[layer])
    return x


@pytest.mark.parametrize("name", CASES)
def test_one_layer(name):
    tokens = jnp.asarray([[0, 3, 7], [7, 7, 1]])

    def fast(params, x):
        w = layer_slice(params, 1)["w"], layer_slice(params, 3)["w"]  # one that trains where layers are split, one not
        return [(linear(x, v), embed(tokens, v), unembed(x, v)) for v in w]

    def slow(params, x):
        w = materialize(params["w"])[1], materialize(params["w"])[3]
        return [(x @ v, v[tokens], x @ v.T) for v in w]

    x, tuned = normal(30, 2, 3, D), cut(name)
    plain_values = fast(combine(tuned), x)
    run = jax.jit(lambda tuned, x: (with_gradients(fast, tuned, x), with_gradients(slow, tuned, x)))
    one, other = run(tuned, x)
    close(one, other)
    close(plain_values, other[0])


@pytest.mark.parametrize("name", CASES)
def test_under_scan_and_vmap(name):
    x, tuned = normal(31, 2, 3, D), cut(name)

    def mapped(params, x):
        return jax.vmap(lambda layer, x: linear(x, layer_slice(params, layer)["w"]))(jnp.arange(L), x)

    def mapped_slow(params, x):
        return jnp.einsum("lbi,lio->lbo", x, materialize(params["w"]))

    @jax.jit
    def run(tuned, x, xs):
        scanned = [with_gradients(f, tuned, x) for f in (chained, chained_slow)]
        over_layers = [with_gradients(f, tuned, xs) for f in (mapped, mapped_slow)]
        over_rows = jax.vmap(lambda x: chained(combine(tuned), x))(x)
        return scanned, over_layers, over_rows

    (scanned, scanned_slow), over_layers, over_rows = run(tuned, x, normal(32, L, 5, D))
    close(scanned, scanned_slow)
    close(*over_layers)
    close(over_rows, scanned[0])


@pytest.mark.parametrize("name", CASES)
def test_on_a_mesh(name):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tuned, x = cut(name), normal(33, 4, 3, D)
    params = combine(tuned)
    wanted = specs(params["w"], P(None, "fsdp", "tensor"))

    def is_spec(x):
        return isinstance(x, P)

    assert jax.tree.structure(wanted, is_leaf=is_spec) == jax.tree.structure(params["w"])
    for spec, array in zip(jax.tree.leaves(wanted, is_leaf=is_spec), jax.tree.leaves(params["w"]), strict=True):
        assert len(spec) <= array.ndim, f"{spec} for an array of shape {array.shape}"
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), wanted, is_leaf=is_spec)
    spread = {"w": jax.device_put(params["w"], places)}
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(spread) if a.ndim > 1)
    assert held < sum(a.nbytes for a in jax.tree.leaves(params)), "nothing is divided"
    again = Tuned(
        *(
            jax.tree.map(lambda hole, a: None if hole is None else a, half, spread, is_leaf=lambda h: h is None)
            for half in tuned[:2]
        )
    )
    rows_divided = jax.device_put(x, NamedSharding(mesh, P("data")))
    run = jax.jit(lambda tuned, x: with_gradients(chained, tuned, x))
    slow = jax.jit(lambda tuned, x: with_gradients(chained_slow, tuned, x))
    close(run(again, rows_divided), slow(tuned, x))


def test_short_specs_mean_trailing_none():
    made = specs(combine(cut("LowRank"))["w"], P(None, "fsdp"))
    assert (made.a, made.b) == (P(None, "fsdp", None), P(None, None, "fsdp"))


def test_all_that_trains_divides_over_fsdp():
    """Whatever its rank, or the number of rows, blocks, entries and experts: along an axis of the matrix."""

    def made(name):
        return specs(combine(cut(name))["w"], P(None, "fsdp", "tensor"))

    assert made("LowRank").b == P(None, None, ("tensor", "fsdp"))
    assert made("RowSplit-rows").rows == P(None, None, ("tensor", "fsdp"))
    assert made("RowSplit-columns").rows == P(None, "fsdp", None)
    assert made("BlockSplit").blocks == P(None, None, "fsdp", "tensor")
    assert made("SparseDelta").values == P(None, ("fsdp", "tensor"))


def equations(jaxpr, inside=()):
    """Every equation of a jaxpr with the names of the primitives that it is nested in."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, (*inside, eqn.primitive.name))


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("Observed")])  # counts in float32, on purpose
def test_fp32_masters_do_not_widen_bf16_activations(name):
    tuned, x = cut(name, jnp.float32, jnp.bfloat16), normal(34, 5, 7, D).astype(jnp.bfloat16)
    y, (_, dx) = jax.eval_shape(lambda t, x: with_gradients(chained, t, x), tuned, x)
    assert y.dtype == dx.dtype == jnp.bfloat16
    # The cotangent too is made in bfloat16; what is float32 beyond the masters has no token axes.
    for trace in (chained, lambda params, x: jax.vjp(lambda x: chained(params, x), x)[1](x)[0]):
        jaxpr = jax.make_jaxpr(lambda t, x, f=trace: f(combine(t), x))(tuned, x).jaxpr
        wide = [
            e.primitive.name
            for e, _ in equations(jaxpr)
            for v in e.outvars
            if v.aval.shape[:2] == (5, 7) and v.aval.dtype == jnp.float32
        ]
        assert not wide, f"float32 [batch, seq, ...] made by {wide}"


def test_split_skips_the_weight_gradient_of_frozen_layers():
    stack = normal(0, L, 6, 6)
    is_trainable = jnp.asarray(MASK)
    cut_stack = split_layers(stack, is_trainable, 2)

    def loss(trainable, x):
        return jnp.sum(chained({"w": cut_stack.replace(trainable=trainable)}, x) ** 2)

    x = normal(1, 5, 6)
    gradient = jax.jit(jax.grad(loss))
    dots = [
        inside
        for eqn, inside in equations(jax.make_jaxpr(gradient)(cut_stack.trainable, x).jaxpr)
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape == (6, 6)
    ]
    assert len(dots) == 1 and {"scan", "cond"} <= set(dots[0]), dots
    compiled = gradient.lower(cut_stack.trainable, x).compile().as_text()
    assert "conditional(" in compiled, "the compiler turned the conditional into a selection: nothing is skipped"


def test_redrawing_layers_compiles_nothing_and_changes_nothing():
    from jaxft.weights import resplit

    stack = matrices()
    w = split_layers(stack, jnp.asarray(MASK), 2)
    run = jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(chained({"w": w}, x)), allow_int=True))
    first, _ = run(w, normal(1, 3, D))
    move = jax.jit(resplit)
    for mask in ([False, True, True, False], [True, True, False, False], [False, False, True, True]):
        w = move(w, jnp.asarray(mask))
        np.testing.assert_array_equal(materialize(w), stack)
        np.testing.assert_array_equal(w.trainable, stack[np.flatnonzero(mask)])
        value, gradient = run(w, normal(1, 3, D))
        assert value == first and np.abs(gradient.trainable).max() > 0
    assert run._cache_size() == move._cache_size() == 1
    masters = split_layers(stack, jnp.asarray(MASK), 2)
    masters = masters.replace(frozen=masters.frozen.astype(jnp.bfloat16))
    moved = resplit(masters, jnp.asarray([True, True, False, False]))
    assert (moved.trainable.dtype, moved.frozen.dtype) == (jnp.float32, jnp.bfloat16)
    with pytest.raises(TypeError, match="LowRank"):
        resplit(combine(cut("Split-of-frozen-LowRank"))["w"], jnp.asarray(MASK))


def test_row_split_keeps_only_the_selected_channels_for_the_backward_pass():
    w = combine(cut("RowSplit-rows"))["w"]
    w = jax.tree.map(lambda a: a[0], w)
    x = normal(1, 5, 7, D)
    _, pull = jax.vjp(lambda r, x: linear(x, w.replace(rows=r)), w.rows, x)
    shapes = [a.shape for a in jax.tree.leaves(pull)]
    assert (5, 7, 2) in shapes and x.shape not in shapes


def test_sparse_gradient_is_the_dense_one_at_the_indices_and_padding_stays_zero():
    w = combine(cut("SparseDelta"))["w"]
    x, g = normal(1, 5, D), normal(2, 5, D)
    for layer in (0, 1):
        one = jax.tree.map(lambda a, layer=layer: a[layer], w)
        pulled = jax.vjp(lambda v, one=one: linear(x, one.replace(values=v)), one.values)[1](g)[0]
        np.testing.assert_allclose(pulled, gather_flat(x.T @ g, one.indices), rtol=1e-6)
        assert (np.asarray(pulled)[np.asarray(one.indices) == D * D] == 0).all()
        assert (np.asarray(pulled)[np.asarray(one.indices) < D * D] != 0).all()
    # Padding means nothing, whatever its value.
    marked = w.replace(values=jnp.where(w.indices == D * D, 100.0, w.values))
    np.testing.assert_array_equal(materialize(marked), materialize(w))


@pytest.mark.parametrize("count", [4, 40])
def test_few_entries_have_their_gradients_without_that_of_the_matrix(count):
    size = 64 * 96
    indices = jnp.append(jnp.arange(count - 1) * 131 % size, size)  # the last is padding
    w, x, g = SparseDelta(normal(0, 64, 96), jnp.zeros(count), indices), normal(1, 3, 5, 64), normal(2, 3, 5, 96)

    def pulled(x, g):
        return jax.vjp(lambda v: linear(x, w.replace(values=v)), w.values)[1](g)[0]

    expected = gather_flat(jnp.einsum("abi,abo->io", x, g), indices)
    np.testing.assert_allclose(pulled(x, g), expected, rtol=1e-5, atol=1e-6)
    assert expected[-1] == 0 != expected[0]
    products = [eqn for eqn, _ in equations(jax.make_jaxpr(pulled)(x, g).jaxpr) if eqn.primitive.name == "dot_general"]
    assert any(eqn.outvars[0].aval.size == size for eqn in products) == (count == 40)


def test_block_gradient_is_the_dense_one_in_the_blocks_and_padding_stays_zero():
    w = jax.tree.map(lambda a: a[2], combine(cut("BlockSplit"))["w"])
    x, g = normal(1, 5, D), normal(2, 5, D)
    pulled = jax.vjp(lambda b: linear(x, w.replace(blocks=b)), w.blocks)[1](g)[0]
    np.testing.assert_allclose(pulled, gather_blocks(x.T @ g, w.index, 2, 4), rtol=1e-5)
    assert (pulled[2:] == 0).all() and (pulled[:2] != 0).all()
    dense_gradients = [
        eqn
        for eqn, _ in equations(
            jax.make_jaxpr(jax.grad(lambda b: linear(x, w.replace(blocks=b)).sum()))(w.blocks).jaxpr
        )
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape == (D, D)
    ]
    assert not dense_gradients


def test_observed_counts_the_squares_of_its_inputs():
    x = normal(1, 5, 7, D)
    w = jax.tree.map(lambda a: a[0], combine(cut("Observed"))["w"])
    energy = jax.grad(lambda e: jnp.sum(linear(x, w.replace(energy=e)) ** 2))(w.energy)
    np.testing.assert_allclose(energy, jnp.sum(x**2, axis=(0, 1)), rtol=1e-5)


def test_a_low_rank_update_of_a_bf16_base_is_rounded_once():
    base = jnp.full((D, D), 1.0, jnp.bfloat16)
    # 1.498 of a unit in the last place of 1.0: rounded alone to bf16 first, it would round up to 1.5 and then to 2.
    update = jnp.full((1, D), 1.498 * 2.0**-7)
    w = LowRank(base, jnp.ones((D, 1)), update)
    expected = (base.astype(jnp.float32) + update).astype(jnp.bfloat16)
    np.testing.assert_array_equal(materialize(w), expected)
    assert materialize(w).dtype == jnp.bfloat16


def test_a_node_without_a_rule_says_what_to_do():
    @node
    class Bare(Node):
        w: jax.Array

    for call in (lambda: linear(jnp.ones(2), Bare(jnp.ones((2, 2)))), lambda: materialize({"w": Bare(jnp.ones(2))})):
        with pytest.raises(TypeError, match="Bare has no .* rule: register one"):
            call()
    assert Bare not in linear_rule.registry


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 7, 8, 21])
def test_entries_are_added_and_read_in_pieces_as_at_once(k, dtype, monkeypatch):
    """What a TPU does. Positions before the first and behind the last entry, which other chips hold, mean nothing."""
    monkeypatch.setattr(sparse_weights, "PIECE", 8)
    matrix, values = normal(1, D, D).astype(dtype), normal(2, k)
    indices = jnp.asarray(np.random.default_rng(k).permutation(np.arange(-D, D * D + D))[:k], jnp.int32)
    ours, expected = (f(matrix, values, indices) for f in (sparse_weights._add_in_pieces, sparse_weights._add_at_once))
    assert ours.dtype == dtype
    rounding = 0.02 if dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(ours.astype(float), expected.astype(float), atol=rounding)
    np.testing.assert_array_equal(sparse_weights._get_in_pieces(matrix, indices), gather_flat(matrix, indices))


@pytest.mark.parametrize("name", CASES)
def test_weights_on_the_host_mean_the_same(name):
    params = combine(cut(name))
    on_host = materialize(jax.tree.map(np.asarray, params))["w"]
    np.testing.assert_allclose(on_host, materialize(params)["w"], rtol=1e-6, atol=1e-6)


def test_outside_of_a_step_a_node_is_one_program():
    """Whatever its rule does: for every operation of it there would be one, for each shape."""
    w = SparseDelta(jnp.ones((3, 7, 11)), jnp.ones((3, 5)), jnp.tile(jnp.arange(5), (3, 1)))
    with CompilationLog() as log:
        materialize(w)
    assert log.programs == 1
