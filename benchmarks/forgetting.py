"""What tuning methods learn and forget over a sequence of tasks: `python benchmarks/forgetting.py`.

The embedded model learns four tasks one after the other, each method from the same start and over the same batches;
after each task the update is merged into the weights and every task, learned or not, is measured on held-out rows,
together with the text that the model was pretrained on. Each seed has its own order of tasks, data and draws.

1. `api-docs`: what a function of numpy or jax does, from its signature (real text)
2. `source`: functions of Python's standard library, as code (real text)
3. `unicode`: the name of a character, from its code point (real data, from `unicodedata`)
4. `numbers`: a number in words, from its digits (programmatic)

Every method runs at several learning rates, because the rate trades one for the other: read who forgets less at equal
*learned*, not at equal rates. With R[i, j] the loss on task j after the i-th task of the order (nats a target token):

- *learned*: mean over tasks of base loss - R[j, j], the fall on a task right after it was learned
- *forgot (tasks)*: mean over all but the last task of R[T, j] - R[j, j]; backward transfer is its negative
- *forgot (pretraining)*: the rise of the loss on held-out documentation of the standard library, over the sequence
- *final*: mean over tasks of R[T, j]

Figures are means over seeds with 95 % intervals (Student's t). The sequences of a method at a rate are kept as soon as
they are done, so that an interrupted run goes on where it stopped; `--write` makes docs/forgetting.md and its picture.
"""

import argparse
import ast
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import sysconfig
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import jaxft
from jaxft.data import DataConfig, EvaluationSetConfig, train_batches
from jaxft.distributed import MeshConfig, make_mesh, shard_batch
from jaxft.evaluation import EvaluationConfig, make_evaluation
from jaxft.methods import Method, Probe, Signals, build
from jaxft.picture import COLOURS, MARKERS
from jaxft.training.compilation import enable_compilation_cache
from jaxft.training.output import write_atomically
from jaxft.training.state import init_state, shardings_of, tuned_of
from jaxft.training.step import make_train_step
from jaxft.weights import Tree, materialize

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results" / "forgetting.json", ROOT.parent / "docs" / "forgetting.md"
TASKS = ("api-docs", "source", "unicode", "numbers")
PRETRAINING = "python-docs"

# What is compared, and at which learning rates. Budgets: half for HFT, else about a tenth of the parameters. Full
# tuning has a lower rate more, at which it learns as little as the others do.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "full": ({"name": "full"}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "hft": ({"name": "hft"}, (3e-4, 1e-3, 3e-3)),
    "lisa": ({"name": "lisa", "period": 10}, (3e-4, 1e-3, 3e-3)),
    "lora": ({"name": "lora", "rank": 16}, (1e-3, 3e-3, 1e-2)),
    "lift": ({"name": "lift-principal-weights", "budget": 0.1, "period": 20}, (3e-4, 1e-3, 3e-3)),
    "s2ft": ({"name": "s2ft"}, (1e-3, 3e-3, 1e-2)),
    "spiel": ({"name": "spiel", "budget": 0.1, "period": 10, "batches": 2}, (1e-3, 3e-3, 1e-2)),
}


# --- tasks ------------------------------------------------------------------------------------------------------------

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(n: int) -> str:
    """
    >>> in_words(4217)
    'four thousand two hundred seventeen'
    """
    if n < 20:
        return UNITS[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f" {UNITS[n % 10]}" if n % 10 else "")
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    return f"{in_words(n // size)} {name}" + (f" {in_words(n % size)}" if n % size else "")


def number_rows() -> list[dict[str, str]]:
    return [{"prompt": str(n), "completion": in_words(n)} for n in range(1, 10_000)]


def unicode_rows() -> list[dict[str, str]]:
    """Letters and signs with a name, below the CJK blocks (whose names repeat the code point)."""
    named = ((n, unicodedata.name(chr(n), "")) for n in range(0x20, 0x3000))
    return [{"prompt": f"U+{n:04X}", "completion": name.capitalize()} for n, name in named if name]


