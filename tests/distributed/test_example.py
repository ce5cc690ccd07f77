"""The example runs under torchrun as it says, and shows a loss that falls and fewer bytes than stock saves."""

import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

from graphopt.memory import saved_bytes

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
STEPS = 11


def stock():
    """What a rank saves without graphopt, compiled as a whole."""
    spec = util.spec_from_file_location("example", EXAMPLE)
    example = util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, batch = example.Decoder(), example.batch(torch.device("cpu"), torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    return saved_bytes(lambda: example.loss_of(compiled, *batch), [*batch, *model.parameters()])


@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_the_example_learns_and_saves_fewer_bytes_than_stock(options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, EXAMPLE, "--backend", "lowmem_eager", "--steps", str(STEPS), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"loss ([\d.]+)  saved ([\d,]+) bytes", done.stdout)
    first, last = (float(loss) for loss, _ in (shown[0], shown[-1]))
    assert last < first
    assert int(shown[0][1].replace(",", "")) < stock()
