"""The directory of a run: what is in it, when it may be used again, and the lock that keeps a second run out.

config.yaml      the resolved configuration
versions.json    library, Python and device versions of every start of the run
metrics.jsonl    one record per logged step and per evaluation
tensorboard/     the same for TensorBoard
checkpoints/     see `jaxft.checkpoint`
baseline.json    the evaluation of the base model, before the first step
report.json, report.md   written when the run is finished
selection.json, selection.png   what a selecting method trains, at the start and (where it draws again) at the end
run.lock         held while a process trains here
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
import yaml

from jaxft.distributed import from_first, in_step
from jaxft.errors import JaxftError

# What may change between the start of a run and its resumption: none of it changes the numbers of the run.
FREE_SECTIONS = ("output", "logging", "checkpoint", "mesh")
FREE_KEYS = ("training.profile", "training.offload")
OURS = (
    "config.yaml",
    "versions.json",
    "metrics.jsonl",
    "baseline.json",
    "report.json",
    "report.md",
    "run.lock",
    "selection.json",
    "selection.png",
    "tensorboard",
    "profile",
    "checkpoints",
    "checkpoints-refused",
    "wandb",
)


class OutputError(JaxftError):
    """The output directory cannot be used: the message says which, why, and what to do."""


def reason(error: OSError) -> str:
    """Why the system refused to write, in words."""
    return {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "writing there is not permitted",
        errno.EPERM: "writing there is not permitted",
        errno.ENOTDIR: "a part of this path is a file",
        errno.EEXIST: "it is a file",
    }.get(error.errno or 0, error.strerror or str(error))


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path` through a temporary file and a rename: a reader sees the old file or the new one,
    whole. Raises OutputError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"{path} cannot be written: {reason(error)}") from error
        raise


def json_text(document: Any, indent: int | None = 2) -> str:
    """JSON by the letter: numbers that it cannot write (a loss that is not finite) become text, "nan" or "inf"."""

    def spelled(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: spelled(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [spelled(one) for one in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(spelled(document), indent=indent, allow_nan=False)


def json_value(text: str) -> Any:
    """What `json_text` wrote, with every number a number again."""

    def read(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: read(one) for key, one in value.items()}
        if isinstance(value, list):
            return [read(one) for one in value]
        return float(value) if value in ("nan", "inf", "-inf") else value

    return read(json.loads(text))


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on."""
    names = (
        "jaxft",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "transformers",
        "tokenizers",
        "datasets",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    found["device"] = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    return found


def flat_config(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key; a list of mappings counts as one, by position."""
    if isinstance(tree, Mapping) and tree:
        return {k: v for key, value in tree.items() for k, v in flat_config(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list) and any(isinstance(x, Mapping) for x in tree):
        return {k: v for i, value in enumerate(tree) for k, v in flat_config(value, f"{prefix}{i}.").items()}
    return {prefix[:-1]: tree}


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flat_config({key: value for key, value in config.items() if key not in FREE_SECTIONS})
    return {k: v for k, v in flat.items() if not any(k == free or k.startswith(free + ".") for free in FREE_KEYS)}


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """A hash (16 hex digits) of the part of a resolved configuration on which the numbers of a run depend."""
    return hashlib.sha256(json.dumps(_fixed(config), sort_keys=True, default=str).encode()).hexdigest()[:16]


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per key whose value differs in a way that makes it another run."""
    before, after = _fixed(old), _fixed(new)
    missing = "(absent)"
    return [
        f"{key}: {before.get(key, missing)!r} there, {after.get(key, missing)!r} now"
        for key in sorted({*before, *after})
        if before.get(key, missing) != after.get(key, missing)
    ]


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.2f} {name}"


class RunDirectory:
    """The output directory of one run, locked for this process until `close` (or until the process dies, however it
    does).

    Args:
      path: the directory; made if it does not exist.
      config: the resolved configuration as plain values.
      overwrite: remove what an earlier run left here.

    Raises:
      OutputError: it is not writable or full, holds another run or something else, or another process trains in it.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, overwrite: bool = False):
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._writes = jax.process_index() == 0
        plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
        in_step("the output directory", lambda: self._take(plain, overwrite))

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, config: dict[str, Any], overwrite: bool) -> None:
        if not self._writes:
            return
        try:
            self._make()
            self._acquire()
            self._claim(config, overwrite)
        except OutputError:
            self.close()
            raise

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Written and read back, not only opened: a full disk shows when blocks are allocated.
            probe = self.path / ".probe"
            with open(probe, "wb") as file:
                file.write(os.urandom(1 << 16))
                file.flush()
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                (self.path / ".probe").unlink()
            raise OutputError(
                f'output directory "{self.path}" cannot be written: {reason(error)}. Set `output` to another directory.'
            ) from error

    def _acquire(self) -> None:
        self._lock = open(self.path / "run.lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise OutputError(
                f'another run is training in "{self.path}" (process {owner}). '
                "Wait for it, or set `output` to another directory."
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} on {platform.node()}")
        self._lock.flush()

    def _claim(self, config: dict[str, Any], overwrite: bool) -> None:
        stored = self.path / "config.yaml"
        present = [entry.name for entry in self.path.iterdir() if entry.name != "run.lock"]
        if overwrite and stored.is_file():
            for name in OURS[:-1]:
                entry = self.path / name
                if name != "run.lock" and entry.exists():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        elif stored.is_file():
            differing = config_differences(yaml.safe_load(stored.read_text()) or {}, config)
            if differing and not self._began():  # a start that failed on a mistake holds nothing worth keeping
                (self.path / "baseline.json").unlink(missing_ok=True)
            elif differing:
                listed = "\n  ".join(differing[:20])
                raise OutputError(
                    f'output directory "{self.path}" holds a run with another configuration:\n  {listed}\n'
                    "Set `output` to another directory, or pass overwrite to replace that run."
                )
        elif any(not name.startswith(".") for name in present):
            raise OutputError(
                f'output directory "{self.path}" is not empty and holds no run '
                f"(found {', '.join(sorted(present)[:5])}). "
                "Set `output` to a new or empty directory."
            )
        write_atomically(stored, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        starts = self._read("versions.json") or []
        if not starts or starts[-1] != versions():
            self.write("versions.json", [*starts, versions()])

    def _began(self) -> bool:
        """Whether a step was ever logged or a checkpoint written here."""
        metrics, checkpoints = self.path / "metrics.jsonl", self.path / "checkpoints"
        logged = metrics.is_file() and metrics.stat().st_size > 0
        return logged or (checkpoints.is_dir() and any(checkpoints.iterdir()))

    def require_space(self, directory: str, checkpoint_bytes: int, kept: int) -> str | None:
        """Checks that checkpoints will fit in `directory`. Returns a warning when one fits but not all that are to be
        kept.

        Raises:
          OutputError: not even one checkpoint of `checkpoint_bytes` fits on the disk.
        """
        if "://" in directory or not self._writes:
            return None
        free = shutil.disk_usage(directory).free
        if free < checkpoint_bytes:
            raise OutputError(
                f'the disk of "{directory}" has {_size(free)} free and one checkpoint takes {_size(checkpoint_bytes)}. '
                "Free some space, or set `output` or `checkpoint.directory` to another disk."
            )
        if free < checkpoint_bytes * (kept + 1):
            return (
                f"{_size(free)} are free for {kept} checkpoints of {_size(checkpoint_bytes)} each "
                "and one being written; lower checkpoint.keep_last or checkpoint.keep_best"
            )
        return None

    def read(self, name: str) -> Any:
        """The JSON document `name` of the directory, None when there is none. With several processes: what the first
        one finds, in all of them, which must all ask."""
        return from_first(name, self._read(name) if self._writes else None)

    def _read(self, name: str) -> Any:
        path = self.path / name
        return json_value(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, document: Any) -> None:
        """Writes a JSON document (or text, by its suffix) atomically; in a run of several processes the first one
        does."""
        if self._writes:
            text = document if name.endswith(".md") else json_text(document) + "\n"
            write_atomically(self.path / name, text)

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
