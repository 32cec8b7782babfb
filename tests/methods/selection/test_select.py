"""`select`: selections written from the vocabulary, and what happens when they are drawn again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.distributed import MeshConfig, make_mesh
from jaxft.errors import JaxftError
from jaxft.hub import load_model
from jaxft.methods import Probe, Signals, build, chain, count_trainable, lora, select
from jaxft.methods.selection import scores
from jaxft.methods.selection.scores import Candidates
from jaxft.methods.selection.units import divisible
from jaxft.partition import combine, weights_by_path
from jaxft.weights import RowSplit, Split, materialize
from tests.methods.tiny import LOSS, batches, params

KEY = jax.random.key(3)
PATHS = [f"layers.{m}.kernel" for m in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")]


def probe(**fields) -> Probe:
    return Probe(loss_fn=LOSS, batches=lambda: iter(batches()), **{"total_steps": 6, **fields})


def started(method, by: float = 0.1):
    """A cut whose trained part has moved, and an Adam state whose moments are all one."""
    tuned = method.init(KEY, params(), probe())
    tuned = tuned._replace(trainable=jax.tree.map(lambda x: x + by, tuned.trainable))
    state = optax.adam(1e-2).init(tuned.trainable)
    return tuned, (state[0]._replace(mu=jax.tree.map(jnp.ones_like, state[0].mu)), *state[1:])


def again(method, tuned, state, step: int = 2):
    return method.update(jax.random.key(9), tuned, state, Signals(0.0, None, probe()), step)


def same_shapes(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


def dense(tuned):
    return weights_by_path(materialize(combine(tuned)))


def test_five_lines_of_yaml_make_a_method():
    spec = {
        "name": "select",
        "score": {"name": "fisher", "batches": 2},
        "granularity": "row",
        "budget": 0.1,
        "rounds": 3,
        "optimizer_state": "carry",
    }
    method = build(spec)
    tuned = method.init(KEY, params(), probe())
    information = probe().gradients_of(params(), PATHS, 2, jnp.square)
    for path, w in weights_by_path(combine(tuned)).items():
        if path not in PATHS:
            assert not isinstance(w, RowSplit)
            continue
        score = np.asarray(information[path]).mean(-1)
        wanted = np.sort(np.argsort(-score, kind="stable")[:, : round(0.1 * score.shape[1])])
        np.testing.assert_array_equal(w.index, wanted)
    assert [step for step in range(1, 7) if method.due(step, 6)] == [2, 4]
    tuned, state = started(method)
    before = dense(tuned)
    was = {p: np.asarray(w.index) for p, w in weights_by_path(combine(tuned)).items() if p in PATHS}
    tuned, state = again(method, tuned, state)
    for path, w in dense(tuned).items():
        np.testing.assert_array_equal(w, before[path])  # values were folded in: nothing changed at once
    moments = weights_by_path(state[0].mu)
    for path in PATHS:
        now, kept = weights_by_path(combine(tuned))[path].index, moments[path].rows
        stays = np.stack([np.isin(i, o) for i, o in zip(now, was[path], strict=True)])
        np.testing.assert_array_equal(kept, np.broadcast_to(stays[..., None], kept.shape))


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
@pytest.mark.parametrize("values", ["fold", "rewind"])
def test_values_fold_in_or_rewind_and_shapes_stay(granularity, values):
    size = 4 if granularity in ("block", "column") else 1
    method = select("random", granularity, 2, on="@attention", size=size, period=1, values=values)
    tuned, state = started(method)
    before, base = dense(tuned), weights_by_path(params())
    moved, _ = again(method, tuned, state, 1)
    same_shapes(moved, tuned)
    bumped = dense(moved._replace(trainable=jax.tree.map(lambda x: x + 1, moved.trainable)))
    for path in ("layers.attn.q.kernel", "layers.attn.o.kernel"):
        active = np.asarray(bumped[path] != dense(moved)[path])
        assert active.any() and not active.all()
        np.testing.assert_array_equal(np.asarray(dense(moved)[path])[active], np.asarray(before[path])[active])
        left = np.asarray(before[path] != base[path]) & ~active
        assert left.any()
        wanted = before[path] if values == "fold" else base[path]
        np.testing.assert_array_equal(np.asarray(dense(moved)[path])[left], np.asarray(wanted)[left])


def test_reset_restarts_all_moments():
    method = select("magnitude", period=1, optimizer_state="reset")
    _, state = again(method, *started(method), 1)
    assert all(not leaf.any() for leaf in jax.tree.leaves(state[0].mu))


def test_whole_layers_and_matrices():
    tuned = select("magnitude", "layer", 2, on="layers").init(KEY, params(), Probe())
    cuts = [w for w in weights_by_path(combine(tuned)).values() if isinstance(w, Split)]
    assert len(cuts) == len(jax.tree.leaves(params()["layers"]))
    assert all((np.asarray(w.is_trainable) == np.asarray(cuts[0].is_trainable)).all() for w in cuts)
    tuned = select("magnitude", "matrix", 0.5, per="category").init(KEY, params(), Probe())
    trained = {p: w for p, w in weights_by_path(tuned.trainable).items() if p in PATHS}
    layers = {p: (w.trainable if isinstance(w, Split) else w).shape[0] for p, w in trained.items()}
    assert sum(n for p, n in layers.items() if ".mlp." in p) == 6
    assert sum(n for p, n in layers.items() if ".attn." in p) == 8
    tuned = select("magnitude", "leaf", 2).init(KEY, params(), Probe())
    assert len(jax.tree.leaves(tuned.trainable)) == 2


def test_layer_ranges_are_obeyed():
    tuned = select("magnitude", "row", 3, on="layers[1:3].mlp.down").init(KEY, params(), Probe())
    index = np.asarray(weights_by_path(combine(tuned))["layers.mlp.down.kernel"].index)
    assert (index[[0, 3]] >= 48).all() and (index[1:3] < 48).all()
    assert count_trainable(tuned) == 2 * 3 * 32


def test_a_budget_per_matrix_is_planned_without_values():
    for score in ("random", "magnitude", {"name": "low_rank", "rank": 2}):
        method = build({"name": "select", "score": score, "budget": 7})
        shapes = jax.eval_shape(lambda p, m=method: m.init(KEY, p, Probe()), params())
        assert shapes.trainable["layers"]["attn"]["q"]["kernel"].values.shape == (4, 7)
    method = select("random", "block", 9, per="model", size=8)  # random numbers are known without the weights
    shapes = jax.eval_shape(lambda p: method.init(KEY, p, Probe()), params())
    made = method.init(KEY, params(), Probe())
    same_shapes(shapes, made)


def test_entries_divide_over_a_mesh():
    """Whatever their number: some padding, where it is little, and as many entries train as without it."""
    assert [divisible(n) for n in (7, 900, 1040, 420_579, 10_000_000)] == [7, 912, 1040, 421_888, 10_027_008]
    params = {"layers": {"w": {"kernel": jax.random.normal(KEY, (2, 64, 400))}}}
    for budget, per in ((9_001, "model"), (4_501, "matrix")):
        tuned = select("magnitude", "element", budget, per=per, on="layers").init(KEY, params, Probe())
        (values,) = jax.tree.leaves(tuned.trainable)
        assert values.shape[1] % 16 == 0 and 4_501 <= values.shape[1] <= 4_700
        assert count_trainable(tuned) == budget * (1 if per == "model" else 2)


def test_noise_is_divided_over_the_mesh_and_drawn_where_it_decides():
    """A billion scores are neither made for a plan, where each matrix has as many as any other, nor by each device."""
    shapes = load_model("preset:llama3.2-1b").abstract(jnp.bfloat16)
    planned = jax.eval_shape(lambda p: build("spiel").init(KEY, p, Probe()), shapes)
    assert sum(x.size for x in jax.tree.leaves(planned.trainable)) == 9_740_288  # 0.1 % of it padding
    candidates = Candidates({}, {}, {"w": (3, 64)}, decide=False)
    whole = scores.random()(KEY, candidates, Probe())["w"]
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        divided = scores.random()(KEY, candidates, Probe())["w"]
    assert divided.sharding.shard_shape(divided.shape) == (3, 8)
    np.testing.assert_array_equal(divided, whole)
    values = jax.eval_shape(
        lambda: jax.tree.map(np.asarray, scores.random()(KEY, candidates._replace(decide=True), Probe()))
    )
    assert values["w"].shape == (3, 64)


def test_a_function_is_a_score():
    def first_rows(rng, candidates, probe):
        return {p: -jnp.arange(w.size, dtype=jnp.float32).reshape(w.shape) for p, w in candidates.weights.items()}

    tuned = select(first_rows, "row", 2, on="@mlp").init(KEY, params(), Probe())
    np.testing.assert_array_equal(weights_by_path(combine(tuned))["layers.mlp.up.kernel"].index, [[0, 1]] * 4)


def test_wanda_is_magnitude_times_activation():
    method = build(
        {
            "name": "select",
            "score": {"name": "activation", "batches": 1},
            "granularity": "row",
            "budget": 3,
            "reduction": "sum",
            "on": "@mlp",
        }
    )
    tuned = method.init(KEY, params(), probe())
    norm = probe().activations(params(), 1)["layers.mlp.down.kernel"]
    score = np.abs(np.asarray(params()["layers"]["mlp"]["down"]["kernel"])).sum(-1) * np.asarray(norm)
    wanted = np.sort(np.argsort(-score, kind="stable")[:, :3])
    np.testing.assert_array_equal(weights_by_path(combine(tuned))["layers.mlp.down.kernel"].index, wanted)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": 0}, "a budget of 0 is 0 of"),
        ({"budget": 10**9}, "expected one at least, all at most"),
        ({"budget": 1e-9}, "is 0 of"),
        ({"budget": -3}, "a budget of -3 is negative"),
        ({"budget": float("nan")}, "a budget of nan is no number of entries"),
        ({"budget": float("inf")}, "a budget of inf is no number of entries"),
        ({"budget": 1.0}, "1.0 may mean one of the entries or all of them: write 1 for one, 512 for all"),
        ({"budget": 1.5}, "neither a fraction below 1 nor a whole number"),
        ({"budget": "5%"}, "unable to parse string as a number"),
        ({"budget": {}}, "expected a number, {rank: r} or {cover: share}"),
        ({"budget": {"rnak": 2}}, 'did you mean "rank"'),
        ({"budget": {"rank": 2.5}}, "budget {rank: 2.5} is not a whole number"),
        ({"budget": {"rank": 2}, "granularity": "row"}, "goes with granularity element, not row"),
        ({"budget": {"cover": 2}}, "not a share above 0 and up to 1"),
        ({"budget": {"cover": 0.5}, "lowest": True}, "of the highest scores of each matrix"),
        ({"budget": {"cover": 0.5}, "per": "model"}, "of the highest scores of each matrix"),
        ({"budget": 9, "granularity": "layer", "on": "layers"}, "a budget of 9 is 9 of 4 layers"),
        ({"budget": 29, "granularity": "matrix"}, "a budget of 29 is 29 of 28 matrices"),
        ({"budget": 33, "granularity": "row"}, "a budget of 33 is 33 of 32 rows"),
        ({"score": {"name": "low_rank", "rank": "abc"}}, "score \"low_rank\", option rank='abc'"),
        ({"score": {"name": "balanced", "fraction": 1}}, "fraction=1.0 must lie between 0 and 1"),
        ({"score": "balanced"}, 'score balanced is of whole matrices or layers, and ".*" has 512 units'),
        ({"score": {"name": "cyclic", "start": 4}, "granularity": "layer", "on": "layers"}, "the layers are 0 to 3"),
        ({"period": -1}, "period=-1 must be at least 0"),
        ({"on": "@experts"}, '"@experts" matches no weight'),
        ({"on": "layers[2:2]"}, "matches no weight"),
        ({"score": "fishr"}, 'unknown score "fishr": .*fisher'),
        ({"score": {"name": "fisher", "batch": 2}}, 'score "fisher" has no option "batch": .*batches'),
        ({"period": 2, "rounds": 2}, "not both"),
        ({"granularity": "leaf", "period": 2}, "cannot be drawn again"),
        ({"granularity": "row", "on": "@norm"}, "has no rows to choose from"),
        ({"granularity": "block", "size": 7}, "do not tile"),
        ({"granularity": "layer", "per": "matrix"}, 'per="matrix" does not go with granularity="layer"'),
        ({"granularity": "element", "size": 2}, "size=2 must be at least 1, and other than 1 for rows"),
        ({"granularity": "block"}, "a block of size=1 is an entry: set granularity=element, or size"),
        ({"granularity": "layer", "budget": 1, "on": "head"}, '"head.kernel" is in no layer'),
        ({"granularity": "matrix", "period": 2, "values": "rewind"}, "rewind"),
        ({"on": "layer.attn"}, "matches no weight: .*layers.attn"),
    ],
)
def test_what_is_impossible_is_refused(options, text):
    with pytest.raises(JaxftError, match=text):
        build({"name": "select", **options}).init(KEY, params(), Probe())


def test_no_data_is_refused():
    for count, text in ((0, "0 calibration batches are none"), (99, "asked for 99 calibration batches")):
        with pytest.raises(JaxftError, match=text):
            select({"name": "fisher", "batches": count}).init(KEY, params(), probe())


def test_scores_that_fit_nothing_are_refused():
    def score(shapes):
        return lambda rng, candidates, probe: {p: jnp.zeros(s) for p, s in shapes.items()}

    for shapes, text in (
        ({}, 'look at "layers.mlp.up.kernel"'),
        ({"layers.mlp.up.kernel": (4, 32, 48), "head": (3,)}, 'look at "head"'),
        ({"layers.mlp.up.kernel": (4, 48)}, r"has the shape \(4, 48\): .* \(4, 32, 48\), or of its units, \(4, 32\)"),
    ):
        with pytest.raises(JaxftError, match=text):
            select(score(shapes), "row", 2, on="layers.mlp.up").init(KEY, params(), Probe())
    with pytest.raises(JaxftError, match="every score is zero"):
        select(score({"layers.mlp.up.kernel": (4, 32)}), "row", {"cover": 0.5}, on="layers.mlp.up").init(
            KEY, params(), Probe()
        )


def test_a_budget_that_covers_and_one_as_large_as_a_low_rank_update():
    tuned = select("magnitude", "row", {"cover": 0.3}, on="layers.mlp.up").init(KEY, params(), Probe())
    score = np.abs(np.asarray(params()["layers"]["mlp"]["up"]["kernel"])).mean(-1)
    index = np.asarray(weights_by_path(combine(tuned))["layers.mlp.up.kernel"].index)
    for row, chosen in zip(score, index, strict=True):
        chosen = chosen[chosen < 32]
        least = row[chosen].min()
        assert set(chosen) == set(np.flatnonzero(row >= least))
        assert row[chosen].sum() >= 0.3 * row.sum() > row[chosen].sum() - least
    tuned = select("random", budget={"rank": 2}, on="layers.attn.{q,k}").init(KEY, params(), Probe())
    assert count_trainable(tuned) == 4 * 2 * (32 + 32 + 32 + 16)


def test_what_another_method_took_is_left_alone():
    with pytest.raises(JaxftError, match="already taken by an earlier method"):
        chain(lora(rank=2), select("magnitude", on="@linear")).init(KEY, params(), Probe())
