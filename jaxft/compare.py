"""Several runs of one configuration side by side: one table, one picture, a few sentences.

`plan` expands `method=full,hft,lora` into checked runs, `run_all` trains those that are not finished yet, each in a
process of its own (so that its peak memory is its own, and freed), and `summarize` writes `compare.json`,
`compare.md` and `compare.png`.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jaxft.config import RunConfig, load_config
from jaxft.config_source import ConfigError, Problem, parse_value
from jaxft.data import FormatConfig
from jaxft.errors import JaxftError
from jaxft.methods.registry import get_method
from jaxft.picture import draw
from jaxft.training.output import config_differences, json_text, json_value, write_atomically

POLL_SECONDS = 0.25
BASE = "base"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One run of a comparison: its name, the overrides that make it, and the checked configuration."""

    name: str
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def directory(self) -> Path:
        return Path(self.config.output)


# --- which runs -------------------------------------------------------------------------------------------------------


def split_values(text: str) -> list[str]:
    """The alternatives of one assignment: split at commas outside of brackets, braces and quotes.

    >>> split_values("full,{name: lora, rank: 4},hft")
    ['full', '{name: lora, rank: 4}', 'hft']
    """
    parts, depth, quote, start = [], 0, "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


def plan(config_path: str, assignments: Sequence[str]) -> list[Variant]:
    """The runs of a comparison, all of them checked.

    Args:
      config_path: the YAML file that they share.
      assignments: `key=value` holds for all; `key=a,b` makes a run for each, and several of those every combination.

    Raises:
      ConfigError: an assignment, or any of the configurations they make, is wrong.
    """
    keys, choices = [], []
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError([Problem(f"'{assignment}'", "", "write key=value or key=value,value")])
        keys.append(key.strip())
        choices.append(split_values(text))
        if "" in choices[-1] and len(choices[-1]) > 1:
            raise ConfigError([Problem(f"'{assignment}'", "", "one of the values between the commas is empty")])
    fixed = [f"{k}={c[0]}" for k, c in zip(keys, choices, strict=True) if len(c) == 1]
    output = Path(load_config(config_path, [f for f in fixed if not f.startswith("method.")]).output)
    variants = []
    for values in itertools.product(*choices):
        given = [f"{k}={v}" for k, v in zip(keys, values, strict=True)]
        varied = [(k, v) for k, v, c in zip(keys, values, choices, strict=True) if len(c) > 1]
        name = _run_name(varied) or _run_name([("method", _method_name(config_path, given))])
        overrides = [*_recommended(config_path, given), *given, f"output={json.dumps(str(output / name))}"]
        config = load_config(config_path, overrides)
        if config.evaluation.baseline is None:
            overrides.append(f"evaluation.baseline={json.dumps(str(baseline_path(config, output).absolute()))}")
        variants.append(Variant(name, tuple(overrides), load_config(config_path, overrides)))
    names = [v.name for v in variants]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError([Problem("", "", f'two runs of the comparison have the same name, "{name}"')])
    if not any(one.kind == "target" for one in variants[0].config.evaluation.sets.values()):
        raise ConfigError(
            [Problem(config_path, "evaluation.sets", "a comparison needs at least one evaluation set of kind target")]
        )
    return variants


def _run_name(varied: Sequence[tuple[str, str]]) -> str:
    """A name that is safe as a directory: `lora`, `lora_rank-16`, `hft_learning_rate.peak-0.001`."""
    parts = []
    for key, text in varied:
        value = parse_value(text)
        if key == "method":
            specs = value if isinstance(value, list) else [value]
            names = [s.get("name", "?") if isinstance(s, Mapping) else str(s) for s in specs]
            options = [f"{k}-{v}" for s in specs if isinstance(s, Mapping) for k, v in s.items() if k != "name"]
            parts.append("+".join(names) + "".join(f"_{o}" for o in options))
        else:
            parts.append(f"{key.removeprefix('method.').removeprefix('training.')}-{text}")
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-.")


def _method_name(config_path: str, given: Sequence[str]) -> str:
    return json.dumps([spec["name"] for spec in load_config(config_path, given).method])


def _recommended(config_path: str, given: Sequence[str]) -> list[str]:
    """Overrides that suit the method of this run; what the command line says comes after them, and wins.

    The `compare` section of the configuration says them. Else the registry may have a learning rate for the method
    (for a chain: its first method that has one), which is used for AdamW and a schedule with a `peak`, unless the
    file is written for this very method: then its own rate holds.
    """
    config = load_config(config_path, given)
    own = [spec["name"] for spec in load_config(config_path).method] == [spec["name"] for spec in config.method]
    found: dict[str, Any] = {}
    rates = [rate for spec in config.method if (rate := get_method(spec["name"]).learning_rate) is not None]
    schedule, optimizer = config.training.learning_rate, config.training.optimizer
    if rates and not own and "peak" in schedule.options() and optimizer.name == "adamw":
        found["training.learning_rate.peak"] = rates[0]
    for spec in config.method:
        found |= config.compare.overrides.get(spec["name"], {})
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


