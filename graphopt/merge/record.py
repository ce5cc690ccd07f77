"""The record of a merge: which norm went into which linears, in names, so that it survives copies and pickling.

It stays on the model that was merged, under RECORD. What the norm's parameters were stays on the norm, in two buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

RECORD = "merged_norms"  # on the model: a tuple of MergedNorm
WEIGHT, BIAS = "merged_weight", "merged_bias"  # on a norm, as buffers: what its parameters were


@dataclass(frozen=True)
class MergedLinear:
    """A linear that a norm was merged into: its module's path and its parameters' names in there.

    `bias` is None where the merge leaves it alone. `transposed` says that the weight is [in, out], as in transformers'
    Conv1D.
    """

    path: str
    weight: str
    bias: str | None
    transposed: bool
    bias_added: bool


@dataclass(frozen=True)
class MergedNorm:
    """A norm that was merged: its module's path, its parameters' names and whether they required gradients.

    The norm multiplies by its weight plus `offset`: 0, or 1 in Gemma.
    """

    path: str
    weight: str
    bias: str | None
    offset: int
    weight_requires_grad: bool
    bias_requires_grad: bool
    linears: tuple[MergedLinear, ...]