def source_rows() -> list[dict[str, str]]:
    """Functions of the top-level modules of the standard library, without their docstrings."""
    rows = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
                text = ast.unparse(node)
                if 80 <= len(text) <= 600:
                    rows.append({"text": text})
    return rows


def write_tasks(directory: Path) -> None:
    """`directory/TASK-train.jsonl` and `-test.jsonl` of the tasks that no builtin source offers; 5 % are held out."""
    for task, rows in (("source", source_rows()), ("unicode", unicode_rows()), ("numbers", number_rows())):
        random.Random(task).shuffle(rows)
        cut = len(rows) // 20
        for part, some in (("test", rows[:cut]), ("train", rows[cut:])):
            lines = (json.dumps(row) for row in some)
            (directory / f"{task}-{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_source(task: str, directory: Path) -> dict[str, Any]:
    if task == "api-docs":
        return {"path": "builtin:api-docs", "holdout": 0.1, "part": "train"}
    return {"path": str(directory / f"{task}-train.jsonl")}


def test_source(task: str, directory: Path) -> dict[str, Any]:
    builtin, limit = {"api-docs": 0.1, PRETRAINING: 0.05}, 40 if task == PRETRAINING else 150  # its rows are pages
    if task in builtin:
        return {"path": f"builtin:{task}", "holdout": builtin[task], "part": "holdout", "limit": limit}
    return {"path": str(directory / f"{task}-test.jsonl"), "limit": limit}


# --- one sequence -----------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What all sequences share."""

    model: Any
    base: Tree
    tokenizer: Any
    mesh: Any
    directory: Path
    steps: int
    batch_size: int
    seq_len: int
    evaluate: Callable[[Tree], dict[str, dict[str, float]]]

    def data(self, task: str) -> DataConfig:
        return DataConfig(
            sources=[train_source(task, self.directory)],
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            loss_on="answers",
            chat_template="plain",
        )


def make_setting(options: argparse.Namespace, directory: Path) -> Setting:
    model, base = jaxft.load_pretrained("nano")
    tokenizer = jaxft.load_tokenizer("nano")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    write_tasks(directory)
    setting = Setting(model, base, tokenizer, mesh, directory, options.steps, options.batch_size, options.seq_len, dict)
    sets = {t: EvaluationSetConfig(**test_source(t, directory), kind="target") for t in (*TASKS, PRETRAINING)}
    evaluate = make_evaluation(EvaluationConfig(sets=sets), setting.data("numbers"), tokenizer, model, mesh)
    return setting._replace(evaluate=evaluate)


class Trainer:
    """One method at one learning rate: its train step is compiled once and serves every task and seed."""

    def __init__(self, setting: Setting, spec: Mapping[str, Any], learning_rate: float):
        self.setting, self.method = setting, build(dict(spec))
        warmup = max(1, setting.steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, setting.steps)
        self.optimizer = optax.adamw(schedule, weight_decay=0.01)
        self.loss = jaxft.language_model_loss(setting.model, remat="none")
        self.steps: dict[int, Any] = {}

    def batches(self, task: str, seed: int) -> Iterator[dict[str, Any]]:
        found = train_batches(self.setting.data(task), self.setting.tokenizer, seed=seed)
        return (shard_batch(batch, self.setting.mesh) for batch in found)

    def run(self, params: Tree, task: str, seed: int, method: Method | None = None, steps: int | None = None) -> Tree:
        """`params` after one task, merged."""
        method, total = method or self.method, steps or self.setting.steps
        probe = Probe(
            loss_fn=self.loss,
            batches=lambda: self.batches(task, seed),
            trainer=lambda p, m, n: self.run(p, task, seed, m, n),
            total_steps=total,
        )
        rng = jax.random.key(seed)
        axes = self.setting.model.logical_axes()
        state, frozen = init_state(
            method, params, self.optimizer, rng, self.setting.mesh, logical_axes=axes, probe=probe
        )
        if id(method) not in self.steps:
            self.steps[id(method)] = make_train_step(
                self.loss, method, self.optimizer, clip_norm=1.0, shardings=shardings_of(state)
            )
        train_step = self.steps[id(method)]
        for step, batch in zip(range(1, total + 1), self.batches(task, seed), strict=False):
            state, metrics = train_step(state, frozen, batch)
            gradients = metrics.pop("gradients", None)
            if method.update is not None and method.due is not None and method.due(step, total):
                signals = Signals(loss=metrics["loss"], gradients=gradients, probe=probe)
                tuned, opt_state = method.update(
                    jax.random.fold_in(rng, step), tuned_of(state, frozen), state.opt_state, signals, step
                )
                state = state._replace(trainable=tuned.trainable, opt_state=opt_state, method_state=tuned.state)
                frozen = tuned.frozen
        return materialize(jaxft.merge(tuned_of(state, frozen)))


def sequence(trainer: Trainer, seed: int, tasks: list[str]) -> dict[str, Any]:
    """Losses after every task of one sequence: `losses[i][name]`, row 0 the base model's."""
    setting = trainer.setting
    params, began = setting.base, time.time()
    losses = [{name: found["loss"] for name, found in setting.evaluate(params).items()}]
    for task in tasks:
        params = trainer.run(params, task, seed)
        losses.append({name: found["loss"] for name, found in setting.evaluate(params).items()})
    return {"tasks": tasks, "losses": losses, "seconds": time.time() - began}


def order_of(seed: int) -> list[str]:
    tasks = list(TASKS)
    random.Random(seed).shuffle(tasks)
    return tasks


# --- figures ----------------------------------------------------------------------------------------------------------


def measures(found: Mapping[str, Any]) -> dict[str, float]:
    tasks, losses = found["tasks"], found["losses"]
    after = {task: losses[i + 1][task] for i, task in enumerate(tasks)}
    last = losses[-1]
    return {
        "learned": statistics.mean(losses[0][t] - after[t] for t in tasks),
        "forgot_tasks": statistics.mean(last[t] - after[t] for t in tasks[:-1]),
        "forgot_pretraining": last[PRETRAINING] - losses[0][PRETRAINING],
        "final": statistics.mean(last[t] for t in tasks),
    }


# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (NaN for a single value)."""
    if len(values) < 2:
        return values[0], math.nan
    spread = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), spread


