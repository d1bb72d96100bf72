"""The command line, run in this process: in one of its own it would import torch and transformers for five seconds."""

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from moefy.cli.app import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(monkeypatch, *args):
    """The exit status of `moefy ARGS`."""
    monkeypatch.setattr(sys, "argv", ["moefy", *args])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def moefy(*args):
    """`moefy ARGS` with what it writes."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(patch, *map(str, args))
    return Done(status, out.getvalue(), err.getvalue())
