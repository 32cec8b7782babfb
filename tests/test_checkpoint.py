"""Checkpoints: whole, atomic, verified, independent of the mesh, no larger than what cannot be rebuilt."""

import contextlib
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    checksums,
    fingerprint,
    named_leaves,
    rebuildable,
    stored_bytes,
)


def state(seed: int = 0, *, shape=(8, 16)) -> dict:
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "trainable": {"w": jax.random.normal(keys[0], shape), "b": jax.random.normal(keys[1], (16,), jnp.bfloat16)},
        "frozen": {
            "base": jax.random.normal(keys[2], (64, 32)),
            "index": jnp.arange(8, dtype=jnp.int32),
            "empty": jnp.zeros((0, 4)),
        },
        "opt_state": (jnp.int32(3), {"mu": jnp.ones(shape), "hole": None}),
        "mask": jnp.array([True, False, True]),
        "rng": keys[3],
    }


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def bits(tree) -> dict[str, np.ndarray]:
    plain = jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree
    )
    return {name: np.asarray(x) for name, x in named_leaves(plain).items()}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (name, x), (_, y) in zip(bits(a).items(), bits(b).items(), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert x.tobytes() == y.tobytes(), name


def files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def test_round_trip_keeps_every_bit_and_the_record(tmp_path):
    tree = state()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(tree)) is None
        written = checkpointer.save(7, tree, {"data": {"position": 3}})
        assert written == stored_bytes(tree) > 0
        checkpointer.wait()
        restored = checkpointer.restore(abstract(tree))
    assert (restored.step, restored.record, restored.warnings) == (7, {"data": {"position": 3}}, ())
    assert_same(restored.tree, tree)
    assert jax.random.key_impl(restored.tree["rng"]) == jax.random.key_impl(tree["rng"])


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "bool", "float8_e4m3fn", "int4"]
)
def test_checksum_sees_value_and_position(dtype):
    x = jnp.arange(24).reshape(2, 3, 4) % 7
    x = (x % 2 == 0) if dtype == "bool" else x.astype(dtype)
    y = x.at[0, 0, 0].set(x[0, 0, 1]).at[0, 0, 1].set(x[0, 0, 0])  # two elements exchanged
    z = x.at[1, 2, 3].set(x[0, 0, 0] if x[1, 2, 3] != x[0, 0, 0] else x[0, 0, 1])
    sums = [checksums({"x": v})["x"] for v in (x, y, z)]
    assert len(set(sums)) == 3
    assert sums[0] == checksums({"x": jnp.array(x)})["x"]


def test_checksum_is_the_same_on_every_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 64))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in (P(), P("a"), P("b", "a"), P(None, ("a", "b")))]
    assert {checksums({"x": v})["x"] for v in [x, *placed]} == {checksums({"x": np.asarray(x)})["x"]}


@pytest.mark.parametrize(("saved", "wanted"), [((8,), (1,)), ((2, 4), (8,)), ((1,), (2, 4)), ((4, 2), (2,))])
def test_restores_on_another_mesh(tmp_path, saved, wanted):
    def sharding(shape):
        count = int(np.prod(shape))
        mesh = Mesh(np.array(jax.devices()[:count]).reshape(shape), ("a", "b")[: len(shape)])
        return NamedSharding(mesh, P(*mesh.axis_names))

    tree = {"w": jax.random.normal(jax.random.key(1), (8, 16)), "v": jnp.arange(64).reshape(8, 8)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, jax.device_put(tree, sharding(saved)))
        checkpointer.wait()
        restored = checkpointer.restore(abstract(tree, sharding(wanted)))
    assert_same(restored.tree, tree)
    assert all(x.sharding == sharding(wanted) for x in jax.tree.leaves(restored.tree))


def test_only_what_cannot_be_rebuilt_is_stored(tmp_path):
    tree = state(shape=(4, 4))
    base = {"layers": tree["frozen"]["base"]}
    left_out = {f"frozen.{k}": v for k, v in rebuildable(tree["frozen"], checksums(base), trained_bytes=100).items()}
    assert set(left_out) == {"frozen.base"}
    with Checkpointer(tmp_path) as checkpointer:
        written = checkpointer.save(1, tree, {"base": "nano (1234)"}, rebuildable=left_out)
        assert written == stored_bytes(tree) - tree["frozen"]["base"].nbytes
        checkpointer.wait()
        target = abstract(tree)
        with pytest.raises(CheckpointError, match=r"refers to the base model for 1 leaves .*load it first"):
            checkpointer.restore(target)
        target["frozen"]["base"] = tree["frozen"]["base"]
        restored = checkpointer.restore(target)
        assert_same(restored.tree, tree)
        assert restored.tree["frozen"]["base"] is tree["frozen"]["base"]  # not a second copy
        target["frozen"]["base"] = tree["frozen"]["base"] + 1
        with pytest.raises(
            CheckpointError, match=r"from the base model nano \(1234\), this run has other \(5678\).*frozen\.base"
        ):
            checkpointer.restore(target, base="other (5678)")
    size = sum(p.stat().st_size for p in files(tmp_path))
    assert size < tree["frozen"]["base"].nbytes + 16_000


