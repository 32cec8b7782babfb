"""Hugging Face directories out: atomic, read back after writing, loadable by transformers."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxft.errors import JaxftError
from jaxft.hub.load import WEIGHTS, WEIGHTS_INDEX
from jaxft.hub.names import flatten, is_transposed, tensor_names
from jaxft.models.config import DecoderConfig, holding_biases, to_huggingface
from jaxft.models.language_model import LanguageModel
from jaxft.weights import Tree, Weight, layer_slice, materialize

MAX_SHARD_BYTES = 5 * 10**9  # of one safetensors file, as on the hub
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor to write: that at `index` (layer, expert) of `leaf`, or zeros where `leaf` is None. `shape` is that in
    the file."""

    name: str
    leaf: Weight | None
    index: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool


def save_pretrained(
    directory: str | os.PathLike,
    model: LanguageModel,
    params: Tree,
    tokenizer: Any = None,
    dtype: Any = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `params` as a Hugging Face directory: config.json, generation_config.json, safetensors, tokenizer.

    Weight nodes are written as the arrays they mean, cast once to `dtype`, which defaults to the dtype of the params
    (the widest, where they differ). A vocabulary that was resized, a head that was untied and biases that were added
    are described by the written config; projections that get a bias for company get zeros. The directory appears whole
    or not at all. Every process must call this; process 0 writes.

    Raises:
      JaxftError: the directory is not empty and `overwrite` is not set (or set, and it is no model directory); params
        hold modules at sites, which no Hugging Face model has; params do not fit the model; the disk refuses.
    """
    directory = Path(directory).expanduser().absolute()
    leaves = flatten(params)
    config = _exported_config(model.config, leaves)
    dtype = _exported_dtype(leaves, dtype)
    shards = _shards(_tensors(config, leaves), dtype, max_shard_bytes)
    _agree(_refusal(directory, overwrite))

    temporary: Path | None = None
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        except OSError as error:
            failure = error
    try:
        for file, tensors in shards.items():
            arrays = _read(tensors, dtype)  # a collective: on every process
            if temporary is not None and failure is None:
                failure = _attempt(_write_shard, temporary / file, arrays)
        if temporary is not None and failure is None:
            failure = _attempt(_write_rest, temporary, model, config, dtype, shards, tokenizer)
        if temporary is not None and failure is None:
            failure = _attempt(_move, temporary, directory)
        _agree(f"{directory} could not be written: {failure}" if failure else None)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


def to_host(array: jax.Array) -> np.ndarray:
    """A global array in the memory of every process; all processes must call this."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _exported_config(config: DecoderConfig, leaves: dict[str, Weight]) -> DecoderConfig:
    """The config of the model that the params are, which a method may have changed from what was loaded."""
    sites = sorted({path for path in leaves if "sites" in path.split(".")})
    if sites:
        raise JaxftError(
            f"modules at sites have no place in a Hugging Face model: {', '.join(sites[:5])}. "
            "Merge them into the weights first, or export the delta only"
        )
    biased = frozenset(path.removeprefix("layers.").removesuffix(".bias") for path in leaves if path.endswith(".bias"))
    config = holding_biases(config, biased)
    embedding = leaves.get("embed.embedding")
    if embedding is not None:
        config = config.replace(vocab_size=jax.eval_shape(materialize, embedding).shape[0])
    return config.replace(tie_embeddings="head.kernel" not in leaves)


def _exported_dtype(leaves: dict[str, Weight], dtype: Any) -> np.dtype:
    if dtype is None:
        dtype = jnp.result_type(*(jax.eval_shape(materialize, leaf).dtype for leaf in leaves.values()))
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise JaxftError(f"dtype {dtype.name} cannot be exported: expected one of {', '.join(DTYPES)}")
    return dtype


def _tensors(config: DecoderConfig, leaves: dict[str, Weight]) -> list[_Tensor]:
    """Every tensor that a checkpoint of `config` holds, with where its values come from, layer by layer."""
    expected = flatten(LanguageModel(config).abstract())
    unknown = sorted(leaves.keys() - expected.keys())
    missing = sorted(path for path in expected.keys() - leaves.keys() if not path.endswith(".bias"))
    if unknown or missing:
        raise JaxftError(
            f"the params are not those of a {config.model_type} model: unknown {unknown}, missing {missing}"
        )
    tensors = []
    for path, abstract in expected.items():
        leaf = leaves.get(path)
        if leaf is not None and (shape := jax.eval_shape(materialize, leaf).shape) != abstract.shape:
            raise JaxftError(f"{path} has shape {list(shape)}, the model has {list(abstract.shape)} there")
        names, transposed = tensor_names(path, config), is_transposed(path)
        shape = abstract.shape[names.ndim :]
        for index, name in np.ndenumerate(names):
            tensors.append(_Tensor(name, leaf, index, shape[::-1] if transposed else shape, transposed))
    last = config.num_layers
    return sorted(tensors, key=lambda t: ("embed" not in t.name, t.index[0] if t.index else last))


def _shards(tensors: list[_Tensor], dtype: np.dtype, max_bytes: int) -> dict[str, list[_Tensor]]:
    """The tensors of each file: as few files as hold at most `max_bytes` each (or one tensor)."""
    groups: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = int(np.prod(tensor.shape)) * dtype.itemsize
        if groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _read(tensors: list[_Tensor], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The values of tensors by name, cast where they are and then brought to the host, once a layer of a leaf."""
    arrays: dict[str, np.ndarray] = {}
    latest: tuple[Any, np.ndarray] | None = None
    for tensor in tensors:
        if tensor.leaf is None:
            arrays[tensor.name] = np.zeros(tensor.shape, dtype)
            continue
        key = (id(tensor.leaf), tensor.index[:1])
        if latest is None or latest[0] != key:
            leaf = layer_slice(tensor.leaf, tensor.index[0]) if tensor.index else tensor.leaf
            latest = (key, to_host(materialize(leaf).astype(dtype)))
        array = latest[1][tensor.index[1:]]
        arrays[tensor.name] = np.ascontiguousarray(array.T if tensor.transposed else array)
    return arrays


def _write_shard(file: Path, arrays: dict[str, np.ndarray]) -> None:
    save_file(arrays, file, metadata={"format": "pt"})
    with safe_open(file, framework="numpy") as written:  # a disk that lies is found here, not by the next user
        for name, array in arrays.items():
            if written.get_tensor(name).tobytes() != array.tobytes():
                raise OSError(f"{file.name}: {name} reads back different from what was written")


def _write_rest(
    directory: Path,
    model: LanguageModel,
    config: DecoderConfig,
    dtype: np.dtype,
    shards: dict[str, list[_Tensor]],
    tokenizer: Any,
) -> None:
    if len(shards) > 1:
        sizes = (int(np.prod(tensor.shape)) * dtype.itemsize for group in shards.values() for tensor in group)
        weight_map = {tensor.name: file for file, group in shards.items() for tensor in group}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / WEIGHTS_INDEX, index)
    described = to_huggingface(config, dtype.name)
    _write_json(directory / "config.json", described)
    special = {name: described[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = dict(model.generation_config or special)
    _write_json(directory / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))


def _write_json(file: Path, contents: dict[str, Any]) -> None:
    file.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _refusal(directory: Path, overwrite: bool) -> str | None:
    """Why the result may not be put at `directory`, as seen by process 0."""
    if jax.process_index() != 0 or not directory.exists():
        return None
    if not directory.is_dir():
        return f"{directory} is a file: expected a directory to write the model to"
    if not any(directory.iterdir()):
        return None
    if not overwrite:
        return f"{directory} is not empty: choose another directory, or ask to overwrite it"
    if not (directory / "config.json").is_file():
        return f"{directory} holds no config.json, so it is not a model that could be overwritten: it stays as it is"
    return None


def _attempt(write: Callable[..., None], *arguments: Any) -> Exception | None:
    """The error of a write, kept so that all processes can go on to the point where they learn of it."""
    try:
        write(*arguments)
    except (OSError, SafetensorError) as error:
        return error
    return None


def _agree(failure: str | None) -> None:
    """Raise on every process what process 0 found wrong, so that none waits for another that has given up."""
    failed = failure is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if failed:
        raise JaxftError(failure or "process 0 could not write the model: see its message")


def _move(temporary: Path, directory: Path) -> None:
    """Put the finished directory in its place; what was there is removed once the new one is."""
    follow_umask(temporary)
    if directory.exists() and any(directory.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        os.replace(directory, old)
        try:
            os.replace(temporary, directory)
        except OSError:
            os.replace(old, directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, directory)


def follow_umask(directory: Path) -> None:
    """Gives a directory and all in it the permissions of new files: mkdtemp and safetensors make them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
