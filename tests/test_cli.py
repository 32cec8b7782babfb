import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
import yaml

from jaxft.checkpoint import checksums
from jaxft.cli import main
from jaxft.methods import methods
from jaxft.runs import load
from jaxft.training import read_metrics
from jaxft.weights import materialize
from tests.environment import environment
from tests.training.tiny import write_tiny

RUN = """\
model: {path: model}
method: {name: hft, rounds: 2}
data:
  sources: [{path: train.jsonl}]
  seq_len: 32
  batch_size: 8
evaluation:
  sets:
    held_out: {path: held_out.jsonl, kind: target}
    other: {path: other.jsonl, kind: retained}
training: {steps: 4, learning_rate: {name: cosine, peak: 1e-2}}
logging: {every: 1, tensorboard: false}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = write_tiny(tmp_path_factory.mktemp("home"))
    (directory / "run.yaml").write_text(RUN + f"output: {directory / 'out'}\n")
    return directory


@pytest.fixture
def cli(capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def run_directory(home):
    """A finished run of half fine-tuning, over one change of halves."""
    with pytest.raises(SystemExit) as ended:
        main(["train", str(home / "run.yaml")])
    assert not ended.value.code
    return home / "out"


def test_help_starts_fast_and_shows_examples(cli):
    command = [
        sys.executable,
        "-c",
        "import sys; from jaxft.cli import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)",
    ]
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - began
    assert result.stdout.rstrip().endswith("False")  # jax was not imported
    assert seconds < 10  # under 1 s on an idle machine; tests share theirs
    code = (
        "import sys, jaxft.training; print({'datasets', 'matplotlib', 'torch', 'transformers'} & set(sys.modules))\n"
        "import jaxft; jaxft.load_tokenizer('nano'); print({'datasets', 'matplotlib', 'torch'} & set(sys.modules))"
    )
    slow = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert slow.stdout == "set()\nset()\n"  # nor by a run what takes seconds, before it is needed
    for name in ("train", "compare", "eval", "generate", "export", "data", "methods"):
        assert name in result.stdout
        code, out, _ = cli(name, "--help")
        assert code == 0 and "Examples" in out and f"jaxft {name}" in out


def test_methods_lists_the_registry(cli):
    code, out, _ = cli("methods", "--json")
    listed = {entry["id"]: entry for entry in json.loads(out)}
    assert code == 0 and set(listed) == set(methods())
    assert {o["name"]: o["default"] for o in listed["lora"]["options"]}["rank"] == 16
    assert all(e["summary"] and e["family"] for e in listed.values())
    assert all(e["paper"]["url"].startswith("http") for e in listed.values() if e["paper"]["url"])
    assert all(o["help"] and o["type"] for e in listed.values() for o in e["options"])
    code, out, _ = cli("methods")
    assert all(name in out for name in methods())
    code, out, _ = cli("methods", "hft")
    assert "2404.18466" in out and "fraction" in out
    code, _, err = cli("methods", "hftt")
    assert code == 2 and 'did you mean "hft"' in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{home}/nothing.yaml"], ["nothing.yaml", "run.yaml"]),
        (["train", "{home}/run.yaml", "method.ronds=3"], ["method.ronds", "rounds"]),
        (["train", "{home}/run.yaml", "mesh.fsdp=3"], ["3"]),
        (["train", "{home}/run.yaml", "data.sources.0.path=trian.jsonl"], ["trian.jsonl"]),
        (["generate", "{home}/model"], ["--prompt"]),
        (["generate", "{home}/nowhere", "-p", "x"], ["nowhere"]),
        (["export", "{home}/model", "{home}/x"], ["not the output directory of a run"]),
        (["export", "{home}/model", "{home}/x", "--dtype", "float23"], ["float32"]),
        (["eval", "{home}/model"], ["CONFIG"]),
        (["compare", "{home}/run.yaml", "method=hft,lroa"], ["lroa", "lora"]),
        (["compare", "{home}/run.yaml", "method=hft,"], ["empty"]),
    ],
)
def test_a_mistake_is_one_clean_message_and_exit_code_2(cli, home, arguments, words):
    code, _, err = cli(*(a.format(home=home) for a in arguments))
    assert code == 2
    assert err.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in err


def test_debug_shows_the_traceback(home):
    with pytest.raises(ValueError, match="nothing.yaml"):
        main(["--debug", "train", str(home / "nothing.yaml")])


def test_check_prints_the_resolved_configuration(cli, home):
    code, out, _ = cli("train", home / "run.yaml", "--check", "training.steps=7", f"output={home / 'unused'}")
    tree = yaml.safe_load(out)
    assert code == 0 and tree["training"]["steps"] == 7 and tree["method"][0]["rounds"] == 2
    assert not (home / "unused").exists()


def test_train_leaves_a_run_and_does_not_repeat_it(cli, home, run_directory):
    report = json.loads((run_directory / "report.json").read_text())
    assert report["steps"] == 4 and report["learned"] > 0
    assert report["trained_parameters"] * 2 <= report["parameters"]
    before = (run_directory / "metrics.jsonl").read_bytes()
    code, out, _ = cli("train", home / "run.yaml")
    assert code == 0 and "finished" in out and (run_directory / "metrics.jsonl").read_bytes() == before
    code, _, err = cli("train", home / "run.yaml", "training.steps=5")
    assert code == 2 and "training.steps" in err and "another configuration" in err


def test_eval_agrees_with_the_report(cli, home, run_directory):
    report = json.loads((run_directory / "report.json").read_text())
    code, out, _ = cli("eval", run_directory, "--json")
    found = json.loads(out)["against_base"]
    assert code == 0
    assert found["learned"] == pytest.approx(report["learned"], abs=1e-5)
    assert found["forgot"] == pytest.approx(report["forgot"], abs=1e-5)
    code, out, _ = cli("eval", home / "model", home / "run.yaml", "evaluation.batch_size=3", "-o", home / "scores.json")
    scores = json.loads((home / "scores.json").read_text())
    assert code == 0 and "held_out" in out
    assert scores["held_out"]["loss"] == pytest.approx(report["sets"]["held_out"]["base_loss"], rel=1e-5)


def test_generate_continues_texts_chats_and_files(cli, home, run_directory):
    code, out, _ = cli("generate", run_directory, "-p", "w1 w2 w3", "-m", "5")
    assert code == 0 and out.startswith("w1 w2 w3")
    (home / "prompts.jsonl").write_text(
        '{"prompt": "w1 w2 w3"}\n{"messages": [{"role": "user", "content": "w4"}]}\n"w5 w6"\n'
    )
    code, out, _ = cli(
        "generate", run_directory, "-f", home / "prompts.jsonl", "-m", "5", "--json", "--batch-size", "2"
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 3 and all(1 <= line["tokens"] <= 5 for line in lines)
    code, again, _ = cli(
        "generate", run_directory, "-p", "w1 w2 w3", "-p", "w4", "-m", "5", "--chat", "-t", "1", "--json"
    )
    assert code == 0 and json.loads(again.splitlines()[0])["prompt"] == [{"role": "user", "content": "w1 w2 w3"}]
    (home / "bad.jsonl").write_text('{"question": 1}\n')
    code, _, err = cli("generate", run_directory, "-f", home / "bad.jsonl")
    assert code == 2 and "bad.jsonl:1" in err


def test_an_export_has_the_tuned_logits_in_transformers(cli, home, run_directory):
    output = home / "exported"
    code, out, err = cli("export", run_directory, output)
    assert code == 0, err
    tuned = load(str(run_directory))
    tokens = np.random.default_rng(0).integers(4, 60, (2, 12))
    hidden = tuned.model.hidden(tuned.params, tokens, remat="none")
    expected = np.asarray(tuned.model.logits(tuned.params, hidden))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        found = oracle(torch.as_tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    with torch.no_grad():
        assert np.abs(base(torch.as_tensor(tokens)).logits.numpy() - expected).max() > 1e-3
    assert transformers.AutoTokenizer.from_pretrained(output)("w1 w2")["input_ids"]
    assert all(file.stat().st_mode & 0o044 for file in output.iterdir())

    code, _, err = cli("export", run_directory, output)
    assert code == 2 and "not empty" in err
    (home / "precious").mkdir()
    (home / "precious" / "thesis.tex").write_text("x")
    code, _, err = cli("export", run_directory, home / "precious", "--overwrite")
    assert code == 2 and (home / "precious" / "thesis.tex").read_text() == "x"
    code, _, err = cli("export", run_directory, output, "--overwrite", "--dtype", "bfloat16")
    assert code == 0, err
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_best_checkpoint_or_any_can_be_taken_from_a_run_that_trains(cli, home, run_directory, tmp_path):
    run = tmp_path / "run"
    overrides = ["checkpoint={every: 1, keep_last: 1, metric: held_out.loss, mode: max}", "evaluation.every=1"]
    code, _, err = cli("train", home / "run.yaml", *overrides, f"output={run}")  # max: the worst is kept, not the last
    assert code == 0, err
    kept = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    assert kept[-1] == 4 and len(kept) == 2 and load(str(run)).step == 4
    records = [r for r in read_metrics(run / "metrics.jsonl") if "held_out/loss" in r]
    worst = max(records, key=lambda r: r["held_out/loss"])
    assert load(str(run), step="best").step == worst["step"] == kept[0]
    saving = run / "checkpoints" / "5.orbax-checkpoint-tmp"
    saving.mkdir()
    code, out, _ = cli("eval", run, "--step", kept[0], "--json")
    scores = json.loads(out)
    assert code == 0 and scores["step"] == kept[0]
    assert scores["results"]["held_out"]["loss"] == pytest.approx(worst["held_out/loss"], rel=1e-5)
    code, out, err = cli("export", run, tmp_path / "best", "--step", "best")
    assert code == 0 and f"step {kept[0]}" in out, err
    code, _, err = cli("generate", run, "-p", "w1", "--step", "3.5")
    assert code == 2 and f"steps {kept[0]}, 4" in err and "best" in err
    code, _, err = cli("generate", home / "model", "-p", "w1", "--step", "best")
    assert code == 2 and "no checkpoints" in err
    (run / "checkpoints" / "4" / "record" / "metadata").write_text("{")
    assert load(str(run)).step == kept[0]  # the latest is damaged
    assert saving.is_dir() and (run / "checkpoints" / "4").is_dir(), "reading moves nothing and removes nothing"


def test_a_delta_and_its_base_are_the_tuned_model_bit_for_bit(cli, home, run_directory):
    output = home / "delta"
    code, _, err = cli("export", run_directory, output, "--delta")
    assert code == 0, err
    tuned, again = load(str(run_directory)), load(str(output))
    assert checksums(materialize(again.params)) == checksums(materialize(tuned.params))
    assert again.step == tuned.step == 4
    record = json.loads((output / "delta.json").read_text())
    record["base_fingerprint"] = "0" * 16
    (output / "delta.json").write_text(json.dumps(record))
    code, _, err = cli("generate", output, "-p", "w1")
    assert code == 2 and "--base" in err
    (output / "delta.json").write_text("{")
    code, _, err = cli("generate", output, "-p", "w1")
    assert code == 2 and "not a readable delta" in err


def test_training_that_changed_nothing_is_not_exported(cli, home):
    output = home / "still"
    overrides = [
        "training.learning_rate.peak=0",
        "training.steps=1",
        "evaluation=null",
        f"output={output}",
        "method=hft",
    ]
    code, _, err = cli("train", home / "run.yaml", *overrides, "training.optimizer.weight_decay=0")
    assert code == 0, err
    code, _, err = cli("export", output, home / "nothing")
    assert code == 2 and "bit for bit" in err and not (home / "nothing").exists()


def test_a_soft_prompt_is_exported_as_a_delta_only(cli, home):
    output = home / "prompted"
    overrides = [
        "method={name: prompt-tuning, num_tokens: 3}",
        "training.steps=1",
        "evaluation=null",
        f"output={output}",
    ]
    code, _, err = cli("train", home / "run.yaml", *overrides)
    assert code == 0, err
    code, _, err = cli("export", output, home / "merged")
    assert code == 2 and "--delta" in err and not (home / "merged").exists()
    code, _, err = cli("export", output, home / "prompt-delta", "--delta")
    assert code == 0, err
    stored = (home / "prompt-delta" / "delta.safetensors").stat().st_size
    assert stored < (home / "model" / "model.safetensors").stat().st_size / 10
    tuned, again = load(str(output)), load(str(home / "prompt-delta"))
    assert jax.tree.structure(tuned.params) == jax.tree.structure(again.params)


def test_data_reports_every_bad_row(cli, home):
    code, out, _ = cli("data", home / "run.yaml", "--json", "--evaluation")
    report = json.loads(out)
    assert code == 0 and report["sources"][0]["rows"] == 96 and set(report["evaluation"]) == {"held_out", "other"}
    hostile = home / "hostile.jsonl"
    hostile.write_text('{"text": "w1 w2 w3"}\n{"text": 5}\nnot json\n{"text": "w4 w5"}\n')
    code, out, _ = cli("data", home / "run.yaml", f"data.sources.0.path={hostile}", "--json")
    assert code == 1
    assert [row["place"] for row in json.loads(out)["malformed"]] == [f"{hostile}:2", f"{hostile}:3"]
    code, out, _ = cli("data", home / "run.yaml", f"data.sources.0.path={hostile}", "data.on_error=skip")
    assert code == 0 and f"{hostile}:2" in out.replace("\n", "")


def test_smoke_runs_a_recipe_small_and_keeps_nothing(home):
    before = sorted(p.name for p in home.iterdir())
    command = [
        sys.executable,
        "-m",
        "jaxft",
        "train",
        "run.yaml",
        "--smoke",
        "training.steps=1000",
        "data.batch_size=512",
    ]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True, env=environment(1), timeout=200)
    assert result.returncode == 0, result.stderr
    assert "Smoke test passed" in result.stdout
    assert sorted(p.name for p in home.iterdir()) == before
    assert Path(home / "out" / "report.json").exists() or "out" not in before
