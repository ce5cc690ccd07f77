"""The passes, in the order in which they run. Each is (gm, example_inputs) -> gm and stands alone.

To add one: a file here, a row in its tuple. FORWARD passes see the graph that Dynamo hands a backend, JOINT passes the
joint graph of forward and backward before the cut, CUT passes each of the two graphs after it.
"""

from graphopt.lowering.decompose import decompose, lower
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.pack_mask import pack_mask
from graphopt.passes.share_norm import share_norm

FORWARD = (canonicalize,)
JOINT = (share_norm, decompose, pack_mask)
CUT = (lower,)

# decompose and lower spell out what the others leave behind and cannot be left out
NAMES = tuple(each.__name__ for each in (canonicalize, share_norm, pack_mask))

__all__ = ["CUT", "FORWARD", "JOINT", "NAMES", "canonicalize", "decompose", "lower", "pack_mask", "share_norm"]
