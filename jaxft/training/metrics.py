"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard, Weights & Biases, and a line on the terminal.

Every process computes the same numbers; only the first one writes them, and nothing here touches a device.
"""

import json
import math
import os
import resource
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxft.errors import JaxftError
from jaxft.training.output import OutputError, json_text, json_value, reason


class LoggingConfig(BaseModel):
    """Section `logging` of a run's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(10, ge=1, description="Record metrics every so many steps.")
    tensorboard: bool = Field(True, description="Write TensorBoard event files too.")
    wandb: bool = Field(False, description="Log to Weights & Biases too (needs `pip install wandb`).")
    project: str = Field("jaxft", description="Weights & Biases project.")


class Writer(Protocol):
    """A destination of metrics. `values` holds plain numbers; `step` counts optimizer steps done."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends records to `metrics.jsonl`. On resume, records after `step` are dropped, so that no step appears
    twice."""

    def __init__(self, path: Path, step: int = 0):
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json_text({"step": step, **values}, indent=None) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: bytes) -> float:
    """The step of a record; infinite for a line cut short by a kill, so that it is dropped."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order."""
    return [json_value(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


class TensorBoard:
    """Scalars in TensorBoard's event file format, written by TensorBoard's own writer (no TensorFlow, no torch)."""

    def __init__(self, directory: Path, step: int = 0):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory), filename_suffix=f".{socket.gethostname()}")
        # A START event makes TensorBoard discard what an interrupted run wrote at this step or later.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One Weights & Biases run per output directory, continued on resume."""

    def __init__(self, directory: Path, config: Mapping[str, Any], project: str):
        try:
            import wandb
        except ImportError as error:
            raise JaxftError(
                "logging.wandb is true, and wandb is not installed: pip install wandb, or set it to false"
            ) from error
        identity = directory / "wandb" / "run_id"
        identity.parent.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=project, dir=str(directory), config=dict(config), id=identity.read_text().strip(), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def make_writers(config: LoggingConfig, directory: Path, run_config: Mapping[str, Any], step: int) -> list[Writer]:
    """The destinations a configuration asks for, continuing after `step`; none in processes other than the first.

    Raises:
      JaxftError: `logging.wandb` is set and wandb is not installed.
    """
    if jax.process_index() != 0:
        return []
    writers: list[Writer] = [JsonLines(directory / "metrics.jsonl", step)]
    if config.tensorboard:
        writers.append(TensorBoard(directory / "tensorboard", step))
    if config.wandb:
        writers.append(WeightsAndBiases(directory, run_config, config.project))
    return writers


