"""One connection from every process of a job to process 0: roll call, agreement, and the end of one told to all.

JAX's own coordination ends a process from C++ when another one is lost, after a long time and without its name, and a
collective that waits for a lost process waits for ever. So process 0 listens on the coordinator's port before JAX
does, calls the roll, hands the port over and keeps the connections. A process that dies closes its connection at once;
one whose machine vanished stops sending heartbeats. Either way every process prints one sentence that names it, and
ends. A tiny process beside each one (`sentinel.py`) prints the sentence where the process can no longer do it.
"""

import contextlib
import json
import os
import platform
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxft.errors import JaxftError

PROCESS_LOST = 75  # exit code, EX_TEMPFAIL of sysexits.h: another process was lost, and the same command resumes
FAILED = 2  # exit code: another process met an error, which will come again
GRACE = 1.0  # seconds in which a process may meet the same error as another, and end with it
LINGER = 5.0  # seconds that process 0 waits for the others to have ended before it ends itself


class ProcessError(JaxftError):
    """The processes of a job are not all there, or not in step. The message names those that are not."""


class Peer(NamedTuple):
    """A process of the job, as it named itself at the roll call."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.rank} ({self.host}, pid {self.pid})"


class Wire:
    """JSON documents, one a line, over a socket."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket = connection
        self._buffer = b""
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a document. That the other end is gone is noticed by whoever reads."""
        data = json.dumps(message).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(data)

    def receive(self) -> list[dict[str, Any]] | None:
        """The documents that have arrived, after waiting for some bytes; None where the other end is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def receive_one(self) -> dict[str, Any] | None:
        """The next document, before any other has been sent; None where the other end is gone."""
        while (found := self.receive()) is not None:
            if found:
                return found[0]
        return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


# The roll call


