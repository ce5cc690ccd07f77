"""loud(): a backend that is not off in silence.

Under `torch._dynamo.config.suppress_errors` Dynamo logs a backend's error and runs the model in eager mode; errors of
some kinds, such as that of an operator without a fake implementation, it treats so in any case. And what
compiles a module in place, `model.compile()`, is passed by where something other than the module itself is called:
its `forward`, a copy of it, another of its methods. Then the backend is never called at all.
"""

from __future__ import annotations

import atexit
import functools
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch._dynamo.config as dynamo_config
from torch._dynamo.exc import RestartAnalysis, SkipFrame, exceptions_allowed_to_be_fallback

Given = ParamSpec("Given")
Compiled = TypeVar("Compiled")

_called: set[str] = set()


def loud(backend: Callable[Given, Compiled]) -> Callable[Given, Compiled]:
    """The backend, which warns where Dynamo hides its error; it is counted as called, see `_never_called`."""

    @functools.wraps(backend)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Compiled:
        _called.add(backend.__name__)
        try:
            return backend(*args, **kwargs)
        except (RestartAnalysis, SkipFrame):  # no errors: Dynamo traces the frame again, or leaves it out
            raise
        except Exception as error:
            if dynamo_config.suppress_errors or isinstance(error, exceptions_allowed_to_be_fallback):
                by = "torch._dynamo.config.suppress_errors" if dynamo_config.suppress_errors else "Dynamo"
                warnings.warn(
                    f"{backend.__name__} is off: {by} hides its error, and this code runs in eager mode. "
                    f"{type(error).__name__}: {error}",
                    stacklevel=2,
                )
            raise

    return call


@atexit.register
def _never_called() -> None:
    # a script that an error ended may not have come to its model
    if not _called and getattr(sys, "last_value", None) is None:
        warnings.warn(
            "lowmem was asked for and compiled nothing: no model that it was to compile was called. After "
            "model.compile(), model.forward(), other methods, copies of the model, and bare containers such as "
            "nn.Sequential run in eager mode.",
            stacklevel=1,
        )