# --- running them -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What became of a run: its report, or the reason it has none."""

    variant: Variant
    report: dict[str, Any] | None = None
    reused: bool = False
    error: str | None = None


def run_all(
    config_path: str, variants: Sequence[Variant], *, overwrite: bool = False, console: Console | None = None
) -> list[Outcome]:
    """Evaluate the base model once, then train the variants one after the other, with live progress.

    Runs that are finished with the same configuration are reused, interrupted ones resume. A run that fails does not
    stop the others; its `error` says why.
    """
    console = console or Console(highlight=False)
    root = variants[0].directory.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".probe").touch()
        (root / ".probe").unlink()
    except OSError as error:
        raise JaxftError(
            f'output directory "{root}" cannot be written: {error.strerror}. Set `output` to another.'
        ) from None
    outcomes = []
    with _Display(console, [BASE, *(v.name for v in variants)]) as display:
        reason = _evaluate_base(config_path, variants, display, overwrite)
        for variant in variants:
            if reason is not None:
                outcomes.append(Outcome(variant, error=reason))
                continue
            report = None if overwrite else finished_report(variant)
            if report is not None:
                display.finish(variant.name, "finished before, reused")
                outcomes.append(Outcome(variant, report, reused=True))
                continue
            outcomes.append(_train(config_path, variant, overwrite, display))
    return outcomes


def finished_report(variant: Variant) -> dict[str, Any] | None:
    """The report of this run, if it was finished with the same configuration."""
    report, config = variant.directory / "report.json", variant.directory / "config.yaml"
    if not report.is_file() or not config.is_file():
        return None
    stored = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    if config_differences(stored, variant.config.resolved()):
        return None
    return json_value(report.read_text(encoding="utf-8"))


def baseline_path(config: RunConfig, root: Path) -> Path:
    """Where the scores of the base model are kept, under a name that stands for all that they depend on."""
    resolved = config.resolved()
    data = {k: resolved["data"][k] for k in ("seq_len", *FormatConfig.model_fields)}
    sets = resolved["evaluation"]["sets"]
    model = {k: resolved["model"][k] for k in ("path", "init", "param_dtype", "compute_dtype")}
    paths = [model["path"], *(one["path"] for one in sets.values())]
    states = [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths if os.path.exists(p)]
    key = json.dumps([model, data, sets, states], sort_keys=True)
    return root / f"baseline-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def _evaluate_base(config_path: str, variants: Sequence[Variant], display: "_Display", overwrite: bool) -> str | None:
    """Score the base model of the variants, once for all that share it. Returns why it failed, if it did."""
    root = variants[0].directory.parent
    done: set[Path] = set()
    for variant in variants:
        path = Path(str(variant.config.evaluation.baseline))
        if path in done or (path.is_file() and not overwrite):
            continue
        done.add(path)
        display.start(BASE, None, "evaluating the base model")
        overrides = [*variant.overrides, "evaluation.baseline=null"]
        command = [sys.executable, "-m", "jaxft", "eval", variant.config.model.path, config_path, *overrides]
        log = root / "base.log"
        if _watch([*command, "--output", str(path)], log, root / "no-metrics", lambda record: None) != 0:
            display.finish(BASE, "failed")
            return f"the base model could not be evaluated: {_last_words(log)} (all of its output: {log})"
    display.finish(BASE, "evaluated")
    return None


def _train(config_path: str, variant: Variant, overwrite: bool, display: "_Display") -> Outcome:
    command = [sys.executable, "-m", "jaxft", "train", config_path, *variant.overrides]
    command += ["--overwrite"] if overwrite else []
    log = variant.directory.parent / f"{variant.name}.log"
    total = variant.config.training.steps
    display.start(variant.name, total, "loading and compiling")
    metrics = variant.directory / "metrics.jsonl"
    if overwrite:
        metrics.unlink(missing_ok=True)
    code = _watch(command, log, metrics, lambda record: display.step(variant.name, record, total))
    report = finished_report(variant)
    if code == 0 and report is not None:
        display.finish(variant.name, "done")
        return Outcome(variant, report)
    error = _last_words(log) or f"it ended with exit code {code}"
    display.finish(variant.name, "failed")
    return Outcome(variant, error=f"{error} (all of its output: {log})")


