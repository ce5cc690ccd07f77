"""The ways to train that are measured, each by its name.

eager, inductor
heuristics-off, aggressive, budget-FRACTION, fp8, checkpoint      torch's own ways to save less
lowmem, lowmem:PRESET, lowmem:PRESET:CODE                         the code being one of approx_activation
lowmem:KEY=VALUE[,KEY=VALUE], lowmem:PRESET:KEY=VALUE             any option, such as lowmem:memory_budget=0.06
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._inductor.compile_fx import compile_fx

from graphopt.errors import OptionsError
from graphopt.options import parse

STOCK, CHECKPOINT, BUDGET = "inductor", "checkpoint", "budget-"
# its defaults are for models of gigabytes: tensors from 100 MB on, 5 bits of range
FP8 = {
    "quant_type": "torch.float8_e4m3fn", "use_scaling": True, "size_in_mb": 0.01, "exclude_primals": True,
    "allowed_dtypes": "torch.bfloat16;torch.float32",
}  # fmt: skip
# torch's own ways to save less, as patches of its settings
KNOBS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "heuristics-off": partial(
        functorch_config.patch, ban_recompute_used_far_apart=False, ban_recompute_materialized_backward=False
    ),
    "aggressive": partial(functorch_config.patch, aggressive_recomputation=True),
    "fp8": partial(inductor_config.patch, post_grad_fusion_options={"activation_quantization_aten_pass": FP8}),
}


def compiled(method: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under `method`, in one graph, so that nothing runs in eager unnoticed; checkpointing is its own."""
    if method == "eager":
        return function
    if method in KNOBS or method.startswith(BUDGET):
        knob = KNOBS.get(method) or partial(
            functorch_config.patch, activation_memory_budget=float(method.removeprefix(BUDGET))
        )
        return torch.compile(function, backend=_patched(knob), fullgraph=True)
    backend = STOCK if method == CHECKPOINT else method.partition(":")[0]
    return torch.compile(function, backend=backend, options=options(method) or None, fullgraph=True)


def options(method: str) -> dict[str, Any]:
    """What a method sets of torch.compile's options: that of its name behind the colon."""
    return dict(_options(method.split(":")[1:]))


def wrong(method: str, known: Iterable[str]) -> str | None:
    """What is wrong with the name of a method, None if nothing is; `known` are those of a script beside lowmem's."""
    name = method.partition(":")[0]
    if name in ("lowmem", "lowmem_eager"):
        try:
            parse(options(method))
        except OptionsError as error:
            return str(error)
        return None
    budget = name.startswith(BUDGET) and name.removeprefix(BUDGET).replace(".", "", 1).isdigit()
    return None if budget or method in known else f"there is {', '.join(known)}"


def warm_up(method: str, device: torch.device) -> None:
    """Compile one line: the imports and probes of a first use are not a model's first call."""
    x = torch.ones(8, device=device, requires_grad=True)
    compiled(method, lambda x: x.sin().sum())(x).backward()


def _options(settings: list[str]) -> Iterator[tuple[str, Any]]:
    """The options of lowmem:...: a preset and a code stand first, without their names."""
    for name, setting in zip(("preset", "approx_activation", ""), settings):
        for item in setting.split(","):
            key, equals, value = item.partition("=")
            if equals:
                # a number, or a word as it stands
                yield key, json.loads(value) if value[:1] in "0123456789" else value
            else:
                yield name, key


def _patched(knob: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """Stock Inductor under other settings; a backend of its own, so that Dynamo keeps them apart."""

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        with knob():
            return compile_fx(gm, example_inputs)

    return backend
