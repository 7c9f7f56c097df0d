#!/usr/bin/env python3
"""How long PyTorch takes for a training step of a llama preset, compiled, in bf16, on the GPU.

  dev/bench/torch_step.py [MODEL=llama-130m] [B=32] [T=1024]

The step is what build/cuda-bf16-LNS/step measures: forward, backward, clipping, fused AdamW on fp32 masters. Attention
is scaled_dot_product_attention; torch.compile fuses the rest.
"""

import re
import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


def preset(name):
    """layers, hidden, ffn, heads, vocabulary, of trainer/model_config.h"""
    text = (Path(__file__).parent / "../../trainer/model_config.h").read_text()
    row = re.search(rf'{{"{re.escape(name)}", Family::LLAMA, (\d+), (\d+), (\d+), (\d+), (\d+),', text)
    return [int(value) for value in row.groups()] if row else sys.exit(f"torch_step: {name} is no llama preset")


def rotate(x, angles):
    """Positions, in Hugging Face's rotate-half form. x (B, heads, T, head size)"""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, hidden, ffn, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-6), nn.RMSNorm(hidden, eps=1e-6)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.gate_up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x, angles):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, layers, hidden, ffn, heads, vocab):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, ffn, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(hidden, eps=1e-6), nn.Linear(hidden, vocab, bias=False)
        self.half = hidden // heads // 2

    def forward(self, tokens, targets):
        position = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        frequency = 10000.0 ** (-torch.arange(self.half, device=tokens.device, dtype=torch.float32) / self.half)
        angles = torch.outer(position, frequency)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def main(name="llama-130m", B="32", T="1024"):
    if not torch.cuda.is_available():
        sys.exit("torch_step: torch finds no GPU")
    layers, hidden, ffn, heads, vocab = preset(name)
    model = Llama(layers, hidden, ffn, heads, vocab).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    compiled = torch.compile(model)
    tokens = torch.randint(vocab, (int(B), int(T) + 1), device="cuda")
    times = []
    for run in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        torch.cuda.synchronize()
        if run >= 5:  # the first ones compile
            times.append(begin.elapsed_time(end))
    ms = statistics.median(times)
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}: {name}, B = {B}, T = {T}, bf16, compiled")
    print(f"  step {ms:.1f} ms, {int(B) * int(T) / ms * 1e3:.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
