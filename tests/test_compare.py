import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.compare import finished_report, markdown_table, plan, split_values, what_happened
from jaxft.config_source import ConfigError
from jaxft.methods import get_method
from jaxft.picture import draw
from tests.environment import environment
from tests.training.tiny import write_tiny

ONE_DEVICE = environment(1)  # in the processes that a comparison starts: eight would share the cores of one
RUN = """\
model: {path: model}
method: {name: lora, rank: 2}
data: {sources: [{path: train.jsonl}], seq_len: 32, batch_size: 8}
evaluation:
  sets:
    held_out: {path: held_out.jsonl, kind: target}
    other: {path: other.jsonl, kind: retained}
training: {steps: 3, learning_rate: {name: cosine, peak: 1e-2}}
logging: {every: 1, tensorboard: false}
compare: {overrides: {bitfit: {training.learning_rate.peak: 0.5, training.clip_norm: 2.0}}}
output: out
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = write_tiny(tmp_path_factory.mktemp("tiny"))
    (directory / "run.yaml").write_text(RUN)
    return directory


@pytest.fixture
def home(tiny, tmp_path, monkeypatch):
    """A copy in which nothing has run, to work in."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(directory: Path, output: str = "out") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxft", "compare", "run.yaml", "method=hft,lora", f"output={output}"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, env=ONE_DEVICE, timeout=500)


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    """A copy in which a comparison has run, and what it said."""
    directory = tmp_path_factory.mktemp("compared")
    shutil.copytree(tiny, directory, dirs_exist_ok=True)
    return directory, compare(directory)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("full,hft", ["full", "hft"]),
        ("1", ["1"]),
        ("{name: lora, rank: 4},hft", ["{name: lora, rank: 4}", "hft"]),
        ("[{name: lora, rank: 4}, hft],full", ["[{name: lora, rank: 4}, hft]", "full"]),
        ("'a,b',c", ["'a,b'", "c"]),
    ],
)
def test_values_are_split_outside_of_brackets_and_quotes(text, parts):
    assert split_values(text) == parts


def test_a_plan_has_a_checked_run_for_every_combination(home):
    variants = plan("run.yaml", ["method=full,hft", "training.steps=1,2", "seed=3", "output=elsewhere"])
    assert [v.name for v in variants] == ["full_steps-1", "full_steps-2", "hft_steps-1", "hft_steps-2"]
    assert [v.config.training.steps for v in variants] == [1, 2, 1, 2]
    assert all(v.config.seed == 3 and v.config.output == f"elsewhere/{v.name}" for v in variants)
    assert len({v.config.evaluation.baseline for v in variants}) == 1
    chain = plan("run.yaml", ["method=[{name: lora, rank: 4}, hft],full"])
    assert [v.name for v in chain] == ["lora+hft_rank-4", "full"]
    assert [m["name"] for m in chain[0].config.method] == ["lora", "hft"]


def test_learning_rates_of_a_plan(home):
    def rate(variant):
        return variant.config.training.learning_rate.options()["peak"]

    lora, full, ssf, bitfit = plan("run.yaml", ["method=lora,full,ssf,bitfit"])
    assert rate(lora) == 1e-2  # the file is written for it
    assert rate(full) == 1e-2  # it has no rate of its own
    assert rate(ssf) == get_method("ssf").learning_rate != 1e-2
    assert rate(bitfit) == 0.5 and bitfit.config.training.clip_norm == 2.0  # the file says so
    assert {rate(v) for v in plan("run.yaml", ["method=lora,ssf,bitfit", "training.learning_rate.peak=0.25"])} == {0.25}


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["method=full,lroa"], "lora"),
        (["method=full,lora", "method.rank=4"], "method.rank"),
        (["method=full,full"], "same name"),
        (["method"], "key=value"),
        (["method=full,hft", "evaluation=null"], "evaluation.sets"),
        (["method=full,hft", "evaluation.sets.held_out.kind=retained"], "kind target"),
    ],
)
def test_a_plan_with_a_mistake_is_refused_before_anything_runs(home, assignments, words):
    with pytest.raises(ConfigError, match=words):
        plan("run.yaml", assignments)
    assert not (home / "out").exists()


