"""LT-SFT: exactly K entries, those that a full run moves most, from the pretrained start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, chain, count_trainable, full, lora, lt_sft
from jaxft.methods.selection.units import budget_count
from jaxft.partition import combine, weights_by_path
from jaxft.weights import LowRank, SparseDelta, materialize
from tests.methods.tiny import params, trial

KEY = jax.random.key(0)


def moved_by(deltas):
    """A probe whose training run moves the parameters by known amounts."""

    def trainer(given, method, steps):
        return jax.tree.map(jnp.add, given, deltas)

    return Probe(trainer=trainer, total_steps=4)


def random_deltas(seed: int):
    leaves, treedef = jax.tree.flatten(params())
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)])


def dense(tuned):
    return weights_by_path(materialize(combine(tuned)))


def bumped(tuned, by=1.0):
    return tuned._replace(trainable=jax.tree.map(lambda v: v + by, tuned.trainable))


@pytest.mark.parametrize("budget", [1, 37, 1000, 0.1])
def test_exactly_k_entries_train_and_they_are_the_most_moved(budget):
    deltas = random_deltas(1)
    tuned = lt_sft(budget=budget).init(KEY, params(), moved_by(deltas))
    total = sum(w.size for w in jax.tree.leaves(params()["layers"]))
    k = round(budget * total) if budget < 1 else budget
    assert count_trainable(tuned) == k
    base, moved = weights_by_path(params()), dense(bumped(tuned))
    chosen = {p: np.asarray(moved[p] != base[p]) for p in base}
    assert sum(int(c.sum()) for c in chosen.values()) == k
    # theta + delta - theta is not delta to the last bit: rank by what the method saw
    size = {p: np.abs(np.asarray((base[p] + d) - base[p])) for p, d in weights_by_path(deltas).items()}
    least = min(size[p][c].min() for p, c in chosen.items() if c.any())
    most = max(size[p][~c].max() for p, c in chosen.items() if p.startswith("layers."))
    assert least >= most


def test_phase_two_starts_exactly_at_the_pretrained_weights():
    tuned = lt_sft(budget=100).init(KEY, params(), moved_by(random_deltas(1)))
    for path, w in dense(tuned).items():
        np.testing.assert_array_equal(w, weights_by_path(params())[path])


def test_sparse_vectors_of_several_runs_add_up_in_any_order():
    phis = []
    for seed in (1, 2):
        tuned = lt_sft(budget=300).init(KEY, params(), moved_by(random_deltas(seed)))
        phis.append(
            {
                p: w.replace(values=0.25 + w.values)
                for p, w in weights_by_path(combine(tuned)).items()
                if isinstance(w, SparseDelta)
            }
        )

    def apply(w, path, *order):
        for phi in order:
            if path in phi:
                w = materialize(phi[path].replace(base=w))
        return w

    for path, w in weights_by_path(params()).items():
        both = apply(w, path, *phis)
        np.testing.assert_allclose(both, apply(w, path, *reversed(phis)), rtol=1e-6, atol=1e-7)
        less = apply(both, path, *({p: d.replace(values=-d.values) for p, d in phi.items()} for phi in phis))
        np.testing.assert_allclose(less, w, rtol=1e-6, atol=1e-6)


def test_all_entries_are_full_tuning():
    """Over the same start and steps, for an optimizer that treats entries alone."""
    sparse = trial(lt_sft(budget=sum(w.size for w in jax.tree.leaves(params()["layers"])), search_steps=1), steps=3)
    whole = trial(full(on="layers"), steps=3)
    for a, b in zip(sparse.events, whole.events, strict=True):
        assert abs(a.loss - b.loss) <= 1e-5 * abs(b.loss)


def test_the_l1_pull_is_a_penalty_on_the_values():
    method = lt_sft(budget=10, l1=0.5)
    tuned = bumped(method.init(KEY, params(), moved_by(random_deltas(1))), -2.0)
    held = [w.values for w in weights_by_path(combine(tuned)).values() if isinstance(w, SparseDelta)]
    assert float(method.penalty(tuned)) == pytest.approx(0.5 * 2.0, rel=1e-6)
    assert sum(v.size for v in held) >= 10
    assert lt_sft(budget=10).penalty is None


def test_a_range_limits_the_candidates():
    tuned = lt_sft(budget=0.25, on="layers[1:3].mlp.up").init(KEY, params(), moved_by(random_deltas(1)))
    assert count_trainable(tuned) == 32 * 48 * 2 // 4
    base, moved = weights_by_path(params()), dense(bumped(tuned))
    changed = np.asarray(moved["layers.mlp.up.kernel"] != base["layers.mlp.up.kernel"]).any((1, 2))
    assert changed.tolist() == [False, True, True, False]


def test_in_a_chain_it_takes_what_is_left():
    deltas = random_deltas(1)
    method = chain(lora(rank=2, on="@attention"), full(on="embed"), lt_sft(budget=50, on="layers|embed"))
    tuned = method.init(KEY, params(), moved_by(deltas))
    weights = weights_by_path(combine(tuned))
    assert isinstance(weights["layers.attn.q.kernel"], LowRank) and not isinstance(
        weights["embed.embedding"], SparseDelta
    )
    alone = count_trainable(chain(lora(rank=2, on="@attention"), full(on="embed")).init(KEY, params(), Probe()))
    assert count_trainable(tuned) == alone + 50
    with pytest.raises(JaxftError, match="already taken"):
        chain(full(), lt_sft()).init(KEY, params(), moved_by(deltas))


def test_wrong_budgets_and_missing_trainer():
    for budget in (0, 10**9):
        with pytest.raises(JaxftError, match=f"a budget of {budget} "):
            lt_sft(budget=budget).init(KEY, params(), moved_by(random_deltas(1)))
    with pytest.raises(JaxftError, match="give its probe a trainer"):
        lt_sft().init(KEY, params(), Probe())
    with pytest.raises(JaxftError, match="search_steps=0"):
        lt_sft(search_steps=0)


def test_a_budget_is_a_fraction_or_a_count():
    assert budget_count(0.5, 7) == 4 and budget_count(7, 7) == 7
