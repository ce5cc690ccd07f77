"""graphopt: torch.compile(model, backend="lowmem") trains the same model while autograd remembers fewer bytes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt import passes
    from graphopt.calibration import calibrate
    from graphopt.checking import check
    from graphopt.errors import CaptureError, GraphoptError, MergeError, OptionsError, PassError, PlanError
    from graphopt.merge import merge_norm_affine, unmerge_norm_affine
    from graphopt.options import Options
    from graphopt.plan import Plan
    from graphopt.report import Report, explain
    from graphopt.tracer import Capture, apply, capture
    from graphopt.verdict import Check

__version__ = "0.1.0"
__all__ = [
    "Capture", "CaptureError", "Check", "GraphoptError", "MergeError", "Options", "OptionsError", "PassError", "Plan",
    "PlanError", "Report", "__version__", "apply", "calibrate", "capture", "check", "explain", "merge_norm_affine",
    "passes", "unmerge_norm_affine",
]  # fmt: skip

# the public names and where they live; loaded on first use, so that `import graphopt` stays cheap
_HOMES = {
    "Capture": "tracer", "capture": "tracer", "apply": "tracer", "Report": "report", "explain": "report",
    "Options": "options", "GraphoptError": "errors", "OptionsError": "errors", "PassError": "errors",
    "CaptureError": "errors", "MergeError": "errors", "merge_norm_affine": "merge", "unmerge_norm_affine": "merge",
    "Plan": "plan", "PlanError": "errors", "calibrate": "calibration", "check": "checking", "Check": "verdict",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "passes":
        return importlib.import_module("graphopt.passes")
    if name in _HOMES:
        return getattr(importlib.import_module(f"graphopt.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
