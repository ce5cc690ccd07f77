"""The passes, in the order in which they run. Each is (gm, example_inputs) -> gm and stands alone.

To add one: a file here, a row in its tuple.
    FORWARD       see the graph that Dynamo hands a backend
    JOINT         the joint graph of forward and backward
    APPROXIMATE   the joint graph with what exact derivatives keep marked; they run where an option asks for them
    AFTER_CUT     the decomposed joint graph with what a first cut would save marked
    PLANNED       the decomposed joint graph, to write a plan into
    HALVES        each of the two graphs that the cut has made
    FORWARD_HALF  the forward one of them, after that
`graphopt.split` finds out what a cut would save after JOINT, APPROXIMATE, AFTER_CUT and PLANNED, and takes back what
saves no bytes.
"""

from graphopt.lowering.decompose import decompose, lower
from graphopt.lowering.residuals import write_residuals
from graphopt.passes.approx_activation import approx_activation
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.encode import encode
from graphopt.passes.pack_mask import pack_mask
from graphopt.passes.share_norm import share_norm

FORWARD = (canonicalize,)
JOINT = (share_norm,)
APPROXIMATE = (approx_activation,)
AFTER_CUT = (pack_mask,)
PLANNED = (encode,)
HALVES = (lower,)
FORWARD_HALF = (write_residuals,)

# the rest prepares for Inductor and cannot be left out
NAMES = tuple(each.__name__ for each in (*FORWARD, *JOINT, *APPROXIMATE, *AFTER_CUT, *PLANNED))

__all__ = [
    "AFTER_CUT", "APPROXIMATE", "FORWARD", "FORWARD_HALF", "HALVES", "JOINT", "NAMES", "PLANNED",
    "approx_activation", "canonicalize", "decompose", "encode", "lower", "pack_mask", "share_norm", "write_residuals",
]  # fmt: skip
