"""Who reads a forward tensor in backward, and by which cheap ways: what a rewrite must redirect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt.graph import tensor
from graphopt.splicing import copy_node

aten, prims = torch.ops.aten, torch.ops.prims
HALF = (torch.bfloat16, torch.float16)
CASTS = {aten._to_copy, prims.convert_element_type}
# through these a rounding of y stays a rounding; a comparison, a clamp or a maximum must see what forward saw
SMOOTH = {aten.mul, aten.div, aten.gelu, aten.silu}
SUMS = {aten.add, aten.sub}
SMOOTH_BACKWARD = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution_backward, aten.mul, aten.gelu_backward,
                   aten.silu_backward}  # fmt: skip
VIEWS = {aten.view, aten.reshape, aten._unsafe_view, aten.permute, aten.t, aten.transpose, aten.expand, aten.squeeze,
         aten.unsqueeze, aten.select, aten.slice, aten.alias, aten.clone}  # fmt: skip


@dataclass(frozen=True)
class WeightGradient:
    """A matrix product of backward that sums over tokens: dW = rows^T y (rows_first) or dW = y^T rows."""

    product: fx.Node
    grad: fx.Node
    y: fx.Node
    rows_first: bool
    tokens: int | torch.SymInt
    width: int | torch.SymInt


class Readers:
    """The ways from y to backward.

    `chain` holds y and the forward nodes made from it by casts, views and smooth pointwise work, in order; `backward`
    the nodes of backward that read one of them, each with what it reads. `smooth` tells whether backward may read y
    with one more rounding than forward had.
    """

    def __init__(self, y: fx.Node, after: set[fx.Node]) -> None:
        chain, backward, queue = {y}, dict[fx.Node, list[fx.Node]](), [y]
        self.smooth = True
        while queue:
            node = queue.pop()
            for user in node.users:
                if user in after:
                    backward.setdefault(user, []).append(node)
                    self.smooth &= packet(user) in SMOOTH_BACKWARD
                elif user not in chain and _link(user, chain):
                    chain.add(user)
                    queue.append(user)
                elif user not in chain and packet(user) not in SUMS and _pointwise(user):
                    self.smooth = False
        needed = {node for inputs in backward.values() for node in inputs}
        for node in sorted(chain, reverse=True):
            if node in needed:
                needed.update(argument for argument in node.all_input_nodes if argument in chain)
        self.y, self.backward = y, backward
        self.chain = [node for node in sorted(chain) if node in needed]

    def dtype(self) -> torch.dtype:
        """y's dtype, or the half precision that every reader casts it to first (as autocast makes them do)."""
        users = [user for user in self.y.users if user in self.backward or user in self.chain] or list(self.y.users)
        dtypes = {user.meta["val"].dtype if packet(user) in CASTS else None for user in users}
        half = dtypes.pop() if len(dtypes) == 1 else None
        y: torch.dtype = self.y.meta["val"].dtype
        return half if half in HALF else y

    def weight_gradients(self) -> list[WeightGradient] | None:
        """The readers, if each is the weight gradient of a linear that read y itself; otherwise None."""
        layout = {self.y: "tokens x width"}
        for node in self.chain[1:]:
            layout[node] = _layout(node, layout, self.y)
        found = []
        for product, inputs in self.backward.items():
            if product.target is not aten.mm.default or len(inputs) != 1:
                return None
            (y,), (left, right) = inputs, product.args
            rows_first = y is right
            if layout[y] != ("tokens x width" if rows_first else "width x tokens") or y.meta["val"].dim() != 2:
                return None
            tokens, width = y.meta["val"].shape if rows_first else reversed(y.meta["val"].shape)
            grad: fx.Node = left if rows_first else right  # type: ignore[assignment]
            found.append(WeightGradient(product, grad, y, rows_first, tokens, width))
        return found

    def copy(self, source: fx.Node) -> dict[fx.Node, fx.Node]:
        """The chain made anew from `source` in y's place, each link after the one it copies."""
        new = {self.y: source}
        for node in self.chain:
            if node is not self.y:
                new[node] = copy_node(node, node.next, new)
        return new


def packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)


def _link(node: fx.Node, chain: set[fx.Node]) -> bool:
    if tensor(node) is None or sum(argument in chain for argument in node.all_input_nodes) != 1:
        return False
    if packet(node) in SUMS:  # a shifted input of a linear; not the residual stream, which norms and further sums read
        return not any(packet(user) in SUMS or not isinstance(tensor(user), torch.Tensor) for user in node.users)
    if packet(node) is aten.div and node.args[0] not in chain:  # near zero a rounding of a divisor is no rounding
        return False
    return packet(node) in VIEWS | CASTS | SMOOTH


def _pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _layout(node: fx.Node, layout: dict[fx.Node, str], y: fx.Node) -> str:
    """How a link of the chain lays out y: "tokens x width", "width x tokens", or "" for anything else."""
    source = layout.get(node.args[0], "") if isinstance(node.args[0], fx.Node) else ""
    value = node.meta["val"]
    if packet(node) in CASTS or packet(node) in (aten.alias, aten.clone):
        return source
    if packet(node) in (aten.view, aten.reshape, aten._unsafe_view):
        return source if source == "tokens x width" and value.shape[-1] == y.meta["val"].shape[-1] else ""
    swaps = node.target in (aten.t.default, aten.transpose.int) or (
        node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    )
    if swaps and value.dim() == 2:
        return {"tokens x width": "width x tokens", "width x tokens": "tokens x width"}.get(source, "")
    return ""
