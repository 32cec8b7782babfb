"""The corpora that are read from installed packages."""

import hashlib
import subprocess
import sys

import pytest

from jaxft.data import builtin
from jaxft.data.builtin import BUILTIN_SOURCES


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {name: list(source()) for name, source in BUILTIN_SOURCES.items()}


def test_sizes_and_columns(rows):
    assert sum(len(row["text"]) for row in rows["python-docs"]) > 1_500_000
    assert len(rows["python-docs"]) > 1_500
    assert len(rows["api-docs"]) > 2_000
    assert {tuple(row) for row in rows["python-docs"]} == {("text",)}
    assert {tuple(row) for row in rows["api-docs"]} == {("prompt", "completion")}
    assert len(rows["api-docs-text"]) == len(rows["api-docs"])


def test_no_text_twice_and_none_empty(rows):
    for name, column in (("python-docs", "text"), ("api-docs", "completion"), ("api-docs-text", "text")):
        texts = [row[column] for row in rows[name]]
        assert len(set(texts)) == len(texts), name
        assert all(text.strip() for text in texts), name


def test_known_rows(rows):
    api = {row["prompt"].partition("(")[0]: row for row in rows["api-docs"]}
    assert api["numpy.linalg.norm"]["completion"] == "Matrix or vector norm."
    assert api["numpy.linalg.norm"]["prompt"] == "numpy.linalg.norm(x, ord=None, axis=None, keepdims=False)"
    assert "jax.lax.scan" in api
    assert "numpy.ndarray.itemsize" in api  # written in C, documented through add_newdoc
    texts = [row["text"] for row in rows["python-docs"]]
    assert any(text.startswith("shutil.copyfile(src, dst, *, follow_symlinks=True)\n\nCopy data") for text in texts)
    assert any('The "if" statement is used for conditional execution' in text for text in texts)


def test_nothing_of_tests_or_private_names(rows):
    for row in rows["api-docs"]:
        name = row["prompt"].partition("(")[0]
        assert not any(part.startswith("_") or part in ("tests", "testing") for part in name.split(".")), name


def test_reading_imports_nothing(rows):
    """The same rows in another process, which does not import what it reads about."""
    code = (
        "import sys, hashlib; from jaxft.data.builtin import BUILTIN_SOURCES; before = set(sys.modules);"
        "digest = hashlib.sha256(repr([list(f()) for f in BUILTIN_SOURCES.values()]).encode()).hexdigest();"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(digest, sorted(new & {'jax', 'tkinter', 'antigravity', 'pydoc_data'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    expected = hashlib.sha256(repr([rows[name] for name in BUILTIN_SOURCES]).encode()).hexdigest()
    assert done.stdout.split(maxsplit=1) == [expected, "[]\n"]


def test_entries_of_a_module(tmp_path, monkeypatch):
    package = tmp_path / "demo"
    (package / "_src").mkdir(parents=True)
    (package / "tests").mkdir()
    (package / "__init__.py").write_text("from demo._src.core import area as surface\nfrom ._src.stars import *\n")
    (package / "_src" / "core.py").write_text(
        "try:\n    import fast\nexcept ImportError:\n    fast = None\n"
        'def area(x: "Array", /, *sides: int, scale: float = 2.0) -> float:\n    """Area of a shape.\n\n    More."""\n'
        'class _Hidden:\n    """Nobody should see this class."""\n'
        'def _hidden():\n    """Nobody should see this function."""\n'
    )
    (package / "_src" / "stars.py").write_text(
        'class Shape:\n    """A shape in the plane."""\n'
        '    def __init__(self, sides=3):\n        """Not a member."""\n'
        '    def grow(self, by=1):\n        """Make the shape larger."""\n'
        '    @staticmethod\n    def unit(sides):\n        """The shape of area one."""\n'
        '    @property\n    def area(self):\n        """Its area in the plane."""\n'
    )
    (package / "tests" / "test_core.py").write_text('def area():\n    """A test is no documentation."""\n')
    (package / "_src" / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = {entry.name + entry.signature: entry.doc for entry in builtin._package_entries("demo")}
    assert found == {
        "demo.surface(x, /, *sides, scale=2.0)": "Area of a shape.\n\nMore.",
        "demo.Shape(sides=3)": "A shape in the plane.",
        "demo.Shape.grow(by=1)": "Make the shape larger.",
        "demo.Shape.unit(sides)": "The shape of area one.",
        "demo.Shape.area": "Its area in the plane.",
    }


def test_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        list(builtin._package_entries("no_such_package"))
