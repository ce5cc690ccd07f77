"""The tasks of fidelity.py: what is fine-tuned, on what, after which pre-training.

| task | pre-trained on | fine-tuned on |
|---|---|---|
| `gpt2-*`, `llama-*` | next bytes of the source of packages | next bytes of docstrings |
| `bert-*` | masked bytes of the source of single modules | which package a window of source is from |
| `vit-*` | digits with rows and columns exchanged | digits |

`-full` trains everything, `-lora` adapters of rank 8: of all linears in the language models, of attention's in the
classifiers, whose head is trained too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import corpora
import torch
from corpora import PACKAGES
from models import GENERATES, Spec, WithLoss, adapted, build
from torch import Tensor

from graphopt.demo.data import Data

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
        return WithLoss(adapted(model, self.tuning.spec))


def _tasks() -> dict[str, Task]:
    labels = ("num_labels", len(PACKAGES)), ("max_position_embeddings", 128)
    language = {
        family: Training(Spec(family, "tiny"), corpora.source, batch=4, length=128, steps=800, learning_rate=2e-3)
        for family in GENERATES
    }
    masked = Spec("bert-masked", "tiny", changes=labels)
    digits = Spec("vit", "tiny", changes=(("num_labels", 10),))
    before = {
        **language,
        "bert": Training(masked, corpora.masked_source, batch=4, length=128, steps=800, learning_rate=2e-3),
        "vit": Training(digits, corpora.mirrored_digits, batch=32, length=0, steps=400, learning_rate=1e-3),
    }
    tuning = {
        **{family: replace(each, corpus=corpora.docstrings, steps=200) for family, each in language.items()},
        "bert": replace(before["bert"], spec=replace(masked, family="bert"), corpus=corpora.packages, steps=300),
        "vit": replace(before["vit"], corpus=corpora.digits, steps=200),
    }
    found = {}
    for family, each in tuning.items():
        lora = replace(each.spec, lora=True)
        for name, training in (
            (f"{family}-full", replace(each, learning_rate=5e-4)),
            (f"{family}-lora", replace(each, spec=lora, learning_rate=4e-3)),
        ):
            found[name] = Task(name, before[family], training)
    return found


TASKS = _tasks()
