"""What passes read off a joint graph: backward's share, bytes, origins; and a copy of one."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import CheckpointPolicy

_ROOT = re.compile(r"^L\['\w+'\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+).*\n(.*)')
_TORCH = str(Path(torch.__file__).parent)

aten = torch.ops.aten
COMPARISONS = (aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor)
ORIGIN = "graphopt_origin"  # in node.meta: the name of the canonical operator that a node helps to spell out

ENCODED = "graphopt_encoded"  # in node.meta of what a codec saves: what it is, such as "int8 of mm"


def tensor(node: object) -> torch.Tensor | None:
    """The dense fake tensor a node stands for; None for sparse ones, tuples, symbolic sizes and unannotated nodes."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) and value.layout is torch.strided else None


def after_tangents(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that can only run in backward: those that a tangent reaches."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or node.meta.get("partitioner_tag") == "must_be_in_backward":
            found.add(node)
        elif node.op != "output" and any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def in_backward(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that autograd made for backward, also those that a tangent does not reach (a cast of a mask, say)."""
    tags = ("is_backward", "must_be_in_backward")
    return {node for node in graph.nodes if node.meta.get("partitioner_tag") in tags} | after_tangents(graph)


def hint(size: int | torch.SymInt) -> int:
    """A size as a number; for a symbolic size the one of the first call."""
    return size if isinstance(size, int) else int(size.node.hint if size.node.has_hint() else 1)


def nbytes(value: torch.Tensor) -> int:
    return math.prod(hint(size) for size in value.shape) * value.dtype.itemsize


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are known to be the same; asked without a guard on sizes that are symbols."""
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right))


def layout(value: torch.Tensor) -> tuple[Any, ...] | None:
    """What tensors must share for one traced function to serve both; None where sizes are symbolic."""
    sizes = (*value.shape, *value.stride())
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    return value.dim(), sizes, value.dtype, value.device


def memory_order(value: torch.Tensor) -> list[int]:
    """The dims as they lie in memory, outermost first: `value.permute(memory_order(value))` is row-major if dense."""
    return sorted(range(value.dim()), key=lambda dim: -hint(value.stride()[dim]))


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes one: `value.permute(order).permute(inverse(order))` is `value`."""
    return [order.index(dim) for dim in range(len(order))]


def storage(value: torch.Tensor) -> int:
    """Which storage a fake tensor lies in: a view and its base answer the same."""
    return int(value.untyped_storage()._cdata)


def storage_bytes(values: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages under `values`: what stays allocated while they live."""
    return sum({storage(value): hint(value.untyped_storage().nbytes()) for value in values}.values())


def owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node the one whose storage it shows: itself, or what it is a view of."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        owner[node] = node
        for each in node.all_input_nodes:
            if _shows(node, each) or (node.target is operator.getitem and owner[each] is not each):
                owner[node] = owner[each]
                break
    return owner


def _shows(node: fx.Node, read: fx.Node) -> bool:
    # a node copied by a rewrite has the fake tensor of its original, so a shared storage alone would not do
    value, base = tensor(node), tensor(read)
    if is_view(node):
        return read is node.args[0]
    return value is not None and base is not None and storage(value) == storage(base)


def is_view(node: fx.Node) -> bool:
    """Whether the node is a view by its operator's schema, which ATen says of its own."""
    return getattr(node.target, "is_view", False) is True


def place_behind(node: fx.Node) -> fx.Node:
    """Where a reader of `node` may stand first; inputs come before all else."""
    if node.op != "placeholder":
        return node.next
    return next(each for each in node.graph.nodes if each.op != "placeholder")  # type: ignore[no-any-return]


def read_by_backward(graph: fx.Graph) -> list[fx.Node]:
    """The forward tensors that backward reads as the graph stands, before any cut; inputs of the graph left out."""
    backward = in_backward(graph)
    inputs = {storage(value) for node in graph.find_nodes(op="placeholder") if (value := tensor(node)) is not None}
    return [
        node
        for node in graph.nodes
        if node not in backward
        and (value := tensor(node)) is not None
        and storage(value) not in inputs
        and any(user in backward for user in node.users)
    ]


def in_checkpoint(node: fx.Node) -> bool:
    """Whether the user checkpoints the region the node lies in: it is recomputed as a whole already."""
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def is_random(node: fx.Node) -> bool:
    """Whether the operator draws random numbers, or may."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def compares(node: fx.Node) -> bool:
    """Whether a mask answers, itself or through masks it is made of, how floating-point tensors compare.

    A kernel that packs such a mask makes what it compares anew, in another order than the kernel before. A maximum may
    then differ in its last bit from all that it was taken over, and a mask be empty.
    """
    queue, seen = [node], {node}
    while queue:
        each = queue.pop()
        read = [value for given in each.all_input_nodes if (value := tensor(given)) is not None]
        if each.target in COMPARISONS and any(value.is_floating_point() for value in read):
            return True
        masks = [given for given in each.all_input_nodes if given not in seen and _is_mask(given)]
        seen.update(masks)
        queue.extend(masks)
    return False


def _is_mask(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype == torch.bool


def operator_name(node: fx.Node) -> str:
    """The operator that computed a node, without PyTorch's namespaces; of one of several outputs what gave them."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return operator_name(node.args[0])
    name = str(getattr(node.target, "overloadpacket", node.target))
    return name.removeprefix("aten.").removeprefix("prims.").removeprefix("_").removeprefix("scaled_dot_product_")


def module_of(node: fx.Node) -> str:
    """The path of the module that made the node, as `named_modules` has it; empty where there is none."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    names: list[str] = re.findall(r"\w+", _ROOT.sub("", path).replace("_modules", ""))
    return ".".join(names)


def source_of(node: fx.Node) -> str:
    """The user's line that made the node, "file.py:12  code", torch's own frames left out; empty if not known."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line, code in reversed(frames):
        if not file.startswith(_TORCH):
            return f"{Path(file).name}:{line}  {code.strip()}"
    return ""


def copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own nodes, under the same names, over the same parameters and fake tensors."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if output is not None:
        value, old = output  # type: ignore[misc]
        graph.output(value).meta = dict(old.meta)  # type: ignore[union-attr]
    new = _LazyGraphModule(gm, graph)  # writes Python code only when it is called
    new.meta.update(gm.meta)
    # by these AOTAutograd tells parameters, which cost nothing to save, from other inputs
    if hasattr(gm, "_param_name_to_source"):
        new._param_name_to_source = gm._param_name_to_source
    for given, node in zip(gm.graph.find_nodes(op="placeholder"), graph.find_nodes(op="placeholder")):
        if hasattr(given, "_dynamo_source"):
            node._dynamo_source = given._dynamo_source
    return new


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = tensor(node)
        if value is not None and hasattr(value, "fake_mode"):
            return value.fake_mode  # type: ignore[no-any-return]
    raise ValueError("the graph's nodes carry no fake tensors in meta['val']")


def outputs_of(node: fx.Node) -> dict[int, fx.Node]:
    """The getitem nodes that read a node of several outputs, by index."""
    return {int(user.args[1]): user for user in node.users if user.target is operator.getitem}  # type: ignore[arg-type]
