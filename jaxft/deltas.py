"""Sparse deltas: what a run changed, as indices and values in a small file; added, subtracted, put on another base.

```python
delta = difference(tuned_params, base_params)
save(delta, "task.npz")
params = apply(base_params, add(load("task.npz"), load("language.npz")))
```
"""

import json
import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.errors import JaxftError, nearest
from jaxft.partition import map_weights, shape_of, weights_by_path
from jaxft.weights import Tree, materialize

FORMAT = "jaxft-sparse-delta-1"


class Entries(NamedTuple):
    """The change of one weight of `shape`: `values` at flat row-major `indices`, ascending, without repeats."""

    shape: tuple[int, ...]
    indices: Int[np.ndarray, " k"]
    values: Float[np.ndarray, " k"]


Delta = dict[str, Entries]
"""Changes by path. A path that is not there did not change."""


def difference(after: Tree, before: Tree) -> Delta:
    """What changed between two parameter trees of the same shapes: int64 positions and float32 differences.

    Nodes are materialised. `apply(before, difference(after, before))` is `after` to the rounding of one float32 sum.

    Raises:
        JaxftError: the trees have different paths or shapes.
    """
    old, new = (weights_by_path(materialize(tree)) for tree in (before, after))
    if old.keys() != new.keys():
        path = min(old.keys() ^ new.keys())
        raise JaxftError(f'"{path}" is in one of the two models only: {nearest(path, old if path in new else new)}')
    found: Delta = {}
    for path, w in new.items():
        if w.shape != old[path].shape:
            raise JaxftError(f'"{path}" has shape {w.shape} in one model and {old[path].shape} in the other')
        change = np.asarray(w, np.float32).reshape(-1) - np.asarray(old[path], np.float32).reshape(-1)
        indices = np.flatnonzero(change)
        if indices.size:
            found[path] = Entries(tuple(w.shape), indices, change[indices])
    return found


def scale(delta: Delta, factor: float) -> Delta:
    """Every change multiplied by `factor`; -1 makes what subtracts it."""
    return {path: e._replace(values=e.values * np.float32(factor)) for path, e in delta.items()}


def add(*deltas: Delta) -> Delta:
    """The sum of several deltas, such as that of a task and that of a language. The order makes no difference.

    Raises:
        JaxftError: two deltas are of models of different shapes.
    """
    total: Delta = {}
    for path in sorted({path for delta in deltas for path in delta}):
        parts = [delta[path] for delta in deltas if path in delta]
        shapes = {e.shape for e in parts}
        if len(shapes) > 1:
            raise JaxftError(f'cannot add deltas of "{path}" of shapes {", ".join(map(str, sorted(shapes)))}')
        indices, where = np.unique(np.concatenate([e.indices for e in parts]), return_inverse=True)
        values = np.zeros(indices.size, np.float64)
        np.add.at(values, where, np.concatenate([e.values for e in parts]).astype(np.float64))
        total[path] = Entries(parts[0].shape, indices, values.astype(np.float32))
    return total


def subtract(delta: Delta, other: Delta) -> Delta:
    """`delta - other`; entries that cancel stay, with value zero."""
    return add(delta, scale(other, -1))


def apply(params: Tree, delta: Delta) -> Tree:
    """Plain parameters with the changes added, in the dtype of each weight. The base may be another of the same shapes.

    Raises:
        JaxftError: the model has no weight at a path, or one of another shape.
    """
    weights = weights_by_path(params)
    for path, e in delta.items():
        if path not in weights:
            raise JaxftError(f'the delta changes "{path}", which this model does not have: {nearest(path, weights)}')
        if shape_of(weights[path]) != e.shape:
            raise JaxftError(f'the delta changes "{path}" of shape {e.shape}, here it is {shape_of(weights[path])}')

    def one(path: str, w: object) -> object:
        if path not in delta:
            return w
        e = delta[path]
        return _changed(materialize(w), np.unravel_index(e.indices, e.shape), e.values)

    return map_weights(one, params)


@jax.jit
def _changed(
    dense: Float[Array, "..."], where: tuple[Int[Array, " n"], ...], values: Float[Array, " n"]
) -> Float[Array, "..."]:
    # Summed in float32 and rounded once, so that small changes of bfloat16 weights are not lost before they count.
    return dense.at[where].set((dense[where].astype(jnp.float32) + values).astype(dense.dtype))


def size(delta: Delta) -> int:
    """How many entries a delta changes."""
    return sum(e.indices.size for e in delta.values())


def overlap(delta: Delta, other: Delta) -> float:
    """The part of the smaller delta's entries that the other changes too: 0 for disjoint ones, 1 for one inside."""
    common = sum(np.intersect1d(delta[p].indices, other[p].indices).size for p in delta.keys() & other.keys())
    return common / max(min(size(delta), size(other)), 1)


def save(delta: Delta, path: str | Path, *, note: Mapping[str, str] | None = None, overwrite: bool = False) -> int:
    """Write a delta to a compressed `.npz` file, atomically. Positions are stored as gaps. Returns the bytes written.

    Args:
        delta: what to write.
        path: the file.
        note: anything worth remembering: base model, task, method.
        overwrite: whether a file that is there is replaced.

    Raises:
        JaxftError: the file exists.
    """
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise JaxftError(f"{path} exists: choose another name, or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"format": FORMAT, "note": dict(note or {}), "shapes": {p: list(e.shape) for p, e in delta.items()}}
    arrays = {"record": np.frombuffer(json.dumps(record).encode(), np.uint8)}
    for name, e in delta.items():
        gaps = np.diff(e.indices, prepend=0)
        arrays[f"{name}/gaps"] = gaps.astype(np.uint32 if gaps.max(initial=0) < 2**32 else np.uint64)
        arrays[f"{name}/values"] = e.values.astype(np.float32)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".npz", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # mypy takes an array for allow_pickle
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path.stat().st_size


def load(path: str | Path) -> Delta:
    """Read a delta that `save` wrote.

    Raises:
        JaxftError: there is no such file, it is no delta, or its contents do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        record = json.loads(arrays.pop("record").tobytes())
        if record["format"] != FORMAT:
            raise JaxftError(f'{path} is of format "{record["format"]}", expected "{FORMAT}"')
        delta: Delta = {}
        for name, shape in record["shapes"].items():
            indices = np.cumsum(arrays[f"{name}/gaps"], dtype=np.int64)
            delta[name] = Entries(tuple(shape), indices, arrays[f"{name}/values"])
    except FileNotFoundError:
        raise JaxftError(f"there is no file {path}") from None
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
        if isinstance(error, JaxftError):
            raise
        raise JaxftError(f"{path} is not a sparse delta written by jaxft: {error}") from None
    for name, e in delta.items():
        inside = e.indices.size == 0 or (e.indices[0] >= 0 and e.indices[-1] < math.prod(e.shape))
        if e.indices.size != e.values.size or not inside or (np.diff(e.indices) <= 0).any():
            raise JaxftError(f'{path} is damaged: the positions of "{name}" do not fit its shape {e.shape}')
    return delta
