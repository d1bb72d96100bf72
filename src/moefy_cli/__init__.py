"""The `moefy` command before it imports anything: torch and transformers take seconds, in which Ctrl-C is heard too.

While `starting` is true, `import moefy` brings no more than the package itself (see its __init__.py).
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

INTERRUPTED = "Interrupted; nothing was left half written."
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
starting = False
_report: Callable[..., Any] = sys.unraisablehook


def main() -> None:
    """The entry point of the `moefy` command."""
    global starting
    on_stop(_leave)
    try:
        os.getcwd()
    except FileNotFoundError:  # in which MKL ends the process with a message of its own
        print("moefy: The current directory is gone; change to one that is there.", file=sys.stderr)
        sys.exit(2)
    starting = True
    from moefy.cli.app import main as run

    try:
        run()
    finally:
        starting = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is impatient shall not see how Python ends


def on_stop(handler: Callable[..., Any]) -> None:
    """What Ctrl-C, `kill` and a closed terminal do from now on, except where they are ignored, as under nohup."""
    for stop in STOPS:
        if signal.getsignal(stop) is not signal.SIG_IGN:
            signal.signal(stop, handler)


def raise_on_stop() -> None:
    """From now on a stop is a KeyboardInterrupt, so that what is temporary goes.

    One that comes while Python runs a `__del__` is printed and lost, as any exception there, and which moment that is
    depends on the garbage collector: it is raised once more.
    """
    global _report
    on_stop(signal.default_int_handler)
    if sys.unraisablehook is not _again:
        _report, sys.unraisablehook = sys.unraisablehook, _again


def _again(lost: Any) -> None:
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        return _report(lost)
    heard = next(stop for stop in STOPS if signal.getsignal(stop) is not signal.SIG_IGN)  # under nohup another
    timer = threading.Timer(0.05, os.kill, [os.getpid(), heard])
    timer.daemon = True
    timer.start()
    return None


def _leave(*_: Any) -> None:
    """End at once: an exception amid the import of an extension may end up as another one, or as none."""
    shown = "\r\x1b[2K\x1b[?25h" if os.isatty(sys.stderr.fileno()) else ""  # the line and the cursor of "Starting"
    os.write(sys.stderr.fileno(), f"{shown}{INTERRUPTED}\n".encode())
    os._exit(130)
