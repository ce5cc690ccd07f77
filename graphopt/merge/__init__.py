"""merge_norm_affine: a norm's weight and bias, folded into the weights and biases of the linears that read it.

    y = weight * z + bias,  o = W y + b     becomes     o = W' z + b',   W' = W diag(weight),  b' = b + W bias

This is the surgery under MS-LN and MS-RMSNorm (LowMemoryBP, arXiv 2406.16282, section 4): the linears then save z,
which is also what the norm's backward reads. share_norm needs no such weights; merging is for those who want them.

    readers.py      model, inputs -> the norms, the linears that read each, or why it cannot be merged
    parameters.py   which parameters may be changed: plain ones, held once and read once
    surgery.py      the arithmetic, there and back, and what it would lose; nothing is changed before all is checked
    record.py       what was merged, kept on the model; the norm's weight and bias, kept on the norm as buffers

By the record `unmerge_norm_affine` takes the norms out again, also after training, `copy.deepcopy`, pickling or
`load_state_dict`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from graphopt.errors import MergeError
from graphopt.merge import surgery
from graphopt.merge.readers import find_norms
from graphopt.merge.record import RECORD, MergedNorm

__all__ = ["merge_norm_affine", "unmerge_norm_affine"]


def merge_norm_affine(model: nn.Module, *inputs: Any, exclude: Iterable[str] = (), **kwargs: Any) -> nn.Module:
    """Fold the weight and bias of every LayerNorm and RMSNorm into the linears that read it, in place.

    `inputs` and `kwargs` are those of one call of the model, of which the graph is traced; nothing is run. They may be
    left out where the model has transformers' `dummy_inputs`. `exclude` names norms, as `named_modules` does, that stay
    as they are. Returns `model`, as torch.nn.utils does.

    With o = W y + b and y = weight * z + bias: W becomes W diag(weight) and b becomes b + W bias, computed in float64
    and then rounded to the parameter's dtype (float16, bfloat16, float32 or float64). They stay the same Parameters;
    the state that an optimizer keeps for them is not rescaled. The norm is left with a weight of ones (zeros in Gemma,
    which multiplies by 1 + weight) and a bias of zeros, both frozen and without a gradient. A linear without a bias
    that reads a norm with one gets a frozen bias. Linears are F.linear(y, W, b) and torch.addmm(b, y, W), transformers'
    Conv1D.

    Norms without parameters are left alone, and so are those that the graph shows as no LayerNorm or RMSNorm. Readers
    in a branch that the traced call does not take, or outside of the model, are not seen.

    The merged state_dict has two more entries a norm, `merged_weight` and `merged_bias`. It loads into a model that was
    merged the same way; another loader, `from_pretrained` say, does not know them, nor the biases that were added.

    Raises CaptureError if the model does not form one graph, and MergeError, before anything is changed, naming every
    norm that cannot be merged, why, and the `exclude` that leaves it as it is: whose output something that is no such
    linear reads, whose parameters or whose linear's are shared, tied, read a second time, computed (parametrized),
    quantised or on the meta device, or with a weight whose zeros or small values would lose W.

    Source: LowMemoryBP (arXiv 2406.16282), section 4.
    """
    if any(RECORD in vars(module) for module in model.modules()):
        raise MergeError("this model's norms are merged already; unmerge_norm_affine takes them out again")
    root: nn.Module = getattr(model, "_orig_mod", model)
    with unset_fake_temporarily():
        found = find_norms(root, *_inputs(root, inputs, kwargs))
    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    for path in excluded:
        if path not in found:
            near = difflib.get_close_matches(path, found, n=1, cutoff=0.0)
            nearest = f"the nearest is {near[0]!r}" if near else "there is none"
            raise MergeError(f"exclude: {path!r} is no norm of this model; {nearest}")
    refused = {path: why for path, why in found.items() if path not in excluded and isinstance(why, str)}
    norms = [norm for path, norm in found.items() if path not in excluded and isinstance(norm, MergedNorm)]
    with torch.inference_mode(False), torch.no_grad():  # a bias made in inference mode could not be trained with
        refused |= {norm.path: why for norm in norms if (why := surgery.why_not_merge(root, norm))}
        if refused:
            way_out = f"Leave them as they are with exclude={[*excluded, *refused]!r}"
            raise MergeError(f"{_listed('be merged', refused)}\n{way_out}")
        for norm in norms:
            surgery.merge(root, norm)
    if norms:
        setattr(root, RECORD, tuple(norms))
    return model


def unmerge_norm_affine(model: nn.Module) -> nn.Module:
    """Take the norms' weights and biases out of the linears again, in place: the inverse of merge_norm_affine.

    W becomes W / diag(weight) and b becomes b - W bias with that W, computed in float64 and then rounded to the
    parameter's dtype. The norm has its parameters back, and they require gradients if they did. Trained linears are
    taken as they are now, and what a norm has learned since is multiplied in, so that the model computes the same
    function up to rounding; for its sake an added bias stays, frozen, where W was trained against it, and is removed
    otherwise. Without training an element of W is off by at most one ulp of its own, where W' is no subnormal number.
    Returns `model`.

    Raises MergeError, before anything is changed, if nothing is merged, or if a linear is no longer where it was.
    """
    merged = [(root, norm) for root in model.modules() for norm in vars(root).get(RECORD, ())]
    if not merged:
        raise MergeError("no norm of this model is merged")
    with torch.no_grad():
        refused = {norm.path: why for root, norm in merged if (why := surgery.why_not_unmerge(root, norm))}
        if refused:
            raise MergeError(_listed("be taken out again", refused))
        for root, norm in merged:
            surgery.unmerge(root, norm)
    for root in {root for root, _ in merged}:
        delattr(root, RECORD)
    return model


def _inputs(root: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs to trace the model with: those given, or its dummy_inputs."""
    if inputs or any(isinstance(each, Tensor) for each in tree_leaves(kwargs)):
        return inputs, kwargs
    dummy = getattr(root, "dummy_inputs", None)
    main = getattr(root, "main_input_name", None)  # dummy_inputs are tokens, also of models that take something else
    if not isinstance(dummy, dict) or (main is not None and main not in dummy):
        raise MergeError(
            f"{type(root).__name__} has no dummy_inputs to trace it with: pass the inputs of one call, "
            "merge_norm_affine(model, *inputs)"
        )
    device = next((each.device for each in root.parameters()), None)
    moved = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in dummy.items()}
    return (), {**moved, **kwargs}


def _listed(what: str, refused: Mapping[str, str]) -> str:
    count = "1 norm" if len(refused) == 1 else f"{len(refused)} norms"
    return "\n".join([f"{count} cannot {what}:", *(f"  {path!r}: {why}" for path, why in refused.items())])
