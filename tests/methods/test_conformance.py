"""Every registered method, and chains of them, against the checks that `jaxft.testing` makes for all."""

import functools

import pytest

from jaxft.methods import build, get_method, methods
from jaxft.testing import CHECKS, Trial
from tests.conftest import forget_compiled_programs, is_crowded
from tests.methods.tiny import OF_EXPERTS, mixture_trial, trial

CHAINS = {
    "lora+hft": [{"name": "lora", "rank": 4, "on": "@attention"}, {"name": "hft", "rounds": 3}],
    "ssf+lora": ["ssf", {"name": "lora", "rank": 4}],
    "bitfit+lora": ["bitfit", {"name": "lora", "rank": 4, "on": "layers[1:3].mlp"}],
}


@functools.lru_cache(maxsize=1)
def tried(name: str) -> Trial:
    if is_crowded():
        forget_compiled_programs()
    if name in CHAINS:
        return trial(build(CHAINS[name]))
    entry = get_method(name)
    return (mixture_trial if name in OF_EXPERTS else trial)(entry.build(**entry.example), identity=entry.identity)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", [*methods(), *CHAINS])
def test_method(name, check):
    check(tried(name))
