"""Says what happened when a process of a job ended without being able to. Started by `link.py`, beside each process.

It reads its standard input, which the process holds open: `bye` means that the process ended in an orderly way. Without
it, one sentence goes to standard error. Imports nothing but the standard library.
"""

import signal
import socket
import sys


def main(me: str, first: str, host: str, port: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if b"bye" in sys.stdin.buffer.read():
        return
    text = f"{me} ended without a word: killed, out of memory, or aborted by a library (see above)"
    if first:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            text = (
                f"{me} stops, because {first}, which coordinated this run, ended or can no longer be reached; "
                "the same command resumes from the latest checkpoint"
            )
    print(f"\nerror: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
