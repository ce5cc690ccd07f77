"""What older versions of torch cannot do: a test that asks for it is expected to fail there, and only there."""

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

ONE_KERNEL = pytest.mark.xfail(TORCH < (2, 13), reason="Inductor makes a kernel of its own for a code", strict=True)
COPIES_CONFIGS = pytest.mark.xfail(TORCH < (2, 13), reason="Dynamo does not trace copy.deepcopy", strict=True)
