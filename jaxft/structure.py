"""The structure of a tree of arrays and weight nodes as a JSON document, so that a file says what its arrays make up.

With it a tuned model is put together again without running its method, which may have looked at data or trained for
hours to choose what trains.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import JaxftError
from jaxft.partition import Tuned
from jaxft.weights import Node, Tree

LEAF = "array"


def describe(tree: Tree) -> Any:
    """The structure of a tree as JSON: dicts, lists, tuples, weight nodes with their static fields, None, arrays.

    None (for the whole) where the tree holds a container of another kind.
    """
    try:
        return _describe(tree)
    except TypeError:
        return None


def _describe(x: Any) -> Any:
    if x is None:
        return None
    if isinstance(x, dict):
        if not all(isinstance(key, str) for key in x):
            raise TypeError
        return {"dict": {key: _describe(value) for key, value in x.items()}}
    if type(x) in (list, tuple):
        return {type(x).__name__: [_describe(value) for value in x]}
    if isinstance(x, Node):
        fields = dataclasses.fields(x)  # type: ignore[arg-type]
        static = {f.name: getattr(x, f.name) for f in fields if f.metadata.get("static")}
        if not all(_is_plain(value) for value in static.values()):
            raise TypeError
        arrays = {f.name: _describe(getattr(x, f.name)) for f in fields if f.name not in static}
        return {"node": type(x).__name__, "arrays": arrays, "static": static}
    if not jax.tree_util.all_leaves([x]):
        raise TypeError
    return LEAF


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or _is_plain_tuple(value)


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(map(_is_plain, value))


def rebuild(document: Any) -> Tree:
    """The tree that `describe` described, with the path of each leaf (as checkpoints name it) in its place.

    Raises:
        JaxftError: the document is none of `describe`, or names a weight node that is not registered.
    """
    tree = _rebuild(document)
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path), tree)


def _rebuild(document: Any) -> Any:
    match document:
        case None:
            return None
        case "array":
            return 0
        case {"dict": entries}:
            return {key: _rebuild(value) for key, value in entries.items()}
        case {"list": entries}:
            return [_rebuild(value) for value in entries]
        case {"tuple": entries}:
            return tuple(_rebuild(value) for value in entries)
        case {"node": name, "arrays": arrays, "static": static}:
            known = {cls.__name__: cls for cls in _node_classes(Node)}
            if name not in known:
                raise JaxftError(f"this file holds a weight node {name}: import the module that defines it first")
            fields = {field.name for field in dataclasses.fields(known[name])}
            # What a node had once, and what held nothing, is left out.
            values = {key: _rebuild(value) for key, value in arrays.items() if key in fields or value is not None}
            if unknown := values.keys() - fields:
                raise JaxftError(
                    f"this file holds a {name} with {min(unknown)}, which it had in another version of jaxft"
                )
            return known[name](**values, **{key: _frozen(value) for key, value in static.items()})
    raise JaxftError(f"cannot read the structure of this file: {str(document)[:80]}")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _node_classes(root: type) -> list[type]:
    children: list[type] = root.__subclasses__()
    return [cls for child in children for cls in (child, *_node_classes(child))]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


# --- cuts in checkpoints and deltas -----------------------------------------------------------------------------------


def tuned_in(document: Mapping[str, Any]) -> Tuned | None:
    """The cut that the document of a checkpoint describes, its arrays abstract; None where it says nothing of it."""
    structure = document["record"].get("structure")
    return None if structure is None else abstract_cut(structure, document["leaves"])


def left_out_of(document: Mapping[str, Any]) -> dict[str, str]:
    """Path -> checksum of the leaves that the document of a checkpoint leaves to the base model."""
    return {name: x["checksum"] for name, x in document["leaves"].items() if x["checksum"] and not x["stored"]}


def abstract_cut(structure: Any, leaves: Mapping[str, Mapping[str, Any]]) -> Tuned:
    """The cut whose structure `cut_structure` made, with the shapes and dtypes that `leaves` gives by path."""

    def one(name: str) -> jax.ShapeDtypeStruct:
        kind = leaves[name]["dtype"]
        dtype = jax.eval_shape(jax.random.key, 0).dtype if kind.startswith("key<") else jnp.dtype(kind)
        return jax.ShapeDtypeStruct(tuple(leaves[name]["shape"]), dtype)

    halves = jax.tree.map(one, rebuild(structure))
    return Tuned(halves["state"]["trainable"], halves["frozen"], halves["state"]["method_state"])


def cut_structure(tuned: Tuned) -> Any:
    """The structure of a cut for a record, with paths as in a checkpoint; None where it cannot be described."""
    return describe({"state": {"trainable": tuned.trainable, "method_state": tuned.state}, "frozen": tuned.frozen})


def take_from_base(frozen: Tree, left_out: Mapping[str, str], base: Tree, base_sums: Mapping[str, str]) -> Tree:
    """An abstract frozen half whose leaves that were left out are those of the base model with the same checksum.

    Args:
        frozen: abstract arrays with shardings.
        left_out: path (`frozen.` before it) -> checksum.
        base: parameters of the base model.
        base_sums: checksums of the base by path, and `"PATH cast"` for those of its arrays in the dtype of `frozen`.

    Returns:
        None where the base has no array of such a checksum (it is another base, or a method computed it).
    """
    origin, taken = {value: name for name, value in base_sums.items()}, set[str]()
    arrays, made = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(base)}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        if (wanted := left_out.get(f"frozen.{_name(path)}")) is None:
            made.append(leaf)
            continue
        if wanted not in origin:
            return None
        source = origin[wanted].removesuffix(" cast")
        array = jax.device_put(arrays[source].reshape(leaf.shape).astype(leaf.dtype), leaf.sharding)
        made.append(jnp.copy(array) if source in taken else array)  # no buffer twice: an update may give it away
        taken.add(source)
    return jax.tree.unflatten(jax.tree.structure(frozen), made)
