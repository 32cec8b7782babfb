"""Fixtures of the tests that plan runs."""

import jax
import pytest

from tests.distributed.planned import write_shape


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_shape(tmp_path_factory.mktemp("shape"))


@pytest.fixture
def quick_compiler():
    """Sharding is decided before optimisation, and three quarters of the time is enough without the latter."""
    level = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", level)
