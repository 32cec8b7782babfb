"""Checkpoints on Orbax: asynchronous, atomic, verified, independent of the mesh.

A checkpoint holds two items: `arrays`, a flat dict of the leaves that cannot be rebuilt, and `record`, a JSON
document that lists every leaf of the state (path, shape, dtype, checksum, stored or not) beside the step, the
position in the data and whatever the caller adds. From the record alone a reader knows what is inside; from the
checksums it knows that it is intact.

A leaf is left out when it has the checksum that `rebuildable` gives for its path: the caller can make it again, bit
by bit, from the base model and the seed (a frozen base under LoRA). So a LoRA checkpoint weighs what LoRA trains,
while a method that moves trained values into the frozen part (HFT rounds, LISA) has exactly the leaves that changed
stored, without declaring it. On restore the leaves left out come from the caller's own tree and must have the
recorded checksum.

The checksum is computed on the device, in integers, so it is the same on every mesh and costs one read of the memory.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, PyTree, Shaped
from orbax.checkpoint import checkpoint_managers
from pydantic import BaseModel, ConfigDict, Field

from jaxft.distributed import ProcessError, barrier, from_first, gather, in_step
from jaxft.errors import JaxftError
from jaxft.weights.memory import fetch, in_host_memory

FORMAT = 1
logger = logging.getLogger(__name__)
# Orbax warns at every save between evaluations that it has no metric to rank it by; those checkpoints are not ranked.
# Its threads print the errors of a failed save, page after page, that `check` and `wait` raise as one sentence.
# And it warns that a directory opened for reading is read only.
_KNOWN = re.compile("tracked_metric|read_only=True|is read only=")
logging.getLogger("absl").addFilter(
    lambda record: (
        not _KNOWN.search(record.getMessage()) and not (record.exc_info and "/orbax/checkpoint/" in record.pathname)
    )
)
logging.getLogger("asyncio").addFilter(lambda record: "/orbax/checkpoint/" not in record.getMessage())


class CheckpointError(JaxftError):
    """A checkpoint cannot be written, read or trusted. The message names the path and the reason."""


class CheckpointConfig(BaseModel):
    """Section `checkpoint` of a run's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: str | None = Field(
        None, description="Where checkpoints go; null: `checkpoints` inside the output directory."
    )
    every: int | None = Field(500, ge=1, description="Save every so many steps; null: not by steps.")
    minutes: float | None = Field(None, gt=0, description="Save when so many minutes have passed since the last save.")
    keep_last: int = Field(2, ge=1, description="How many of the latest checkpoints to keep.")
    keep_best: int = Field(1, ge=0, description="How many of the best checkpoints to keep besides; 0: none.")
    metric: str | None = Field(
        None,
        description="What `best` means, such as `held_out.loss`; null: the mean loss of the sets of kind target.",
    )
    mode: Literal["min", "max"] = Field("min", description="Whether a smaller or a larger metric is better.")


class Restored(NamedTuple):
    """A state read from a checkpoint.

    Attributes:
      step: optimizer steps done when it was saved.
      tree: the state, in the structure, dtypes and shardings of the `target` it was restored into.
      record: what the caller gave as `record` when saving (JSON values).
      warnings: one sentence for every later checkpoint that was refused.
    """

    step: int
    tree: PyTree
    record: dict[str, Any]
    warnings: tuple[str, ...]