def test_a_frozen_leaf_that_changed_is_stored(tmp_path):
    tree = state()
    left_out = {f"frozen.{k}": v for k, v in rebuildable(tree["frozen"], checksums(tree["frozen"]), 0).items()}
    moved = {**tree, "frozen": {**tree["frozen"], "base": tree["frozen"]["base"].at[0, 0].add(1.0)}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, moved, rebuildable=left_out)
        checkpointer.wait()
        target = {**abstract(tree), "frozen": tree["frozen"]}
        assert_same(checkpointer.restore(target).tree, moved)


def test_large_integer_codes_are_rebuilt_small_masks_are_stored():
    frozen = {"codes": jnp.arange(4096, dtype=jnp.uint8), "scales": jnp.ones(8), "slot": jnp.arange(8)}
    assert set(rebuildable(frozen, {}, trained_bytes=1024)) == {"codes"}


def test_what_a_failed_save_still_writes_is_removed_once_it_has_ended(tmp_path):
    """The threads of a save do not end with it: they may write into a folder that the next start removes."""
    folder = tmp_path / "4.orbax-checkpoint-tmp" / "arrays"
    folder.mkdir(parents=True)
    ends = time.monotonic() + 1

    def write() -> None:
        while time.monotonic() < ends:
            with contextlib.suppress(FileNotFoundError):
                for i in range(200):
                    (folder / str(i)).touch()

    writer = threading.Thread(target=write)
    writer.start()
    with Checkpointer(tmp_path):
        assert not folder.parent.exists()
    writer.join()


def test_keeps_the_last_and_the_best(tmp_path):
    tree = {"w": jnp.arange(4.0)}
    values = [5.0, 1.0, 4.0, float("nan"), 3.0]
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1, keep_best=2)) as checkpointer:
        for step, value in enumerate(values, start=1):
            checkpointer.save(step, tree, metric=value)
        checkpointer.save(6, tree)
        checkpointer.wait()
        assert checkpointer.steps() == [2, 5, 6]
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1, keep_best=2)) as checkpointer:  # remembered across starts
        checkpointer.save(7, tree, metric=2.0)
        checkpointer.wait()
        assert checkpointer.steps() == [2, 7]
        assert checkpointer.best_step() == 2


def test_saving_a_step_twice_does_nothing(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, {"w": jnp.ones(3)}) > 0
        assert checkpointer.save(1, {"w": jnp.ones(3)}) == 0


def test_the_tree_is_compared_before_anything_is_read(tmp_path):
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(1)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.wait()
        with pytest.raises(CheckpointError) as error:
            checkpointer.restore(abstract({"a": jnp.ones((3, 3)), "b": jnp.ones(4, jnp.bfloat16), "d": jnp.ones(1)}))
    message = str(error.value)
    assert "a: shape [2, 3] in the checkpoint, [3, 3] in this run" in message
    assert "b: dtype float32 in the checkpoint, bfloat16 in this run" in message
    assert "c: in the checkpoint only" in message and "d: missing in the checkpoint" in message
    assert str(tmp_path) in message


def test_differences_are_cut_at_ten(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {f"x{i}": jnp.ones(1) for i in range(15)})
        checkpointer.wait()
        with pytest.raises(CheckpointError, match="and 6 more"):
            checkpointer.restore(abstract({"y": jnp.ones(1)}))


def truncate(path: Path) -> None:
    largest = max(files(path), key=lambda p: p.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def flip_bits_of_arrays(path: Path) -> None:
    largest = max(files(path / "arrays"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 64):
        content[i] ^= 0xFF
    largest.write_bytes(content)


def edit_record(path: Path) -> None:
    document = next(p for p in files(path / "record") if b'"leaves"' in p.read_bytes())
    document.write_bytes(document.read_bytes().replace(b'"position": 2', b'"position": 9'))


def lose_arrays(path: Path) -> None:
    for file in files(path / "arrays"):
        if file.parent.name == "d" or "ocdbt" in str(file):
            file.unlink()


def lose_record(path: Path) -> None:
    for file in files(path / "record"):
        file.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_bits_of_arrays, edit_record, lose_arrays, lose_record])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(tmp_path, damage):
    trees = {step: {"w": jax.random.normal(jax.random.key(step), (64, 64))} for step in (1, 2)}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        for step, tree in trees.items():
            checkpointer.save(step, tree, {"position": step})
    damage(tmp_path / "checkpoints" / "2")
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        restored = checkpointer.restore(abstract(trees[1]))
        assert restored.step == 1 and restored.record == {"position": 1}
        assert_same(restored.tree, trees[1])
        (warning,) = restored.warnings
        assert "checkpoints/2 is refused: " in warning and "resuming from step 1 instead" in warning
        checkpointer.save(2, trees[2])  # the bad one is out of the way
        checkpointer.wait()
        assert checkpointer.restore(abstract(trees[1])).step == 2
    assert (tmp_path / "checkpoints-refused" / "2").is_dir()


