"""Stopping on request: SIGTERM (what schedulers and spot machines send) and SIGINT (Ctrl-C) save and exit cleanly."""

import itertools
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias

import jax
from jax.experimental import multihost_utils

Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | None

# JAX's preemption service agrees on the number after the largest that a process has asked with, and says yes to that
# number alone. A resumed run that asked with its steps would leap over it, if the notice came before the first of them.
_questions = itertools.count(1)


class Interrupted(SystemExit):
    """The run stopped because it was asked to, after saving a checkpoint; running the same command again resumes it.

    `code` is 128 plus the signal number, as shells report it: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(128 + signal_number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """While entered, SIGTERM and SIGINT are noted instead of ending the process. A second one acts as it used to.

    With several processes SIGTERM belongs to JAX's preemption service, which every process asks at every step, so that
    all of them stop after the same step although only one was told. SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            wanted = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        if number == signal.SIGINT and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(2, b"\nstopping after this step and saving; the same signal again stops at once\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def after_step(self) -> int | None:
        """The signal for which to stop after a step, None to go on. To be asked after every step.

        With several processes: the same answer on all.
        """
        if jax.process_count() == 1:
            return self.signal
        return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(next(_questions)) else None
