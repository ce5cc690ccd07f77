import os
import warnings

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # with a warm cache no pass runs
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it where a kernel is decorated, so it is set before graphopt.kernels is imported, wherever that is
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="every operator and 2,000 random networks, not a spread of them"
    )


@pytest.fixture(autouse=True)
def fresh():
    """Every test compiles anew, from the same seed, and a backend failure that Dynamo would hide is an error."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is off: .*")
        yield
    torch._dynamo.reset()
