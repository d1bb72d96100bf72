"""What this machine can do at most, and what it is: for the JSON lines of the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
FLAGS = {"generic": ["-msse2"], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"]}


def limits(isa: str, threads: int) -> dict[str, float] | None:
    """GFLOP/s of fp32 multiply-adds and of bf16 tiles (0 without AMX), GB/s of DRAM; None without a compiler."""
    flags = FLAGS.get(isa.removesuffix("bf16"), ["-march=native"])
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        command = [
            os.environ.get("CXX", "c++"),
            "-O3",
            "-std=gnu++17",
            "-ffp-contract=fast",
            "-fopenmp",
            *flags,
        ]
        try:
            subprocess.run([*command, HERE / "peak.cpp", "-o", program], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return json.loads(subprocess.run([program], check=True, capture_output=True, env=environment).stdout)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, object]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
    }