# Names and checksums of leaves


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by path: `{"trainable.layers.attn.q.kernel.a": array, ...}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise CheckpointError("two leaves of the state have the same path; rename one of the nested keys")
    return named


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """The generator of an abstract typed key, which `jax.random.key_impl` gives for traced and real keys only."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return found[0]


def _bits(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`x` as uint32 of the same bits, 64-bit values as pairs."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _bits(jnp.stack([x.real, x.imag], axis=-1))
    width = jax.dtypes.itemsize_bits(x.dtype)
    if width < 8:  # int4 and narrower floats: their values are exact in float32
        return _bits(x.astype(jnp.float32))
    target = {8: jnp.uint8, 16: jnp.uint16}.get(width, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, target).astype(jnp.uint32)


@jax.jit
def _checksum(x: Shaped[Array, "..."]) -> tuple[Array, Array]:
    # Every element is hashed with its position (the murmur3 finaliser) and the hashes are added modulo 2^32: integer
    # addition is associative, so neither the sharding nor the order of the reduction changes the result.
    bits = _bits(x)
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = bits ^ (index * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    weighted = mixed * (index * jnp.uint32(0x85EBCA77) | jnp.uint32(1))
    return jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(weighted, dtype=jnp.uint32)


def checksums(tree: PyTree) -> dict[str, str]:
    """A 64-bit checksum of the bits of every array of `tree`, by path, as 16 hex digits.

    Equal for equal values on any mesh and process count. Detects corruption and another base model; it is not
    cryptographic.
    """
    leaves = named_leaves(tree)
    sums = {}
    for name, x in leaves.items():
        if x.size:
            sums[name] = _checksum(jax.random.key_data(x) if _is_key(x) else fetch(x))
            # Programs in flight together may run in another order on another process (CPU), and what is fetched from
            # host memory should be on the device one at a time.
            if jax.process_count() > 1 or in_host_memory(x):
                jax.block_until_ready(sums[name])
    values = jax.device_get(sums)
    return {name: f"{int(values[name][0]):08x}{int(values[name][1]):08x}" if name in values else "" for name in leaves}


def fingerprint(sums: Mapping[str, str]) -> str:
    """One short hash (16 hex digits) of the checksums of a whole tree, such as the base model's."""
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()[:16]


def rebuildable(frozen: PyTree, base_sums: Mapping[str, str], trained_bytes: int) -> dict[str, str]:
    """Which leaves of a freshly made frozen part need not be stored, as path -> checksum.

    Those that are, bit for bit, leaves of the base model; and integer leaves that outweigh all that trains (the codes
    of a quantised base), which are elementwise functions of it. Floats that a method computed (the residual of an
    SVD), drawn indices and drawn masks are stored: another machine or version may not make them again exactly.

    Args:
      frozen: the frozen part as a method's `init` returned it, before any step.
      base_sums: `checksums` of the base model's params.
      trained_bytes: size in bytes of the trainable part.
    """
    known = set(base_sums.values())
    sums = checksums(frozen)
    kept = {}
    for name, leaf in named_leaves(frozen).items():
        large_codes = jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.nbytes > trained_bytes
        if sums[name] and (sums[name] in known or large_codes):
            kept[name] = sums[name]
    return kept


# Saving and restoring


def _seal(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "No space left on device" in text or "quota exceeded" in text:
        return "the disk is full"
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _abstract_plain(leaf: Any) -> jax.ShapeDtypeStruct:
    """What Orbax restores for `leaf`: its shape, dtype and *target* sharding; typed keys as their uint32 data."""
    sharding = getattr(leaf, "sharding", None)
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def differences(
    expected: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], limit: int = 10
) -> str:
    """The paths, shapes and dtypes in which two described trees differ, at most `limit` of them; empty when none."""
    lines = []
    for name in sorted({*expected, *found}):
        want, have = expected.get(name), found.get(name)
        if want is None:
            lines.append(f"{name}: in the checkpoint only")
        elif have is None:
            lines.append(f"{name}: missing in the checkpoint")
        else:
            for field in ("shape", "dtype"):
                if want[field] != have[field]:
                    lines.append(f"{name}: {field} {have[field]} in the checkpoint, {want[field]} in this run")
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more


class Checkpointer:
    """Saves and restores the state of one run in `directory`.

    Orbax writes into a temporary directory and renames it when every process is done, so that a kill at any moment
    leaves either the whole checkpoint or none. Use as a context manager: leaving it waits for the save in flight.

    With `read_only` nothing in the directory is changed, so that the checkpoints of a run can be read while it trains.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig | None = None, *, read_only: bool = False):
        self._read_only = read_only
        config = config or CheckpointConfig()
        self.directory = str(directory) if "://" in str(directory) else str(Path(directory).absolute())
        self._best = config.keep_best > 0
        latest = checkpoint_managers.LatestN(n=config.keep_last)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["value"],
            reverse=config.mode == "min",  # BestN keeps the last of the sorted list
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        keep = checkpoint_managers.AnyPreservationPolicy([latest, best]) if self._best else latest
        self._worst = math.inf if config.mode == "min" else -math.inf
        count = jax.process_count()
        if not read_only:
            self._make_directory()
        # Naming the processes makes Orbax meet through JAX's coordination service, with a time limit; by default it
        # meets in collectives on the devices, which wait for ever for a process that is lost or a step behind.
        together = ocp.options.MultiprocessingOptions(active_processes=set(range(count)) if count > 1 else None)
        self._handlers = {
            "arrays": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, multiprocessing_options=together),
            "record": ocp.JsonCheckpointHandler(multiprocessing_options=together),
        }
        try:
            self.manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    multiprocessing_options=together,
                    preservation_policy=None if read_only else keep,
                    best_fn=(lambda metrics: metrics["value"])
                    if self._best
                    else None,  # without it metrics are not written
                    best_mode=config.mode,
                    save_decision_policy=None if read_only else checkpoint_managers.FixedIntervalPolicy(1),
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    enable_async_checkpointing=True,
                ),
                item_names=("arrays", "record"),
                item_handlers=self._handlers,
            )
        except OSError as error:
            raise CheckpointError(f"checkpoint directory {self.directory} cannot be used: {_reason(error)}") from error
        self._last_saved: int | None = None
        self.last_time = time.monotonic()

    def _make_directory(self) -> None:
        """Makes the directory, without what a killed run left unfinished, and checks that every process sees it.

        Raises:
          CheckpointError: it cannot be made.
          ProcessError: it is on a disk that not all processes share.
        """
        mark = None

        def make() -> None:
            nonlocal mark
            if jax.process_index():
                return
            try:
                path = epath.Path(self.directory)
                path.mkdir(parents=True, exist_ok=True)
                for unfinished in path.glob("*.orbax-checkpoint-tmp*"):  # Orbax does so too, but some time later
                    _remove(unfinished)
                if jax.process_count() > 1:
                    mark = path / f".shared-{os.getpid()}-{time.time_ns()}"
                    mark.touch()
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint directory {self.directory} cannot be used: {_reason(error)}"
                ) from error

        in_step("the checkpoint directory", make)
        if jax.process_count() == 1:
            return
        name = from_first("the mark in the checkpoint directory", mark.name if mark else "")
        found = epath.Path(self.directory) / name
        deadline = time.monotonic() + 10  # a network file system may show it late
        while not (seen := found.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = [index for index, saw in enumerate(gather("who sees the mark", seen)) if not saw]
        if mark is not None:
            mark.unlink(missing_ok=True)
        if blind:
            raise ProcessError(
                f"checkpoint directory {self.directory} of process 0 is not seen by process "
                f"{', '.join(map(str, blind[:20]))} of {jax.process_count()}: set checkpoint.directory (or output) to "
                "one that all machines share, such as a network file system or gs://bucket/path"
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception) and jax.process_count() > 1:
            pass  # the others may be gone or elsewhere, and closing would wait for them
        else:  # the error that is on its way matters more than one of the save
            try:
                self.close()
            except CheckpointError as failed:
                logger.warning("%s", failed)

    def path(self, step: int) -> str:
        """Directory of the checkpoint of `step`."""
        return f"{self.directory}/{step}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending. They are complete, not yet verified."""
        return from_first("steps of checkpoints", sorted(self.manager.all_steps()))

    def best_step(self) -> int | None:
        """Step of the best complete checkpoint, None when none was saved with a metric."""
        return self.manager.best_step() if self._best else None

    def save(
        self,
        step: int,
        tree: PyTree,
        record: Mapping[str, Any] | None = None,
        rebuildable: Mapping[str, str] | None = None,
        metric: float | None = None,
    ) -> int:
        """Copies `tree` to the host and starts writing it; the next step may donate its buffers at once.

        Args:
          step: optimizer steps done.
          tree: arrays (any pytree). In a run of several processes: global arrays, and every process calls.
          record: JSON values kept beside the arrays, returned by `restore`.
          rebuildable: path -> checksum of leaves that need not be stored while they have this checksum.
          metric: the value by which the best checkpoints are kept.

        Returns:
          The number of bytes of the leaves stored; 0 if this step is saved already.

        Raises:
          CheckpointError: this save could not start, or the one before failed.
        """
        if step == self._last_saved:
            return 0
        leaves, sums = named_leaves(tree), checksums(tree)
        left_out = rebuildable or {}
        described = {}
        stored = {}
        for name, leaf in leaves.items():
            # Orbax refuses arrays without elements; their description says all there is to them.
            keep = leaf.size > 0 and left_out.get(name) != sums[name]
            described[name] = {**_describe(leaf), "checksum": sums[name], "stored": keep}
            if keep:
                stored[name] = _plain(leaf)
        document = {"format": FORMAT, "step": step, "leaves": described, "record": dict(record or {})}
        document["seal"] = _seal(document)
        value = self._worst if metric is None or math.isnan(metric) else float(metric)
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(stored), record=ocp.args.JsonSave(document)),
                metrics={"value": value} if self._best and metric is not None else None,
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error
        self._last_saved = step
        self.last_time = time.monotonic()
        return sum(x.nbytes for x in stored.values())

    def restore(self, target: PyTree, base: str | None = None, *, step: int | None = None) -> Restored | None:
        """The latest checkpoint that is whole, intact and of this tree, or that of `step` if it is.

        Args:
          target: the state to restore into, as `jax.ShapeDtypeStruct`s with the shardings wanted now (the ones in the
            file are never used); leaves that were not stored must be arrays. Nothing is allocated for the others
            before.
          base: what this run calls its base model, for the message when leaves left out do not match.
          step: only this one will do.

        Returns:
          None when there is no checkpoint at all.

        Raises:
          CheckpointError: there are checkpoints and none can be used; the message gives the reason for each.
        """
        refused: list[tuple[int, str]] = []
        for found in reversed(self.steps()) if step is None else [step]:
            try:
                tree, record = self._restore(found, target, base)
            except (CheckpointError, ProcessError) as error:
                refused.append((found, str(error)))
                continue
            warnings = tuple(f"{reason}; resuming from step {found} instead" for _, reason in refused)
            if not self._read_only:
                for bad, _ in refused:
                    self._set_aside(bad)
            self._last_saved = found
            return Restored(found, tree, record, warnings)
        if refused and step is not None:
            raise CheckpointError(refused[0][1])
        if refused:
            reasons = "\n  ".join(reason for _, reason in refused)
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be resumed:\n  {reasons}\n"
                "Use another output directory, or remove these checkpoints to start from the beginning."
            )
        return None

    def record(self, step: int) -> dict[str, Any]:
        """The verified document of the checkpoint of `step`: `leaves` (shape, dtype, checksum, stored) and `record`.

        Raises:
          CheckpointError: it is missing, truncated, altered or of another program or format.
        """
        refusal = f"checkpoint {self.path(step)} is refused: "
        try:
            # By the handler itself: the manager would meet the other processes, which may have failed to read.
            document = self._handlers["record"].restore(epath.Path(self.path(step)) / "record")
        except Exception as error:
            raise CheckpointError(f"{refusal}its record cannot be read ({_reason(error)})") from error
        if not isinstance(document, dict) or "seal" not in document:
            raise CheckpointError(f"{refusal}it was not written by jaxft")
        if document.get("format") != FORMAT:
            raise CheckpointError(f"{refusal}it has format {document.get('format')}, this version reads {FORMAT}")
        if document.pop("seal") != _seal(document):
            raise CheckpointError(f"{refusal}its record was altered after it was written (checksum differs)")
        if document["step"] != step:
            raise CheckpointError(f"{refusal}it holds step {document['step']}; its directory was renamed or copied")
        return document

    def _restore(self, step: int, target: PyTree, base: str | None) -> tuple[PyTree, dict[str, Any]]:
        refusal = f"checkpoint {self.path(step)} is refused: "
        document = in_step(f"record of checkpoint {step}", lambda: self.record(step))
        wanted, found = named_leaves(target), document["leaves"]
        differing = differences({name: _describe(leaf) for name, leaf in wanted.items()}, found)
        if differing:
            raise CheckpointError(f"{refusal}its tree is not this run's: {differing}")
        self._require_rebuilt(refusal, wanted, document, base)
        stored = [name for name, leaf in found.items() if leaf["stored"]]
        abstract = {name: _abstract_plain(wanted[name]) for name in stored}
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)

        def read() -> dict[str, Any]:
            try:
                return self._handlers["arrays"].restore(
                    epath.Path(self.path(step)) / "arrays",
                    args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args),
                )
            except Exception as error:
                raise CheckpointError(f"{refusal}its arrays are truncated or damaged ({_reason(error)})") from error

        arrays = in_step(f"arrays of checkpoint {step}", read)
        damaged = [name for name, value in checksums(arrays).items() if value != found[name]["checksum"]]
        if damaged:
            raise CheckpointError(
                f"{refusal}{len(damaged)} arrays do not have the checksum they were saved with: {damaged[:10]}"
            )
        values = []
        for name, leaf in wanted.items():
            if name not in arrays:
                concrete = isinstance(leaf, jax.Array | np.ndarray)
                value = leaf if concrete else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            elif _is_key(leaf):
                value = jax.random.wrap_key_data(arrays[name], impl=_key_impl(leaf))
            else:
                value = arrays[name]
            values.append(value)
        return jax.tree.unflatten(jax.tree.structure(target), values), document["record"]

    def _require_rebuilt(
        self, refusal: str, wanted: Mapping[str, Any], document: Mapping[str, Any], base: str | None
    ) -> None:
        found = document["leaves"]
        left_out = {name: wanted[name] for name, leaf in found.items() if not leaf["stored"] and leaf["checksum"]}
        abstract = [name for name, leaf in left_out.items() if not isinstance(leaf, jax.Array | np.ndarray)]
        if abstract:
            raise CheckpointError(
                f"{refusal}it refers to the base model for {len(abstract)} leaves ({abstract[:3]}); load it first"
            )
        sums = {name: _one_checksum(leaf) for name, leaf in left_out.items()}
        other = [name for name in left_out if sums[name] != found[name]["checksum"]]
        if other:
            saved_base = document["record"].get("base", "unknown")
            raise CheckpointError(
                f"{refusal}it was trained from the base model {saved_base}, this run has {base or 'unknown'}: "
                f"{len(other)} frozen leaves differ, such as {other[:3]}"
            )

    def _set_aside(self, step: int) -> None:
        """Moves a refused checkpoint out of the way of the one that will be written at its step."""
        if "://" in self.directory:
            self.manager.delete(step)
            return
        if jax.process_index() == 0:
            source = Path(self.path(step))
            aside = Path(self.directory).with_name(Path(self.directory).name + "-refused")
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            source.rename(aside / str(step))
        barrier(f"checkpoint {step} set aside")
        self.manager.reload()

    def _failed(self, error: BaseException) -> CheckpointError:
        kept = [step for step in _complete_steps(self.directory) if step != self._last_saved]
        left = f"the last good checkpoint is {self.path(max(kept))}" if kept else "there is no earlier checkpoint"
        return CheckpointError(
            f"saving a checkpoint to {self.directory} failed: {_reason(error)}; {left}. "
            "Make room or repair the disk; the same command then goes on from there"
        )

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed. Call it every step; it does not wait."""
        try:
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until the save in flight is complete on disk. Raises CheckpointError if it failed."""
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits for the save in flight and releases the threads."""
        try:
            self.wait()
        finally:
            self.manager.close()


def _one_checksum(leaf: Any) -> str:
    return checksums({"leaf": leaf})["leaf"]


def _remove(folder: epath.Path, attempts: int = 50) -> None:
    """Removes a folder into which a save that failed, or a process that is about to end, may still write."""
    for left in reversed(range(attempts)):
        try:
            return folder.rmtree(missing_ok=True)
        except OSError:
            if not left:
                raise
            time.sleep(0.1)


def _complete_steps(directory: str) -> list[int]:
    if "://" in directory or not Path(directory).is_dir():
        return []
    return sorted(int(entry.name) for entry in Path(directory).iterdir() if entry.name.isdigit())


def stored_bytes(tree: PyTree, left_out: Iterable[str] = ()) -> int:
    """Bytes that a checkpoint of `tree` (arrays or abstract ones) takes before compression, without the paths in
    `left_out`."""
    skip = set(left_out)
    plain = (_abstract_plain(leaf) for name, leaf in named_leaves(tree).items() if name not in skip)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plain)
