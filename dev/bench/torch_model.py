"""The trainer's models and its training step in PyTorch, to compare with: LLaMA and GPT-2, causal attention by
scaled_dot_product_attention, clipping, fused AdamW."""

import re
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


def dimensions(name):
    """family, layers, hidden, ffn, heads, vocabulary of a preset of trainer/model_config.h, or of a work of step.cu"""
    here = Path(__file__).parent
    row = re.search(
        rf'{{"{re.escape(name)}", Family::(\w+), (\d+), (\d+), (\d+), (\d+), (\d+),',
        (here / "../../trainer/model_config.h").read_text(),
    )
    if row:
        return row[1], *map(int, row.groups()[1:])
    row = re.search(
        rf'"{re.escape(name)}"\) return {{\.L = (\d+), \.C = (\d+), \.F = (\d+), \.NH = (\d+), .*\.V = (\d+)}};',
        (here / "step.cu").read_text(),
    )
    if row:
        return "LLAMA", *map(int, row.groups())
    sys.exit(f"{name}: neither a preset of trainer/model_config.h nor a work of dev/bench/step.cu")


def rotate(x, angles):
    """Positions, in Hugging Face's rotate-half form. x (B, heads, T, head size)"""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, llama, hidden, ffn, heads):
        super().__init__()
        self.llama, self.heads = llama, heads
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.norm1, self.norm2 = norm(hidden, eps=1e-6), norm(hidden, eps=1e-6)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=not llama)
        self.out = nn.Linear(hidden, hidden, bias=not llama)
        self.up = nn.Linear(hidden, 2 * ffn if llama else ffn, bias=not llama)
        self.down = nn.Linear(ffn, hidden, bias=not llama)

    def forward(self, x, angles):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if self.llama:
            q, k = rotate(q, angles), rotate(k, angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        up = self.up(self.norm2(x))
        if not self.llama:
            return x + self.down(F.gelu(up, approximate="tanh"))
        gate, up = up.chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, name):
        super().__init__()
        family, layers, hidden, ffn, heads, vocab = dimensions(name)
        self.llama, self.vocab, self.half = family == "LLAMA", vocab, hidden // heads // 2
        self.embedding = nn.Embedding(vocab, hidden)
        self.positions = None if self.llama else nn.Embedding(1024, hidden)
        self.blocks = nn.ModuleList(Block(self.llama, hidden, ffn, heads) for _ in range(layers))
        self.norm = (nn.RMSNorm if self.llama else nn.LayerNorm)(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, vocab, bias=False)
        if not self.llama:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, targets):
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x, angles = self.embedding(tokens), None
        if self.llama:
            frequency = 10000.0 ** (-torch.arange(self.half, device=tokens.device, dtype=torch.float32) / self.half)
            angles = torch.outer(position.float(), frequency)
        else:
            x = x + self.positions(position)
        for block in self.blocks:
            x = block(x, angles)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class Training:
    """step() is one of the trainer's: forward, backward, clipping, AdamW. bf16: on a GPU fp32 masters and autocast, as
    PyTorch's users have it; on a CPU everything in bf16, which is faster there."""

    def __init__(self, name, B, T, device, bf16, compiled):
        torch.manual_seed(1)
        self.autocast = torch.autocast("cuda", torch.bfloat16, enabled=bf16 and device == "cuda")
        self.model = Transformer(name).to(device)
        if bf16 and device == "cpu":
            self.model.bfloat16()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.loss = torch.compile(self.model) if compiled else self.model
        self.tokens = torch.randint(self.model.vocab, (B, T + 1), device=device)

    def step(self):
        with self.autocast:
            loss = self.loss(self.tokens[:, :-1], self.tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