def listen(port: int) -> socket.socket:
    """A listening socket on every address of this machine; port 0 takes a free one."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def call_roll(listener: socket.socket, count: int, timeout: float) -> tuple[list[Peer], dict[int, Wire]]:
    """In process 0: waits until every other process of the `count` has connected.

    Raises:
      ProcessError: some did not come within `timeout` seconds, or came twice, or expect another number; those that
        came are told the same.
    """
    me = Peer(0, platform.node(), os.getpid())
    came: dict[int, tuple[Peer, Wire]] = {}
    deadline, problem = time.monotonic() + timeout, ""
    while len(came) < count - 1 and not problem:
        listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            present = ", ".join(str(peer) for peer in [me, *(peer for peer, _ in came.values())])
            missing = ", ".join(str(i) for i in range(1, count) if i not in came)
            problem = (
                f"{count} processes were expected and {len(came) + 1} came within {timeout:.0f} s. "
                f"Missing: process {missing}. Present: {present}"
            )
            break
        connection.settimeout(max(min(deadline - time.monotonic(), 10.0), 0.001))
        wire = Wire(connection)
        try:
            hello = wire.receive_one()
        except (TimeoutError, ValueError):  # a port scan, or a process of another program
            hello = None
        if not hello or hello.get("jaxft") != "roll call":
            wire.close()
            continue
        peer = Peer(hello["index"], hello["host"], hello["pid"])
        if hello["count"] != count:
            problem = f"{peer} expects {hello['count']} processes, process 0 expects {count}"
        elif not 0 < peer.rank < count:
            problem = f"{peer} has a number that is not one of 1 to {count - 1}"
        elif peer.rank in came:
            problem = f"two processes have the same number: {came[peer.rank][0]} and {peer}"
        came[peer.rank if peer.rank not in came else -1] = (peer, wire)
    if problem:
        for _, wire in came.values():
            wire.send({"refused": problem})
            wire.close()
        raise ProcessError(problem)
    roll = [me, *(came[i][0] for i in range(1, count))]
    for _, wire in came.values():
        wire.send({"roll": roll})
    return roll, {i: wire for i, (_, wire) in came.items()}


def answer_roll(host: str, port: int, index: int, count: int, timeout: float) -> tuple[list[Peer], Wire]:
    """In the other processes: connects to process 0 and waits until all have. Raises ProcessError as `call_roll`."""
    deadline = time.monotonic() + timeout
    address = f"{host}:{port}"
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001))
            connection.settimeout(max(deadline - time.monotonic(), 0.001) + 10)
            wire = Wire(connection)
            wire.send({"jaxft": "roll call", "index": index, "host": platform.node(), "pid": os.getpid(),
                       "count": count})  # fmt: skip
            found = wire.receive_one()
            if found is not None:
                break
            wire.close()
            reason = "it closed the connection"
        except (OSError, ValueError) as error:  # a name that is not known yet is an OSError too
            reason = str(error)
        if time.monotonic() >= deadline:
            raise ProcessError(
                f"process {index}: process 0 did not answer at {address} within {timeout:.0f} s ({reason}). Is it "
                "running, is this its address, and may the machines reach each other at this port?"
            )
        time.sleep(min(0.2, max(deadline - time.monotonic(), 0.0)))
    if "refused" in found:
        wire.close()
        raise ProcessError(found["refused"])
    return [Peer(*peer) for peer in found["roll"]], wire


# The link


class Link:
    """What one process knows of the others, from the roll call to the end of the job.

    Args:
      index: number of this process.
      roll: all processes.
      wires: in process 0 those to all others, by number; elsewhere the one to process 0.
      coordinator: host and port at which process 0 can be tried, for the sentinel.
      timeout: seconds after which a process that is not heard from is taken for lost. May be changed later.
    """

    def __init__(
        self,
        index: int,
        roll: Sequence[Peer],
        wires: dict[int, Wire],
        coordinator: tuple[str, int],
        timeout: float = 60.0,
    ):
        self.index, self.roll, self.timeout = index, list(roll), timeout
        self._wires = wires
        self._changed = threading.Condition()
        self._values: dict[int, dict[int, tuple[str, Any]]] = {}  # process 0: what came to each meeting, by process
        self._results: dict[int, dict[str, Any]] = {}  # elsewhere: what process 0 answered
        self._meetings = 0
        self._left: set[int] = set()
        self._heard = dict.fromkeys(wires, time.monotonic())
        self._closed = self._ending = False
        self._failing = threading.Event()
        for wire in wires.values():
            wire.socket.settimeout(30.0)
        self._sentinel = _start_sentinel(self.me, self.roll[0], coordinator)
        self._thread = threading.Thread(target=self._listen, name="jaxft-link", daemon=True)
        self._thread.start()

    @property
    def me(self) -> Peer:
        return self.roll[self.index]

    def meet(
        self, name: str, value: Any = None, combine: Callable[[list[Any]], Any] | None = None, *, timeout: float = 1800
    ) -> Any:
        """A barrier at which every process leaves a JSON value; all get what process 0 makes of the values.

        Args:
          name: what it is for; a process that is at a meeting of another name is an error.
          value: this process's part.
          combine: values in the order of processes -> result, in process 0. What it raises as JaxftError, all raise.
          timeout: seconds to wait for the others. Processes that have died are noticed at once, whatever this is.

        Raises:
          ProcessError: a process did not come (which one, and where it is instead), or `combine` raised.
        """
        with self._changed:
            self._meetings += 1
            number = self._meetings
        if self.index:
            self._wires[0].send({"meeting": number, "name": name, "value": value})
            with self._changed:
                arrived = self._changed.wait_for(lambda: number in self._results, timeout + 30)
                answer = self._results.pop(number, {})
            if not arrived:
                raise ProcessError(f'{self.roll[0]} gave no answer at "{name}" within {timeout + 30:.0f} s')
        else:
            answer = self._hold(number, name, value, combine, timeout)
            for index, wire in self._wires.items():
                if index not in self._left:
                    wire.send({"result": number, **answer})
        if "error" in answer:
            raise ProcessError(answer["error"])
        return answer["value"]

    def _hold(
        self, number: int, name: str, value: Any, combine: Callable[[list[Any]], Any] | None, timeout: float
    ) -> dict[str, Any]:
        everyone = set(range(len(self.roll)))
        with self._changed:
            came = self._values.setdefault(number, {})
            came[0] = (name, value)
            self._changed.wait_for(lambda: everyone <= came.keys() | self._left, timeout)
            self._values.pop(number)
            left = self._left - came.keys()
            missing = everyone - came.keys() - left
        if left:
            return {"error": f'at "{name}": {_list(self.roll, left)} ended before the others'}
        if missing:
            self._failing.set()
            error = f'{_list(self.roll, missing)} did not come to "{name}" within {timeout:.0f} s'
            for index in missing:  # the others raise the error
                self._wires[index].send({"stop": error, "code": PROCESS_LOST})
            return {"error": error}
        if other := {index: said for index, (said, _) in came.items() if said != name}:
            index, said = min(other.items())
            return {"error": f'the processes are not in step: {self.roll[index]} is at "{said}", process 0 at "{name}"'}
        values = [came[index][1] for index in sorted(came)]
        try:
            return {"value": combine(values) if combine else None}
        except JaxftError as error:
            return {"error": str(error)}

    # Heartbeats and ends

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        for index, wire in self._wires.items():
            selector.register(wire.socket, selectors.EVENT_READ, index)
        beat = 0.0
        while not self._closed and not self._ending:
            if time.monotonic() - beat > min(5.0, self.timeout / 4):
                beat = time.monotonic()
                for index in self._wires.keys() - self._left:
                    self._wires[index].send({})
                self._find_silent()
            for key, _ in selector.select(min(1.0, self.timeout / 8)):
                try:
                    messages = self._wires[key.data].receive()
                except TimeoutError:
                    continue
                if messages is None:
                    selector.unregister(key.fileobj)
                    self._gone(key.data)
                    continue
                self._heard[key.data] = time.monotonic()
                for message in messages:
                    self._take(key.data, message)
        selector.close()

    def _take(self, index: int, message: dict[str, Any]) -> None:
        if "stop" in message:
            if message["code"] == FAILED:
                self._let_fail()
            self._end(message["stop"], message["code"])
        elif "failed" in message:
            text = f"{self.roll[index]} stopped: {message['failed']}"
            if not self._ending:
                self._tell(text, FAILED, but=index)
                self._let_fail()
                self._wait_for_ends()
                self._end(text, FAILED)
        elif "bye" in message:
            with self._changed:
                self._left.add(index)
                self._changed.notify_all()
        elif "meeting" in message:
            with self._changed:
                self._values.setdefault(message["meeting"], {})[index] = (message["name"], message["value"])
                self._changed.notify_all()
        elif "result" in message:
            with self._changed:
                self._results[message["result"]] = message
                self._changed.notify_all()

    def _gone(self, index: int) -> None:
        if index not in self._left and not self._closed and not self._ending:
            self._lost(index, "ended without a word (killed, out of memory, or its machine was taken away)")

    def _find_silent(self) -> None:
        for index, at in self._heard.items():
            silent = time.monotonic() - at
            if index not in self._left and silent > self.timeout:
                self._lost(index, f"has not been heard from for {silent:.0f} s")

    def _lost(self, index: int, how: str) -> None:
        others = "" if index else ", and it coordinated this run"
        text = f"{self.roll[index]} {how}{others}; the same command resumes from the latest checkpoint"
        if self.index == 0:  # ends last, for JAX aborts the others when it is gone
            self._tell(text, PROCESS_LOST, but=index)
            self._wait_for_ends()
        self._end(text, PROCESS_LOST)

    def _let_fail(self) -> None:
        """An error that one process met may be everybody's: each may then say so itself, and end by itself."""
        if self._failing.wait(GRACE):
            time.sleep(2 * LINGER)

    def _tell(self, text: str, code: int, but: int | None = None) -> None:
        self._ending = True
        for index, wire in self._wires.items():
            if index not in self._left and index != but:
                wire.send({"stop": text, "code": code})

    def _wait_for_ends(self) -> None:
        deadline = time.monotonic() + LINGER
        for index in self._wires.keys() - self._left:
            wire = self._wires[index]
            with contextlib.suppress(OSError, ValueError):
                while (left := deadline - time.monotonic()) > 0:
                    wire.socket.settimeout(left)
                    if wire.receive() is None:
                        break

    def _end(self, text: str, code: int) -> NoReturn:
        """Ends this process at once: its other threads may be waiting for ever inside a collective."""
        self._ending = True
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os.write(2, f"\nerror: process {self.index} stops, because {text}\n".encode())
        self._dismiss_sentinel()  # not earlier: JAX may abort this process at any moment
        os._exit(code)

    def fail(self, reason: str) -> None:
        """Tells the others that this process stops, and why: they end too."""
        self._failing.set()
        self._dismiss_sentinel()
        if self._ending or self._closed:
            if self.index == 0:
                self._wait_for_ends()
            return
        if self.index:
            self._ending = True
            self._wires[0].send({"failed": reason})
        else:
            self._tell(f"{self.me} stopped: {reason}", FAILED)
            self._thread.join(2)  # it lets go of the wires
            self._wait_for_ends()

    @property
    def broken(self) -> bool:
        """Whether the job has failed, so that an orderly end, for which JAX waits for all, cannot be had."""
        return self._failing.is_set() or self._ending

    def wait_for_end(self) -> None:
        """Waits for word that another process was lost, which ends this one."""
        time.sleep(3 * LINGER)

    def close(self) -> None:
        """Leaves the job in peace."""
        if self._closed or self._ending:
            return
        self._closed = True
        for wire in self._wires.values():
            wire.send({"bye": True})
        self._dismiss_sentinel()

    def _dismiss_sentinel(self) -> None:
        if self._sentinel.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._sentinel.stdin.write(b"bye\n")
                self._sentinel.stdin.close()


def _list(roll: Sequence[Peer], indices: Iterable[int]) -> str:
    return ", ".join(str(roll[index]) for index in sorted(indices))


def _start_sentinel(me: Peer, first: Peer, coordinator: tuple[str, int]) -> subprocess.Popen[bytes]:
    program = str(Path(__file__).with_name("sentinel.py"))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", program, str(me), "" if me.rank == 0 else str(first), *map(str, coordinator)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the run
    )
