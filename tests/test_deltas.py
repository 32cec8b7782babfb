"""Sparse deltas: small files that add up, come off again and go on other bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import deltas
from jaxft.cli import main
from jaxft.errors import JaxftError
from jaxft.hub import load_pretrained
from jaxft.training import train
from tests.training.tiny import tiny_config, write_tiny


def model(seed: int, dtype=jnp.float32) -> dict:
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "layers": {"kernel": jax.random.normal(a, (3, 40, 30)).astype(dtype)},
        "norm": {"scale": jax.random.normal(b, (30,)).astype(dtype)},
    }


def changed(base: dict, seed: int, count: int = 25) -> dict:
    kernel = base["layers"]["kernel"]
    where = np.random.default_rng(seed).choice(kernel.size, count, replace=False)
    moved = kernel.reshape(-1).at[where].add(1.0 + seed).reshape(kernel.shape)
    return {**base, "layers": {"kernel": moved}}


def same(a: dict, b: dict) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-7), a, b)


def test_a_difference_holds_the_changed_entries_and_puts_them_back():
    base = model(0)
    tuned = changed(base, 1)
    delta = deltas.difference(tuned, base)
    assert list(delta) == ["layers.kernel"] and deltas.size(delta) == 25
    same(deltas.apply(base, delta), tuned)
    same(deltas.apply(tuned, deltas.scale(delta, -1)), base)
    assert deltas.difference(base, base) == {}


def test_deltas_add_up_in_any_order_and_come_off_again():
    base = model(0)
    task, language = (deltas.difference(changed(base, s), base) for s in (1, 2))
    one, other = deltas.add(task, language), deltas.add(language, task)
    for path in one:
        np.testing.assert_array_equal(one[path].indices, other[path].indices)
        np.testing.assert_array_equal(one[path].values, other[path].values)
    same(deltas.apply(base, one), deltas.apply(deltas.apply(base, task), language))
    same(deltas.apply(base, deltas.subtract(one, language)), changed(base, 1))
    assert 0 <= deltas.overlap(task, language) < 0.5 and deltas.overlap(task, task) == 1


def test_a_file_is_small_and_reads_back_bit_for_bit(tmp_path):
    base = model(0)
    delta = deltas.difference(changed(base, 1), base)
    written = deltas.save(delta, tmp_path / "sub" / "task.npz", note={"base": "tiny"})
    assert written < base["layers"]["kernel"].nbytes / 10
    again = deltas.load(tmp_path / "sub" / "task.npz")
    assert again.keys() == delta.keys()
    for path, e in delta.items():
        assert again[path].shape == e.shape
        np.testing.assert_array_equal(again[path].indices, e.indices)
        np.testing.assert_array_equal(again[path].values, e.values)
    assert [f.name for f in (tmp_path / "sub").iterdir()] == ["task.npz"]
    with pytest.raises(JaxftError, match="exists: choose another name"):
        deltas.save(delta, tmp_path / "sub" / "task.npz")
    deltas.save({}, tmp_path / "sub" / "task.npz", overwrite=True)
    assert deltas.load(tmp_path / "sub" / "task.npz") == {}


def test_another_base_and_another_dtype():
    base, other = model(0), model(5, jnp.bfloat16)
    delta = deltas.difference(changed(base, 1), base)
    ported = deltas.apply(other, delta)
    moved = np.asarray(ported["layers"]["kernel"] != other["layers"]["kernel"])
    assert moved.sum() == 25 and ported["layers"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.flatnonzero(moved), delta["layers.kernel"].indices)


def test_the_command_line_writes_adds_subtracts_ports_and_exports(tmp_path, capsys):
    """Two sparse runs on one base: their files compose to a Hugging Face model, come off again, and go on another."""

    def cli(*arguments):
        with pytest.raises(SystemExit) as done:
            main(["export", *map(str, arguments)])
        assert not done.value.code, capsys.readouterr().err

    tiny = tmp_path / "tiny"
    tiny.mkdir()
    write_tiny(tiny)
    for name, seed in (("task", 1), ("language", 2)):
        config = tiny_config(
            tiny,
            tmp_path / name,
            method={"name": "shira", "rank": 1},
            training={"steps": 2, "learning_rate": 1e-2},
            evaluation={"sets": {}},
            seed=seed,
        )
        train(config)
        cli(tmp_path / name, tmp_path / f"{name}.npz", "--sparse")
    task, language = (deltas.load(tmp_path / f"{name}.npz") for name in ("task", "language"))
    assert deltas.size(task) <= 4 * sum(sum(e.shape[1:]) for e in task.values())
    assert (tmp_path / "task.npz").stat().st_size < 60_000
    base = tiny / "model"
    cli(base, tmp_path / "both", "--add", tmp_path / "task.npz", "--add", tmp_path / "language.npz")
    _, start = load_pretrained(base)
    _, both = load_pretrained(tmp_path / "both")
    same(both, deltas.apply(start, deltas.add(task, language)))
    cli(tmp_path / "both", tmp_path / "task-again", "--subtract", tmp_path / "language.npz")
    _, again = load_pretrained(tmp_path / "task-again")
    same(again, deltas.apply(start, task))
    cli(tmp_path / "language", tmp_path / "stacked.npz", "--sparse", "--add", tmp_path / "task.npz")
    assert deltas.size(deltas.load(tmp_path / "stacked.npz")) == deltas.size(deltas.add(task, language))


def test_what_does_not_fit_is_refused(tmp_path):
    base = model(0)
    delta = deltas.difference(changed(base, 1), base)
    with pytest.raises(JaxftError, match='changes "layers.kernel", which this model does not have: .*layers.kernels'):
        deltas.apply({"layers": {"kernels": base["layers"]["kernel"]}}, delta)
    with pytest.raises(JaxftError, match=r'"layers.kernel" of shape \(3, 40, 30\), here it is \(3, 30, 40\)'):
        deltas.apply({"layers": {"kernel": jnp.zeros((3, 30, 40))}}, delta)
    with pytest.raises(JaxftError, match="in one of the two models only"):
        deltas.difference({**base, "bias": jnp.ones(2)}, base)
    with pytest.raises(JaxftError, match="there is no file"):
        deltas.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(JaxftError, match="is not a sparse delta"):
        deltas.load(tmp_path / "text.npz")
    bad = {"layers.kernel": delta["layers.kernel"]._replace(shape=(2, 2))}
    deltas.save(bad, tmp_path / "bad.npz")
    with pytest.raises(JaxftError, match="is damaged"):
        deltas.load(tmp_path / "bad.npz")