def _watch(command: Sequence[str], log: Path, metrics: Path, on_record: Callable[[dict[str, Any]], None]) -> int:
    """Run `command` with its output in `log`, handing on records as they appear in `metrics`. Returns its exit code."""
    with open(log, "wb") as file:
        # A session of its own: Ctrl-C reaches us only, and the run is then asked once to save and stop.
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        reader = _records(metrics)
        previous = (
            signal.signal(signal.SIGTERM, _exit) if threading.current_thread() is threading.main_thread() else None
        )
        try:
            while child.poll() is None:
                for record in iter(reader.__next__, None):
                    on_record(record)
                time.sleep(POLL_SECONDS)
            for record in iter(reader.__next__, None):
                on_record(record)
        except BaseException:
            child.send_signal(signal.SIGTERM)  # it saves a checkpoint, and the same command goes on from there
            try:
                child.wait()
            except BaseException:  # asked twice
                child.kill()
                raise
            raise
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
    return child.returncode


def _exit(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Records as they are appended to a JSON-lines file; None when there is none right now."""
    offset = 0
    while True:
        if path.is_file():
            with open(path, "rb") as file:
                file.seek(0, os.SEEK_END)
                offset = offset if offset <= file.tell() else 0  # rewritten by a resume
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    try:
                        yield json_value(line.decode())
                    except ValueError:
                        continue
        yield None


def _last_words(log: Path) -> str:
    """The error at the end of a log: from the last line that starts with `error:` on, or the last line."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("error:")]
    return "\n".join(lines[starts[-1] :]).removeprefix("error: ") if starts else (lines[-1] if lines else "")


class _Display:
    """One line a run: a live table on a terminal, plain lines now and then elsewhere."""

    def __init__(self, console: Console, names: Sequence[str]):
        self._console = console
        self._width = max(map(len, names))
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), BarColumn(bar_width=24),
            MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
            console=console, disable=not self._live,
        )  # fmt: skip
        self._tasks = {
            n: self._progress.add_task(n.ljust(self._width), total=None, start=False, note="") for n in names
        }
        self._printed: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, name: str, total: int | None, note: str) -> None:
        self._began[name] = time.monotonic()
        self._progress.start_task(self._tasks[name])
        self._progress.update(self._tasks[name], total=total, completed=0, note=note)
        self._say(name, note)

    def step(self, name: str, record: Mapping[str, Any], total: int | None) -> None:
        if "loss" not in record:
            return
        note = f"loss {record['loss']:.4f}"
        if (seconds := record.get("step_seconds")) is not None and isinstance(seconds, float):
            note += f"  {1e3 * seconds:.0f} ms a step"
        self._progress.update(self._tasks[name], completed=record.get("step", 0), total=total, note=note)
        if time.monotonic() - self._printed.get(name, 0.0) >= 5:
            self._printed[name] = time.monotonic()
            self._say(name, f"step {record.get('step')}/{total or '?'}  {note}")

    def finish(self, name: str, note: str) -> None:
        self._progress.update(self._tasks[name], note=note)
        self._progress.stop_task(self._tasks[name])
        seconds = time.monotonic() - self._began[name] if name in self._began else None
        self._say(name, note + (f" after {seconds:.0f} s" if seconds else ""))

    def _say(self, name: str, text: str) -> None:
        if not self._live:
            self._console.print(f"{name.ljust(self._width)}  {text}", markup=False, soft_wrap=True)


# --- what came out ----------------------------------------------------------------------------------------------------


def table_row(outcome: Outcome) -> dict[str, Any]:
    """The line of a finished run in the table and the picture."""
    report = outcome.report or {}
    seconds = report["step_seconds"]
    return {
        "name": outcome.variant.name,
        "method": outcome.variant.config.method,
        "learned": report["learned"],
        "forgot": report["forgot"],
        "trained_parameters": report["trained_parameters"],
        "trained_percent": 100 * report["trained_parameters"] / report["parameters"],
        "step_milliseconds": None if seconds is None else 1e3 * seconds,
        "peak_memory_gib": report["peak_memory_bytes"] / 2**30,
        "peak_memory_of": report["peak_memory_of"],
        "learning_rate": outcome.variant.config.training.learning_rate.model_dump(),
        "steps": report["steps"],
        "sets": report["sets"],
        "directory": str(outcome.variant.directory),
    }


