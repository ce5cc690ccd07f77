"""One training step of a transformers model under a method: its loss and gradients, its bytes and its seconds."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from architectures import Spec, adapted, batch, build
from methods import CHECKPOINT, STOCK, compiled
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from graphopt.checking import LARGEST_REFERENCE
from graphopt.demo.models import WithLoss
from graphopt.memory import peak_bytes, saved_bytes
from measuring.baselines import LIGER, OFFLOAD, Liger, Offloaded, checkpointed

PRECISIONS = {"bf16": torch.bfloat16, "autocast": torch.float32}
SEED = 7
# eager's random masks are not those of compiled code: without dropout every method has the same gradients
NO_DROPOUT = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "llama": ("attention_dropout",),
    "vit": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}
POSITIONS = {"gpt2": "n_positions", "llama": "max_position_embeddings", "bert": "max_position_embeddings"}

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A model and its batch: which, how it is trained, in which precision, on how many sequences of which length."""

    family: str
    size: str
    tuning: str
    precision: str
    batch: int
    length: int
    layers: int | None = None

    @property
    def row(self) -> dict[str, Any]:
        """Its part of a row of results."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "layers"}

    @property
    def spec(self) -> Spec:
        """Without dropout, and with as many positions as the sequences have."""
        changes: dict[str, Any] = dict.fromkeys(NO_DROPOUT[self.family], 0.0)
        positions = POSITIONS.get(self.family)
        if positions and self.length > getattr(Spec(self.family, self.size).config(), positions):
            changes[positions] = self.length
        if self.layers is not None:
            changes["n_layer" if self.family == "gpt2" else "num_hidden_layers"] = self.layers
        return Spec(self.family, self.size, self.tuning == "lora", tuple(changes.items()))

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and images."""
        return PRECISIONS[self.precision]


def length_of(family: str, size: str, length: int) -> int:
    """The tokens of a sequence: `length`, but an image has as many as its model cuts it into, and one of class."""
    if family != "vit":
        return length
    config = Spec(family, size).config()
    return (config.image_size // config.patch_size) ** 2 + 1


@dataclass
class Job:
    """The model of a setting with its batch. All methods train the same parameters, which are there once."""

    setting: Setting
    model: nn.Module
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, setting: Setting, device: torch.device) -> "Job":
        """Built in its dtype on its device, with the weights and the batch of a fixed seed."""
        torch.manual_seed(SEED)
        with _defaults(setting.dtype, device):
            model = adapted(build(setting.spec), setting.spec)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(device, setting.dtype)
            if "lora_B" in name:  # zero at first, and then so is every gradient of A
                nn.init.normal_(parameter, std=0.02)
        x, y = batch(setting.spec, setting.batch, setting.length, torch.Generator().manual_seed(SEED))
        x = x.to(setting.dtype) if x.is_floating_point() else x
        return cls(setting, model, x.to(device), y.to(device))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    @property
    def held(self) -> list[Tensor]:
        """What is in memory before a step."""
        return [self.x, self.y, *self.model.parameters(), *self.model.buffers()]

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def with_loss(self, method: str) -> WithLoss:
        """The model and its loss; what a method does to modules it does to a copy with the same parameters."""
        autocast = self.setting.precision == "autocast"
        if method == CHECKPOINT:
            return WithLoss(checkpointed(self._copy()), autocast)
        return Liger(self._copy(), autocast) if method == LIGER else WithLoss(self.model, autocast)

    def reference(self) -> Gradients | None:
        """The gradients in float32, eager, of the same weights and batch; None of a model that is too large for it."""
        if sum(each.numel() for each in self.model.parameters()) > LARGEST_REFERENCE:
            return None
        model = copy.deepcopy(self.model).float()
        WithLoss(model, autocast=False)(self.x.float() if self.x.is_floating_point() else self.x, self.y).backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    def _copy(self) -> nn.Module:
        shared = {id(each): each for each in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared)


@dataclass
class Run:
    """A job under a method, compiled by its first step, and the seconds of that."""

    job: Job
    method: str
    forward: Callable[[Tensor, Tensor], Tensor]
    first_call: float = 0.0

    @classmethod
    def started(cls, job: Job, method: str, cold: bool = True) -> "Run":
        """After the first step; it compiles from an empty cache if `cold`, so that its seconds can be compared."""
        function = job.with_loss(method)
        if method == OFFLOAD:
            forward: Callable[..., Tensor] = Offloaded(compiled(STOCK, function))
        else:
            forward = compiled("eager" if method == LIGER else method, function)
        run = cls(job, method, forward)
        with fresh_cache() if cold else nullcontext():
            run.first_call = run.step()
        return run

    def step(self) -> float:
        """Forward and backward into fresh gradients, no optimizer; returns its seconds."""
        self.job.zero_grad()
        _wait(self.job.x.device)
        start = time.perf_counter()
        self.forward(self.job.x, self.job.y).backward()
        _wait(self.job.x.device)
        return time.perf_counter() - start

    def gradients(self) -> Gradients:
        """Those of one step from a fixed seed; the next step has others."""
        torch.manual_seed(SEED)
        self.step()
        return {name: each.grad for name, each in self.job.trained.items() if each.grad is not None}

    def memory(self) -> dict[str, int | None]:
        """Bytes saved for backward, on the device and on the host, and the peak of a step above what is held before."""
        self.job.zero_grad()
        saved = saved_bytes(lambda: self.forward(self.job.x, self.job.y), self.job.held)
        host = self.forward.host_bytes if isinstance(self.forward, Offloaded) else None
        peak = peak_bytes(self.step, self.job.x.device)
        self.job.zero_grad()
        return {"saved_bytes": saved, "host_bytes": host, "peak_bytes": peak}


def distance(found: Gradients, wanted: Gradients) -> float:
    """|g - g0| / |g0| over all parameters."""
    if found.keys() != wanted.keys():
        raise ValueError(f"other parameters have gradients: {sorted(found.keys() ^ wanted.keys())[:3]}")
    return norm(found[name].float() - wanted[name].float() for name in wanted) / norm(wanted.values())


def norm(gradients: Iterable[Tensor]) -> float:
    return math.sqrt(sum(each.float().square().sum().item() for each in gradients))


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """New tensors have this dtype and device: a large model is never anywhere else."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
