"""Plain loops: accumulation, clipping, scaling, fused optimizers, what is compiled, and what is saved to disk."""

import copy

import pytest
import torch
from tasks import EXACT, LOSS, counted
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X, Y = torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8 * 32).reshape(8, 32) % 4
SETTINGS = {"backend": "lowmem_eager", **EXACT}


def loss_of(model, x, y):
    return F.cross_entropy(model(x).float(), y)


def train(net, function=None, loss=loss_of, make=lambda each: torch.optim.SGD(each, 0.5), scaler=None, autocast=None):
    """Eight steps' losses, two batches a step, gradients clipped; and the bytes saved."""
    function, optimizer, losses = net if function is None else function, make(net.parameters()), []
    with counted(net) as saved:
        for i, (x, y) in enumerate(zip(X, Y)):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                found = loss(function, x, y)
            (found if scaler is None else scaler.scale(found)).backward()
            losses.append(found.item())
            if i % 2:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                (optimizer if scaler is None else scaler).step(*([] if scaler is None else [optimizer]))
                if scaler is not None:
                    scaler.update()
                optimizer.zero_grad()
    return torch.tensor(losses), saved.total


def in_place(net):
    net.compile(**SETTINGS)
    return train(net)


def regional(net):
    for block in net.blocks:
        block.compile(**SETTINGS)
    return train(net)


WAYS = {
    "the module wrapped": lambda net: train(net, torch.compile(net, **SETTINGS)),
    "in place": in_place,
    "each block": regional,
    "the loss with the model": lambda net: train(net, loss=torch.compile(loss_of, **SETTINGS)),
}


@pytest.mark.parametrize("way", WAYS)
def test_losses_of_an_accumulating_and_clipping_loop_are_those_of_eager(net, way):
    expected, kept = train(copy.deepcopy(net))
    found, saved = WAYS[way](net)
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)
    assert saved < 0.8 * kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_scaler(net, dtype):
    def run(net, function=None):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return (*train(net, function, scaler=scaler, autocast=dtype), scaler.get_scale())

    expected, kept, scale = run(copy.deepcopy(net))
    found, saved, own = run(net, torch.compile(net, **SETTINGS))
    # the forward's roundings are those of eager; in the gradient z has one more
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert own == scale and saved < kept


def test_an_inf_in_the_gradient_skips_the_step(net):
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**127), copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    scaler.scale(1000 * loss_of(torch.compile(net, **SETTINGS), X[0], Y[0])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())


def adamw(parameters):
    return torch.optim.AdamW(parameters, 1e-3, fused=True)


def test_a_fused_optimizer_and_a_run_resumed_from_disk(net, tmp_path):
    start = copy.deepcopy(net.state_dict())
    expected, _ = train(copy.deepcopy(net), make=adamw)
    found, _ = train(net, torch.compile(net, **SETTINGS), make=adamw)
    # AdamW moves where the gradient is but rounding by the rate all the same; the loss does not depend on it
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)

    def steps(net, optimizer, batches):
        net.compile(**SETTINGS)
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            losses.append(loss_of(net, x, y))
            losses[-1].backward()
            optimizer.step()
        return [each.item() for each in losses]

    net.load_state_dict(start)
    optimizer, pairs = adamw(net.parameters()), list(zip(X, Y))
    whole = steps(net, optimizer, pairs[:3])
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    whole += steps(net, optimizer, pairs[3:])
    resumed, state = Net(), torch.load(tmp_path / "checkpoint.pt")
    resumed.load_state_dict(state["net"])
    optimizer = adamw(resumed.parameters())
    optimizer.load_state_dict(state["optimizer"])
    assert steps(resumed, optimizer, pairs[3:]) == whole[3:]


def test_names_of_parameters(net):
    names = set(net.state_dict())
    assert set(torch.compile(net, **SETTINGS).state_dict()) == {f"_orig_mod.{name}" for name in names}
    net.compile(**SETTINGS)
    assert set(net.state_dict()) == names
