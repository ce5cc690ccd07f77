"""The passes, in the order in which they run. Each is (gm, example_inputs) -> gm and stands alone.

To add one: a file here, a row in its tuple.
    FORWARD   see the graph that Dynamo hands a backend
    JOINT     the joint graph of forward and backward
    CODES     the joint graph with what exact derivatives keep marked; what they rewrite is approximate
    SAVED     the decomposed joint graph with what a first cut would save marked
    HALVES    each of the two graphs that the cut has made
After CODES and SAVED the graph is cut again if one of them fired, and they are taken back if that saves no bytes.
"""

from graphopt.lowering.decompose import decompose, lower
from graphopt.passes.approx_activation import approx_activation
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.pack_mask import pack_mask
from graphopt.passes.share_norm import share_norm

FORWARD = (canonicalize,)
JOINT = (share_norm,)
CODES = (approx_activation,)
SAVED = (pack_mask,)
HALVES = (lower,)

# decompose and lower spell out what the others leave behind and cannot be left out
NAMES = tuple(each.__name__ for each in (*FORWARD, *JOINT, *CODES, *SAVED))

__all__ = [
    "CODES", "FORWARD", "HALVES", "JOINT", "NAMES", "SAVED",
    "approx_activation", "canonicalize", "decompose", "lower", "pack_mask", "share_norm",
]  # fmt: skip