@pytest.mark.parametrize("damage", [truncate, flip_bits_of_arrays, edit_record, lose_arrays, lose_record])
def test_without_a_good_checkpoint_it_says_so_and_removes_nothing(tmp_path, damage):
    tree = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, tree, {"position": 2})
    damage(tmp_path / "2")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be resumed:\n  checkpoint .*/2 is refused"):
            checkpointer.restore(abstract(tree))
    assert (tmp_path / "2").is_dir()


def test_a_foreign_checkpoint_is_refused(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path, item_names=("arrays",)) as other:
        other.save(5, args=ocp.args.Composite(arrays=ocp.args.StandardSave({"w": jnp.ones(3)})))
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "model.bin").write_bytes(b"something else")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError) as error:
            checkpointer.restore(abstract({"w": jnp.ones(3)}))
    assert f"{tmp_path}/5 is refused" in str(error.value)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, {"w": jnp.ones(3)})
    (tmp_path / "5").rename(tmp_path / "50")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="it holds step 5"):
            checkpointer.restore(abstract({"w": jnp.ones(3)}))


KILLED = """
    import sys, jax, jax.numpy as jnp
    from jaxft.checkpoint import Checkpointer
    with Checkpointer(sys.argv[1]) as checkpointer:
        for step in range(1, 10_000):
            checkpointer.save(step, {str(i): jnp.full((64, 512), step * 1.0 + i) for i in range(16)})
            print(step, flush=True)
"""


def test_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint(tmp_path):
    target = abstract({str(i): jnp.zeros((64, 512)) for i in range(16)})
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / str(attempt))],
            stdout=subprocess.PIPE,
            text=True,
        )
        steps = 0
        while steps < 4 + attempt:
            steps = int(process.stdout.readline())
        time.sleep(0.007 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Checkpointer(tmp_path / str(attempt)) as checkpointer:
            restored = checkpointer.restore(target)
            # The save before the one in flight is complete, because a save waits for the one before it.
            assert restored.step >= steps - 2 and restored.warnings == ()
            for i in range(16):
                np.testing.assert_array_equal(restored.tree[str(i)], np.full((64, 512), restored.step + i, np.float32))
        assert not [p for p in (tmp_path / str(attempt)).iterdir() if "tmp" in p.name]  # no litter after the next start


FULL = """
    import json, resource, signal, sys, jax, jax.numpy as jnp, numpy as np
    from jaxft.checkpoint import Checkpointer, CheckpointError
    checkpointer = Checkpointer(sys.argv[1])
    small = {"w": jnp.arange(16.0)}
    noise = {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}
    checkpointer.save(1, small); checkpointer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        checkpointer.save(2, noise)
        checkpointer.wait()
    except CheckpointError as error:
        print(json.dumps(str(error)))
"""


def test_a_full_disk_is_an_error_that_names_the_path_and_the_good_checkpoint(tmp_path):
    # A limit on the size of files makes writes fail as a full disk does, without one.
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    message = json.loads(result.stdout.splitlines()[-1])
    assert f"saving a checkpoint to {tmp_path} failed" in message and "same command" in message
    assert "Traceback" not in result.stderr  # Orbax's own account of it, several pages
    assert f"the last good checkpoint is {tmp_path}/1" in message
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract({"w": jnp.arange(16.0)})).step == 1


def test_a_failed_save_is_raised_by_check(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.check()
        monkeypatch.setattr(
            checkpointer.manager, "check_for_errors", lambda: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        with pytest.raises(CheckpointError, match=r"No space left.*there is no earlier checkpoint"):
            checkpointer.check()
        monkeypatch.undo()


def test_the_state_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    tree = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=5)) as checkpointer:
        expected = {}
        for number in range(1, 5):
            expected[number] = np.array(tree["w"], copy=True)
            checkpointer.save(number, tree)
            tree = step(tree)
        checkpointer.wait()
        for number in range(4, 0, -1):
            restored, _ = checkpointer._restore(
                number, {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=tree["w"].sharding)}, None
            )
            np.testing.assert_array_equal(restored["w"], expected[number])


def test_memory_stays_flat_over_twenty_saves(tmp_path):
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    tree = {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}  # 4 MiB
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1, keep_best=0)) as checkpointer:
        seen = []
        for step in range(1, 41):
            checkpointer.save(step, tree)
            checkpointer.wait()
            if step % 20 == 0:
                seen.append(resident())
    # The first saves fill the allocator's pools; a leak of one state a save would be 80 MiB over the last twenty, and
    # the allocator alone moves the figure by some 20 MiB in a process that ran other tests.
    assert seen[1] - seen[0] < 10 * tree["w"].nbytes


def test_fingerprint_tells_models_apart():
    base = {"w": jnp.arange(4.0)}
    assert fingerprint(checksums(base)) == fingerprint(checksums({"w": jnp.arange(4.0)}))
    assert fingerprint(checksums(base)) != fingerprint(checksums({"w": jnp.arange(4.0) + 1e-6}))