def memory_bytes() -> tuple[int, str]:
    """Peak memory in bytes and what it is of: the fullest local device, or this process where devices keep no count
    (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


class Terminal:
    """Progress on the terminal: a live line with a bar where there is one, else a plain line per logged step."""

    def __init__(self, total: int, step: int, every: int, console: Console | None = None):
        self._main = jax.process_index() == 0
        self._console = console or Console(stderr=False, highlight=False, soft_wrap=True)
        self._total, self._every = total, every
        self._started: tuple[int, float] | None = None
        self._bar: Progress | None = None
        if self._main and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[numbers]}"),
                TextColumn("ETA"), TimeRemainingColumn(), console=self._console, transient=False,
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=total, completed=step, numbers="compiling")
            self._bar.start()

    def say(self, text: str) -> None:
        """One sentence, above the progress line."""
        if self._main:
            self._console.print(text, markup=False)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows `step` of the total and its numbers."""
        if not self._main:
            return
        parts = [f"loss {values['loss']:.4f}"]
        if "learning_rate" in values:
            parts.append(f"lr {values['learning_rate']:.2e}")
        if "step_seconds" in values:
            parts.append(f"{values['step_seconds'] * 1e3:.0f} ms/step")
            parts.append(
                f"{_short(values['tokens_per_second'])} tok/s ({_short(values['target_tokens_per_second'])} target)"
            )
        numbers = "  ".join([*parts, f"{values['memory_gib']:.2f} GiB"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step == self._total:
            self._console.print(
                f"step {step}/{self._total}  {numbers}  ETA {_duration(self._remaining(step))}", markup=False
            )

    def _remaining(self, step: int) -> float:
        now = time.monotonic()
        if self._started is None:
            self._started = (step, now)
        first, began = self._started
        return (now - began) / (step - first) * (self._total - step) if step > first else math.nan

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Meter:
    """Turns the metric arrays of steps into records, one step late: while the device works on a step, the numbers of
    the step before are read. So nothing waits for the device that would not wait anyway, and the host runs one step
    ahead.

    A record is written every `every` steps. Loss and gradient norm are those of its step; times and token rates are
    means over the steps since the last record. A step lasts from its `begin` to the next one or to `pause`, at which
    the device is idle; so compilation, evaluation and saves are not counted, and the sum over steps is exact.
    """

    def __init__(self, writers: Sequence[Writer], terminal: Terminal, total: int, every: int, skipped: int = 0):
        self._writers, self._terminal = writers, terminal
        self._total, self._every = total, every
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._began: float | None = None  # when the latest step began; None while the clock stands
        self._skipped = skipped
        self._rates: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self._seconds, self._steps = 0.0, 0
        self._tokens = {"target": 0.0, "real": 0.0, "padded": 0.0}

    def begin(self) -> None:
        """To be called before a step is dispatched."""
        now = time.monotonic()
        if self._began is not None:
            self._seconds += now - self._began
        self._began = now

    def add(self, step: int, metrics: Mapping[str, jax.Array], *, timed: bool = True) -> None:
        """Takes the arrays of the step just dispatched and records the one before. An untimed step is waited for."""
        self._flush(timed=True)
        self._pending = (step, metrics)
        if not timed:
            self._began = None
            self._flush(timed=False)

    def pause(self) -> None:
        """Waits for the step whose numbers are pending, records it and stops the clock."""
        self._flush(timed=True, stop=True)

    def _flush(self, *, timed: bool, stop: bool = False) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(x) for name, x in jax.device_get(dict(metrics)).items()}
        if stop and self._began is not None:
            self._seconds += time.monotonic() - self._began
            self._began = None
        if timed:
            self._steps += 1
            for kind in self._tokens:
                self._tokens[kind] += values.get(f"{kind}_tokens", 0.0)
        self._skipped += int(values.pop("skipped", 0))
        if values.get("target_tokens") and "correct" in values:
            values["accuracy"] = values.pop("correct") / values["target_tokens"]
        if step % self._every and step != self._total:
            return
        if self._steps:
            seconds = max(self._seconds, 1e-9)
            self._rates = {
                "step_seconds": seconds / self._steps,
                "tokens_per_second": self._tokens["real"] / seconds,
                "target_tokens_per_second": self._tokens["target"] / seconds,
                "padded_tokens_per_second": self._tokens["padded"] / seconds,
            }
        timing = self._rates if self._steps else {}
        self._reset()
        record = {**values, **timing, "skipped_steps": self._skipped, "memory_gib": memory_bytes()[0] / 2**30}
        self._write(step, record)
        self._terminal.step(step, {**self._rates, **record})

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Records the metrics of every evaluation set after `step`, as `set/metric`. To be called while paused."""
        values = {f"{name}/{key}": value for name, found in results.items() for key, value in found.items()}
        if values:
            self._write(step, values)
            losses = ", ".join(f"{name} {found['loss']:.4f}" for name, found in results.items())
            self._terminal.say(f"step {step}: evaluation loss {losses}")

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            try:
                writer.write(step, values)
            except OSError as error:
                raise OutputError(
                    f"the metrics of step {step} cannot be written: {reason(error)}. Make room or repair the disk; "
                    "the same command then goes on from the last checkpoint"
                ) from error
