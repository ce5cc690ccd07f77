"""lowmem is not off in silence: a hidden error warns, and so does a backend that was asked for and never called."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from training import EXACT

import graphopt
from graphopt import passes
from graphopt.loud import loud


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def suppressed():
    with torch._dynamo.config.patch(suppress_errors=True):
        yield


@pytest.mark.parametrize("backend", ["lowmem", "lowmem_eager"])
def test_options_that_are_not_allowed_warn_where_dynamo_hides_them(suppressed, backend):
    model, x = Net(), torch.randn(4, 8)
    with pytest.warns(UserWarning, match=rf"(?s){backend} is off.*suppress_errors.*'preset'.*allowed: compressed"):
        y = torch.compile(model, backend=backend, options={"preset": "exakt"})(x)
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("backend", ["lowmem", "lowmem_eager"])
def test_a_pass_that_fails_warns_where_dynamo_hides_it(suppressed, backend, monkeypatch):
    def broken(gm, example_inputs=()):
        raise ValueError("boom")

    monkeypatch.setattr(passes, "JOINT", (broken,))
    with pytest.warns(UserWarning, match=rf"(?s){backend} is off.*pass 'broken' failed.*boom"):
        torch.compile(Net(), backend=backend)(torch.randn(4, 8)).sum().backward()


def test_an_error_that_dynamo_hides_in_any_case_warns():
    @loud
    def broken(gm, example_inputs):
        raise DynamicOutputShapeException(torch.ops.aten.nonzero.default)

    model, x = Net(), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="broken is off: Dynamo hides its error"):
        y = torch.compile(model, backend=broken)(x)
    assert torch.equal(y, model(x))


def test_nothing_is_said_where_nothing_fails(suppressed):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is off.*")
        torch.compile(Net(), backend="lowmem_eager", options=EXACT)(torch.randn(4, 8)).sum().backward()


def test_explain_and_its_errors_do_not_depend_on_suppress_errors(suppressed):
    assert graphopt.explain(Net(), torch.randn(4, 8)).bytes_before > 0
    with pytest.raises(graphopt.CaptureError, match="one graph"):
        graphopt.explain(lambda x: (torch._dynamo.graph_break(), x)[1], torch.randn(4, 8, requires_grad=True))


def test_explain_says_what_to_do_about_code_that_dynamo_has_given_up(suppressed):
    model, x = Net(), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="is off"):
        torch.compile(model, backend="lowmem_eager", options={"preset": "exakt"})(x)
    with pytest.raises(graphopt.CaptureError, match=r"torch\._dynamo\.reset\(\)"):
        graphopt.explain(model, x)
    torch._dynamo.reset()
    assert graphopt.explain(model, x).bytes_before > 0


PASSED_BY = (
    "model.forward(x), copy.deepcopy(model)(x)",
    "bare = nn.Sequential(nn.Linear(8, 8)); bare.compile(backend='lowmem_eager'); bare(x)",
)


@pytest.mark.parametrize("calls, told", [(PASSED_BY, True), ((*PASSED_BY, "model(x)"), False)])
def test_a_model_that_is_passed_by_is_told_of_as_python_ends(calls, told):
    lines = [
        "import copy, torch; from torch import nn; x = torch.randn(4, 8)",
        "class Net(nn.Linear):",
        "    def forward(self, x): return super().forward(x).relu()",
        "model = Net(8, 8); model.compile(backend='lowmem_eager')",
        *calls,
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert ("lowmem was asked for and compiled nothing" in found) == told