def summarize(config_path: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Write `compare.json`, `compare.md` and `compare.png` of the finished runs; returns the lines to tell the user."""
    rows = [table_row(outcome) for outcome in outcomes]
    root = outcomes[0].variant.directory.parent
    config = outcomes[0].variant.config
    title = f"{Path(config_path).stem}: {Path(config.model.path).name}, {rows[0]['steps']} steps"
    picture = root / "compare.png"
    temporary = picture.with_name(".compare.png")
    temporary.write_bytes(draw(rows, title))
    os.replace(temporary, picture)
    sentences = what_happened(rows)
    table = markdown_table(rows)
    lines = [f"# {title}", "", *table, "", "![learned against forgot](compare.png)", "", *(f"- {s}" for s in sentences)]
    lines += ["", "Losses are mean nats a target token, against the base model.", ""]
    write_atomically(root / "compare.md", "\n".join(lines))
    document = {"title": title, "config": str(config_path), "runs": rows}
    write_atomically(root / "compare.json", json_text(document) + "\n")
    kept = {row["name"]: row["learned"] - (row["forgot"] or 0.0) for row in rows}
    best = max(rows, key=lambda row: kept[row["name"]] if math.isfinite(kept[row["name"]]) else -math.inf)
    # Prompts are then written as in training: by the chat template, or with the newline of the plain format.
    conversations = sum(s.get("conversations", 0) for s in (outcomes[0].report or {})["data"].get("sources", ()))
    chat = "--chat " if conversations else ""
    return [
        "",
        *table,
        "",
        *sentences,
        "",
        f"Table:    {root / 'compare.md'}  (and compare.json)",
        f"Picture:  {picture}",
        f"Runs:     {', '.join(row['directory'] for row in rows)}",
        "",
        "Next:",
        f"  jaxft generate {best['directory']} {chat}-p '...'    the run that kept most of what it learned",
        f"  jaxft export {best['directory']} my-model             write it for transformers",
        "  jaxft methods                                        see what else there is to compare",
    ]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of a comparison, as lines of Markdown."""
    memory = "process" if rows[0]["peak_memory_of"] == "process" else "device"
    heads = ["run", "learned", "forgot", "trained", "of all", "step", f"peak memory ({memory})", "learning rate"]
    cells = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in rows:
        rate = row["learning_rate"].get("peak")
        cells.append([
            row["name"],
            _nats(row["learned"]),
            _nats(row["forgot"]),
            f"{row['trained_parameters']:,}",
            f"{row['trained_percent']:.3g} %",
            "" if row["step_milliseconds"] is None else f"{row['step_milliseconds']:.0f} ms",
            f"{row['peak_memory_gib']:.2f} GiB",
            row["learning_rate"]["name"] if rate is None else f"{rate:g}",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    cells[1] = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    return [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in cells
    ]


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def what_happened(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The comparison in plain sentences."""
    finite = [row for row in rows if math.isfinite(row["learned"])]
    if len(finite) < len(rows):
        lost = ", ".join(row["name"] for row in rows if row not in finite)
        broken = f"{lost} diverged: the loss on the target sets is not a finite number. Lower the learning rate."
        return [*(what_happened(finite) if finite else ()), broken]
    most = max(rows, key=lambda row: row["learned"])
    sentences = [
        f"{most['name']} learned most: its loss on the target sets fell by {most['learned']:.3f} nats a token "
        f"(a perplexity {_factor(most['learned'])})."
    ]
    measured = [row for row in rows if row["forgot"] is not None]
    if measured:
        worst = max(measured, key=lambda row: row["forgot"])
        if worst["forgot"] > 0:
            sentences.append(
                f"{worst['name']} forgot most: its loss on the retained sets rose by {worst['forgot']:.3f} nats "
                f"a token."
            )
        else:
            sentences.append("No run forgot anything: the loss on the retained sets fell everywhere.")
    for row in rows:
        if row is most or most["learned"] <= 0:
            continue
        words = [f"{row['name']} learned {100 * row['learned'] / most['learned']:.0f} % as much as {most['name']}"]
        if row["forgot"] is not None and most["forgot"] is not None and most["forgot"] > 0:
            share = 100 * row["forgot"] / most["forgot"]
            words.append(f"forgot {share:.0f} % as much" if share > 0.5 else "forgot nothing")
        words.append(f"trained {row['trained_percent']:.3g} % of the parameters")
        if row["step_milliseconds"] and most["step_milliseconds"]:
            ratio = most["step_milliseconds"] / row["step_milliseconds"]
            words.append(
                f"took steps {ratio:.2f} times as fast" if ratio >= 1 else f"took steps {1 / ratio:.2f} times as long"
            )
        sentences.append(", ".join(words[:-1]) + f" and {words[-1]}.")
    return sentences


def _factor(nats: float) -> str:
    factor = math.exp(min(abs(nats), 50.0))
    return f"{factor:.2f} times lower" if nats >= 0 else f"{factor:.2f} times higher"
