"""The kernels as ptxas builds them: no spills, and a committed table that is about these kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cubins.py"


def test_no_kernel_spills_and_the_table_is_up_to_date():
    # Triton compiles nothing in a process that interprets
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, SCRIPT, "--quick"], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