def rows():
    common = {"method": [], "peak_memory_of": "process", "learning_rate": {"name": "cosine", "peak": 1e-3}, "sets": {}}
    return [
        {"name": "full", "learned": 0.8, "forgot": 0.4, "trained_parameters": 1000, "trained_percent": 100.0,
         "step_milliseconds": 300.0, "peak_memory_gib": 1.5, **common},
        {"name": "hft", "learned": 0.7, "forgot": 0.2, "trained_parameters": 500, "trained_percent": 50.0,
         "step_milliseconds": 200.0, "peak_memory_gib": 1.1, **common},
        {"name": "lora", "learned": 0.4, "forgot": -0.1, "trained_parameters": 10, "trained_percent": 1.0,
         "step_milliseconds": None, "peak_memory_gib": 0.9, **common},
    ]  # fmt: skip


def test_the_sentences_say_what_the_numbers_say():
    most, forgot, hft, lora = what_happened(rows())
    assert most.startswith("full learned most") and "0.800" in most and "2.23 times lower" in most
    assert forgot.startswith("full forgot most") and "0.400" in forgot
    assert hft == (
        "hft learned 88 % as much as full, forgot 50 % as much, trained 50 % of the parameters and took steps "
        "1.50 times as fast."
    )
    assert lora == "lora learned 50 % as much as full, forgot nothing and trained 1 % of the parameters."


def test_a_run_that_diverged_is_said_to_have():
    full, hft, lora = rows()
    broken = {**full, "learned": float("nan"), "forgot": float("nan")}
    *others, last = what_happened([broken, hft, lora])
    assert others == what_happened([hft, lora]) and last.startswith("full diverged")
    assert what_happened([broken]) == [last]
    assert "+nan" in markdown_table([broken, hft])[2] and draw([broken, hft], "a title").startswith(b"\x89PNG")


def test_the_table_is_markdown_of_equal_widths():
    lines = markdown_table(rows())
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    assert "+0.800" in lines[2] and "300 ms" in lines[2] and "50 %" in lines[3]


def test_the_picture_is_drawn_for_one_run_for_many_and_without_measures():
    for some in (rows()[:1], [{**row, "forgot": None} for row in rows()] * 3):
        png = draw(some, "a title")
        assert png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", png[16:24])
        assert width >= 1200 and height >= 700


def test_compare_trains_each_run_once_and_reports(compared, monkeypatch):
    home, result = compared
    monkeypatch.chdir(home)
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("learned most", "compare.png", "jaxft export"):
        assert words in result.stdout
    document = json.loads((home / "out" / "compare.json").read_text())
    assert [run["name"] for run in document["runs"]] == ["hft", "lora"]
    for run in document["runs"]:
        report = json.loads((home / "out" / run["name"] / "report.json").read_text())
        assert run["learned"] == report["learned"] and run["peak_memory_gib"] > 0.05
    bases = {
        json.loads((home / "out" / name / "baseline.json").read_text())["held_out"]["loss"] for name in ("hft", "lora")
    }
    assert len(bases) == 1 and len(list((home / "out").glob("baseline-*.json"))) == 1
    assert (home / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "| hft " in (home / "out" / "compare.md").read_text()

    variants = plan("run.yaml", ["method=hft,lora"])
    assert all(finished_report(v) is not None for v in variants)
    assert finished_report(plan("run.yaml", ["method=hft,lora", "seed=1"])[0]) is None
    metrics = (home / "out" / "hft" / "metrics.jsonl").stat().st_mtime_ns
    again = compare(home)
    assert again.returncode == 0 and again.stdout.count("reused") == 2
    assert (home / "out" / "hft" / "metrics.jsonl").stat().st_mtime_ns == metrics


def test_a_run_that_fails_is_named_and_the_others_are_reported(compared):
    home, _ = compared
    output = home / "another"
    output.mkdir()
    (output / "hft").write_text("in the way")
    (scores,) = (home / "out").glob("baseline-*.json")  # of the same base model, which is not evaluated again
    shutil.copy(scores, output)
    result = compare(home, "another")
    assert result.returncode == 2 and not (output / "base.log").exists()
    assert "run hft failed" in result.stderr and "another/hft" in result.stderr and "Traceback" not in result.stderr
    assert [r["name"] for r in json.loads((output / "compare.json").read_text())["runs"]] == ["lora"]
