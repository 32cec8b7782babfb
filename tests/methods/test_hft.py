"""HFT: exactly half of every category, another half each round, the other half bitwise untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, Signals, chain, count_trainable, hft, lora
from jaxft.methods.selection.layers import balanced_draw, spread
from jaxft.models import LanguageModel
from jaxft.partition import DECODER_ROLES, Tuned, combine, weights_by_path
from jaxft.weights import Anchored, RowSplit, Split, materialize
from tests.methods.tiny import CONFIG, params

KEY = jax.random.key(0)
# Of this model: the roles name the experts of a mixture too.
ATTENTION, MLP, NORM = (
    [path for path in DECODER_ROLES.categories[category] if path in weights_by_path(params())]
    for category in ("attention", "mlp", "norm")
)
L = CONFIG.num_layers


def cut(tree=None, key=KEY, **options) -> Tuned:
    return hft(**options).init(key, params() if tree is None else tree, Probe())


def drawn(tuned: Tuned) -> dict[str, np.ndarray]:
    """Which layers train, by path of the stacked leaf."""
    return {p: np.asarray(w.is_trainable) for p, w in weights_by_path(combine(tuned)).items() if isinstance(w, Split)}


def signals(total: int = 10) -> Signals:
    return Signals(0.0, None, Probe(total_steps=total))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "config", [CONFIG, CONFIG.replace(num_layers=6, sliding_layers=(), qkv_bias=True, qk_norm=True)], ids=["4", "6"]
)
def test_exactly_half_of_every_category_trains(seed, config):
    tree = LanguageModel(config).init(jax.random.key(0))
    tuned = cut(tree, jax.random.key(seed))
    masks, weights, layers = drawn(tuned), weights_by_path(tree), config.num_layers
    for category in DECODER_ROLES.categories.values():
        held = [p for p in category if p in weights]
        whole = sum(weights[p].size for p in held)
        trained = sum(weights[p][0].size * int(masks[p].sum()) for p in held)
        assert 2 * trained == whole, category
    per_layer = {
        name: sum(masks[p].astype(int) for p in paths) for name, paths in (("a", ATTENTION), ("m", MLP), ("n", NORM))
    }
    assert (per_layer["a"] == 2).all()
    assert sorted(per_layer["m"]) == [1] * (layers // 2) + [2] * (layers // 2)
    assert (per_layer["n"] == 1).all()
    # One of embedding and head, and no final norm: half of all but the final norm.
    assert 2 * count_trainable(tuned) == sum(w.size for w in weights.values()) - config.hidden_size
    embeddings = [p for p in ("embed.embedding", "head.kernel") if p in weights_by_path(tuned.trainable)]
    assert len(embeddings) == 1


def test_draws_are_random_and_cover_every_matrix():
    seen = {p: np.zeros(L, int) for p in (*ATTENTION, *MLP, *NORM)}
    for seed in range(40):
        for path, mask in drawn(cut(key=jax.random.key(seed))).items():
            seen[path] += mask
    for path, times in seen.items():
        assert (times > 6).all() and (times < 34).all(), (path, times)  # 20 expected; p < 1e-6 beyond


def test_a_tied_embedding_trains_half_of_its_rows():
    tree = LanguageModel(CONFIG.replace(tie_embeddings=True)).init(jax.random.key(0))
    tuned = cut(tree)
    table = combine(tuned)["embed"]["embedding"]
    assert isinstance(table, RowSplit) and table.rows.shape == (32, 32)
    assert 2 * count_trainable(tuned) == sum(w.size for w in jax.tree.leaves(tree)) - 32


@pytest.mark.parametrize(("policy", "count"), [("train", 2), ("freeze", 0)])
def test_embeddings_can_train_or_stay(policy, count):
    names = weights_by_path(cut(embeddings=policy).trainable)
    assert sum(p in names for p in ("embed.embedding", "head.kernel")) == count


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_fraction(fraction):
    masks = drawn(cut(fraction=fraction, embeddings="freeze"))
    for category in (ATTENTION, MLP):
        assert sum(masks[p].sum() for p in category) == round(fraction * L * len(category))


def test_model_level_draws_over_all_matrices():
    tuned = cut(level="model", embeddings="freeze")
    masks, weights = drawn(tuned), weights_by_path(tuned.trainable)
    whole = [p for p, w in weights.items() if not isinstance(w, Split)]  # leaves that happen to train in every layer
    assert sum(m.sum() for m in masks.values()) + L * len(whole) == L * 9 // 2
    per_layer = sum(masks.get(p, np.zeros(L, bool)).astype(int) for p in ATTENTION)
    others = [
        sum(drawn(cut(key=jax.random.key(s), level="model")).get(p, np.zeros(L)) for p in ATTENTION) for s in range(5)
    ]
    assert any((n != 2).any() for n in [per_layer, *others]), "nothing balances the categories within a layer"


def test_layer_level_draws_whole_layers():
    masks = drawn(cut(level="layer"))
    first = masks[ATTENTION[0]]
    assert first.sum() == L // 2 and all((m == first).all() for m in masks.values()) and len(masks) == 9


def test_a_round_draws_another_half_and_keeps_every_value():
    method = hft(rounds=5)
    tuned, before = method.init(KEY, params(), Probe()), None
    assert [step for step in range(1, 11) if method.due(step, 10)] == [2, 4, 6, 8]
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(tuned.trainable)
    run = jax.jit(lambda tuned: materialize(combine(tuned)))
    halves = []
    for seed in range(4):
        halves.append(np.concatenate(list(drawn(tuned).values())))
        tuned, opt_state = method.update(jax.random.key(seed), tuned, opt_state, signals(), 2)
        before = run(tuned)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params()), strict=True):
            np.testing.assert_array_equal(a, b)
        masks = drawn(tuned)
        assert (sum(masks[p].astype(int) for p in ATTENTION) == 2).all()
        assert 2 * count_trainable(tuned) == sum(w.size for w in jax.tree.leaves(params())) - 32
    assert run._cache_size() == 1
    assert len({h.tobytes() for h in halves}) == 4


def moments(state) -> dict:
    return weights_by_path(state[0].mu)


def test_optimizer_state_is_reset_or_follows_the_layers_that_stay():
    for policy in ("reset", "carry"):
        method = hft(rounds=2, optimizer_state=policy)
        tuned = method.init(KEY, params(), Probe())
        opt_state = optax.adam(1e-2).init(tuned.trainable)
        gradients = jax.tree.map(lambda w: w + 1, tuned.trainable)  # every layer's moment tells which layer it is of
        _, opt_state = optax.adam(1e-2).update(gradients, opt_state)
        new, moved = method.update(jax.random.key(9), tuned, opt_state, signals(), 5)
        old_mu, new_mu, old, masks = moments(opt_state), moments(moved), drawn(tuned), drawn(new)
        assert int(moved[0].count) == (0 if policy == "reset" else 1)
        for path, mask in masks.items():
            was = dict(zip(np.flatnonzero(old[path]), np.asarray(old_mu[path].trainable), strict=True))
            for layer, m in zip(np.flatnonzero(mask), np.asarray(new_mu[path].trainable), strict=True):
                stays = policy == "carry" and layer in was
                np.testing.assert_array_equal(m, was[layer] if stays else np.zeros_like(m))
        whole = next(
            p for p in ("embed.embedding", "head.kernel") if p in old_mu and p in weights_by_path(tuned.trainable)
        )
        np.testing.assert_array_equal(new_mu[whole], old_mu[whole] if policy == "carry" else 0 * old_mu[whole])


def test_moments_of_an_optimizer_that_treats_leaves_apart_follow_too():
    method = hft(rounds=2, optimizer_state="carry")
    tuned = method.init(KEY, params(), Probe())
    labels = jax.tree.map(lambda w: "matrix" if w.ndim == 3 else "other", tuned.trainable)
    optimizer = optax.partition({"matrix": optax.sgd(1.0, momentum=0.5), "other": optax.adam(1e-2)}, labels)
    opt_state = optimizer.init(tuned.trainable)
    _, opt_state = optimizer.update(jax.tree.map(lambda w: w + 1, tuned.trainable), opt_state, tuned.trainable)
    new, moved = method.update(jax.random.key(9), tuned, opt_state, signals(), 5)
    path = ATTENTION[0]
    traces = [
        dict(zip(np.flatnonzero(drawn(t)[path]), np.asarray(trace.trainable), strict=True))
        for t, s in ((tuned, opt_state), (new, moved))
        for trace in [weights_by_path(optax.tree.get(s, "trace"))[path]]
    ]
    for layer, trace in traces[1].items():
        np.testing.assert_array_equal(trace, traces[0].get(layer, np.zeros_like(trace)))
    with pytest.raises(JaxftError, match="it cannot follow its entries"):
        factored = optax.adafactor(1e-2, min_dim_size_to_factor=8)
        method.update(jax.random.key(9), tuned, factored.init(tuned.trainable), signals(), 5)


def test_half_reset_restores_the_start_exactly_on_the_mask():
    method = hft(half_reset=True)
    tuned = method.init(KEY, params(), Probe())
    assert count_trainable(tuned) == sum(w.size for w in jax.tree.leaves(params()))
    assert [s for s in range(1, 11) if method.due(s, 10)] == [10]
    trained = tuned._replace(trainable=jax.tree.map(lambda w: w + 0.125, tuned.trainable))
    reset, _ = method.update(jax.random.key(3), trained, (), signals(), 10)
    base, start, end = (weights_by_path(materialize(t)) for t in (params(), combine(trained), combine(reset)))
    for category in (ATTENTION, MLP, NORM):
        restored = 0
        for path in category:
            for layer in range(L):
                now, was, then = end[path][layer], base[path][layer], start[path][layer]
                assert (now == was).all() or (now == then).all(), f"{path}[{layer}] is neither"
                restored += (now == was).all() * now.size
        assert 2 * restored == sum(base[p].size for p in category)
    for path in ("embed.embedding", "head.kernel", "final_norm.scale"):
        np.testing.assert_array_equal(end[path], start[path])


def test_half_reset_anchors_are_not_narrowed():
    from jaxft.training.precision import Precision, cast_tuned

    tuned = cast_tuned(cut(half_reset=True), Precision(frozen_dtype="bfloat16"))
    anchors = [w for w in weights_by_path(combine(tuned)).values() if isinstance(w, Anchored)]
    assert anchors and all(w.anchor.dtype == jnp.float32 for w in anchors)


def test_half_reset_beside_another_method():
    method = chain(lora(rank=2, on="@attention"), hft(half_reset=True))
    tuned = method.init(KEY, params(), Probe())
    trained = tuned._replace(trainable=jax.tree.map(lambda w: w + 0.125, tuned.trainable))
    reset, _ = method.update(jax.random.key(3), trained, (), signals(), 10)
    old, new = (weights_by_path(t.trainable) for t in (trained, reset))
    np.testing.assert_array_equal(new["layers.attn.q.kernel"].a, old["layers.attn.q.kernel"].a)
    assert (np.asarray(new["layers.mlp.up.kernel"].value) != old["layers.mlp.up.kernel"].value).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0}, "fraction=1.0 must lie between 0 and 1"),
        ({"fraction": 0}, "fraction=0 must lie"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"fraction": 0.1, "level": "layer"}, "a budget of 0.1 is 0 of 4 layers"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(JaxftError, match=message):
        cut(**options)


def test_a_model_without_stacked_layers_is_refused():
    with pytest.raises(JaxftError, match="no stacked matrix of any category|have none of"):
        cut({"dense": {"kernel": jnp.ones((4, 4))}})


@pytest.mark.parametrize("seed", range(20))
def test_balanced_draw_has_the_sums(seed):
    rng = np.random.default_rng(seed)
    num, width = int(rng.integers(1, 9)), int(rng.integers(1, 7))
    total = int(rng.integers(0, num * width + 1))
    rows, columns = spread(total, num, rng), spread(total, width, rng)
    matrix = balanced_draw(rng, rows, columns)
    assert (matrix.sum(1) == rows).all() and (matrix.sum(0) == columns).all()


def test_an_impossible_draw_is_refused():
    with pytest.raises(JaxftError, match="no selection has"):
        balanced_draw(np.random.default_rng(0), np.array([2, 0]), np.array([2, 0]))
