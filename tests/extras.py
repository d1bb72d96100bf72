"""Packages of the extras, which a newcomer may not have installed: left out then, but in CI they have to be there."""

import importlib
import os

import pytest


def extra(name):
    return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)
