"""Jobs of several processes, killed again and again at moments and in places drawn at random, until a run is done.

    python benchmarks/kills.py --campaigns 20 --seed 1

A campaign is one run of half fine-tuning (two rounds of 20 steps, a checkpoint every 5) on four CPU devices. Each time,
it is started in 1, 2 or 4 processes; after a random time from its start, beginning with the roll call, one of them gets
SIGKILL or SIGTERM. Needs the test dependencies. Checked each time:

- all processes end within 60 s of SIGKILL; told to stop they may have to compile and take a step first;
- no job reports success before its run is done, nor runs on to the end though it was told to stop in time;
- after SIGKILL, each of the others names the process that is gone (before the roll call: that it did not come);
- the run's directory stays usable: the next start resumes, whatever its number of processes.

And in the end: every step's loss is there once and is that of an uninterrupted run in one process (rtol 1e-5).
"""

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxft.distributed import initialize
from jaxft.distributed.link import PROCESS_LOST
from tests.distributed.job import Job, losses, steps_done, train_all, train_slowly
from tests.training.tiny import write_tiny

STEPS, DEVICES = 40, 4
LONGEST = {signal.SIGKILL: 60.0, signal.SIGTERM: 300.0}  # seconds after it
ROLL_CALL = 20.0  # seconds that processes wait for others to come
SECTIONS: dict[str, Any] = {
    "method": {"name": "hft", "rounds": 2},
    "training": {"steps": STEPS, "learning_rate": 1e-2},
    "evaluation": {"sets": {}},
    "checkpoint": {"every": 5},
    "mesh": {"data": 2, "fsdp": 2},
}


def join_and_train(rank: int, *arguments: Any) -> None:
    initialize(timeout=ROLL_CALL)
    train_slowly(rank, *arguments)


def check(job: Job, number: int, victim: int, codes: list[int | None], is_done: bool) -> str:
    """What the end of a job was, in a word. Raises AssertionError where it was none that is allowed."""
    if is_done and set(codes) <= {0, 143, -number}:
        return "after the end"
    if number == signal.SIGTERM and set(codes) == {143}:
        return "saved and left"
    # Before a process can catch SIGTERM it ends as any other program.
    assert codes[victim] == -number, f"{codes}\n{job.logs()}"
    word = "alone"
    for rank, code in enumerate(codes):
        if rank == victim:
            continue
        log = job.log_until(rank, "error: ")
        if "Missing: process" in log or "did not answer at" in log:
            assert code != 0 and f"process {victim}" in log, f"{codes}\n{job.logs()}"
            word = "missed at the roll call"
        else:
            # JAX aborts (SIGABRT) those who lose their coordinator, if it is faster; the sentence comes all the same.
            assert code in ({PROCESS_LOST, -6} if victim == 0 else {PROCESS_LOST}), f"{codes}\n{job.logs()}"
            assert f"process {victim} (" in log, f"{codes}\n{job.logs()}"
            word = "named by the others"
    return word


def campaign(directory: Path, where: Path, expected: list[float], rng: random.Random, ends: collections.Counter) -> int:
    """Starts and kills until the run is done; how often it was started."""
    output, span = where / "run", 6.0
    for start in range(1, 200):
        count, number = rng.choice((1, 2, 4, 4)), rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        victim, delay = rng.randrange(count), rng.uniform(0, span)
        begun = time.monotonic()
        logs, run = where / f"logs-{start}", (directory, output, SECTIONS, 0.05)
        with Job(logs, count, DEVICES // count, join_and_train, *run) as job:
            process = job.processes[victim]
            process.join(delay)
            in_time = process.is_alive() and steps_done(output) < STEPS - 3  # to be answered after the next step
            if process.is_alive():
                os.kill(process.pid, number)
            codes = job.wait(LONGEST[number])
            is_done = (output / "report.json").exists()
            if codes == [0] * count:
                assert is_done and not in_time, f"{number.name} was ignored\n{job.logs()}"
                word = "finished"
            else:
                word = check(job, number, victim, codes, is_done)
        ends[word] += 1
        print(f"  start {start}: {count} processes, {number.name} to {victim} after {delay:.1f} s: {codes}, {word}, "
              f"{steps_done(output)} steps, {time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
        if is_done:
            break
        span = min(span * 1.15, 40.0)  # a run that never gets far enough to save is not what this is about
    found = losses(output)
    assert json.loads((output / "report.json").read_text())["steps"] == STEPS
    assert len(found) == STEPS, f"{len(found)} losses"
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    return start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaigns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        directory = write_tiny(Path(root))
        with Job(Path(root) / "logs", 1, DEVICES, train_all, directory, [(Path(root) / "whole", SECTIONS)]) as job:
            job.finish()
        expected, ends, starts = losses(Path(root) / "whole"), collections.Counter[str](), 0
        for index in range(arguments.campaigns):
            seed = f"{arguments.seed}.{index}"
            print(f"campaign {seed}", flush=True)
            starts += campaign(directory, Path(root) / seed, expected, random.Random(seed), ends)
        print(f"{arguments.campaigns} runs, started {starts} times, all as an uninterrupted one: {dict(ends)}")


if __name__ == "__main__":
    main()