Row = dict[str, tuple[float, float]]
FORGOT = ("forgot_tasks", "forgot_pretraining")


def by_seed(results: Mapping[str, Any]) -> dict[tuple[str, float], dict[str, dict[str, float]]]:
    """(method, learning rate) -> seed -> measure, for what is done."""
    return {
        (name, float(rate)): {seed: measures(run) for seed, run in runs.items()}
        for name, by_rate in results["sequences"].items()
        for rate, runs in sorted(by_rate.items(), key=lambda item: float(item[0]))
    }


def over_seeds(found: list[dict[str, float]]) -> Row:
    return {key: interval([m[key] for m in found]) for key in found[0]}


def summary(results: Mapping[str, Any]) -> dict[tuple[str, float], Row]:
    """(method, learning rate) -> measure -> (mean, half width), over the seeds that are done."""
    return {key: over_seeds(list(runs.values())) for key, runs in by_seed(results).items()}


def forgotten_at(curve: list[dict[str, float]], learned: float) -> dict[str, float] | None:
    """What was forgotten where so much was learned, linear between the points of `curve`; None beyond its ends."""
    for below, above in itertools.pairwise(sorted(curve, key=lambda m: m["learned"])):
        if below["learned"] <= learned <= above["learned"]:
            share = (learned - below["learned"]) / (above["learned"] - below["learned"])
            return {key: (1 - share) * below[key] + share * above[key] for key in FORGOT}
    return None


