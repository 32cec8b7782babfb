"""One run of the tiny model in a process of its own, forked from a server that has imported everything already."""

import gc
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from jaxft.errors import JaxftError
from jaxft.training import train
from tests.environment import xla_flags
from tests.training.tiny import IMPORTED_BY_RUNS, tiny_config

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.training.run_tiny", *IMPORTED_BY_RUNS])


def start(directory: Path, output: Path, sections: dict[str, Any]) -> multiprocessing.Process:
    """Starts a run on one device; what it prints goes to `<output>.log`."""
    process = _context.Process(target=_run, args=(directory, output, sections))
    process.start()
    return process


def log(output: Path) -> str:
    return output.with_suffix(".log").read_text()


def _run(directory: Path, output: Path, sections: dict[str, Any]) -> None:
    gc.freeze()  # a collection would write to all that was imported, and so copy the memory that is shared
    os.environ["XLA_FLAGS"] = xla_flags(1)  # read when the first device is asked for
    file = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        train(tiny_config(directory, output, **sections))
    except JaxftError as error:
        sys.exit(f"error: {error}")
