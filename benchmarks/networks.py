"""The six blocks that are measured: a ViT block and a Llama block, trained in full or through LoRA."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LLAMA_HIDDEN, RANK = 512, 8, 1408, 8


class ViTBlock(nn.Module):
    def __init__(self, dropout: float = 0.0, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.activation = activation
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(attention))
        return x + self.dropout(self.fc2(self.activation(self.fc1(self.norm2(x)))))


class LlamaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, LLAMA_HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(LLAMA_HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(attention)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LoRALinear(nn.Module):
    """A frozen linear beside a trained one of rank 8; both factors start random, so that both have gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Linear(linear.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.b(self.a(x))


def with_lora(block: nn.Module, only: Collection[str] = ()) -> nn.Module:
    """`block` with its parameters frozen and its linears, or those named in `only`, given an adapter."""
    block.requires_grad_(False)
    for name, linear in list(block.named_children()):
        if isinstance(linear, nn.Linear) and (not only or name in only):
            setattr(block, name, LoRALinear(linear))
    return block


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "vit-full": ViTBlock,
    "vit-dropout": lambda: ViTBlock(dropout=0.1),
    "vit-lora": lambda: with_lora(ViTBlock()),
    "vit-lora-qkv": lambda: with_lora(ViTBlock(), ("qkv",)),
    "llama-full": LlamaBlock,
    "llama-lora": lambda: with_lora(LlamaBlock()),
}


def build(name: str, dtype: torch.dtype, device: torch.device) -> nn.Sequential:
    """Block `name` behind a linear, so that the block's input has a gradient; the weights are the same every time."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for module in block.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            # as after some training: a norm that scales by one would hide errors
            for parameter, mean in zip(module.parameters(), (1.0, 0.0), strict=False):
                nn.init.normal_(parameter, mean, 0.2)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), block).to(device, dtype)
