"""Corpora that are on every machine that can run jaxft: documentation, read from the sources of installed packages.

Files are parsed, never imported, so reading them has no side effects, needs no network, and gives the same rows in
the same order wherever the same versions are installed.

| name | rows | what |
|---|---|---|
| `python-docs` | `{"text"}` | the Python standard library: language topics, modules, classes, functions |
| `api-docs` | `{"prompt", "completion"}` | numpy and jax: a call's signature, and the summary of its documentation |
| `api-docs-text` | `{"text"}` | the same calls with their whole documentation |
"""

import ast
import contextlib
import functools
import gc
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Not documentation of the library: tests, vendored code, applications, generated tables, compiler internals.
_SKIPPED_PARTS = frozenset(
    "test tests testing _bundled site-packages dist-packages idlelib lib2to3 turtledemo pydoc_data encodings "
    "distutils f2py mosaic pallas internal_test_util test_loader test_util test_multiprocess test_warning_util "
    "conftest".split()
)
_MIN_DOC = 40  # characters; a shorter docstring of the standard library repeats the name
_MIN_SUMMARY, _MAX_SUMMARY = 20, 600
_MAX_SIGNATURE = 200


class Entry(NamedTuple):
    """One documented object: its dotted public name, its parameters "(x, axis=None)" or "", and its docstring."""

    name: str
    signature: str
    doc: str
    members: tuple["Entry", ...] = ()


# --- reading sources --------------------------------------------------------------------------------------------------


