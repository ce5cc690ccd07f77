"""Every error graphopt raises on purpose: one class per mistake, all under GraphoptError."""

from __future__ import annotations

from torch._dynamo.exc import ShortenTraceback


class GraphoptError(ShortenTraceback):
    """Base of graphopt's errors.

    Dynamo re-raises this family as it is: not wrapped in BackendCompilerFailed, never turned into a graph break. Under
    its `suppress_errors` it hides them as any other error, and the backend warns that it is off.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionsError(GraphoptError):
    """An option of graphopt's own is unknown or has a value that is not allowed."""


class PassError(GraphoptError):
    """A pass raised, or left a graph that does not hold together: a bug in the pass, not in the model."""


class CaptureError(GraphoptError):
    """A model could not be captured as one training graph."""


class MergeError(GraphoptError):
    """Norms cannot be merged into the linears that read them, or cannot be taken out again."""


class PlanError(GraphoptError):
    """A plan cannot be read, or a goal cannot be reached by any plan."""
