"""A checkpoint says what its arrays make up: runs resume and are exported without choosing again what trains."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxft import runs
from jaxft.errors import JaxftError
from jaxft.methods.probe import Probe
from jaxft.structure import describe, rebuild
from jaxft.training import loop, train
from tests.training.tiny import tiny_config, write_tiny
from tests.weights.test_law import CASES, cut


@pytest.mark.parametrize("name", CASES)
def test_every_node_is_described(name):
    halves = cut(name)
    tree = {"trainable": halves.trainable, "state": ((), {"count": np.zeros(3)}, [None])}
    again = rebuild(json.loads(json.dumps(describe(tree))))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(tree)}
    assert set(jax.tree.leaves(again)) == named


def test_what_cannot_be_described_is_left_out_and_what_is_unknown_refused():
    assert describe({"a": jax.ShapeDtypeStruct((), int), "b": {1: np.zeros(2)}}) is None
    with pytest.raises(JaxftError, match="weight node Strange"):
        rebuild({"node": "Strange", "arrays": {}, "static": {}})
    split = describe(cut("Split").trainable)
    assert jax.tree.structure(rebuild(with_field(split, None))) == jax.tree.structure(rebuild(split))
    with pytest.raises(JaxftError, match="a Split with propagates, which it had in another version"):
        rebuild(with_field(split, "array"))
    with pytest.raises(JaxftError, match="cannot read the structure"):
        rebuild({"set": []})


def with_field(document, value):
    """A described tree whose nodes have a field `propagates`, as in an earlier version."""
    if not isinstance(document, dict):
        return document
    found = {key: with_field(inner, value) for key, inner in document.items()}
    return found | {"arrays": {**found["arrays"], "propagates": value}} if "node" in found else found


METHODS = {
    "smt": {"name": "smt", "budget": 10, "size": 8, "batches": 2},
    "lt-sft": {"name": "lt-sft", "budget": 200, "search_steps": 2},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", METHODS)
def test_a_search_is_not_repeated_at_resume_nor_at_export(name, directory, tmp_path, monkeypatch):
    sections = {"training": {"steps": 4, "learning_rate": 1e-2}, "checkpoint": {"every": 2, "keep_last": 9}}
    config = tiny_config(directory, tmp_path / "run", method=METHODS[name], evaluation={"sets": {}}, **sections)
    whole = train(config)
    with loop.Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        sums = {n: x["checksum"] for n, x in checkpointer.record(4)["leaves"].items()}
    (tmp_path / "run" / "report.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")

    def searched(*_, **__):
        raise AssertionError("the search ran again")

    monkeypatch.setattr(Probe, "gradients_of", searched)
    monkeypatch.setattr(loop, "short_run", searched)
    again = train(config)
    assert again.final_loss == whole.final_loss
    with loop.Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        assert {n: x["checksum"] for n, x in checkpointer.record(4)["leaves"].items()} == sums
    loaded = runs.load(str(tmp_path / "run"))
    assert runs.export(loaded, tmp_path / "merged").largest_difference < 1e-3
    runs.save_delta(loaded, tmp_path / "delta")
    delta = runs.load(str(tmp_path / "delta"))
    jax.tree.map(np.testing.assert_array_equal, delta.params, loaded.params)
