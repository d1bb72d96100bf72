"""The `moefy` command before it imports anything: torch and transformers take seconds, in which Ctrl-C is heard too."""

import os
import signal
import sys

from moefy_cli import starting
from moefy_cli.stops import leave, on_stop


def main() -> None:
    """The entry point of the `moefy` command."""
    on_stop(leave)
    try:
        os.getcwd()
    except FileNotFoundError:  # in which MKL ends the process with a message of its own
        print("moefy: The current directory is gone; change to one that is there.", file=sys.stderr)
        sys.exit(2)
    starting.now = True
    from moefy.cli.app import main as run

    try:
        run()
    finally:
        starting.now = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is impatient shall not see how Python ends
