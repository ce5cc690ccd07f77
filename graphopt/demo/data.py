"""Real data that every machine with Python has: the standard library's source, and scikit-learn's digits."""

import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """`train(i)` is the batch of step i, the same in every run with one seed; `held_out` is never trained on."""

    train: Callable[[int], Batch]
    held_out: Batch


def text(batch: int, length: int, seed: int) -> Data:
    """Windows of Python source: inputs and next bytes, both int64 [batch, length]; every tenth file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(files) < 10:
        raise FileNotFoundError(f"no Python source in {sysconfig.get_paths()['stdlib']}")
    train = as_bytes(file.read_bytes() for i, file in enumerate(files) if i % 10 != 9)
    return windows(train, as_bytes(file.read_bytes() for file in files[9::10]), batch, length, seed)


def windows(train: Tensor, held_out: Tensor, batch: int, length: int, seed: int) -> Data:
    """Windows of two texts, uint8 [bytes]: inputs and next bytes, int64 [batch, length], and 64 of them held out."""

    def cut(text: Tensor, starts: Tensor) -> Batch:
        spans = text[starts[:, None] + torch.arange(length + 1)].long()
        return spans[:, :-1], spans[:, 1:]

    def at(step: int) -> Batch:
        return cut(train, torch.randint(len(train) - length, (batch,), generator=generator(seed, step)))

    return Data(at, cut(held_out, torch.linspace(0, len(held_out) - length - 1, 64).long()))


def digits(batch: int, seed: int) -> Data:
    """Handwritten digits: images float32 [batch, 1, 8, 8] in [-1, 1] and labels int64 [batch]; every fifth held out."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, labels = (images.float() / 8 - 1).view(-1, 1, 8, 8), labels.long()
    kept = torch.arange(len(labels)) % 5 != 4

    def at(step: int) -> Batch:
        chosen = torch.randint(int(kept.sum()), (batch,), generator=generator(seed, step))
        return images[kept][chosen], labels[kept][chosen]

    return Data(at, (images[~kept], labels[~kept]))


def as_bytes(texts: Iterable[bytes]) -> Tensor:
    """Texts joined into one, uint8 [bytes]."""
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step of one run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
