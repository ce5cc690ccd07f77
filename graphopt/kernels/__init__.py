"""Triton kernels of graphopt's own operators, for CUDA tensors: one read of what each formula reads.

activation   y = f(x) with the two-bit code of f'(x); dx = dy * levels[code]
norm         LayerNorm and RMSNorm to y, z, rstd; dx, dweight, dbias from z
language     Triton, or what stands in for it where it is not installed
ops          the operators that run them, torch.ops.graphopt.activation_forward and the like

They run where a model calls those operators in eager mode; the backends spell formulas out instead, and Inductor writes
the kernels. Where `supports()` answers False, or on another device than CUDA, the reference runs.
"""
