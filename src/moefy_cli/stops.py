"""What Ctrl-C, `kill` and a closed terminal do, before and after torch is imported."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

INTERRUPTED = "Interrupted; nothing was left half written."
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_report: Callable[..., Any] = sys.unraisablehook


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


def leave(*_: Any) -> None:
    """End at once: an exception amid the import of an extension may end up as another one, or as none."""
    shown = "\r\x1b[2K\x1b[?25h" if os.isatty(sys.stderr.fileno()) else ""  # the line and the cursor of "Starting"
    os.write(sys.stderr.fileno(), f"{shown}{INTERRUPTED}\n".encode())
    os._exit(130)