def at_equal_learning(results: Mapping[str, Any]) -> dict[tuple[str, float], tuple[float, Row]]:
    """(method, learning rate) -> (mean learned, how much less than full tuning the method forgot at equal learning).

    Seed by seed, since the order of the tasks decides how much there is to forget: full tuning's curve over its rates
    is interpolated linearly in what it learned. A rate at which some seed learned more or less than full tuning at all
    of its rates is left out.
    """
    found = by_seed(results)
    full = [runs for (name, _), runs in found.items() if name == "full"]
    gains = {}
    for (name, rate), runs in found.items():
        at_full = {seed: forgotten_at([curve[seed] for curve in full], run["learned"]) for seed, run in runs.items()}
        if name != "full" and all(at_full.values()):
            less = [{key: at_full[seed][key] - run[key] for key in FORGOT} for seed, run in runs.items()]
            gains[name, rate] = statistics.mean(run["learned"] for run in runs.values()), over_seeds(less)
    return gains


def page(results: Mapping[str, Any]) -> str:
    table, setting = summary(results), results["setting"]

    def cell(value: tuple[float, float]) -> str:
        return f"{value[0]:.2f}" + ("" if math.isnan(value[1]) else f" ± {value[1]:.2f}")

    lines = [
        "# Forgetting",
        "",
        "What tuning methods learn and forget when one model learns four tasks, one after the other. Written by",
        "`python benchmarks/forgetting.py --write`, whose first lines define tasks and measures; do not edit.",
        "",
        f"Base: the embedded model *nano*. Each seed has its own order of tasks; {setting['steps']} steps a task of "
        f"{setting['batch_size']} x {setting['seq_len']} tokens; AdamW, warm-up and cosine decay; the update is merged "
        "after each task. Means with 95 % intervals over seeds; nats a target token.",
        "",
        "![Learned against forgot](images/forgetting.png)",
        "",
        "| method | learning rate | seeds | learned | forgot (tasks) | forgot (pretraining) | final loss |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, rate), row in table.items():
        seeds = len(results["sequences"][name][f"{rate:g}"])
        cells = " | ".join(cell(row[key]) for key in ("learned", "forgot_tasks", "forgot_pretraining", "final"))
        lines.append(f"| {name} | {rate:g} | {seeds} | {cells} |")
    lines += [
        "",
        "*learned*: more is better. *forgot*: less is better; *backward transfer* is the negative of *forgot (tasks)*.",
        "",
        "## At equal learning",
        "",
        "What full tuning forgot at the rate (interpolated) at which it learned as much as the method, less what the",
        "method forgot, seed by seed: where the interval lies above zero the method forgot less, below it more. Rates",
        "at which a method learned less than full tuning at all of its rates cannot be compared and are left out.",
        "",
        "| method | learning rate | learned | forgot less of the tasks | forgot less of pretraining |",
        "|---|--:|--:|--:|--:|",
    ]
    for (name, rate), (learned, row) in at_equal_learning(results).items():
        tasks, pretraining = (f"{row[key][0]:+.2f} ± {row[key][1]:.2f}" for key in FORGOT)
        lines.append(f"| {name} | {rate:g} | {learned:.2f} | {tasks} | {pretraining} |")
    lines += [
        "",
        "The papers of HFT (Hui et al., 2024), LIFT (Liu et al., 2025) and S2FT (Yang et al., 2024) claim about as",
        "much learned as by full tuning and less forgotten; Biderman et al. (2024) find that LoRA learns less and",
        "forgets less. Where the table disagrees, it says so about a model of three million parameters and short",
        "tasks: it tells apart mechanisms, it does not predict what a model of billions will do.",
        "",
        f"Measured on {results['date']} with {results['versions']}, in {results['seconds'] / 60:.0f} minutes.",
        "",
    ]
    return "\n".join(lines)


def picture(results: Mapping[str, Any]) -> bytes:
    """A PNG: for each method a curve over its learning rates, learned against forgotten."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    table = summary(results)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharex=True)
    for axes, key, label in zip(
        panels, ("forgot_tasks", "forgot_pretraining"), ("earlier tasks", "pretraining"), strict=True
    ):
        for i, name in enumerate(dict.fromkeys(name for name, _ in table)):
            rows = [row for (other, _), row in table.items() if other == name]
            axes.plot(
                [row["learned"][0] for row in rows], [row[key][0] for row in rows],
                marker=MARKERS[i], color=COLOURS[i], label=name,
            )  # fmt: skip
        axes.set_xlabel("learned, nats a token (more is better →)")
        axes.set_ylabel(f"forgot of {label}, nats a token (less is better ↓)")
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white")
    plt.close(figure)
    return file.getvalue()


# --- running ----------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """All sequences that have no result yet, in `options.jobs` processes: the model is too small for threads."""
    wanted = []
    # The middle rates of every method first, so that there is something to compare early.
    for position in (1, 0, 2, 3):
        for name in options.methods:
            for rate in METHODS[name][1][position : position + 1]:
                done = results["sequences"].setdefault(name, {}).setdefault(f"{rate:g}", {})
                missing = [seed for seed in range(options.seeds) if str(seed) not in done]
                wanted += [(name, rate, missing)] if missing else []
    began, before = time.time(), results.get("seconds", 0.0)
    with (
        tempfile.TemporaryDirectory() as directory,
        ProcessPoolExecutor(
            options.jobs, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(options, directory)
        ) as pool,
    ):
        for finished in as_completed([pool.submit(_sequences, *one) for one in wanted]):
            name, rate, found = finished.result()
            results["sequences"][name][f"{rate:g}"] |= found
            results["seconds"] = before + time.time() - began
            for seed, one in found.items():
                figures = {key: round(value, 3) for key, value in measures(one).items()}
                print(f"{name} at {rate:g}: seed {seed} {figures} in {one['seconds']:.0f} s", flush=True)
            save(results)


_setting: Setting  # of a worker


def _prepare(options: argparse.Namespace, directory: str) -> None:
    global _setting
    enable_compilation_cache()
    mine = Path(directory) / str(os.getpid())
    mine.mkdir()
    _setting = make_setting(options, mine)


def _sequences(name: str, rate: float, seeds: list[int]) -> tuple[str, float, dict[str, Any]]:
    """One method at one rate over some seeds, in a worker."""
    trainer = Trainer(_setting, METHODS[name][0], rate)
    return name, rate, {str(seed): sequence(trainer, seed, order_of(seed)) for seed in seeds}


def save(results: Mapping[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="steps a task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--write", action="store_true", help="write docs/forgetting.md too")
    parser.add_argument("--only-write", action="store_true", help="write it from the results there are")
    options = parser.parse_args()
    setting = {"steps": options.steps, "batch_size": options.batch_size, "seq_len": options.seq_len}
    results: dict[str, Any] = {}
    if RESULTS.exists() and not options.again:
        results = json.loads(RESULTS.read_text())
        if results["setting"] != setting:
            parser.error(f"{RESULTS} was made with {results['setting']}; --again starts anew with {setting}")
    results = {"setting": setting, "sequences": {}} | results
    results["date"] = time.strftime("%Y-%m-%d")
    results["versions"] = f"jax {jax.__version__} on {os.cpu_count()} CPU cores ({platform.machine()})"
    if not options.only_write:
        run(options, results)
    for (name, rate), row in summary(results).items():
        print(f"{name:6} {rate:<6g}", {key: tuple(round(v, 3) for v in value) for key, value in row.items()})
    if options.write or options.only_write:
        write_atomically(PAGE, page(results))
        (PAGE.parent / "images" / "forgetting.png").write_bytes(picture(results))


if __name__ == "__main__":
    main()
