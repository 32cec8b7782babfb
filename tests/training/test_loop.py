"""The loop and what it writes: the run directory, metrics, evaluation, the report, and how it refuses."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml

from jaxft.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from jaxft.errors import JaxftError
from jaxft.hub import load_pretrained, load_tokenizer, save_pretrained
from jaxft.training import Interrupted, loop, read_metrics, train
from jaxft.training.compilation import CompilationLog, enable_compilation_cache
from jaxft.training.loop import save_due
from jaxft.training.metrics import JsonLines, LoggingConfig, Meter, TensorBoard, Terminal, make_writers
from jaxft.training.output import OutputError, RunDirectory, config_differences, config_fingerprint, write_atomically
from jaxft.training.preemption import StopRequest
from jaxft.training.report import Report, report_markdown
from tests.training.tiny import tiny_config, write_tiny

CONFIG = {
    "seed": 0,
    "output": "x",
    "method": [{"name": "lora", "rank": 4}],
    "mesh": {"data": 1},
    "training": {"steps": 3},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(directory):
    """One whole run with everything on, and its report."""
    output = directory / "finished"
    config = tiny_config(
        directory,
        output,
        evaluation={"every": 4},
        checkpoint={"every": 5, "keep_last": 1, "keep_best": 1},
        logging={"every": 2, "tensorboard": True},
        training={"steps": 12, "learning_rate": {"name": "cosine", "peak": 1e-2}, "profile": {"start": 3, "steps": 1}},
    )
    return config, output, train(config)


def test_a_run_learns_and_reports_what_it_learned_and_forgot(finished):
    config, output, report = finished
    assert report.learned > 0.1
    assert report.sets["held_out"]["change"] == -report.learned
    assert report.sets["other"]["change"] == report.forgot
    assert report.sets["held_out"]["kind"] == "target" and report.sets["other"]["kind"] == "retained"
    assert 0 < report.trained_parameters < report.parameters
    assert report.steps == 12 and report.skipped_steps == 0 and report.peak_memory_bytes > 2**20
    assert report.step_seconds > 0 and report.tokens_per_second > report.target_tokens_per_second > 0
    assert report.data["sources"][0]["rows"] == 96
    assert json.loads((output / "report.json").read_text())["learned"] == report.learned
    text = (output / "report.md").read_text()
    assert f"**{report.learned:.4f}**" in text and "| held_out | target |" in text


def test_the_directory_holds_config_versions_baseline_and_profile(finished):
    config, output, report = finished
    assert yaml.safe_load((output / "config.yaml").read_text()) == config.resolved()
    (versions,) = json.loads((output / "versions.json").read_text())
    assert versions["jax"] == jax.__version__ and "8 x" in versions["device"]
    baseline = json.loads((output / "baseline.json").read_text())
    assert baseline["held_out"]["loss"] == report.sets["held_out"]["base_loss"]
    assert list((output / "profile").rglob("*.xplane.pb"))


def test_metrics_are_recorded_as_often_as_asked(finished):
    _, output, report = finished
    records = read_metrics(output / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "held_out/loss" in r] == [4, 8, 12]
    assert steps[-1]["loss"] == report.final_loss < steps[0]["loss"]
    assert steps[0]["learning_rate"] > steps[-1]["learning_rate"] > 0
    assert all(r["target_tokens"] < r["real_tokens"] <= r["padded_tokens"] == 8 * 32 for r in steps)
    assert all(r["padded_tokens_per_second"] >= r["tokens_per_second"] > r["target_tokens_per_second"] for r in steps)


def test_tensorboard_shows_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, output, _ = finished
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    expected = {r["step"]: r["loss"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r}
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(expected)
    assert [e.step for e in events.Scalars("held_out/loss")] == [4, 8, 12]


def test_the_best_and_the_last_checkpoint_are_kept(finished):
    _, output, _ = finished
    losses = {r["step"]: r["held_out/loss"] for r in read_metrics(output / "metrics.jsonl") if "held_out/loss" in r}
    with Checkpointer(output / "checkpoints") as checkpointer:
        assert set(checkpointer.steps()) == {12, min(losses, key=losses.__getitem__)}
        assert checkpointer.record(12)["record"]["results"]["held_out"]["loss"] == losses[12]


def test_a_finished_run_is_not_run_again(finished, capsys):
    config, output, report = finished
    before = (output / "metrics.jsonl").read_bytes()
    assert train(config) == report
    assert "is finished (12 steps): nothing to do" in capsys.readouterr().out
    assert (output / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_by_key(directory, finished):
    config, output, _ = finished
    other = config.model_copy(update={"seed": 1, "training": config.training.model_copy(update={"clip_norm": 0.5})})
    with pytest.raises(OutputError) as error:
        train(other)
    message = str(error.value)
    assert "seed: 0 there, 1 now" in message and "training.clip_norm: 1.0 there, 0.5 now" in message
    assert str(output) in message and "learning_rate" not in message


def test_a_run_whose_report_is_missing_ends_without_another_step(directory, finished, tmp_path, capsys):
    """As after a kill between the last save and the report."""
    import shutil

    config, output, report = finished
    shutil.copytree(output, tmp_path / "copy")
    (tmp_path / "copy" / "report.json").unlink()
    again = train(config.model_copy(update={"output": str(tmp_path / "copy")}))
    assert "resuming after step 12" in capsys.readouterr().out
    assert (again.learned, again.forgot, again.final_loss) == (report.learned, report.forgot, report.final_loss)


def test_overwrite_replaces_the_run(directory, tmp_path):
    short = {"training": {"steps": 2, "learning_rate": 1e-2}, "evaluation": {"sets": {}}}
    train(tiny_config(directory, tmp_path / "run", **short))
    changed = tiny_config(directory, tmp_path / "run", **short, seed=5)
    with pytest.raises(OutputError, match="seed: 0 there, 5 now"):
        train(changed)
    report = train(changed, overwrite=True)
    assert report.learned is None and report.sets == {}
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_another_base_model_at_resume_is_an_error_that_names_both(directory, tmp_path):
    import shutil

    shutil.copytree(directory / "model", tmp_path / "model")
    config = tiny_config(
        directory,
        tmp_path / "run",
        model={"path": str(tmp_path / "model")},
        training={"steps": 30, "learning_rate": 1e-2},
        evaluation={"sets": {}},
    )
    with pytest.raises(Interrupted):
        _interrupted_after(config, tmp_path / "run", 3)
    model, params = load_pretrained(tmp_path / "model", dtype=np.float32)
    params["layers"]["attn"]["q"]["kernel"] += 1e-3
    save_pretrained(tmp_path / "model", model, params, load_tokenizer(tmp_path / "model"), overwrite=True)
    with pytest.raises(
        CheckpointError, match=r"trained from the base model .*model \(\w{16}\), this run has .*model \(\w{16}\)"
    ):
        train(config)


def _interrupted_after(config, output: Path, steps: int):
    import threading
    import time

    def terminate():
        path = output / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"grad_norm") < steps:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        return train(config)
    finally:
        thread.join()


def test_a_failing_save_stops_the_run_and_names_the_path(directory, tmp_path):
    config = tiny_config(
        directory,
        tmp_path / "run",
        checkpoint={"every": 2},
        training={"steps": 500, "learning_rate": 1e-2},
        evaluation={"sets": {}},
    )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    reached = []

    def full_disk(step: int, frame: object) -> None:  # as soon as there is a good checkpoint, files stop growing
        if (tmp_path / "run" / "checkpoints" / "2").is_dir() and not reached:
            reached.append(step)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))

    signal.signal(signal.SIGALRM, full_disk)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with pytest.raises((CheckpointError, OSError)) as error:
            train(config)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert reached
    assert str(tmp_path / "run") in str(error.value)
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        assert checkpointer.steps() and checkpointer.record(checkpointer.steps()[-1])["step"] >= 2


def test_a_step_with_a_loss_that_is_not_finite_is_counted(directory, tmp_path):
    config = tiny_config(
        directory,
        tmp_path / "run",
        training={"steps": 4, "learning_rate": 1e30, "clip_norm": None},
        method={"name": "full"},
        evaluation={"sets": {}},
    )
    report = train(config)
    assert report.skipped_steps >= 2
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["skipped_steps"] == report.skipped_steps


def test_a_report_of_losses_that_are_not_finite_is_valid_json_and_reads_back(finished, tmp_path):
    config, _, report = finished
    sets = {"held_out": {**report.sets["held_out"], "loss": float("nan"), "change": float("inf")}}
    diverged = dataclasses.replace(report, final_loss=float("nan"), learned=float("-inf"), sets=sets)
    assert "| training loss of the last step | nan |" in report_markdown(diverged)
    with RunDirectory(tmp_path / "run", config.resolved()) as run:
        run.write("report.json", dataclasses.asdict(diverged))
        text = (tmp_path / "run" / "report.json").read_text()
        json.loads(text, parse_constant=pytest.fail)
        read = Report(**run.read("report.json"))
    assert np.isnan(read.final_loss) and read.learned == float("-inf") and read.sets["held_out"]["change"] == np.inf


def test_saves_by_minutes(directory, tmp_path):
    now = time.monotonic()
    config = CheckpointConfig(every=None, minutes=2)
    assert save_due(config, SimpleNamespace(last_time=now - 121), 1, None)
    assert not save_due(config, SimpleNamespace(last_time=now - 60), 1, None)
    checkpoint = {"every": None, "minutes": 1e-6, "keep_last": 9}
    train(
        tiny_config(directory, tmp_path / "run", checkpoint=checkpoint, training={"steps": 3}, evaluation={"sets": {}})
    )
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_tokens_that_the_model_has_no_embedding_of_are_an_error(directory, tmp_path):
    tokenizer = load_tokenizer(directory / "model")
    tokenizer.add_tokens(["w60"])
    known = (directory / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(known + json.dumps({"text": "w1 w60 w2"}) + "\n")
    shutil.copytree(directory / "model", tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = {"sources": [{"path": str(tmp_path / "train.jsonl")}]}
    config = tiny_config(
        directory, tmp_path / "run", model={"path": str(tmp_path / "model")}, data=data, evaluation={"sets": {}}
    )
    with pytest.raises(JaxftError, match="token 64 .*embeds 64 .*0 to 63"):
        train(config)
    sets = {"a": {"path": str(tmp_path / "train.jsonl")}}
    config = tiny_config(
        directory, tmp_path / "run", model={"path": str(tmp_path / "model")}, evaluation={"sets": sets}
    )
    with pytest.raises(JaxftError, match="evaluation.sets.a: .*token 64"):
        train(config)


def test_epochs_become_steps_and_both_are_said(directory, tmp_path, capsys):
    train(tiny_config(directory, tmp_path / "run", training={"steps": None, "epochs": 0.5}, evaluation={"sets": {}}))
    assert "4 steps = 0.50 epochs of 8 steps" in capsys.readouterr().out


def test_what_is_recomputed_is_chosen_where_the_memory_of_a_device_is_known(directory, tmp_path, capsys, monkeypatch):
    short = {"training": {"steps": 2, "learning_rate": 1e-2}, "evaluation": {"sets": {}}}
    reports = []
    for memory, policy in ((None, "block"), (2**34, "attention")):
        monkeypatch.setattr(loop, "_memory", lambda memory=memory: memory)
        reports.append(train(tiny_config(directory, tmp_path / policy, **short)))
        assert f"; remat: {policy}\n" in capsys.readouterr().out
    assert reports[0].final_loss == pytest.approx(reports[1].final_loss, rel=1e-6)
    assert "remat: auto" in (tmp_path / "attention" / "config.yaml").read_text()  # as asked for, on whatever device


def test_a_method_that_trains_first_gets_a_training_run(directory, tmp_path):
    report = train(
        tiny_config(
            directory,
            tmp_path / "run",
            method={"name": "lt-sft", "budget": 200, "search_steps": 3},
            training={"steps": 3, "learning_rate": 1e-2},
        )
    )
    assert report.trained_parameters == 200 and report.learned > 0


def test_checkpoint_metric_must_exist(directory, finished, tmp_path):
    scores = {"baseline": str(finished[1] / "baseline.json")}  # of the same model
    config = tiny_config(directory, tmp_path / "run", checkpoint={"metric": "held_out.los"}, evaluation=scores)
    with pytest.raises(JaxftError, match=r'checkpoint.metric = "held_out.los": did you mean "held_out.loss"'):
        train(config)


def test_more_epochs_than_the_data_gives_is_an_error(directory, tmp_path):
    with pytest.raises(JaxftError, match="data.epochs = 1 ends after 8 steps"):
        train(tiny_config(directory, tmp_path / "run", data={"epochs": 1}))


# The run directory


def test_two_runs_in_one_directory_are_refused(tmp_path):
    with RunDirectory(tmp_path / "run", CONFIG):
        with pytest.raises(OutputError, match=rf"another run is training in .* \(process {os.getpid()} on "):
            RunDirectory(tmp_path / "run", CONFIG)
    with RunDirectory(tmp_path / "run", CONFIG):  # free again
        assert True


def test_a_directory_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is not empty and holds no run .found thesis.tex"):
            RunDirectory(tmp_path, CONFIG, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        run.write("report.json", {"a": 1})
    (tmp_path / "notes.txt").write_text("mine")
    with RunDirectory(tmp_path, {**CONFIG, "seed": 1}, overwrite=True) as run:
        assert run.read("report.json") is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_path_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OutputError, match='output directory ".*file/run" cannot be written: a part of this path is a file'
    ):
        RunDirectory(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(OutputError, match="it is a file"):
        RunDirectory(tmp_path / "file", CONFIG)


def test_a_directory_without_permission_is_a_sentence(tmp_path):
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # nothing is forbidden to root
        os.seteuid(65534)
    try:
        with pytest.raises(
            OutputError, match="cannot be written: writing there is not permitted. Set `output` to another"
        ):
            RunDirectory(directory / "run", CONFIG)
    finally:
        os.seteuid(user)


def test_a_full_disk_is_a_sentence_before_anything_starts(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OutputError, match='output directory ".*run" cannot be written: '):
            RunDirectory(tmp_path / "run", CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "run").iterdir())


def test_space_for_checkpoints_is_checked(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        assert run.require_space(str(tmp_path), 1, 3) is None
        with pytest.raises(OutputError, match="GiB free and one checkpoint takes"):
            run.require_space(str(tmp_path), 2**62, 3)
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        assert "lower checkpoint.keep_last" in run.require_space(str(tmp_path), free // 2, 3)


def test_only_what_changes_numbers_makes_another_run():
    free = {
        **CONFIG,
        "output": "y",
        "mesh": {"data": 8},
        "training": {"steps": 3, "profile": {"start": 2}, "offload": ["frozen"]},
    }
    assert config_differences(CONFIG, free) == [] and config_fingerprint(CONFIG) == config_fingerprint(free)
    other = {**CONFIG, "method": [{"name": "lora", "rank": 8}]}
    assert config_differences(CONFIG, other) == ["method.0.rank: 4 there, 8 now"]
    assert config_fingerprint(CONFIG) != config_fingerprint(other)


# Metrics


class Recorder:
    def __init__(self):
        self.records = []

    def write(self, step, values):
        self.records.append((step, dict(values)))

    def close(self):
        pass


def test_metrics_are_read_one_step_late():
    recorder = Recorder()
    meter = Meter([recorder], Terminal(3, 0, 100), total=3, every=1)
    for step in (1, 2, 3):
        meter.begin()
        meter.add(
            step, {"loss": jax.numpy.float32(step), "target_tokens": 4.0, "real_tokens": 6.0, "padded_tokens": 8.0}
        )
        assert [s for s, _ in recorder.records] == list(range(1, step))
    meter.pause()
    assert [(s, v["loss"]) for s, v in recorder.records] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_pauses_and_compilation_are_not_step_time():
    import time

    recorder = Recorder()
    meter = Meter([recorder], Terminal(4, 0, 100), total=4, every=4)
    metrics = {"loss": 1.0, "target_tokens": 4.0, "real_tokens": 6.0, "padded_tokens": 8.0}
    meter.begin()
    time.sleep(0.2)  # compiling
    meter.add(1, metrics, timed=False)
    meter.begin()
    time.sleep(0.02)
    meter.add(2, metrics)
    meter.pause()
    time.sleep(0.2)  # saving
    for step in (3, 4):
        meter.begin()
        time.sleep(0.02)
        meter.add(step, metrics)
    meter.pause()
    ((step, values),) = recorder.records
    assert step == 4 and 0.02 <= values["step_seconds"] < 0.06
    assert values["tokens_per_second"] == pytest.approx(6 / values["step_seconds"])


def test_records_after_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')  # cut by a kill
    writer = JsonLines(path, step=2)
    writer.write(3, {"loss": 30.0, "bad": float("nan")})
    writer.close()
    one, two, three = read_metrics(path)
    assert one == {"step": 1, "loss": 1.0} and two == {"step": 2, "loss": 2.0}
    assert three["loss"] == 30.0 and np.isnan(three["bad"]) and '"nan"' in path.read_text()  # JSON has no NaN


def test_tensorboard_forgets_what_came_after_the_restored_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0})):
        writer = TensorBoard(tmp_path, start)
        for step, value in values.items():
            writer.write(step, {"loss": value})
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == {1: 1.0, 2: 2.0, 3: 30.0}


def test_metrics_on_a_full_disk_are_a_sentence(tmp_path):
    def full(step, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    meter = Meter([SimpleNamespace(write=full)], Terminal(1, 0, 1), 1, 1)
    with pytest.raises(OutputError, match="metrics of step 0 cannot be written: the disk is full.*same command"):
        meter.evaluation(0, {"a": {"loss": 1.0}})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/report.json cannot be written: a part of this path is a file"):
        write_atomically(tmp_path / "file" / "report.json", "x")


def test_wandb_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(JaxftError, match="pip install wandb"):
        make_writers(LoggingConfig(tensorboard=False, wandb=True), tmp_path, {}, 0)


def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on_with_its_own(tmp_path, monkeypatch):
    calls = []  # wandb is no dependency: a module with the functions that are used stands in for it
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    module = SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = LoggingConfig(tensorboard=False, wandb=True, project="mine")
    for step in (0, 5):
        json_lines, wandb = make_writers(config, tmp_path, {"seed": 3}, step)
        wandb.write(step + 1, {"loss": 2.5})
        wandb.close()
        json_lines.close()
    first, second = calls[0], calls[3]
    assert first == second and first["project"] == "mine" and first["config"] == {"seed": 3} and first["id"]
    assert first["resume"] == "allow" and Path(first["dir"]) == tmp_path
    assert calls[1:3] == [(1, {"loss": 2.5}), "finish"] and calls[4] == (6, {"loss": 2.5})


# Compilation and signals


def test_compilations_are_counted():
    with CompilationLog() as log:
        f = jax.jit(lambda x: x * 3 + 1)
        f(np.ones(3))
        once = log.programs
        f(np.zeros(3))
        assert log.programs == once >= 1
        f(np.zeros(4))
        assert log.programs == once + 1 and log.seconds > 0
    f(np.zeros(5))
    assert log.programs == once + 1


def test_the_cache_goes_to_the_users_directory_unless_set(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
        assert enable_compilation_cache() == str(tmp_path / "own")
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert enable_compilation_cache() == str(tmp_path / "jaxft" / "xla")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxft" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_second_signal_acts_as_it_used_to():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    try:
        with StopRequest() as stop:
            assert stop.after_step() is None
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.after_step() == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)
    assert Interrupted(signal.SIGTERM, "").code == 143 and Interrupted(signal.SIGINT, "").code == 130
