"""The demo: its measures of memory are right, its data and models are what it says."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import graphopt
from graphopt.memory import peak_bytes, saved_bytes

FLOAT = 4
OPTIONAL = ("matplotlib", "rich", "sklearn", "transformers")


@pytest.fixture
def demo():
    for package in OPTIONAL:
        pytest.importorskip(package)
    import graphopt.demo

    return graphopt.demo


def test_saved_bytes_of_a_product_and_a_sine():
    x = torch.randn(100, requires_grad=True)
    w = torch.randn(100, requires_grad=True)
    # sin keeps x, an input; the product keeps sin(x), and w, a parameter
    assert saved_bytes(lambda: (x.sin() * w).sum(), [x, w]) == 100 * FLOAT
    # without `own` all three count
    assert saved_bytes(lambda: (x.sin() * w).sum(), []) == 300 * FLOAT


def test_saved_bytes_counts_aliases_once():
    x = torch.randn(10, 10, requires_grad=True)

    def forward():
        h = x * 2
        # keeps h by sin, by cos, and by both sides of a product of views
        return h.sin().sum() + h.cos().sum() + (h.t()[:2] @ h.view(10, 10)).sum()

    assert saved_bytes(forward, [x]) == 100 * FLOAT


def test_saved_bytes_leaves_out_what_dies_before_backward():
    x = torch.randn(100, requires_grad=True)

    def forward():
        (x * 2).sin()
        return (x * 3).cos()

    assert saved_bytes(forward, [x]) == 100 * FLOAT


def test_saved_bytes_leaves_out_what_is_freed_by_the_end_of_forward():
    """As FSDP frees whole weights: autograd still names them, and they are gathered again in backward."""
    x, w = torch.randn(100, requires_grad=True), torch.randn(100)

    def forward():
        whole = w.clone()
        loss = (x * whole).sin().sum()  # the product keeps `whole`, the sine what it is taken of
        whole.untyped_storage().resize_(0)
        return loss

    assert saved_bytes(forward, [x]) == 100 * FLOAT


def test_saved_bytes_of_a_tensor_of_tensors_are_those_inside():
    x = TwoTensor(torch.randn(100), torch.randn(100)).requires_grad_()
    assert saved_bytes(lambda: (x * 2).sin().sum(), [x]) == 2 * 100 * FLOAT
    assert saved_bytes(lambda: x.sin().sum(), [x]) == 0


def test_saved_bytes_of_a_linear_leaves_out_parameters():
    layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(16, 8)
    # the output of relu, kept by relu and by the second linear
    assert saved_bytes(lambda: layers(x), [x, *layers.parameters()]) == 16 * 32 * FLOAT


@pytest.mark.slow
def test_saved_bytes_sees_what_a_compiled_forward_keeps():
    layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    x = torch.randn(32, 64)
    compiled = torch.compile(layers, backend="inductor")
    measured = saved_bytes(lambda: compiled(x), [x, *layers.parameters()])
    # relu's output, and perhaps its sign as bool
    assert 32 * 256 * FLOAT <= measured <= 32 * 256 * (FLOAT + 1)
    assert peak_bytes(lambda: compiled(x), "cpu") >= measured


def test_peak_bytes_sees_what_was_allocated_at_once():
    def step():
        a = torch.zeros(1_000_000)
        del a
        b = torch.zeros(2_000_000)
        return b.sin()

    # b and its sine live together, a does not
    assert peak_bytes(step, "cpu") == 4_000_000 * FLOAT


def test_peak_bytes_leaves_out_what_was_held_before():
    held = torch.zeros(3_000_000)
    assert peak_bytes(lambda: held[:1_000_000].sin(), "cpu") == 1_000_000 * FLOAT


def test_batches_of_text_are_the_same_each_time(demo):
    first, second = demo.load("gpt2", seed=3), demo.load("gpt2", seed=3)
    for step in (0, 7):
        assert all(torch.equal(a, b) for a, b in zip(first.train(step), second.train(step)))
    assert all(torch.equal(a, b) for a, b in zip(first.held_out, second.held_out))
    assert not torch.equal(first.train(0)[0], first.train(1)[0])
    assert not torch.equal(first.train(0)[0], demo.load("gpt2", seed=4).train(0)[0])


def test_targets_of_text_are_the_next_bytes(demo):
    for x, y in (demo.load("gpt2", seed=0).train(0), demo.load("llama", seed=0).held_out):
        assert x.shape == y.shape and x.shape[1] == demo.LENGTH and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert 0 <= int(x.min()) <= int(x.max()) < 256


def test_digits_are_images_with_labels(demo):
    data = demo.load("vit", seed=0)
    for x, y in (data.train(0), data.held_out):
        assert x.shape == (len(y), 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.min() == -1 and x.max() == 1 and 0 <= int(y.min()) <= int(y.max()) < 10
    assert all(torch.equal(a, b) for a, b in zip(data.train(5), demo.load("vit", seed=0).train(5)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_models_are_small_and_reproducible(demo, name):
    from graphopt.demo.models import build

    model, again = build(name, seed=1), build(name, seed=1)
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    x, y = demo.load(name, seed=0).train(0)
    # untrained, the loss is near that of a uniform guess over the classes; the weights are small, so within 1 nat
    guess = F.cross_entropy(torch.zeros(1, 10 if name == "vit" else 256), torch.zeros(1, dtype=torch.int64))
    assert abs(model(x, y).item() - guess.item()) < 1


def test_importing_graphopt_needs_no_package_of_the_demo():
    check = f"import sys, graphopt; sys.exit(any(package in sys.modules for package in {OPTIONAL}))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_a_missing_package_is_named(monkeypatch, capsys):
    from graphopt.__main__ import main

    for name in [name for name in sys.modules if name.startswith("graphopt.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["graphopt", "demo"])
    with pytest.raises(SystemExit, match="1"):
        main()
    printed = capsys.readouterr().err
    assert "transformers" in printed and 'pip install "graphopt[demo]"' in printed


@pytest.mark.slow
def test_the_demo_runs_end_to_end(demo, tmp_path):
    command = [sys.executable, "-m", "graphopt", "demo", "--steps", "2", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    results = json.loads((tmp_path / "results.json").read_text())
    inductor, lowmem = results["backends"]["inductor"], results["backends"]["lowmem"]
    assert results["options"] == str(graphopt.Options())
    # float32 in 8 bits, beside what stays as it is
    assert lowmem["saved_bytes"] < inductor["saved_bytes"] / 2
    # the same weights and batches; dropout may draw other numbers, which moves a loss by far less than this; so does an
    # error of a percent in the gradient between the two
    assert all(abs(a - b) < 0.1 for a, b in zip(lowmem["losses"], inductor["losses"], strict=True))
    assert (tmp_path / "demo.png").stat().st_size > 0 and (tmp_path / "report.html").stat().st_size > 0
