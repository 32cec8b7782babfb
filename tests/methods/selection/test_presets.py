"""What each preset promises, on a tiny model; what all methods promise is in tests/methods/test_conformance.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.distributed import MeshConfig, make_mesh
from jaxft.errors import JaxftError
from jaxft.methods import (
    Probe,
    Signals,
    badam,
    bitfit,
    chain,
    cofitune,
    count_trainable,
    freezeasguard,
    full,
    gmt,
    layer_freezing,
    locft_bf,
    lora,
    paca,
    r_amt,
    s2ft,
    sara,
    shira,
    skip_tuning,
    spafit,
    spiel,
    spt,
)
from jaxft.methods.selection.apet import smallest_sufficient
from jaxft.methods.selection.cofitune import gate_gradients, importance
from jaxft.methods.selection.gates import gate, hold_closed
from jaxft.methods.selection.gmt import mask_small
from jaxft.methods.selection.greentrainer import backward_knapsack
from jaxft.methods.selection.ist import reinforced
from jaxft.methods.selection.r_amt import purity
from jaxft.methods.selection.s2ft import permute_channels
from jaxft.methods.selection.sara import nuclear_norm, still_small
from jaxft.methods.selection.spiel import regrow
from jaxft.partition import combine, split, weights_by_path
from jaxft.training.compilation import CompilationLog
from jaxft.weights import (
    Damped,
    Grafted,
    LowRank,
    RowSplit,
    SparseDelta,
    Split,
    first_trained,
    let_through,
    linear,
    materialize,
    rounded,
)
from tests.methods.tiny import LOSS, batches, params

KEY = jax.random.key(3)
SIZE = sum(w.size for p, w in weights_by_path(params()).items() if "attn." in p or "mlp." in p)


def probe(**fields) -> Probe:
    return Probe(loss_fn=LOSS, batches=lambda: iter(batches()), **{"total_steps": 6, **fields})


def nodes(tuned) -> dict:
    return weights_by_path(combine(tuned))


def loss(p) -> jax.Array:
    total, weight, _ = LOSS(p, batches()[0], KEY)
    return total / weight


# --- sparse -----------------------------------------------------------------------------------------------------------


def test_shira_is_pefts():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False))
    model = peft.get_peft_model(layer, peft.ShiraConfig(r=2, target_modules=["0"], init_weights=False))
    theirs = model.base_model.model[0]
    values, indices = theirs.shira_weight["default"], theirs.shira_indices["default"].long()
    x, g = torch.randn(5, 12), torch.randn(5, 8)
    y = model(x)
    y.backward(g)
    flat = indices[1] * 8 + indices[0]  # torch has [d_out, d_in]
    ours = SparseDelta(
        jnp.asarray(theirs.base_layer.weight.detach().numpy().T),
        jnp.asarray(values.detach().numpy()),
        jnp.asarray(flat.numpy(), jnp.int32),
    )
    made, pull = jax.vjp(lambda v: linear(jnp.asarray(x.numpy()), ours.replace(values=v)), ours.values)
    scaling = theirs.scaling["default"] if isinstance(theirs.scaling, dict) else 1.0
    assert scaling == 1.0
    np.testing.assert_allclose(made, y.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.asarray(g.numpy()))[0], values.grad.numpy(), rtol=1e-4, atol=1e-5)
    assert values.numel() == 2 * (12 + 8)
    for path, w in nodes(shira(rank=2).init(KEY, params(), Probe())).items():
        if isinstance(w, SparseDelta):
            assert w.values.shape == (4, 2 * sum(w.base.shape[1:])), path


def test_the_least_count_that_suffices_is_found():
    tried = []

    def reaches(count):
        tried.append(count)
        return count >= 37

    counts = [1, 5, 20, 36, 37, 40, 80, 300]
    assert smallest_sufficient(counts, reaches) == 37 and len(tried) <= 5
    assert smallest_sufficient([1, 2, 3], reaches) is None


def test_paca_keeps_only_the_chosen_inputs():
    w = jax.tree.map(lambda a: a[0], nodes(paca(rank=3).init(KEY, params(), Probe()))["layers.mlp.up.kernel"])
    x = jax.random.normal(KEY, (5, 32))
    _, pull = jax.vjp(lambda rows: linear(x, w.replace(rows=rows)), w.rows)
    kept = [r.shape for r in jax.tree.leaves(pull) if r.shape[:1] == (5,)]
    assert kept == [(5, 3)]
    g = jax.random.normal(jax.random.key(1), (5, 48))
    np.testing.assert_allclose(pull(g)[0], (x.T @ g)[w.index], rtol=1e-5, atol=1e-5)


def test_s2ft_permutation_changes_nothing_and_makes_the_trained_rows_contiguous():
    tuned = s2ft(channels=6, heads=1, head_dim=8).init(KEY, params(), Probe())
    down, o = nodes(tuned)["layers.mlp.down.kernel"], nodes(tuned)["layers.attn.o.kernel"]
    assert isinstance(down, RowSplit) and down.rows.shape == (4, 6, 32) and o.rows.shape == (4, 8, 32)
    assert (np.asarray(o.index) == np.asarray(o.index)[:, :1] + np.arange(8)).all() and not (o.index[:, 0] % 8).any()
    rest = np.stack([np.setdiff1d(np.arange(48), i) for i in np.asarray(down.index)])
    order = jnp.concatenate([down.index, jnp.asarray(rest)], axis=1)
    permuted = permute_channels(params(), order)
    assert (permuted["layers"]["mlp"]["down"]["kernel"][:, :6] == down.rows).all()
    np.testing.assert_allclose(loss(permuted), loss(params()), rtol=1e-6)


def test_spiel_drops_the_smallest_deltas_and_grows_where_the_gradient_is():
    base = jnp.zeros((1, 4, 5))
    w = SparseDelta(base, jnp.asarray([[0.1, 0.0, 0.2, -3.0]]), jnp.asarray([[2, 7, 11, 19]], jnp.int32))
    gradient = jnp.zeros(20).at[jnp.asarray([4, 7, 16])].set(jnp.asarray([-9.0, 1.0, 8.0])).reshape(1, 4, 5)
    assert regrow(w, gradient, 0.5).tolist() == [[4, 11, 16, 19]]
    assert regrow(w, gradient, 0.3).tolist() == [[2, 4, 11, 19]]
    assert regrow(w, gradient, 0.75).tolist() == [[4, 7, 16, 19]]  # a dropped position may come back
    assert regrow(w, gradient, 0.1).tolist() == [[2, 7, 11, 19]]
    padded = SparseDelta(
        base, jnp.pad(w.values, ((0, 0), (0, 4))), jnp.pad(w.indices, ((0, 0), (0, 4)), constant_values=20)
    )
    assert regrow(padded, gradient, 0.5).tolist() == [[4, 11, 16, 19, 20, 20, 20, 20]]


def test_spiel_keeps_the_number_of_positions_and_forgets_the_dropped():
    method = spiel(budget=20, period=1, replaced=0.5, batches=1, on="@mlp")
    tuned = method.init(KEY, params(), probe())
    tuned = tuned._replace(trainable=jax.tree.map(lambda v: v + jnp.arange(v.shape[-1]) * 1e-3, tuned.trainable))
    state = optax.adam(1e-2).init(tuned.trainable)
    moved, _ = method.update(KEY, tuned, state, Signals(0.0, None, probe()), 1)
    for path, w in nodes(moved).items():
        if not isinstance(w, SparseDelta):
            continue
        for index in np.asarray(w.indices):
            assert len(set(index)) == 20 and index.max() < 32 * 48
        base = weights_by_path(params())[path]
        np.testing.assert_array_equal(w.base, base)  # what is dropped is the pretrained weight again
        changed = (np.asarray(materialize(w)) != np.asarray(base)).reshape(4, -1).sum(1)
        assert (changed <= 20).all() and (changed < 19).any()


def test_sara_trains_the_smallest_and_freezes_what_grows():
    tuned = sara(budget=0.2).init(KEY, params(), Probe())
    assert count_trainable(tuned) == round(0.2 * SIZE)
    cut = {p: w for p, w in nodes(tuned).items() if isinstance(w, SparseDelta)}
    threshold = float(tuned.state["threshold"])
    for w in cut.values():
        chosen = np.zeros(w.base.size, bool).reshape(4, -1)
        for layer, index in enumerate(np.asarray(w.indices)):
            chosen[layer, index[index < chosen.shape[1]]] = True
        np.testing.assert_array_equal(chosen, np.abs(np.asarray(w.base).reshape(4, -1)) <= threshold)
    w = SparseDelta(jnp.zeros((2, 2)), jnp.asarray([0.1, -2.0, 0.3]), jnp.asarray([0, 2, 3]))
    assert still_small(w, 0.5).tolist() == [0, 4, 3]


def test_the_nuclear_norm_is_the_sum_of_singular_values():
    values, indices = jax.random.normal(KEY, (2, 20)), jnp.tile(jnp.arange(20), (2, 1))

    def norm(values):
        return nuclear_norm(SparseDelta(jnp.ones((2, 5, 4)), values, indices))

    def exact(values):
        return jnp.linalg.svd(values.reshape(2, 5, 4), compute_uv=False).sum()

    np.testing.assert_allclose(norm(values), exact(values), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(norm)(values), jax.grad(exact)(values), rtol=1e-3, atol=1e-4)
    assert not jax.grad(norm)(jnp.zeros((2, 20))).any()
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):  # two layers do not divide over eight devices
        step = jax.jit(jax.value_and_grad(norm))
        found = step(values)
        assert "f32[2,5,4]{" not in step.lower(values).compile().as_text(), "no device forms the matrices of all layers"
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, jax.value_and_grad(norm)(values))
    penalty = sara(budget=0.2, nuclear=2.0).penalty
    tuned = sara(budget=0.2).init(KEY, params(), Probe())
    moved = tuned._replace(trainable=jax.tree.map(lambda v: v + 0.1, tuned.trainable))
    changes = jax.tree.map(jnp.subtract, materialize(combine(moved)), params())
    wanted = sum(np.linalg.svd(w, compute_uv=False).sum() for p, w in weights_by_path(changes).items() if "kernel" in p)
    np.testing.assert_allclose(penalty(moved), 2 * wanted, rtol=1e-4)


def test_spt_chooses_between_entries_and_low_rank_updates():
    tuned = spt(budget=0.3, rank=2, batches=1).init(KEY, params(), probe())
    assert 0 < count_trainable(tuned) <= round(0.3 * SIZE)
    kinds = {type(w) for p, w in nodes(tuned).items() if "kernel" in p and p != "head.kernel"}
    assert LowRank in kinds
    entries = spt(budget=0.3, rank=2, batches=1, threshold=float("inf")).init(KEY, params(), probe())
    assert count_trainable(entries) == round(0.3 * SIZE)
    everywhere = spt(budget=0.3, rank=2, batches=1, threshold=0).init(KEY, params(), probe())
    assert count_trainable(everywhere) == count_trainable(lora(rank=2).init(KEY, params(), probe()))


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gmt_keeps_the_largest_gradients_of_every_tensor():
    rng = np.random.default_rng(0)
    gradients = {"layers": {"w": rng.normal(size=(3, 5, 4))}, "head": {"w": rng.normal(size=(7,))}}
    gradients = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients)
    masked, _ = mask_small(0.3).update(gradients, optax.EmptyState())
    for name, rows in (("layers", 3), ("head", 1)):
        got, g = masked[name]["w"], gradients[name]["w"]
        got, g = np.asarray(got).reshape(rows, -1), np.asarray(g).reshape(rows, -1)
        drop = round(0.3 * g.shape[1])
        for one, all_of in zip(got, g, strict=True):
            least = np.argsort(np.abs(all_of))[:drop]
            assert set(np.flatnonzero(one == 0)) == set(least)
            kept = np.setdiff1d(np.arange(all_of.size), least)
            np.testing.assert_array_equal(one[kept], all_of[kept])
    ties, _ = mask_small(0.5).update({"head": jnp.ones(6)}, optax.EmptyState())
    assert ties["head"].tolist() == [1, 1, 1, 0, 0, 0]
    assert gmt(ratio=0).gradients is None


def test_closed_gates_hold_weights_and_moments():
    everywhere_open = jnp.ones(3, bool)
    tuned = split({"w": gate(jnp.ones((3, 4, 2)), everywhere_open, everywhere_open, True), "v": jnp.ones(2)})
    optimizer = hold_closed(optax.adamw(0.1, weight_decay=0.1), decay=0.5)
    state = optimizer.init(tuned.trainable)
    value = tuned.trainable["w"].value
    everywhere = {"w": tuned.trainable["w"].replace(value=jnp.ones_like(value)), "v": None}
    updates, state = optimizer.update(everywhere, state, tuned.trainable)
    speeds = np.abs(np.asarray(updates["w"].value)).mean((1, 2))
    np.testing.assert_allclose(speeds / speeds[2], [0.25, 0.5, 1], rtol=1e-5)
    some = {"w": everywhere["w"].replace(value=jnp.ones_like(value).at[1].set(0)), "v": None}
    updates, after = optimizer.update(some, state, tuned.trainable)
    for was, now in zip(jax.tree.leaves(state[0].mu), jax.tree.leaves(after[0].mu), strict=True):
        assert (was[1] == now[1]).all() and (was[0] != now[0]).all()
    assert not updates["w"].value[1].any() and updates["w"].value[0].all()


def brute_force(gains, costs, passing, budget):
    best, chosen = 0.0, None
    for bits in itertools.product((False, True), repeat=gains.size):
        mask = np.array(bits).reshape(gains.shape)
        if mask.any():
            deepest = np.flatnonzero(mask.any(1))[0]
            if costs[mask].sum() + passing[deepest:].sum() <= budget and gains[mask].sum() > best:
                best, chosen = gains[mask].sum(), mask
    return best, chosen


@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_finds_the_best_choice_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    gains, costs = rng.random((4, 3)), rng.integers(1, 9, (4, 3)).astype(float)
    passing = rng.integers(1, 6, 4).astype(float)
    whole = costs.sum() + passing.sum()
    for budget in (10, 20, 35):
        best, _ = brute_force(gains, costs, passing, budget)
        chosen = backward_knapsack(gains, costs, passing, budget / whole, resolution=budget)
        deepest = np.flatnonzero(chosen.any(1))[0]
        assert costs[chosen].sum() + passing[deepest:].sum() <= budget
        assert np.isclose(gains[chosen].sum(), best)
    assert backward_knapsack(gains, costs, passing, 1.0).all()
    with pytest.raises(JaxftError, match="rho=0.001 of the backward FLOPs buys no tensor"):
        backward_knapsack(gains, costs, passing, 0.001)


def test_layers_whose_suppression_does_no_harm_rise():
    scores = np.zeros(4)
    rng = np.random.default_rng(0)
    for _ in range(60):  # only layer 2 matters: the loss rises when it is among the suppressed
        sets = [np.isin(np.arange(4), rng.choice(4, 2, replace=False)) for _ in range(3)]
        scores = reinforced(scores, sets, [2.0 if s[2] else 1.0 for s in sets], 10.0)
    assert np.argmin(scores) == 2 and scores[2] < 0 < np.delete(scores, 2).min()
    np.testing.assert_array_equal(reinforced(scores, sets, [1.0, 1.0, 1.0], 10.0), scores)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_badam_goes_through_the_layers_in_turn():
    for order, wanted in (("ascending", [0, 1, 2, 3, 0]), ("descending", [3, 2, 1, 0, 3])):
        method = badam(period=1, order=order)
        tuned = method.init(KEY, params(), Probe())
        state, seen = optax.adam(1e-3).init(tuned.trainable), []
        for step in range(1, 6):
            seen.append(int(np.argmax(nodes(tuned)["layers.mlp.up.kernel"].is_trainable)))
            tuned, state = method.update(KEY, tuned, state, Signals(0.0, None, probe()), step)
        assert seen == wanted
    assert np.argmax(nodes(badam(start=2).init(KEY, params(), Probe()))["layers.attn.q.kernel"].is_trainable) == 2


def trained_layers(tuned, path) -> list[int]:
    return np.flatnonzero(nodes(tuned)[path].is_trainable).tolist()


def test_layer_freezing_and_locft_train_what_is_named():
    last = layer_freezing(2).init(KEY, params(), Probe())
    assert trained_layers(last, "layers.attn.q.kernel") == [2, 3]
    assert trained_layers(layer_freezing(-1).init(KEY, params(), Probe()), "layers.mlp.up.kernel") == [0]
    some = layer_freezing(1, modules="attn,mlp.down", extra="head").init(KEY, params(), Probe())
    assert {p for p, w in weights_by_path(some.trainable).items()} >= {"head.kernel"}
    assert trained_layers(some, "layers.mlp.down.kernel") == [3]
    assert not isinstance(nodes(some)["layers.mlp.up.kernel"], Split)
    edit = locft_bf(layer=-2).init(KEY, params(), Probe())
    assert count_trainable(edit) == 48 * 32 and trained_layers(edit, "layers.mlp.down.kernel") == [2]
    with pytest.raises(JaxftError, match="the model has 4 layers"):
        layer_freezing(5).init(KEY, params(), Probe())
    with pytest.raises(JaxftError, match="matches no weight"):
        locft_bf(layer=9).init(KEY, params(), Probe())


def test_skipping_the_prefix_changes_no_gradient_of_what_trains():
    method = skip_tuning(skip=2)
    tuned = method.init(KEY, params(), Probe())
    cut = nodes(tuned)["layers.attn.q.kernel"]
    assert cut.first == 2
    plain = let_through(tuned)

    @jax.jit
    def gradients(tuned):
        return jax.grad(lambda t: loss(combine(tuned._replace(trainable=t))))(tuned.trainable)

    one, other = (jax.tree.leaves(gradients(t)) for t in (tuned, plain))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    scans = [
        e.params
        for e in jax.make_jaxpr(jax.grad(lambda t: loss(combine(tuned._replace(trainable=t)))))(tuned.trainable).eqns
        if e.primitive.name == "scan"
    ]
    assert sorted((s["length"], s["reverse"]) for s in scans if s["length"] in (2, 4)) == [
        (2, False), (2, False), (2, True),
    ], "two layers forward, two forward and backward"  # fmt: skip
    everything = skip_tuning(skip=0).init(KEY, params(), Probe())
    assert count_trainable(everything) == sum(w.size for w in jax.tree.leaves(params())) - 64 * 32


def test_a_chain_passes_gradients_to_what_trains_below():
    both = chain(layer_freezing(1, modules="attn"), lora(rank=2, on="layers[:2].mlp")).init(KEY, params(), Probe())
    assert nodes(both)["layers.attn.q.kernel"].first == 0
    for below in ("embed", "layers[1].mlp.up", "layers.mlp_norm"):
        assert first_trained(combine(layer_freezing(1, extra=below).init(KEY, params(), Probe()))["layers"]) < 2
    assert nodes(layer_freezing(1).init(KEY, params(), Probe()))["layers.attn.q.kernel"].first == 3


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (full("layers[2:].attn|head"), 2),
        (lora(rank=2, on="layers[1:].attn|layers[3].mlp"), 1),
        (lora(rank=2, on="layers[1:].attn|layers.mlp"), 0),
        (lora(rank=2, on="embed|layers[2:].attn"), 0),
        (bitfit("layers[3].attn.q"), 3),
        (spafit(frozen=1, biases=3, rank=2), 1),
        (chain(lora(rank=2, on="layers[2:].mlp"), full("layers[3].attn")), 0),
    ],
)
def test_the_backward_pass_ends_where_nothing_trains_below(method, first):
    """And with the gradients that it has where it does not."""
    tuned = method.init(KEY, params(), Probe())
    assert first_trained(combine(tuned)["layers"]) == first
    moved = tuned._replace(trainable=jax.tree.map(lambda a: a + 0.01, tuned.trainable))

    @jax.jit
    def gradients(tuned):
        return jax.grad(lambda t: loss(combine(tuned._replace(trainable=t))))(tuned.trainable)

    one, other = (jax.tree.leaves(gradients(t)) for t in (moved, let_through(moved)))
    assert all(float(jnp.abs(a).max()) > 0 for a in one)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_spafit_counts_by_stratum():
    tuned = spafit(frozen=1, biases=3, rank=2).init(KEY, params(), Probe())
    widths = {"attn.q": 32, "attn.k": 16, "attn.v": 16, "attn.o": 32, "mlp.gate": 48, "mlp.up": 48, "mlp.down": 32}
    factors = sum(2 * (32 + widths[f"attn.{m}"]) for m in "qkvo")
    assert count_trainable(tuned) == 3 * sum(widths.values()) + factors
    assert trained_layers(tuned, "layers.attn.q.bias") == [1, 2, 3]
    lowest = spafit(frozen=0, biases=0, rank=2).init(KEY, params(), Probe())
    both = chain(bitfit(), lora(rank=2, on="@attention")).init(KEY, params(), Probe())
    assert count_trainable(lowest) == count_trainable(both)
    with pytest.raises(JaxftError, match="boundaries 4 and 4 of 4 layers"):
        spafit(frozen=4, biases=4).init(KEY, params(), Probe())


def test_cofitune_damps_units_by_their_gates():
    neurons, outputs = gate_gradients(params(), probe(), 1)
    kernel = params()["layers"]["mlp"]["down"]["kernel"]

    def with_gate(unit, factor):
        mlp = {**params()["layers"]["mlp"], "down": {"kernel": kernel.at[unit].multiply(factor)}}
        return float(loss({**params(), "layers": {**params()["layers"], "mlp": mlp}}))

    neuron, output = int(jnp.argmax(jnp.abs(neurons[1]))), int(jnp.argmax(jnp.abs(outputs[1])))
    for unit, found in (((1, neuron), neurons[1, neuron]), ((1, slice(None), output), outputs[1, output])):
        slope = (with_gate(unit, 1.05) - with_gate(unit, 0.95)) / 0.1
        assert abs(slope) > 1e-4
        np.testing.assert_allclose(found, slope, rtol=0.02, atol=1e-5)
    tuned = cofitune(first=1, last=3, batches=1, soft=0.5).init(KEY, params(), probe())
    for name, gates in (("up", neurons), ("down", outputs)):
        damped = nodes(tuned)[f"layers.mlp.{name}.kernel"]
        assert isinstance(damped, Damped) and trained_layers_of(damped.base) == [1, 2]
        np.testing.assert_allclose(damped.rate[:, 0], 1 - 0.5 * importance(gates), rtol=1e-6)
        assert float(jnp.min(damped.rate)) >= 0.5
    assert not isinstance(nodes(tuned)["layers.mlp.gate.kernel"], Damped)
    assert trained_layers_of(nodes(cofitune(soft=0).init(KEY, params(), Probe()))["layers.mlp.up.kernel"]) == [1]


def trained_layers_of(w: Split) -> list[int]:
    return np.flatnonzero(w.is_trainable).tolist()


def test_grafts_are_exact_at_both_ends():
    base, tuned = jax.random.normal(KEY, (3, 4)), jax.random.normal(jax.random.key(1), (3, 4))
    start = tuned > 0
    sure = Grafted(base, tuned, start, jnp.full((3, 4), -200.0))
    np.testing.assert_array_equal(materialize(sure), jnp.where(start, tuned, base))
    np.testing.assert_array_equal(materialize(sure.replace(start=jnp.ones_like(start))), tuned)
    np.testing.assert_array_equal(materialize(sure.replace(start=jnp.zeros_like(start))), base)
    soft = sure.replace(logits=jnp.where(jnp.arange(4) == 2, 1.0, -1.0) * jnp.ones((3, 1)))
    np.testing.assert_array_equal(rounded({"w": soft})["w"], jnp.where(start ^ (jnp.arange(4) == 2), tuned, base))


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_start_at_the_pretrained_model_and_learn_straight_through():
    tuned = r_amt(batches=1).init(KEY, params(), probe())
    for path, w in weights_by_path(materialize(combine(tuned))).items():
        np.testing.assert_array_equal(w, weights_by_path(params())[path])
    w = jax.tree.map(lambda a: a[0], nodes(tuned)["layers.attn.q.kernel"])
    some = w.replace(scores=jnp.where(jnp.arange(32) % 2 == 0, 1e-2, 0.0) * jnp.ones((32, 1)))
    kept = materialize(some)
    np.testing.assert_array_equal(kept, np.where(np.arange(32) % 2 == 0, w.base, 0))
    through = jax.grad(lambda s: jnp.sum(jnp.sin(materialize(some.replace(scores=s)))))(some.scores)
    np.testing.assert_allclose(through, np.cos(kept) * w.base, rtol=1e-5, atol=1e-6)  # dL/dW' * W
    with pytest.raises(JaxftError, match="start=0.001 must exceed threshold=0.005"):
        r_amt(start=1e-3)


def test_gradients_that_pull_away_from_the_pretrained_model_are_dropped_at_random():
    g = jnp.asarray([2.0, -2.0, 2.0, 2.0, 0.0])
    general = jnp.asarray([1.0, -3.0, 0.0, -2.0, -1.0])
    np.testing.assert_allclose(purity(g, general), [1, 1, 1, 0.5, 0.5])
    method = r_amt(batches=1)
    tuned = method.init(KEY, params(), probe())
    first = nodes(tuned)["layers.attn.q.kernel"]
    size = float(jnp.mean(first.curvature * first.base**2))  # task gradients as large as what pulls back
    flat = jax.tree.map(lambda x: jnp.full_like(x, size), tuned.trainable)
    run = jax.jit(lambda t, rng: method.gradients.update(flat, (), t.trainable, frozen=t.frozen, rng=rng)[0])
    assert all(x.all() for x in jax.tree.leaves(run(tuned, KEY)))  # nothing is switched off: nothing pulls back
    off = tuned._replace(trainable=jax.tree.map(jnp.zeros_like, tuned.trainable))
    drawn = weights_by_path(run(off, KEY))["layers.attn.q.kernel"].scores
    w = nodes(off)["layers.attn.q.kernel"]
    chance = purity(jnp.full_like(w.base, size), -w.curvature * w.base**2)
    assert set(np.unique(drawn)) == {np.float32(0), np.float32(size)}
    assert 0.3 < chance.mean() < 0.95 and abs(float((drawn > 0).mean() - chance.mean())) < 0.03
    np.testing.assert_array_equal(drawn, weights_by_path(run(off, KEY))["layers.attn.q.kernel"].scores)


def test_the_guard_freezes_what_the_unwanted_domain_needs():
    """Two planted tasks: `x` reaches its target through `up`, the unwanted one through `down` only."""
    rng = np.random.default_rng(0)
    tree = {
        "layers": {
            "mlp": {name: {"kernel": jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.float32)} for name in ("up", "down")}
        }
    }

    def planted(params, batch, rng):
        mlp = params["layers"]["mlp"]
        error = jnp.sum((materialize(mlp["up"]["kernel"]) - batch["up"]) ** 2) * batch["wanted"]
        error += jnp.sum((materialize(mlp["down"]["kernel"]) - batch["down"]) ** 2) * (1 - batch["wanted"])
        return error, jnp.float32(1), {}

    target = {"up": np.ones((2, 4, 4), np.float32), "down": -np.ones((2, 4, 4), np.float32)}
    wanted, unwanted = ({**target, "wanted": np.float32(x)} for x in (1, 0))
    sets = {"illegal": lambda: iter([unwanted])}
    data = Probe(loss_fn=planted, batches=lambda: iter([wanted]), sets=sets, total_steps=10)
    method = freezeasguard(frozen=0.5, guard_steps=20, user_rate=0.05, batches=1, on="layers.mlp")
    tuned = method.init(KEY, tree, data)
    other = jax.tree.map(lambda w: w + 1, tree)
    with CompilationLog() as log:
        method.init(KEY, other, data)
    assert not log.programs, "weights are no constants of its programs"
    trained = {p for p, w in weights_by_path(tuned.trainable).items() if jax.tree.leaves(w)}
    assert trained == {"layers.mlp.up.kernel"} and count_trainable(tuned) == 2 * 16  # half of four matrices
    np.testing.assert_array_equal(nodes(tuned)["layers.mlp.up.kernel"], tree["layers"]["mlp"]["up"]["kernel"])
    with pytest.raises(JaxftError, match='the evaluation set "ilegal": did you mean "illegal"'):
        freezeasguard("ilegal", batches=1, on="layers.mlp").init(KEY, tree, data)
    with pytest.raises(JaxftError, match="frozen=1 must lie between"):
        freezeasguard(frozen=1)
