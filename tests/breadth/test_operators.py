"""PyTorch's own operator database under lowmem: outputs and gradients of every differentiable operator as in eager.

Here one sample each of a spread of operators, without Inductor; `--long` takes all of them, and Inductor too.
"""

import math
import warnings

import pytest
import torch
import torch._inductor.config as inductor_config
from operators import OPERATORS, samples, spread
from properties import stock

from graphopt.plan import candidates

SPREAD, SAMPLES = 150, {"lowmem_eager": 4, "lowmem": 1}
ORDER = 3  # two orders of the same roundings: neither is nearer to the exact value by more than a factor
ROUNDINGS = 16 * torch.finfo(torch.float32).eps  # a decomposition rounds a few times more than a kernel
# 8 bits move a gradient by their own error, 0.005, and as often as it is made of them; samples have tens of values,
# of which the default's groups of 64 would save nothing
PRESETS = {"exact": ({"preset": "exact"}, 0.0), "compressed": ({"codecs": ["int8-8"], "time_slack": 1e9}, 0.05)}


def pytest_generate_tests(metafunc):
    if "name" not in metafunc.fixturenames:
        return
    long = metafunc.config.getoption("--long")
    metafunc.parametrize("name", list(OPERATORS) if long else spread(SPREAD))
    metafunc.parametrize("backend", ["lowmem_eager", "lowmem"] if long else ["lowmem_eager"])


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    """Samples are below the size from which tensors are encoded."""
    monkeypatch.setattr(candidates, "SMALLEST", 0)


def test_samples_are_encoded():
    sample = next(samples("nn_functional_gelu", 1, saved=True))
    exact, found = (
        sample.run(torch.compile(sample.function, backend="lowmem_eager", options=options))
        for options, _ in PRESETS.values()
    )
    assert distance(found, exact) > 1e-4 * norm(exact)


def test_outputs_and_gradients_of_an_operator(name, backend, request):
    count = SAMPLES[backend] if request.config.getoption("--long") else 1
    checked = 0
    with warnings.catch_warnings(), inductor_config.patch(fallback_random=True):
        warnings.simplefilter("ignore")
        for options, error in PRESETS.values():
            for sample in samples(name, count, saved=error > 0):
                broken = difference(sample, backend, options, error)
                reference = stock if backend == "lowmem_eager" else "inductor"
                if broken and difference(sample, reference, None, 0.0):
                    continue  # stock's own failure
                assert not broken
                checked += 1
    if not checked:
        pytest.skip("no sample that runs in eager mode, or stock fails on it")


def difference(sample, backend, options, error):
    """How a compiled operator differs from eager beyond rounding, in words; empty where it does not."""
    torch._dynamo.reset()
    try:
        eager = sample.run(sample.function)
    except RuntimeError:
        return ""  # eager mode does not take it
    try:
        exact = sample.run(sample.function, torch.float64)
    except RuntimeError:  # a dtype among the arguments
        exact = eager
    try:
        found = sample.run(torch.compile(sample.function, backend=backend, dynamic=False, options=options))
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    if [each.shape for each in found] != [each.shape for each in eager]:
        return "other outputs or gradients than in eager mode"
    if any(not torch.equal(one.isfinite(), other.isfinite()) for one, other in zip(found, eager)):
        return "inf or NaN elsewhere than in eager mode"
    allowed = max(ORDER * distance(eager, exact), error * norm(eager), ROUNDINGS * norm(eager))
    apart = distance(found, eager)
    return f"{apart / norm(eager):.3g} from eager" if apart > allowed else ""


def distance(found, expected):
    return norm([one - other for one, other in zip(found, expected)])


def norm(tensors):
    """Of what is finite."""
    return math.sqrt(sum(float(each.abs().double().nan_to_num(0, 0, 0).square().sum()) for each in tensors)) or 1e-30
