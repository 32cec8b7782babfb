"""The registry: one row a method drives the command line, the documentation and the tests."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import pydantic

from jaxft.errors import JaxftError, nearest
from jaxft.methods.base import Method, chain

_REGISTRY: dict[str, "MethodEntry"] = {}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a method: a keyword argument of its factory."""

    name: str
    type: str
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class MethodEntry:
    """What the library knows of a method besides its code.

    Attributes:
        id: name in configs and on the command line.
        title, url: the paper it implements.
        family: selection, reparametrization, modules, objectives, ...
        factory: keyword options -> `Method`.
        learning_rate: a tested starting point for AdamW; None where the caller's is as good as any.
        mergeable: whether the result can be written as plain weights of the base architecture.
        identity: whether the model computes the same before the first step as without the method.
        example: options under which a tiny model (4 layers, width 32) exercises the method, for tests.
    """

    id: str
    title: str
    url: str
    family: str
    factory: Callable[..., Method]
    learning_rate: float | None = None
    mergeable: bool = True
    identity: bool = True
    example: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        doc = inspect.getdoc(self.factory)
        assert doc is not None  # `register` asks for one
        return doc.splitlines()[0]

    @property
    def options(self) -> list[Option]:
        described = _described_arguments(inspect.getdoc(self.factory))
        return [
            Option(name, _type_name(hint), parameter.default, described.get(name, ""))
            for name, (hint, parameter) in _arguments(self.factory).items()
        ]

    def options_model(self) -> type[pydantic.BaseModel]:
        """A pydantic model of the options: unknown keys and wrong types are refused."""
        described = _described_arguments(self.factory.__doc__)
        fields: dict[str, Any] = {
            name: (hint, pydantic.Field(parameter.default, description=described.get(name)))
            for name, (hint, parameter) in _arguments(self.factory).items()
        }
        config = pydantic.ConfigDict(extra="forbid", strict=False)
        return pydantic.create_model(f"{self.id}_options", __config__=config, **fields)

    def build(self, **options: Any) -> Method:
        """The method with these options; a wrong option is an error that names the nearest."""
        known = _arguments(self.factory)
        for name in options:
            if name not in known:
                raise JaxftError(f'method "{self.id}" has no option "{name}": {nearest(name, known)}')
        try:
            checked = self.options_model()(**options)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(x) for x in first["loc"])
            raise JaxftError(f'method "{self.id}", option {where}={first["input"]!r}: {first["msg"]}') from None
        return self.factory(**{name: getattr(checked, name) for name in options})


def _arguments(factory: Callable[..., Method]) -> dict[str, tuple[Any, inspect.Parameter]]:
    hints = typing.get_type_hints(factory)
    return {name: (hints[name], p) for name, p in inspect.signature(factory).parameters.items()}


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(str(a) for a in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in get_args(hint))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _described_arguments(doc: str | None) -> dict[str, str]:
    """Argument descriptions from the `Args:` section of a Google-style docstring."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(doc or ""), re.S | re.M)
    if not section:
        return {}
    found = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", section.group(1), re.S | re.M)
    return {name: " ".join(text.split()) for name, text in found}


def register(
    id: str,
    *,
    title: str,
    url: str,
    family: str,
    learning_rate: float | None = None,
    mergeable: bool = True,
    identity: bool = True,
    example: dict[str, Any] | None = None,
) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Enter a factory of keyword options into the registry. The id is lower case with hyphens and unique."""

    def enter(factory: Callable[..., Method]) -> Callable[..., Method]:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id):
            raise ValueError(f'method id "{id}" is not lower case words joined by hyphens')
        if id in _REGISTRY and _REGISTRY[id].factory.__qualname__ != factory.__qualname__:
            raise ValueError(f'method id "{id}" is taken by {_REGISTRY[id].factory.__module__}')
        missing = [n for n, (_, p) in _arguments(factory).items() if p.default is inspect.Parameter.empty]
        if missing or not factory.__doc__:
            raise ValueError(f'method "{id}": every option needs a default (missing: {missing}), the factory a doc')
        undescribed = set(_arguments(factory)) - set(_described_arguments(factory.__doc__))
        if undescribed:
            raise ValueError(f'method "{id}": options {sorted(undescribed)} are not described under "Args:"')
        _REGISTRY[id] = MethodEntry(id, title, url, family, factory, learning_rate, mergeable, identity, example or {})
        return factory

    return enter


def methods() -> dict[str, MethodEntry]:
    """Every registered method by id, sorted."""
    import jaxft.methods  # noqa: F401  (its modules register themselves on import)

    return dict(sorted(_REGISTRY.items()))


def get_method(id: str) -> MethodEntry:
    """The entry of a method; an unknown id is an error that names the nearest."""
    known = methods()
    if id not in known:
        raise JaxftError(f'unknown method "{id}": {nearest(id, known)}')
    return known[id]


def build(spec: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]) -> Method:
    """A method from its configuration: an id, `{name: id, **options}`, or a list of those, which is a chain."""
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        return chain(*(build(s) for s in spec))
    options = dict(spec)
    if "name" not in options:
        raise JaxftError(f"a method needs a name, got the keys {sorted(options)}")
    return get_method(options.pop("name")).build(**options)
