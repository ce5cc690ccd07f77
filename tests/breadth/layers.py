"""What a random network is made of: modules that take two values [batch, tokens, width] and give another like them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.gelu,
    F.silu,
    F.relu,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: x * torch.sigmoid(x),
    F.tanh,
    F.softplus,
    F.mish,
    F.hardswish,
    F.elu,
    F.leaky_relu,
    torch.sigmoid,
    lambda x: torch.exp(-x.square()),
    F.logsigmoid,
    F.softsign,
    lambda x: F.relu(x).square(),
    torch.sin,
    lambda x: F.softmax(x, -1),
    lambda x: F.log_softmax(x, -1),
    lambda x: x.clamp(-1, 1),
    lambda x: x.abs().sqrt().clamp(max=2),
    lambda x: 1 / (1 + x.square()),
    lambda x: torch.where(x > 0, x, x.exp() - 1),
)
JOINS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    torch.mul,
    torch.sub,
    torch.maximum,
    lambda a, b: a / (1 + b.abs()),
    lambda a, b: torch.where(a > b, a, b * 2),
    lambda a, b: a * b.sigmoid(),
    lambda a, b: torch.addcmul(a, a, b),
    lambda a, b: a @ (b.transpose(-1, -2) @ a) / 16,
    lambda a, b: torch.cat([a, b], -1).unflatten(-1, (2, -1)).mean(-2),
    lambda a, b: torch.lerp(a, b, 0.3),
)
VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.transpose(0, 1).reshape(x.shape),
    lambda x: x.flatten(0, 1).unsqueeze(0).reshape(x.shape),
    lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    lambda x: x[:1].expand_as(x),
    lambda x: x.roll(1, 1),
    lambda x: x.flip(-1),
    lambda x: torch.stack(x.unbind(-1), -1),
    lambda x: F.pad(x[:, 1:], (0, 0, 1, 0)),
    lambda x: x.mT.contiguous().mT,
    lambda x: x.as_strided(x.shape, x.stride()),
    lambda x: x.repeat_interleave(2, 1)[:, ::2],
    lambda x: x.cumsum(-1) / 4,
    lambda x: x.sort(-1).values,
    lambda x: x.index_select(-1, torch.arange(x.shape[-1]).flip(0)),
    torch.tril,
)
REDUCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.mean(-1, keepdim=True),
    lambda x: x.amax(-1, keepdim=True),
    lambda x: x.logsumexp(-1, keepdim=True),
    lambda x: x.var(-1, keepdim=True),
    lambda x: x.mean(1, keepdim=True),
    lambda x: x.norm(dim=-1, keepdim=True),
    lambda x: x.max(-1, keepdim=True).values,
    lambda x: x.square().mean((-1, -2), keepdim=True).rsqrt().clamp(max=3),
)


def _set_row(x: Tensor, y: Tensor) -> Tensor:
    x[:, 0] = y[:, 0]
    return x


# what is written into is new, so that autograd allows it
WRITES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: (x * 2).add_(y),
    lambda x, y: (x + y).relu_(),
    lambda x, y: F.silu(x + 1, inplace=True),
    lambda x, y: _set_row(x * 1, y),
    lambda x, y: (x + 0.5).masked_fill_(y > 0, 0.25),
    lambda x, y: (x * 1).copy_(y).mul_(2),
    lambda x, y: (x + 1).mul_(y.sigmoid()),
    lambda x, y: F.dropout(x + 1, 0.2, True, True),
    lambda x, y: (x * 3).clamp_(-1, 1),
    lambda x, y: (x - y).unsqueeze(0).tanh_().squeeze(0),
)


class Apply(nn.Module):
    """A function of its first input, or of as many as it is given."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class First(nn.Sequential):
    """Modules in a row, of the first of two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a)


class Scaled(nn.Module):
    """RMSNorm as models write it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Channels(nn.Module):
    """A module that wants the channels second."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.transpose(1, 2)).transpose(1, 2)


class Gated(nn.Module):
    def __init__(self, width: int, option: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.activation = _pick(ACTIVATIONS, option % 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(a)) * self.up(a))


class Attention(nn.Module):
    """Attention of `a` to `b`, by torch's operator or written out."""

    def __init__(self, width: int, option: int) -> None:
        super().__init__()
        self.query, self.both, self.last = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.fused, self.causal, self.dropout = option % 2 == 0, option % 4 > 1, 0.1 * (option % 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        query, key, value = (
            x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (self.query(a), *self.both(b).chunk(2, -1))
        )
        if self.fused:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        else:
            scores = query @ key.mT * query.shape[-1] ** -0.5
            if self.causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            attended = F.dropout(scores.softmax(-1), self.dropout) @ value
        return self.last(attended.transpose(1, 2).flatten(2))


class Counted(nn.Module):
    """Writes into buffers as it goes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.steps.add_(1)
        self.mean.lerp_(a.detach().mean((0, 1)).to(self.mean.dtype), 0.1)
        return a - self.mean.to(a.dtype)


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return checkpoint(self.module, a, b, use_reentrant=False)


class Looked(nn.Module):
    """Rows of a table, by numbers made of the values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(8, width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + self.table((a.detach().float().sum(-1) * 4).long().remainder(8))


def _without_gradient(a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        scale = b.sigmoid()
    return a * scale


def _pick(functions: tuple[Callable[..., Tensor], ...], option: int) -> nn.Module:
    return Apply(functions[option % len(functions)])


def _norm(width: int, option: int) -> nn.Module:
    return (
        nn.LayerNorm(width), nn.RMSNorm(width), Scaled(width), nn.LayerNorm(width, elementwise_affine=False),
        Channels(nn.GroupNorm(2, width)), Channels(nn.BatchNorm1d(width)), nn.LayerNorm(width, bias=False),
    )[option % 7]  # fmt: skip


def _mlp(width: int, option: int) -> nn.Module:
    middle = _pick(ACTIVATIONS, option), nn.Dropout(0.1 * (option % 3))
    return First(nn.Linear(width, 3 * width), *middle, nn.Linear(3 * width, width))


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda width, option: First(nn.Linear(width, width, bias=option % 2 == 0)),
    "norm": lambda width, option: First(_norm(width, option)),
    "activation": lambda width, option: First(_pick(ACTIVATIONS, option)),
    "join": lambda width, option: _pick(JOINS, option),
    "residual": lambda width, option: Apply(torch.add),
    "mlp": _mlp,
    "gated": Gated,
    "attention": Attention,
    "dropout": lambda width, option: First(nn.Dropout(0.1 + 0.2 * (option % 3))),
    "view": lambda width, option: First(_pick(VIEWS, option)),
    "reduction": lambda width, option: Apply(lambda a, b: a - REDUCTIONS[option % len(REDUCTIONS)](b)),
    "write": lambda width, option: _pick(WRITES, option),
    "convolution": lambda width, option: First(Channels(nn.Conv1d(width, width, 3, padding=1, groups=1 + option % 2))),
    "buffer": lambda width, option: Counted(width),
    "lookup": lambda width, option: Looked(width),
    "checkpoint": lambda width, option: Checkpointed((Attention, _mlp, Gated)[option % 3](width, option)),
    "no_gradient": lambda width, option: Apply(_without_gradient),
    "detach": lambda width, option: Apply(lambda a, b: a.detach() * b),
}
