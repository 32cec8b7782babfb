"""The examples of docs/selection.md run, and its configurations are methods."""

import re
from pathlib import Path

import yaml

from jaxft.methods import build
from jaxft.methods.selection.scores import SCORES

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "selection.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


def test_the_examples_run(capsys):
    names: dict = {}
    for code in blocks("python"):
        exec(compile(code, "docs/selection.md", "exec"), names)  # noqa: S102
    assert "a budget of 100 is 100 of 32 rows" in capsys.readouterr().out


def test_the_configurations_build():
    for text in blocks("yaml"):
        assert build(yaml.safe_load(text)["method"]).init


def test_every_score_is_described():
    assert set(re.findall(r"^\| `(\w+)` \| [^|]*(?:\\\||w|g|noise)", PAGE, re.M)) >= set(SCORES)
