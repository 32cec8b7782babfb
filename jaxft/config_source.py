"""A configuration as the user wrote it: a YAML tree that remembers the line of every key, overrides on top, and
the translation of what pydantic finds wrong into sentences that name the line, the key, the value and what is allowed.

YAML is read by the rules of YAML 1.2 where PyYAML's 1.1 surprises: `on`, `off`, `yes`, `no` are text (`on` is a key
of `lora`), `1e-3` is a number, and a key written twice is an error.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from jaxft.errors import JaxftError, nearest

KeyPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong: where it was written ("run.yaml:12"), which key, and what to do about it."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(JaxftError):
    """Everything that is wrong with one configuration, all at once. `problems` holds the list."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        if len(self.problems) == 1:
            text = str(self.problems[0])
        else:
            text = f"{len(self.problems)} errors in the configuration:\n" + "\n".join(f"  {p}" for p in self.problems)
        super().__init__(text)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tree of plain values, and for every key path that was written, where (`"run.yaml:12"`)."""

    tree: dict[str, Any]
    places: Mapping[KeyPath, str]
    name: str

    def where(self, path: KeyPath) -> str:
        """The place of `path`, else of the first key written inside it, else of the nearest enclosing one."""
        if path and path not in self.places:
            for written, place in self.places.items():
                if written[: len(path)] == path:
                    return place
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.name


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core rules for booleans, integers and floats."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


# PyYAML's own constructor would read 010 as octal; YAML 1.2 reads it as ten.
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def parse_value(text: str) -> Any:
    """The value of one override, by the same YAML rules as the file.

    What starts with a character that YAML reserves (`*.jsonl`) is text.

    >>> parse_value("1e-3"), parse_value("[1, 2]"), parse_value("on"), parse_value(""), parse_value("*.txt")
    (0.001, [1, 2], 'on', None, '*.txt')
    """
    if text[:1] in tuple("*&!%@`|>"):
        return text
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read_yaml(path: str | Path) -> Source:
    """Read one YAML file. Raises ConfigError, with the line, if it cannot be read or is not a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        parent = path.parent if path.parent.is_dir() else Path(".")
        near = sorted(str(p) for p in parent.glob("*.yaml"))
        hint = nearest(str(path), near) if near else f"there is no .yaml file in {parent.resolve()}"
        raise ConfigError([Problem(str(path), "", f"no such configuration file; {hint}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(path), "", f"cannot be read as UTF-8 text: {error}")]) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Source:
    """Parse YAML text; `name` is what the places call it. Raises ConfigError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Source({}, {}, name)
        if not isinstance(node, yaml.MappingNode):
            found = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise ConfigError([Problem(f"{name}:1", "", f"the file must be a mapping of keys, it is {found}")])
        places: dict[KeyPath, str] = {}
        tree = _construct(loader, node, (), name, places)
        return Source(tree, places, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError([Problem(f"{name}{line}", "", f"not valid YAML: {what}")]) from None
    except RecursionError:
        raise ConfigError([Problem(name, "", "nested too deep, or an alias that holds itself")]) from None
    finally:
        loader.dispose()


def _construct(loader: _Loader, node: yaml.Node, path: KeyPath, name: str, places: dict[KeyPath, str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        written: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError([Problem(f"{name}:{line}", _dotted(path), "a key must be plain text")])
            if key_node.value in written and key_node.value != "<<":
                dotted = _dotted((*path, key_node.value))
                first = written[key_node.value]
                raise ConfigError(
                    [Problem(f"{name}:{line}", dotted, f"written twice, first on line {first}; keep one")]
                )
            written[key_node.value] = line
        loader.flatten_mapping(node)  # resolves `<<: *anchor`
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = (*path, key_node.value)
            places[here] = f"{name}:{key_node.start_mark.line + 1}"
            result[key_node.value] = _construct(loader, value_node, here, name, places)
        return result
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, item in enumerate(node.value):
            places[(*path, i)] = f"{name}:{item.start_mark.line + 1}"
            items.append(_construct(loader, item, (*path, i), name, places))
        return items
    return loader.construct_object(node, deep=True)


def override(source: Source, assignments: Iterable[str], bare: str | None = None) -> Source:
    """`source` with every `key.sub=value` applied in order; the inputs are not changed.

    Values are YAML (`a=[1, 2]`, `a={b: 1}`, `a=null`) and may contain `=`. A list element is named by its index
    (`data.sources.0.weight=2`; the index one past the end appends; in a list of one it may be left out). Missing
    mappings on the way are made, so that a wrong key is found by the schema with the same message as in a file. Where
    the top-level key `bare` holds a bare name, setting a key inside makes it `{name: ...}` first. Raises ConfigError
    for what cannot be applied.
    """
    tree = _copy(source.tree)
    places = dict(source.places)
    problems = []
    for assignment in assignments:
        place = f"override '{assignment}'"
        key, separator, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            problems.append(Problem(place, "", "an override is written key.sub=value"))
            continue
        try:
            value = parse_value(text)
        except yaml.YAMLError as error:
            problems.append(Problem(place, key, f"the value is not valid YAML: {getattr(error, 'problem', error)}"))
            continue
        try:
            if bare is not None and parts[0] == bare and len(parts) > 1:
                tree[bare] = _named(tree.get(bare))
            path = _assign(tree, parts, value)
        except JaxftError as error:
            problems.append(Problem(place, key, str(error)))
            continue
        for written in [p for p in places if p[: len(path)] == path]:
            del places[written]
        places[path] = place
    if problems:
        raise ConfigError(problems)
    return Source(tree, places, source.name)


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(item) for item in value]
    return {"name": value} if isinstance(value, str) else value


def _assign(tree: dict[str, Any], parts: list[str], value: Any) -> KeyPath:
    at: Any = tree
    path: list[str | int] = []
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(at, list) and len(at) == 1 and not part.isdecimal():
            path.append(0)
            at = at[0]
        if isinstance(at, list):
            if not part.isdecimal() or int(part) > len(at):
                raise JaxftError(
                    f"{_dotted(tuple(path))} is a list of {len(at)}; name an element by its index, 0 to {len(at)}"
                    f" ({len(at)} appends), not {part!r}"
                )
            step: str | int = int(part)
            if step == len(at):
                at.append({})
        elif isinstance(at, dict):
            step = part
            if at.get(step) is None:
                at[step] = {}
        else:
            raise JaxftError(f"{_dotted(tuple(path))} is {at!r}, not a mapping: {part!r} cannot be set inside it")
        path.append(step)
        if last:
            at[step] = value
        else:
            at = at[step]
    return tuple(path)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _copy(v) for k, v in tree.items()}
    return [_copy(v) for v in tree] if isinstance(tree, list) else tree


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def problems_of(
    error: ValidationError,
    schema: type[BaseModel],
    source: Source,
    models: Mapping[KeyPath, type[BaseModel]] | None = None,
) -> list[Problem]:
    """What pydantic found, one Problem a key, in the order of the file.

    `models` names the schema of key paths whose type is only known at run time (a method's options).
    """
    by_key: dict[KeyPath, list[str]] = {}
    for item in error.errors():
        path = _path_in(source.tree, item["loc"], item["type"] == "missing")
        message = _message(item, path, schema, models or {})
        if message not in by_key.setdefault(path, []):
            by_key[path].append(message)
    return [Problem(source.where(path), _dotted(path), " or: ".join(m)) for path, m in by_key.items()]


def _path_in(tree: Any, loc: Sequence[str | int], missing: bool) -> KeyPath:
    """The part of a pydantic location that the user wrote: pydantic also puts the names of union members in it."""
    path: list[str | int] = []
    at = tree
    for i, part in enumerate(loc):
        if isinstance(at, dict) and part in at:
            at = at[part]
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        elif not (missing and i == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


_EXPECTED = {
    "int_type": "an integer", "int_parsing": "an integer", "int_from_float": "an integer",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "text", "path_type": "a path",
    "list_type": "a list", "tuple_type": "a list", "set_type": "a list",
    "dict_type": "a mapping of keys", "none_required": "null",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("greater than", "gt"), "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"), "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}  # fmt: skip


def _message(item: Any, path: KeyPath, schema: type[BaseModel], models: Mapping[KeyPath, type[BaseModel]]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        valid = sorted(keys_at(schema, path[:-1], models))
        return f"unknown key (its value is {_shown(value)}); {nearest(str(path[-1]), valid)}"
    if kind == "missing":
        field = field_at(schema, path, models)
        about = f": {field.description}" if field and field.description else ""
        return f"required, but not given{about}"
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        expected = context.get("expected") or context.get("expected_tags", "")
        choices = re.findall(r"'([^']*)'", expected)
        if kind == "union_tag_invalid":
            value = context.get("tag", value)
        hint = nearest(str(value), choices) if choices else f"valid: {expected}"
        return f"{_shown(value)} is not allowed; {hint}"
    if kind == "model_type" or kind == "model_attributes_type":
        return f"expected a mapping of the keys {', '.join(sorted(keys_at(schema, path, models)))}, got {_shown(value)}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {_shown(value)}"
    if kind in ("too_short", "string_too_short"):
        return f"must not be empty, got {_shown(value)}"
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"must be {word} {context[name]}, got {_shown(value)}"
    text = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind in ("value_error", "assertion_error"):
        return text
    return f"{text}, got {_shown(value)}"


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else "null" if value is None else str(value)
    if isinstance(value, bool):
        text = text.lower()
    kind = {str: "text", bool: "true/false", int: "an integer", float: "a number", list: "a list", dict: "a mapping"}
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"{text} ({kind[type(value)]})" if type(value) in kind else text


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that a type annotation may hold, through Optional, Union, Annotated, list and dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in models_in(argument)]


def field_at(
    schema: type[BaseModel], path: KeyPath, models: Mapping[KeyPath, type[BaseModel]] | None = None
) -> FieldInfo | None:
    """The schema's field at a key path, if there is one."""
    for model in _models_at(schema, path[:-1], models or {}):
        if path and path[-1] in model.model_fields:
            return model.model_fields[str(path[-1])]
    return None


def keys_at(
    schema: type[BaseModel], path: KeyPath, models: Mapping[KeyPath, type[BaseModel]] | None = None
) -> set[str]:
    """The keys the schema allows inside `path`."""
    return {key for model in _models_at(schema, path, models or {}) for key in model.model_fields}


def _models_at(
    schema: type[BaseModel], path: KeyPath, models: Mapping[KeyPath, type[BaseModel]]
) -> list[type[BaseModel]]:
    for end in range(len(path), 0, -1):
        if path[:end] in models:
            schema, path = models[path[:end]], path[end:]
            break
    # A state is the annotation we stand in: a model consumes a field name, a container consumes a key or an index.
    states: list[Any] = [schema]
    for part in path:
        states = [inner for state in states for inner in _step(state, part)]
    return [model for state in states for model in _direct_models(state)]


def _unwrapped(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _unwrapped(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for argument in typing.get_args(annotation) for inner in _unwrapped(argument)]
    return [annotation]


def _direct_models(annotation: Any) -> list[type[BaseModel]]:
    return [a for a in _unwrapped(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]


def _step(annotation: Any, part: str | int) -> list[Any]:
    found = []
    for a in _unwrapped(annotation):
        arguments = typing.get_args(a)
        if isinstance(a, type) and issubclass(a, BaseModel):
            if part in a.model_fields:
                found.append(a.model_fields[str(part)].annotation)
        elif arguments and isinstance(part, int):
            found.append(arguments[0])
        elif len(arguments) == 2:
            found.append(arguments[1])
    return found
