"""The tasks of fidelity.py: what is fine-tuned, on what, after which pre-training.

| task | pre-trained on | fine-tuned on |
|---|---|---|
| `gpt2-*`, `llama-*` | next bytes of the source of packages | next bytes of docstrings |
| `bert-full` | masked words of single modules' source | which package a window of words is from |
| `vit-*` | digits with rows and columns exchanged | digits |

`-full` trains everything, `-lora` adapters of rank 8: of all linears in the language models, of attention's in the ViT,
whose head is trained too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from architectures import GENERATES, Spec, adapted, build
from torch import Tensor

from finetuning import corpora
from finetuning.corpora import PACKAGES, WORDS
from graphopt.demo.data import Data
from graphopt.demo.models import WithLoss

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """Steps of AdamW on a corpus: the learning rate rises for ten steps, then falls straight to zero."""

    spec: Spec
    corpus: Callable[[int, int, int], Data]
    batch: int
    length: int
    steps: int
    learning_rate: float

    def data(self, seed: int) -> Data:
        return self.corpus(self.batch, self.length, seed)


@dataclass(frozen=True)
class Task:
    """A fine-tuning, and the pre-training it starts from."""

    name: str
    before: Training
    tuning: Training

    @property
    def classifies(self) -> bool:
        return self.tuning.spec.family not in GENERATES

    def model(self, seed: int, pretrained: Weights) -> WithLoss:
        """The pre-trained model; adapters and the head of a new kind of model have random weights of `seed`."""
        torch.manual_seed(seed)
        model = build(self.tuning.spec)
        own = model.state_dict()
        model.load_state_dict({**own, **{name: each for name, each in pretrained.items() if name in own}})
        return WithLoss(adapted(model, self.tuning.spec), autocast=False)


def _tasks() -> Iterator[Task]:
    # of 0.02, which is made for a width of 768, so little is left at 128 that models hardly start to learn
    spread = ("initializer_range", 0.02 * (768 / 128) ** 0.5)
    for family in GENERATES:
        spec = Spec(family, "tiny", changes=(spread,))
        before = Training(spec, corpora.source, batch=4, length=128, steps=2000, learning_rate=2e-3)
        yield from _tuned(before, replace(before, corpus=corpora.docstrings, steps=200), full=5e-4, lora=4e-3)

    about = ("num_labels", len(PACKAGES)), ("vocab_size", WORDS), ("max_position_embeddings", 64), spread
    masked = Spec("bert-masked", "tiny", changes=about)
    before = Training(masked, corpora.masked_source, batch=16, length=32, steps=800, learning_rate=5e-4)
    tuning = replace(before, spec=replace(masked, family="bert"), corpus=corpora.packages, steps=400)
    yield from _tuned(before, tuning, full=1e-3)

    digits = Spec("vit", "tiny", changes=(("num_labels", 10),))
    before = Training(digits, corpora.mirrored_digits, batch=32, length=0, steps=400, learning_rate=1e-3)
    yield from _tuned(before, replace(before, corpus=corpora.digits, steps=200), full=5e-4, lora=4e-3)


def _tuned(before: Training, tuning: Training, full: float, lora: float | None = None) -> Iterator[Task]:
    """The task at a learning rate for all parameters, and at one for adapters."""
    family = tuning.spec.family
    yield Task(f"{family}-full", before, replace(tuning, learning_rate=full))
    if lora is not None:
        adapters = replace(tuning, spec=replace(tuning.spec, lora=True), learning_rate=lora)
        yield Task(f"{family}-lora", before, adapters)


TASKS = {task.name: task for task in _tasks()}
