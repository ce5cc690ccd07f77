"""The script that measures kernels: its gate on errors, which runs anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


def test_every_kernel_passes_the_gate():
    found = subprocess.run([sys.executable, SCRIPT, "--interpret"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("error 0.") == len(found.stdout.splitlines())


def test_a_wrong_kernel_has_no_speed():
    script = f"""
import runpy, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
sys.argv = ["kernels.py", "--interpret", "--only", "activation.backward"]
import os
os.environ["TRITON_INTERPRET"] = "1"
from graphopt.kernels import activation
right = activation.backward
activation.backward = lambda *args: right(*args) * 1.1
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 1 and "wrong results, no speed" in found.stderr
