"""Granularity and budget: exactly the units that numpy would choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import JaxftError
from jaxft.methods.selection.units import (
    best_in_rows,
    best_of_all,
    budget_count,
    drawn_counts,
    positions,
    reduce_to_units,
    spend,
    unit_shape,
)


def ranked(row: np.ndarray, k: int) -> np.ndarray:
    """The k highest of a row, earlier entries first among equals."""
    row = np.where(np.isnan(row), -np.inf, row)
    mask = np.zeros(row.size, bool)
    mask[np.argsort(-row, kind="stable")[:k]] = True
    return mask


def test_the_best_of_a_row_are_those_of_a_stable_sort():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8, 57)).astype(np.float32)
    rows[1] = np.round(rows[1])  # ties, and zeros of both signs
    rows[2] = 0
    rows[3, :5] = [np.inf, -np.inf, np.nan, -0.0, 0.0]
    counts = np.array([5, 20, 13, 57, 0, 1, 56, 30])
    found = np.asarray(best_in_rows(jnp.asarray(rows), jnp.asarray(counts)))
    for row, k, mask in zip(rows, counts, found, strict=True):
        np.testing.assert_array_equal(mask, ranked(row, k))
    shaped = best_in_rows(jnp.asarray(rows).reshape(8, 3, 19), jnp.asarray(counts))
    np.testing.assert_array_equal(np.asarray(shaped).reshape(8, 57), found)


@pytest.mark.parametrize("k", [1, 17, 100, 186])
def test_the_best_of_all_are_those_of_one_row(k):
    rng = np.random.default_rng(1)
    scores = {"a": rng.integers(-9, 9, (3, 40)), "b": rng.integers(-9, 9, (1, 30)), "c": rng.integers(-9, 9, (2, 18))}
    found = best_of_all({p: jnp.asarray(s, jnp.float32) for p, s in scores.items()}, k)
    flat = np.concatenate([s.reshape(-1) for s in scores.values()])
    together = np.concatenate([np.asarray(m).reshape(-1) for m in found.values()])
    np.testing.assert_array_equal(together, ranked(flat.astype(np.float32), k))


def test_positions_ascend_and_are_padded():
    mask = jnp.asarray([[False, True, True], [True, False, False]])
    np.testing.assert_array_equal(positions(mask, 2), [[1, 2], [0, 3]])


W = np.random.default_rng(2).normal(size=(2, 6, 4)).astype(np.float32)
BLOCKS = W.reshape(2, 3, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 6, 4)
EXPECTED = {
    ("element", 1): W.reshape(2, 24),
    ("row", 1): W.mean(2),
    ("row", 3): W.reshape(2, 2, 12).mean(2),
    ("column", 1): W.mean(1),
    ("column", 2): W.reshape(2, 6, 2, 2).mean((1, 3)),
    ("block", 2): BLOCKS.mean(2),
    ("matrix", 1): W.mean((1, 2))[:, None],
    ("leaf", 1): W.mean()[None, None],
}


@pytest.mark.parametrize(("granularity", "size"), EXPECTED)
def test_units_hold_the_mean_of_their_entries(granularity, size):
    found = reduce_to_units(jnp.asarray(W), granularity, True, size, "mean")
    assert found.shape == unit_shape(granularity, W.shape, True, size, "w") == EXPECTED[granularity, size].shape
    np.testing.assert_allclose(found, EXPECTED[granularity, size], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_every_matrix_of_a_stack_of_experts_is_a_pool(granularity):
    w = np.stack([W, 2 * W, W + 1], axis=1)
    found = reduce_to_units(jnp.asarray(w), granularity, True, 2, "max")
    each = [reduce_to_units(jnp.asarray(w[:, e]), granularity, True, 2, "max") for e in range(3)]
    np.testing.assert_array_equal(np.asarray(found).reshape(2, 3, -1), np.stack(each, axis=1))
    assert found.shape == unit_shape(granularity, w.shape, True, 2, "w")
    scores, may = {"w": found}, {"w": np.array([True, False])}
    assert np.asarray(spend(scores, may, 1, "matrix", {}, {})["w"][0]).sum(1).tolist() == [1, 1, 1, 0, 0, 0]
    assert np.asarray(spend(scores, may, 4, "layer", {}, {})["w"][0]).reshape(2, -1).sum(1).tolist() == [4, 0]
    assert np.asarray(spend(scores, may, 0.5, "model", {}, {})["w"][0])[3:].sum() == 0


def test_reductions():
    for name, wanted in {"sum": W.sum(2), "norm": np.linalg.norm(W, axis=2), "max": W.max(2)}.items():
        np.testing.assert_allclose(reduce_to_units(jnp.asarray(W), "row", True, 1, name), wanted, rtol=1e-5, atol=1e-6)


def spent(per, budget, allowed=None):
    rng = np.random.default_rng(3)
    scores = {"a": rng.normal(size=(2, 10)), "b": rng.normal(size=(2, 6))}
    allowed = allowed or {p: np.ones(2, bool) for p in scores}
    groups, shapes = {"a": "one", "b": "two"}, {"a": (10,), "b": (6,)}
    made = spend({p: jnp.asarray(s, jnp.float32) for p, s in scores.items()}, allowed, budget, per, groups, shapes)
    return scores, {p: np.asarray(m) for p, (m, _) in made.items()}, {p: c.tolist() for p, (_, c) in made.items()}


def drawn(per, budget, sizes, layers, seed=0):
    draws, groups = np.random.default_rng(seed), {"a": "one", "b": "two"}
    return drawn_counts(draws, sizes, layers, budget, per, groups)


def test_what_is_drawn_at_random_spends_the_budget_of_every_pool():
    sizes = {"a": np.array([10, 0, 10]), "b": np.array([6, 6, 0, 6, 0, 6])}  # b has two matrices in each layer
    layers = {"a": np.arange(3), "b": np.repeat(np.arange(3), 2)}
    for seed in range(20):
        for per, budget, totals in (("leaf", 0.5, [10, 12]), ("category", 0.25, [5, 6]), ("model", 40, None)):
            found = drawn(per, budget, sizes, layers, seed)
            assert all((found[p] <= sizes[p]).all() and (found[p] >= 0).all() for p in sizes)
            counts = [found[p].sum() for p in sizes]
            assert sum(counts) == 40 if totals is None else counts == totals
        everything = drawn("model", 44, sizes, layers, seed)
        assert all(np.array_equal(everything[p], sizes[p]) for p in sizes)
        found = drawn("layer", 6, sizes, layers, seed)
        assert np.array_equal(found["a"] + found["b"].reshape(3, 2).sum(1), [6, 6, 6]) and found["a"][1] == 0


@pytest.mark.parametrize("count", [3, 20, 50])
def test_any_units_are_drawn_as_likely_as_any_others(count):
    """From each pool as many as NumPy takes from it, within four standard errors of mean and variance."""
    sizes, n = np.array([5, 30, 25]), 4000
    found = np.array([drawn("leaf", count, {"a": sizes}, {"a": np.arange(3)}, seed)["a"] for seed in range(n)])
    wanted = np.random.default_rng(9).multivariate_hypergeometric(sizes, count, size=200_000)
    np.testing.assert_allclose(found.mean(0), wanted.mean(0), atol=4 * (wanted.std(0) / n**0.5).max())
    np.testing.assert_allclose(found.var(0), wanted.var(0), rtol=4 * (2 / n) ** 0.5)


def test_draws_from_more_units_than_32_bits_count():
    sizes = np.full(80, 2**31 - 1)
    for budget, count in ((100_000, 100_000), (0.05, round(0.05 * int(sizes.sum())))):
        found = drawn("model", budget, {"a": sizes}, {"a": np.arange(80)})["a"]
        assert found.sum() == count
        assert (abs(found - count / 80) < 6 * (count / 80) ** 0.5).all()


def test_every_pool_spends_its_own_budget():
    scores, masks, counts = spent("matrix", 0.5)
    assert [m.sum(1).tolist() for m in masks.values()] == [[5, 5], [3, 3]] and counts == {"a": [5, 5], "b": [3, 3]}
    scores, masks, _ = spent("leaf", 4)
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask.reshape(-1), ranked(scores[path].reshape(-1).astype(np.float32), 4))
    scores, masks, counts = spent("layer", 4)
    for layer in range(2):
        row = np.concatenate([s[layer] for s in scores.values()]).astype(np.float32)
        np.testing.assert_array_equal(np.concatenate([m[layer] for m in masks.values()]), ranked(row, 4))
    assert counts == {p: m.sum(1).tolist() for p, m in masks.items()}
    _, masks, _ = spent("category", 0.5)
    assert [m.sum() for m in masks.values()] == [10, 6]
    _, masks, _ = spent("model", 7)
    assert sum(m.sum() for m in masks.values()) == 7
    _, masks, _ = spent("matrix", lambda shape: shape[0] - 2)
    assert [m.sum(1).tolist() for m in masks.values()] == [[8, 8], [4, 4]]


@pytest.mark.parametrize("per", ["matrix", "leaf", "layer", "model"])
def test_rows_that_are_not_allowed_get_nothing(per):
    _, masks, _ = spent(per, 3, {"a": np.array([True, False]), "b": np.array([False, True])})
    assert not masks["a"][1].any() and not masks["b"][0].any() and masks["a"][0].any()


def test_impossible_budgets_say_so():
    for budget, text in ((0, "is 0 of 10"), (11, "is 11 of 10"), (0.01, "is 0 of 10"), (1.5, "neither a fraction")):
        with pytest.raises(JaxftError, match=text):
            budget_count(budget, 10)
    with pytest.raises(JaxftError, match="spent per matrix"):
        spent("model", lambda shape: 3)


def test_leaves_that_cannot_be_cut_are_named():
    with pytest.raises(JaxftError, match=r'"norm" of shape \(2, 8\) has no rows'):
        unit_shape("row", (2, 8), True, 1, "norm")
    with pytest.raises(JaxftError, match='blocks of size 5 do not tile the 10 x 8 of "w"'):
        unit_shape("block", (2, 10, 8), True, 5, "w")


def test_a_shared_budget_needs_values():
    def count(x):
        return spend({"a": x}, {"a": np.ones(2, bool)}, 3, "model", {}, {})["a"][0]

    with pytest.raises(jax.errors.ConcretizationTypeError, match='shared by several matrices, among them "a"'):
        jax.eval_shape(count, jnp.zeros((2, 5)))
