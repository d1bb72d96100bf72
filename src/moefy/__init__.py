"""moefy: turn a trained dense transformer into a mixture of experts, with its own weights.

Importing it also makes transformers' Auto classes able to load converted checkpoints.
"""

import sys
from typing import TYPE_CHECKING

from moefy.errors import MoefyError
from moefy.version import __version__


def _command_starts() -> bool:
    """Whether this is the command line before it knows what to do, by its script or by `python -m moefy`."""
    given = sys.orig_argv
    as_module = getattr(sys, "argv", [])[:1] == ["-m"] and "-m" in given  # while Python looks for the module to run
    return getattr(sys.modules.get("moefy_cli.starting"), "now", False) or (
        as_module and given[given.index("-m") + 1 :][:1] == ["moefy"]
    )


# torch and transformers take seconds to import. Help and wrong options do without: see `whole` in cli/app.py.
_is_whole = not _command_starts()

if TYPE_CHECKING or _is_whole:
    from moefy import hf as _hf
    from moefy.calibrate import text_calibration
    from moefy.checkpoint import load, save, to_dense
    from moefy.convert import Report, convert
    from moefy.moe import MoEFFN, pack
    from moefy.recipe import RECIPES, Recipe
    from moefy.sources.models import load_source
    from moefy.tasks import evaluate_task, task_calibration
    from moefy.tuning.relufy import relufy
    from moefy.tuning.tune import Tuned, tune
    from moefy.types import FFNWeights, LayerSpec, MoEWeights, Partition
    from moefy.wanted import at_share

    _hf.register()

__all__ = [
    "RECIPES",
    "FFNWeights",
    "LayerSpec",
    "MoEFFN",
    "MoEWeights",
    "MoefyError",
    "Partition",
    "Recipe",
    "Report",
    "Tuned",
    "__version__",
    "at_share",
    "convert",
    "evaluate_task",
    "load",
    "load_source",
    "pack",
    "relufy",
    "save",
    "task_calibration",
    "text_calibration",
    "to_dense",
    "tune",
]