def _source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted module name and file of every module below `root`, in the order of the names."""
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED_PARTS & set(parts) and all(part.isidentifier() for part in parts):
            found.append((".".join(part for part in parts if part != "__init__"), path))
    return iter(sorted(found))


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file; None if this Python cannot read it (a template, another version's syntax)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in someone else's docstring
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Syntax trees have no cycles, but so many nodes that the collector would take half of the time of reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _clean(doc: str | None) -> str:
    """A docstring without indentation, trailing blanks and control characters."""
    text = inspect.cleandoc(doc or "")
    text = re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> str:
    """ "(x, axis=None, *, keepdims=False)": names and defaults, without annotations and without `self`."""
    arguments = node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if method and not static:
        first = arguments.posonlyargs or arguments.args
        if first and len(arguments.defaults) < len(arguments.posonlyargs) + len(arguments.args):
            first.pop(0)
    text = f"({ast.unparse(arguments)})"
    if len(text) > _MAX_SIGNATURE:
        text = text[: text.rfind(",", 0, _MAX_SIGNATURE - 5)] + ", ...)"
    return text


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body and of its `if`, `try` and `with`: definitions for one platform or version."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _statements(node.body)
            yield from _statements(getattr(node, "orelse", []))
        else:
            yield node


def _entries(body: list[ast.stmt], prefix: str, *, method: bool = False) -> Iterator[Entry]:
    """The documented public functions and classes of a module or class body, in source order."""
    for node in _statements(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _is_public(node.name):
            is_property = any(isinstance(d, ast.Name) and d.id.endswith("property") for d in node.decorator_list)
            signature = "" if is_property else _signature(node, method=method)
            yield Entry(f"{prefix}.{node.name}", signature, _clean(ast.get_docstring(node, clean=False)))
        elif isinstance(node, ast.ClassDef) and _is_public(node.name):
            name = f"{prefix}.{node.name}"
            start = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            signature = _signature(start, method=True) if start else "()"
            members = tuple(_entries(node.body, name, method=True))
            yield Entry(name, signature, _clean(ast.get_docstring(node, clean=False)), members)


def _with_members(entry: Entry) -> Iterator[Entry]:
    yield entry._replace(members=())
    for member in entry.members:
        yield from _with_members(member)


# --- the Python standard library --------------------------------------------------------------------------------------


def _topics(stdlib: Path) -> Iterator[str]:
    """The language reference that `help("topic")` shows."""
    path = stdlib / "pydoc_data" / "topics.py"
    tree = _parse(path) if path.is_file() else None  # some distributions leave it out
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            yield from (_clean(topics[name]) for name in sorted(topics))


def _as_text(entry: Entry) -> str:
    """An object and its members, each as a heading with its docstring."""
    found = [item for item in _with_members(entry) if len(item.doc) >= _MIN_DOC]
    return "\n\n".join(f"{item.name}{item.signature}\n\n{item.doc}" for item in found)


@functools.cache
@_without_collector()
def _python_docs() -> tuple[str, ...]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = list(_topics(stdlib))
    for module, path in _source_files(stdlib):
        tree = _parse(path)
        if tree is None or not module:
            continue
        public = ".".join(part for part in module.split(".") if _is_public(part)) or module.lstrip("_")
        doc = _clean(ast.get_docstring(tree, clean=False))
        if len(doc) >= _MIN_DOC:
            texts.append(f"{public}\n\n{doc}")
        texts.extend(_as_text(entry) for entry in _entries(tree.body, public))
    # The same docstring may stand in several places (decimal and _pydecimal); compare without the heading.
    found: dict[str, str] = {}
    for text in filter(None, texts):
        found.setdefault(text.partition("\n\n")[2] or text, text)
    return tuple(found.values())


def python_docs() -> Iterator[dict[str, str]]:
    """Documentation of the Python standard library: `{"text": ...}`, one object or topic a row, no text twice."""
    return ({"text": text} for text in _python_docs())


# --- numpy and jax ----------------------------------------------------------------------------------------------------


def _package_root(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {name} is not installed, and its documentation is a built-in source")
    return Path(spec.origin).parent


def _imported_from(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The absolute module that a `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _public_name(full: str, importers: dict[str, set[str]]) -> str | None:
    """The shortest name under which users import an object that is defined as `full`; None if there is none.

    `importers`: "defining.module.name" (or "defining.module.*") -> "importing.module.name"s (or "importing.module.*").
    """
    found, seen, open_names = [], {full}, [full]
    while open_names:
        module, _, name = open_names.pop().rpartition(".")
        stars = {star.removesuffix("*") + name for star in importers.get(f"{module}.*", ())}
        for other in (importers.get(f"{module}.{name}", set()) | stars) - seen:
            seen.add(other)
            open_names.append(other)
            found += [other] if all(map(_is_public, other.split("."))) else []
    return min(found, key=lambda other: (other.count("."), other), default=None)


def _package_entries(package: str) -> Iterator[Entry]:
    """The documented objects of a package under the names that users import them by."""
    entries: list[Entry] = []
    importers: dict[str, set[str]] = {}
    for name, path in _source_files(_package_root(package)):
        tree, module = _parse(path), f"{package}.{name}" if name else package
        if tree is None:
            continue
        entries += [*_entries(tree.body, module), *_added_docs(tree)]
        for node in _statements(tree.body):
            if not isinstance(node, ast.ImportFrom):
                continue
            source = _imported_from(node, module, path.name == "__init__.py")
            for alias in node.names:
                importers.setdefault(f"{source}.{alias.name}", set()).add(f"{module}.{alias.asname or alias.name}")
    for entry in entries:
        if not entry.name.startswith(f"{package}."):  # numpy documents names of `typing` too
            continue
        public = _public_name(entry.name, importers) or entry.name
        public = ".".join(part for part in public.split(".") if _is_public(part))
        for item in _with_members(entry):
            yield item._replace(name=public + item.name.removeprefix(entry.name))


def _added_docs(tree: ast.Module) -> Iterator[Entry]:
    """The documentation that numpy gives to what is written in C: `add_newdoc(module, name, doc or (member, doc))`."""
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr) else None
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "add_newdoc"):
            continue
        try:
            module, name, doc = (ast.literal_eval(argument) for argument in call.args[:3])
        except ValueError:  # computed
            continue
        if isinstance(doc, str):
            yield _added_entry(f"{module}.{name}", doc)
        else:
            documented = [doc] if isinstance(doc, tuple) else doc
            members = tuple(
                _added_entry(f"{module}.{name}.{member}", text) for member, text in documented if _is_public(member)
            )
            yield Entry(f"{module}.{name}", "", "", members)


def _added_entry(name: str, doc: str) -> Entry:
    """Such a docstring begins with lines like "copyto(dst, src, casting='same_kind')"."""
    text = _clean(doc)
    head, _, body = text.partition("\n\n")
    match = re.match(rf"(?:\w+\.)*{re.escape(name.rpartition('.')[2])}(\(.*?\))(\s|$)", head)
    while match and re.match(r"[\w.]+\(", body):  # a second form of the call
        body = body.partition("\n\n")[2]
    signature = re.sub(r"\((\$self)?(, )?(/)?(, )?", "(", match[1]) if match else ""
    return Entry(name, signature, body if match else text)


def _summary(doc: str) -> str:
    """The first paragraph of a docstring as one line; "" if it is none."""
    text = re.sub(r"\s+", " ", doc.partition("\n\n")[0]).strip()
    is_prose = not re.match(r"\.\. |>>>|[\w.]+ ?\(|Parameters ---", text)
    return text if is_prose and _MIN_SUMMARY <= len(text) <= _MAX_SUMMARY else ""


@functools.cache
@_without_collector()
def _api_docs() -> tuple[Entry, ...]:
    found: dict[str, Entry] = {}
    for package in ("jax", "numpy"):
        for entry in _package_entries(package):
            summary = _summary(entry.doc)
            if summary:
                found.setdefault(summary, entry)  # numpy and jax share sentences: no text twice
    return tuple(sorted(found.values()))


def api_docs() -> Iterator[dict[str, str]]:
    """numpy and jax: `{"prompt": "numpy.linalg.norm(x, ord=None)", "completion": "Matrix or vector norm."}`."""
    return ({"prompt": f"{e.name}{e.signature}", "completion": _summary(e.doc)} for e in _api_docs())


def api_docs_text() -> Iterator[dict[str, str]]:
    """The objects of `api_docs` with their whole documentation: `{"text": ...}`."""
    return ({"text": f"{e.name}{e.signature}\n\n{e.doc}"} for e in _api_docs())


BUILTIN_SOURCES: dict[str, Callable[[], Iterator[dict[str, str]]]] = {
    "python-docs": python_docs,
    "api-docs": api_docs,
    "api-docs-text": api_docs_text,
}
