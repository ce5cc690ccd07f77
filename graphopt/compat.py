"""What differs between the versions of torch that graphopt runs on, 2.11 to 2.13: all of it is here."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch._inductor.inductor_prims

# arguments of torch.compile for what is only tried out: it does not count towards the limit of recompiles of its code
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
)

# Inductor's own multiply-add, in the backward of a softmax
FMA = {torch.ops.prims.fma} if hasattr(torch.ops.prims, "fma") else set()
