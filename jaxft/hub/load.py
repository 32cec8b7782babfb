"""Hugging Face safetensors in: every process reads only the slices that its devices hold."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from jaxft.errors import JaxftError
from jaxft.hub.names import EMBED, HEAD, dotted, is_transposed, tensor_names
from jaxft.models.config import from_huggingface
from jaxft.models.language_model import LanguageModel
from jaxft.models.presets import preset
from jaxft.weights import Tree

EMBEDDED = ("nano", "nano-moe")  # in the package, under jaxft/assets; nano-moe is nano with four copies of its MLPs
PRESET = "preset:"  # in front of the name of a well-known shape, which has no weights
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Recomputed from the config; of a model of text and images, what is not its language model.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.")
_WRAPPED = re.compile(r"^(model\.)?language_model\.")  # in front of the names of the language model in such a model
_MODEL_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_SHOWN = 12


def resolve(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """The directory of a model: an embedded one ("nano"; a local one of that name is "./nano"), a local one, or a
    snapshot of a hub id.

    A hub id is downloaded, or taken from the local cache when the hub cannot be reached. Raises JaxftError with what
    was tried when there is none of these.
    """
    name = str(path_or_id)
    if name.startswith(PRESET):
        raise JaxftError(f'model "{name}" is a shape without weights, for `jaxft plan`: name a directory or a hub id')
    local = Path(name).expanduser()
    if name in EMBEDDED:
        nano = Path(str(resources.files("jaxft") / "assets" / "nano"))
        if name == "nano":
            return nano
        from jaxft.hub.upcycle import upcycle

        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return upcycle(nano, cache / "jaxft" / f"nano-moe-{_digest(nano / WEIGHTS)}")
    if local.is_dir():
        return local
    if local.exists():
        raise JaxftError(f"{name} is a file: expected a directory with config.json and safetensors, or a hub id")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(("./", "../")):
        raise JaxftError(
            f'model "{name}": there is no such directory, and it is not a hub id ("owner/name") '
            f"nor an embedded model ({', '.join(EMBEDDED)})"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [p for p in _MODEL_FILES if weights or p != "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise JaxftError(
            f'model "{name}" is not a directory here, is not in the local Hugging Face cache, '
            "and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise JaxftError(f'model "{name}" could not be fetched from the Hugging Face hub: {reason}') from error


def read_json(file: Path) -> dict[str, Any]:
    """The contents of a JSON file, or JaxftError naming it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise JaxftError(f"{file}: there is no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise JaxftError(f"{file}: not valid JSON ({error})") from error


def load_model(path_or_id: str | Path) -> LanguageModel:
    """The model that a directory or hub id describes, without its weights; `preset:NAME` is a well-known shape."""
    if str(path_or_id).startswith(PRESET):
        return LanguageModel(preset(str(path_or_id).removeprefix(PRESET)))
    directory = resolve(path_or_id, weights=False)
    contents = read_json(directory / "config.json")
    if not isinstance(contents, dict):
        raise JaxftError(f"{directory / 'config.json'}: expected an object with the keys of a model's configuration")
    try:
        config = from_huggingface(contents)
    except (TypeError, ValueError, AttributeError) as error:  # JaxftErrors, and values of another type than the key's
        raise JaxftError(f"{directory / 'config.json'}: {error}") from error
    generation = None
    if (directory / "generation_config.json").is_file():
        generation = read_json(directory / "generation_config.json")
    return LanguageModel(config, generation)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


@contextlib.contextmanager
def open_tensors(directory: Path) -> Iterator["_Tensors"]:
    """The tensors of a checkpoint, to be read while entered."""
    with contextlib.ExitStack() as stack:
        yield _Tensors(directory, stack)


class _Tensors:
    """The tensors of a checkpoint by name, over its files, which are opened when first needed. Those of the language
    model in a model of text and images have the names they have where it stands alone."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory, self._stack = directory, stack
        self._open: dict[str, Any] = {}
        if (directory / WEIGHTS_INDEX).is_file():
            self._file_of = dict(read_json(directory / WEIGHTS_INDEX)["weight_map"])
            self._check_index()
        elif (directory / WEIGHTS).is_file():
            self._file_of = dict.fromkeys(self._handle(WEIGHTS).keys(), WEIGHTS)
        else:
            other = sorted(file.name for file in directory.glob("*.bin"))
            hint = f" ({', '.join(other[:3])} is in PyTorch's format: convert it to safetensors)" if other else ""
            raise JaxftError(f"{directory}: there is neither {WEIGHTS} nor {WEIGHTS_INDEX}{hint}")
        self._stored = {_WRAPPED.sub(r"\1", name): name for name in self._file_of}

    def _check_index(self) -> None:
        """The index may name files or tensors which are not there, and files may hold tensors it does not name."""
        for file in sorted(set(self._file_of.values())):
            held, promised = set(self._handle(file).keys()), {n for n, f in self._file_of.items() if f == file}
            if lost := promised - held:
                raise JaxftError(f"{self.directory / file} lacks tensors named in {WEIGHTS_INDEX}: {_listed(lost)}")
            self._file_of.update(dict.fromkeys(held - promised, file))

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(self.directory / file, framework="numpy"))
            except FileNotFoundError as error:
                raise JaxftError(f"{self.directory / file}: named in {WEIGHTS_INDEX}, but not there") from error
            except (SafetensorError, OSError) as error:
                raise JaxftError(f"{self.directory / file}: not a readable safetensors file ({error})") from error
        return self._open[file]

    def names(self) -> set[str]:
        return set(self._stored)

    def slice(self, name: str) -> "_Slice":
        name = self._stored[name]
        file = self._file_of[name]
        return _Slice(self.directory / file, name, tuple(self._handle(file).get_slice(name).get_shape()))


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A tensor of a file, which is mapped into memory only while a part of it is read: what of a map has been touched
    counts as memory of the process, and a column touches all of a matrix."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def __getitem__(self, cut: Any) -> np.ndarray:
        with safe_open(self.file, framework="numpy") as file:
            return file.get_slice(self.name)[cut]


def load_pretrained(
    path_or_id: str | Path, *, dtype: Any = jnp.float32, sharding: Tree | Sharding | None = None
) -> tuple[LanguageModel, Tree]:
    """A model and its params from a Hugging Face directory (safetensors, one file or several) or hub id.

    Args:
      path_or_id: a directory with `config.json` and safetensors, a hub id "owner/name", or an embedded model ("nano").
      dtype: the dtype of the params (float32, as `model.param_dtype` of a config), or None for that of the file.
      sharding: a tree of shardings like the params, one sharding for all, or None for the default device. Each process
        reads only what its devices hold.

    Raises:
      JaxftError: the model type is not supported; a tensor is missing, unexpected (all are listed) or of a shape other
        than the config says; `lm_head` differs from the embedding it is tied to; a file cannot be read.
    """
    directory = resolve(path_or_id)
    model = load_model(directory)
    abstract = model.abstract(jnp.float32 if dtype is None else dtype)
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    if sharding is None or isinstance(sharding, Sharding):
        default = sharding or SingleDeviceSharding(jnp.zeros(()).devices().pop())
        shardings = [default] * len(flat)
    else:
        shardings = treedef.flatten_up_to(sharding)
    with open_tensors(directory) as tensors:
        sources = {dotted(path): tensor_names(dotted(path), model.config) for path, _ in flat}
        _check_names(tensors, {name for names in sources.values() for name in names.flat}, directory)
        leaves = []
        for (path, expected), placed in zip(flat, shardings, strict=True):
            path = dotted(path)
            slices = np.empty(sources[path].shape, object)
            for at, name in np.ndenumerate(sources[path]):
                slices[at] = tensors.slice(name)
            _check_shapes(path, sources[path], slices, expected.shape, directory)
            read = _reader(slices, expected.shape, is_transposed(path), None if dtype is None else expected.dtype)
            leaves.append(jax.make_array_from_callback(expected.shape, placed, read))
    return model, treedef.unflatten(leaves)


def _reader(
    slices: np.ndarray, shape: tuple[int, ...], transposed: bool, dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """The callback which reads one shard of a leaf, whose stack `slices` holds. Devices that hold the same shard share
    one read."""
    latest: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*cut.indices(size)) for cut, size in zip(index, shape, strict=True)]
        key = tuple((r.start, r.stop) for r in ranges)
        if key not in latest:
            latest.clear()
            kept = dtype or slices.flat[0][0:1].dtype
            latest[key] = fill(np.empty([len(r) for r in ranges], kept), slices, ranges)
        return latest[key]

    def fill(out: np.ndarray, tensors: Any, ranges: list[range]) -> np.ndarray:
        """In place: beside what is kept there is one tensor at a time."""
        if isinstance(tensors, np.ndarray) and tensors.ndim:
            for part, i in zip(out, ranges[0], strict=True):
                fill(part, tensors[i], ranges[1:])
        else:
            tensor = tensors[()] if isinstance(tensors, np.ndarray) else tensors
            array = tensor[tuple(slice(r.start, r.stop) for r in (reversed(ranges) if transposed else ranges))]
            out[...] = array.T if transposed else array
        return out

    return read


def _check_names(tensors: _Tensors, expected: set[str], directory: Path) -> None:
    present = {name for name in tensors.names() if not _IGNORED.search(name)}
    missing, unexpected = expected - present, present - expected
    if HEAD in unexpected and EMBED in present:
        if not _equal(tensors.slice(EMBED), tensors.slice(HEAD)):
            raise JaxftError(
                f"{directory}: config.json ties the head to the embedding (tie_word_embeddings), but {HEAD} differs "
                f'from {EMBED}: set "tie_word_embeddings": false in config.json to use both'
            )
        unexpected -= {HEAD}
    problems = [
        f"{kind} {_listed(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if problems:
        raise JaxftError(f"{directory}: the tensors are not those of the model in config.json: {'; '.join(problems)}")


def _equal(a: Any, b: Any) -> bool:
    """Whether two tensors are the same, compared in pieces so that neither is held whole."""
    if list(a.get_shape()) != list(b.get_shape()):
        return False
    rows, step = a.get_shape()[0], 4096
    pieces = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    return all(np.array_equal(a[piece], b[piece]) for piece in pieces)


def _check_shapes(path: str, names: np.ndarray, slices: np.ndarray, shape: tuple[int, ...], directory: Path) -> None:
    one = shape[names.ndim :]
    one = one[::-1] if is_transposed(path) else one
    for name, tensor in zip(names.flat, slices.flat, strict=True):
        if tuple(tensor.get_shape()) != one:
            raise JaxftError(
                f"{directory}: {name} has shape {list(tensor.get_shape())}, config.json makes it {list(one)}"
            )


def _listed(names: set[str]) -> str:
    shown = sorted(names, key=_natural)
    rest = f" ... ({len(shown)} in all)" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + rest


def _natural(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
