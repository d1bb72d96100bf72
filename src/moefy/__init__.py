"""moefy: turn a trained dense transformer into a mixture of experts, with its own weights.

Importing it also makes transformers' Auto classes able to load converted checkpoints.
"""

from moefy import hf as _hf
from moefy.calibrate import text_calibration
from moefy.checkpoint import load, save, to_dense
from moefy.convert import Report, convert
from moefy.moe import MoEFFN
from moefy.recipe import RECIPES, Recipe
from moefy.relufy import relufy
from moefy.tasks import evaluate_task, task_calibration
from moefy.types import FFNWeights, LayerSpec, MoefyError, MoEWeights, Partition
from moefy.version import __version__

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
    "__version__",
    "convert",
    "evaluate_task",
    "load",
    "relufy",
    "save",
    "task_calibration",
    "text_calibration",
    "to_dense",
]

_hf.register()
