"""The example of docs/add-a-method.md is executed as it stands."""

import re
from pathlib import Path

import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, build, get_method
from jaxft.methods.registry import _REGISTRY
from jaxft.partition import combine, weights_by_path
from jaxft.weights import RowSplit
from tests.methods.tiny import params

DOCUMENT = Path(__file__).parents[2] / "docs" / "add-a-method.md"


@pytest.fixture
def names():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert len(blocks) == 2
    space: dict = {"__name__": "documentation"}
    try:
        for block in blocks:
            exec(compile(block, str(DOCUMENT), "exec"), space)  # noqa: S102
        yield space
    finally:
        _REGISTRY.pop("random-channels", None)


def test_the_documented_method_works_and_is_registered(names):
    assert names["trial"].events, "check_method ran"
    entry = get_method("random-channels")
    assert [o.name for o in entry.options] == ["channels", "on"] and all(o.help for o in entry.options)
    tuned = build({"name": "random-channels", "channels": 3}).init(names["jax"].random.key(1), params(), Probe())
    q = weights_by_path(combine(tuned))["layers.attn.q.kernel"]
    assert isinstance(q, RowSplit) and q.rows.shape == (4, 3, 32) and q.axis == -2
    with pytest.raises(JaxftError, match='channels=32, but "layers.attn.k.kernel" has 32'):
        build({"name": "random-channels", "channels": 32}).init(names["jax"].random.key(1), params(), Probe())
