"""Layers of stacked leaves: draws on the host, schedules, which leaves there are."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.partition import Roles, Selector, has_marks, select, shape_of, weights_by_path
from jaxft.weights import Split, Tree, is_node, num_layers


def generator(rng: PRNGKeyArray) -> np.random.Generator:
    """A numpy generator seeded by a JAX key: draws of structure happen on the host."""
    with jax.ensure_compile_time_eval():  # `init` may be traced over abstract weights; the key is a value all the same
        data = np.asarray(jax.random.key_data(rng))
    return np.random.default_rng(data.astype(np.uint32).tolist())


def balanced_draw(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A random binary matrix with the given row and column sums, `bool[len(rows), len(columns)]`.

    Starts from the greedy (Gale-Ryser) matrix and shuffles it by exchanges that keep all sums.

    Raises:
        JaxftError: no such matrix exists.
    """
    left, matrix = columns.astype(int).copy(), np.zeros((len(rows), len(columns)), bool)
    order = rng.permutation(len(rows))
    for row in order[np.argsort(-rows[order], kind="stable")]:
        fill = np.argsort(-(left + rng.random(len(left)) * 0.5), kind="stable")[: rows[row]]
        matrix[row, fill] = True
        left[fill] -= 1
    if left.any():
        raise JaxftError(f"no selection has {rows.tolist()} per layer and {columns.tolist()} per matrix")
    if len(rows) > 1 and len(columns) > 1:
        for _ in range(20 * matrix.size):
            a, b = rng.choice(len(rows), 2, replace=False)
            c, d = rng.choice(len(columns), 2, replace=False)
            corner = matrix[np.ix_((a, b), (c, d))]
            if corner[0, 0] == corner[1, 1] != corner[0, 1] == corner[1, 0]:
                matrix[np.ix_((a, b), (c, d))] = ~corner
    return matrix


def spread(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` in `parts` integers that differ by at most one, which are larger being random."""
    return rng.permutation(np.arange(parts) < total % parts) + total // parts


def layer_counts(params: Tree, roles: Roles) -> int:
    """The number of stacked layers of a model."""
    stacked = [params[key] for key in roles.stacked if key in params]
    if not stacked:
        raise JaxftError(
            f"this method selects layers of stacked leaves, but the parameters have none of {roles.stacked} "
            f"(top-level keys: {sorted(params)}): name the stack in Roles(stacked=...), or make one of layers that are "
            "kept apart with jaxft.stack_layers"
        )
    return num_layers(stacked[0])


def every(period: int) -> Callable[[int, int], bool]:
    """Due after each `period` steps, but not after the last."""
    return lambda step, total: step % period == 0 and step < total


def at_rounds(rounds: int) -> Callable[[int, int], bool] | None:
    """Due at the boundaries of `rounds` equal parts of the run; None for a single round."""
    if rounds < 2:
        return None
    return lambda step, total: step < total and any(step == total * i // rounds for i in range(1, rounds))


def stacked_arrays(params: Tree, selector: Selector, roles: Roles) -> list[str]:
    """Paths of the stacked leaves (arrays, or layer splits of arrays) that a selector names."""
    weights = weights_by_path(params)
    return [
        p
        for p in select(params, selector, roles=roles, allow_empty=True)
        if roles.is_stacked(p)
        and not has_marks(weights[p])
        and (not is_node(weights[p]) or isinstance(weights[p], Split))
        and len(shape_of(weights[p])) > 0
    ]
