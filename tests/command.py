"""The command line, run in this process."""

import sys

from moefy.cli import main


def run(monkeypatch, *args):
    """The exit status of `moefy ARGS`."""
    monkeypatch.setattr(sys, "argv", ["moefy", *args])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0
