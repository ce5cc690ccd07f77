"""Triton kernels of graphopt's own operators, for CUDA tensors: one read of what each formula reads.

activation   y = f(x) with the two-bit code of f'(x); dx = dy * levels[code]
norm         LayerNorm and RMSNorm to y, z, rstd; dx, dweight, dbias from z
group_quant  saved tensors in 8, 4 or 2 bits: codes and scales of groups of values, and values from these
language     Triton, or what stands in for it where it is not installed
ops          the operators that run them, torch.ops.graphopt.activation_forward and the like

    import graphopt.kernels                                                               # registers the operators
    y, code = torch.ops.graphopt.activation_forward(x, "gelu", "relu3", None)             # trains in eager mode

They are for models in eager mode and for other compilers. The backends spell formulas out instead and Inductor writes
the kernels; docs/lowering.md says why. Where `supports()` answers False, or on another device than CUDA, the reference
runs.
"""

import graphopt.kernels.ops  # noqa: F401
