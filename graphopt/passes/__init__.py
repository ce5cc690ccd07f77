"""The passes, in the order in which they run. Each is (gm, example_inputs) -> gm and stands alone.

To add one: a file here, a row in its tuple.
    FORWARD   see the graph that Dynamo hands a backend
    JOINT     the joint graph of forward and backward
    SAVED     the joint graph with what a first cut would save marked; the graph is cut again if one of them fires
    HALVES    each of the two graphs that the cut has made
"""

from graphopt.lowering.decompose import decompose, lower
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.pack_mask import pack_mask
from graphopt.passes.share_norm import share_norm

FORWARD = (canonicalize,)
JOINT = (share_norm, decompose)
SAVED = (pack_mask,)
HALVES = (lower,)

# decompose and lower spell out what the others leave behind and cannot be left out
NAMES = tuple(each.__name__ for each in (canonicalize, share_norm, pack_mask))

__all__ = [
    "FORWARD", "HALVES", "JOINT", "NAMES", "SAVED", "canonicalize", "decompose", "lower", "pack_mask", "share_norm",
]  # fmt: skip
