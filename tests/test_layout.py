"""The folders are the pipeline: imports point one way."""

import ast
from pathlib import Path

import moefy

ROOT = Path(moefy.__file__).parent
# A module may import those before it, and its own folder.
ORDER = [
    "version",
    "errors",
    "files",
    "older",
    "heads",
    "types",
    "quiet",
    "sites",
    "stats",
    "calibrate",
    "construct",
    "kernels",
    "routers",
    "selection",
    "packed",
    "moe",
    "usage",
    "reconstruct",
    "hf",
    "slim",
    "recipe_text",
    "recipe",
    "wanted",
    "conversion",
    "convert",
    "sources",
    "model_card",
    "checkpoint",
    "export",
    "tasks",
    "measure",
    "tuning",
    "study",
    "report",
    "cli",
]
TOP = {"__init__", "__main__"}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moefy":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found |= set(names)
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")[1:2] if alias.name[:6] == "moefy."}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: imports are absolute"
    return found


def test_imports_point_one_way():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        here = part_of(path)
        if here in TOP:
            continue
        allowed = {*ORDER[: ORDER.index(here)], here}
        wrong += [f"{path.name} imports {name}" for name in imported_parts(path) - allowed]
    assert not wrong


def test_only_commands_know_the_command():
    """It imports them, so anything else that imported `moefy_cli` would close a circle."""
    knows = {path for path in ROOT.rglob("*.py") if "moefy_cli" in path.read_text()}
    assert {part_of(path) for path in knows} <= {"cli", *TOP}


def test_every_module_is_in_the_order():
    assert {part_of(path) for path in ROOT.rglob("*.py")} - TOP == set(ORDER)


def test_files_stay_short():
    sources = [path for ending in ("*.py", "*.h", "*.cpp") for path in ROOT.rglob(ending)]
    assert not {path.name: n for path in sources if (n := len(path.read_text().splitlines())) > 400}


def test_functions_stay_short():
    long = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (n := node.end_lineno - node.lineno + 1) > 60:  # with the options
                long[f"{path.name}: {node.name}"] = n
    assert not long
