"""Products of grouped rows on a GPU: the kernels, interpreted, and XLA's ragged products compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxft.weights import ragged_gpu
from jaxft.weights.ragged import _BY_OUTPUTS, _outer

CASES = [
    (300, 96, 130, [0, 7, 130, 150, 0, 13]),  # groups without rows, and larger than a tile; sides that no tile divides
    (64, 256, 128, [10, 20, 30, 4]),  # several tiles are summed
    (40, 24, 8, [3, 0, 30]),  # sides smaller than a tile; rows that belong to no group
    (256, 16, 64, [100, 50]),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    rows, inputs, outputs, sizes = request.param
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, inputs), (len(sizes), inputs, outputs), (rows, outputs))
    x, w, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return x, w, g, jnp.array(sizes, jnp.int32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rows_are_multiplied_with_the_matrix_of_their_group(case):
    x, w, g, sizes = case
    covered = int(sizes.sum())
    close(ragged_gpu.product(x, w, sizes, interpret=True)[:covered], lax.ragged_dot(x, w, sizes)[:covered])
    back = ragged_gpu.product(g, w, sizes, is_transposed=True, interpret=True)
    close(back[:covered], lax.ragged_dot_general(g, w, sizes, _BY_OUTPUTS)[:covered])


def test_outer_products_are_summed_within_a_group(case):
    x, _, g, sizes = case
    close(ragged_gpu.outer(x, g, sizes, interpret=True), _outer(x, g, sizes))


def test_results_have_the_dtype_of_the_rows_and_are_summed_in_float32():
    """512 products of 1.00390625 with 1: in bfloat16 a sum would stop growing at 256."""
    x, w = jnp.full((16, 512), 1.0, jnp.bfloat16), jnp.full((1, 512, 16), 1.00390625, jnp.bfloat16)
    found = ragged_gpu.product(x, w, jnp.array([16]), interpret=True)
    assert found.dtype == jnp.bfloat16
    close(found.astype(jnp.float32), 512.0)
    assert ragged_gpu.outer(x, x, jnp.array([16]), interpret=True).dtype == jnp.bfloat16
