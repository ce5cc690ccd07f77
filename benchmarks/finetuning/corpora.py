"""The data of fine-tuning, all of it from installed packages: Python source, its docstrings, its packages, digits.

Language models read bytes. The classifier of text reads words, the 2,046 most frequent of what is trained on.

What a model is pre-trained on and what it is fine-tuned on do not come from the same file, but for digits: those are
the same images, transposed. Each function gives the Data of one run: `train(step)` is a batch, the same for every
method under one seed, and `held_out` is never trained on.
"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graphopt.demo import data
from graphopt.demo.data import Batch, Data, as_bytes, generator, windows

# packages of the standard library that every installation has, and that differ enough to be told apart
PACKAGES = ("asyncio", "email", "http", "importlib", "multiprocessing", "unittest", "urllib", "xml")
IGNORED = -100  # a target that does not count, as of torch.nn.functional.cross_entropy
MASK, UNKNOWN, WORDS = 0, 1, 2048  # of the words, with the two before them
MASKED = 0.15
WORD = re.compile(rb"[A-Za-z_]\w+")


def source(batch: int, length: int, seed: int) -> Data:
    """Next bytes of the source of PACKAGES, int64 [batch, length]."""
    train, held_out = zip(*(_package(name) for name in PACKAGES))
    return windows(torch.cat(train), torch.cat(held_out), batch, length, seed)


def docstrings(batch: int, length: int, seed: int) -> Data:
    """Next bytes of the docstrings of the standard library's single modules, int64 [batch, length]."""
    return windows(*_docstrings(), batch, length, seed)


def masked_source(batch: int, length: int, seed: int) -> Data:
    """Words of single modules, 15 % of them masked: targets are the words that were, int64 [batch, length]."""
    files = [file.read_bytes() for file in _modules()]
    train, held_out = (
        _words(b"\n".join(part)) for part in ([x for i, x in enumerate(files) if i % 10 != 9], files[9::10])
    )

    def masked(x: Tensor, random: torch.Generator) -> Batch:
        hidden = torch.rand(x.shape, generator=random) < MASKED
        return x.masked_fill(hidden, MASK), x.masked_fill(~hidden, IGNORED)

    def at(step: int) -> Batch:
        random = generator(seed, step)
        return masked(_spans(train, torch.rand(batch, generator=random), length), random)

    return Data(at, masked(_spans(held_out, torch.linspace(0, 1, 64), length), generator(0, 0)))


def packages(batch: int, length: int, seed: int) -> Data:
    """Windows of words of source, int64 [batch, length], and which of PACKAGES they are from, int64 [batch]."""
    texts = [tuple(_words(text.numpy().tobytes()) for text in _package(name)) for name in PACKAGES]

    def at(step: int) -> Batch:
        random = generator(seed, step)
        labels = torch.randint(len(PACKAGES), (batch,), generator=random)
        places = torch.rand(batch, generator=random)
        return torch.cat([_spans(texts[k][0], place[None], length) for k, place in zip(labels, places)]), labels

    held_out = [_spans(text, torch.linspace(0, 1, 64), length) for _, text in texts]
    return Data(at, (torch.cat(held_out), torch.arange(len(PACKAGES)).repeat_interleave(64)))


def digits(batch: int, length: int, seed: int) -> Data:
    """Handwritten digits, float32 [batch, 1, 8, 8], and their labels; `length` has no say, patches are the tokens."""
    return data.digits(batch, seed)


def mirrored_digits(batch: int, length: int, seed: int) -> Data:
    """The same images with rows and columns exchanged, as most digits are not written."""
    plain = data.digits(batch, seed)

    def mirrored(batch: Batch) -> Batch:
        return batch[0].mT.contiguous(), batch[1]

    return Data(lambda step: mirrored(plain.train(step)), mirrored(plain.held_out))


@cache
def _package(name: str) -> tuple[Tensor, Tensor]:
    """The source of one package, and that of every fifth of its files, which are held out; uint8 [bytes]."""
    files = sorted((_library() / name).rglob("*.py"))
    if len(files) < 5:
        raise FileNotFoundError(f"no source of package {name} in {_library()}")
    train = as_bytes(file.read_bytes() for i, file in enumerate(files) if i % 5 != 4)
    return train, as_bytes(file.read_bytes() for file in files[4::5])


@cache
def _docstrings() -> tuple[Tensor, Tensor]:
    texts = ["\n\n".join((*_docstrings_of(file), "")).encode() for file in _modules()]
    return as_bytes(text for i, text in enumerate(texts) if i % 10 != 9), as_bytes(texts[9::10])


def _docstrings_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from filter(None, [ast.get_docstring(node)])


def _words(text: bytes) -> Tensor:
    """The words of a text by their place in the vocabulary, int64 [words]."""
    known = _vocabulary()
    return torch.tensor([known.get(word, UNKNOWN) for word in WORD.findall(text)])


@cache
def _vocabulary() -> dict[bytes, int]:
    texts = [*(file.read_bytes() for file in _modules()), *(_package(name)[0].numpy().tobytes() for name in PACKAGES)]
    count = Counter(WORD.findall(b"\n".join(texts)))
    # words that are equally frequent in the order of the alphabet: the same numbers everywhere
    frequent = sorted(count, key=lambda word: (-count[word], word))[: WORDS - 2]
    return {word: i + 2 for i, word in enumerate(frequent)}


def _spans(words: Tensor, places: Tensor, length: int) -> Tensor:
    """Windows that begin at these fractions of a text."""
    starts = (places * (len(words) - length)).long()
    return words[starts[:, None] + torch.arange(length)]


def _modules() -> list[Path]:
    return sorted(_library().glob("*.py"))


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
