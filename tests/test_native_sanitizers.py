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


FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


@pytest.mark.parametrize("unit", FLAGS)
def test_units_share_no_code(unit: str, tmp_path: Path) -> None:
    """An inline function compiled for AVX-512 could become the copy that every machine runs: none has a symbol of its
    own, without optimisation too."""
    compiler, nm = shutil.which(os.environ.get("CXX", "c++")), shutil.which("nm")
    if not compiler or not nm or os.uname().machine != "x86_64":
        assert not os.environ.get("CI"), "CI needs a C++ compiler for x86-64 and nm"
        pytest.skip("needs a compiler for x86-64 and nm")
    made = tmp_path / "unit.o"
    command = [compiler, "-std=c++17", "-O0", *FLAGS[unit], "-c", CSRC / f"isa_{unit}.cpp", "-o", made]
    subprocess.run(command, check=True)
    shown = subprocess.run(
        [nm, "--demangle", "--defined-only", made], check=True, capture_output=True, text=True
    ).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in shown.splitlines()]
    assert [name for kind, name in symbols if kind.isupper()] == [f"moefy::k_{unit}"]


def test_units_use_nothing_of_the_standard_library() -> None:
    allowed = {f"#include <{name}>" for name in ("cstdint", "cstring", "cstddef", "immintrin.h", "arm_neon.h")}
    names = ["kernels.h", "tiles.h", "sparse.h", "activations.h", "ffn.h"]
    for name in (*names, *(p.name for glob in ("lanes_*.h", "amx*.h") for p in CSRC.glob(glob))):
        includes = [line for line in (CSRC / name).read_text().splitlines() if line.startswith("#include <")]
        assert set(includes) <= allowed, name
