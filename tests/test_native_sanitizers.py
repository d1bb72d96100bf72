"""The kernel's own C++ test, built with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "src" / "moefy" / "kernels" / "csrc"


def test_kernel_under_sanitizers(tmp_path: Path) -> None:
    if not shutil.which("cmake") or not shutil.which(os.environ.get("CXX", "c++")):
        assert not os.environ.get("CI"), "CI needs cmake and a C++ compiler"
        pytest.skip("no cmake or no C++ compiler")
    options = ["-DMOEFY_PYTHON=OFF", "-DMOEFY_TEST=ON", "-DMOEFY_ASAN=ON"]
    steps = [
        ["cmake", "-S", ROOT, "-B", tmp_path, *options],
        ["cmake", "--build", tmp_path, "--parallel", "2", "--target", "kernel_test"],
        [tmp_path / "kernel_test"],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.rstrip().endswith(", 0 failed")


def test_units_share_no_code() -> None:
    """An inline function compiled for AVX-512 could become the copy that every machine runs."""
    compiler, nm = shutil.which(os.environ.get("CXX", "c++")), shutil.which("nm")
    if not compiler or not nm or os.uname().machine != "x86_64":
        pytest.skip("needs a compiler for x86-64 and nm")
    allowed = {f"#include <{name}>" for name in ("cstdint", "cstring", "cstddef", "immintrin.h", "arm_neon.h")}
    for name in (
        "kernels.h",
        "tiles.h",
        "sparse.h",
        "activations.h",
        "ffn.h",
        *(p.name for glob in ("lanes_*.h", "amx*.h") for p in CSRC.glob(glob)),
    ):
        includes = [line for line in (CSRC / name).read_text().splitlines() if line.startswith("#include <")]
        assert set(includes) <= allowed, name
