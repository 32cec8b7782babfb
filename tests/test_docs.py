"""What the documentation shows runs: every block of Python, and every command names a command and options there are."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import jaxft
from jaxft.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
TESTED_ELSEWHERE = ("selection.md", "add-a-method.md")  # test_selection_docs.py, methods/test_documentation.py
FEWER = {"README.md": ("range(20)", "range(2)")}  # steps


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p.name not in TESTED_ELSEWHERE], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": page.stem}
    for code in blocks(page, "python"):
        long, short = FEWER.get(page.name, ("", ""))
        assert long in code
        exec(compile(code.replace(long, short), str(page), "exec"), names)  # noqa: S102
    if page.name == "README.md":
        model, params = jaxft.load_pretrained(tmp_path / "tuned")
        assert model.config.model_type == "llama" and names["state"].step == 2


def test_the_architecture_names_what_there_is():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "jaxft").rglob("*.py")}
    everything = "\n".join(sources.values())
    for name in set(re.findall(r"\b([\w/]+\.py)\b", text)):
        assert any(str(path).endswith(f"/{name}") for path in sources), name
    rooms = re.search(r"^jaxft/\n(.*?)^```", text, re.S | re.M).group(1)
    listed = {line.split()[0].rstrip("/") for line in rooms.splitlines() if line.startswith("  ") and line[2] != " "}
    there = {
        path.name for path in (ROOT / "jaxft").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    unlisted = there - listed - {n for n in there if n in rooms}
    assert unlisted <= {"__init__.py", "__main__.py", "errors.py", "config_docs.py", "selected.py"}, unlisted
    assert listed <= there, listed - there
    walk = text[text.index("## The way of a batch") : text.index("## Rooms")]
    for name in set(re.findall(r"`(?:\w+\.py: )?(?:[A-Z]\w+\.)?([a-zA-Z_]{3,})`", walk)):
        assert re.search(rf"\b(def|class) {name}\b|^ *{name}\b ?[:=]|\"{name}\"", everything, re.M), name


def test_every_command_of_a_page_exists():
    commands = get_command(app).commands
    seen = set()
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            for line in re.findall(r"(?:^|[|;&] *|\$ )jaxft (.*)", block, re.M):
                for part in re.split(r"\| jaxft ", line.split(" #")[0]):
                    name, *arguments = shlex.split(part.replace("'...'", "x"))
                    if name.startswith("-"):
                        continue
                    assert name in commands, f"{page.name}: jaxft {line}"
                    options = {o for p in commands[name].params for o in (*p.opts, *p.secondary_opts)} | {"--debug"}
                    for argument in arguments:
                        assert not argument.startswith("-") or argument in options, f"{page.name}: jaxft {line}"
                    seen.add(name)
    assert {"train", "data", "compare", "export", "generate", "eval", "methods", "plan"} <= seen
