#!/usr/bin/env python3
"""Where the variance of the residual stream behind block 1 sits: in which sublayer, tokens, channels and hidden units.

  first_block.py CHECKPOINT SHARD [--tokens 16384] [--seq-len 128] [--block 1]

CHECKPOINT is a plain LLaMA, as PRE, LNS and LNS_INIT save it; needs torch, numpy and safetensors.

Variance: over the channels, of a token, and its mean over the tokens, as the trainer's probe.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

from model import Config, block_forward, block_prefix, linear, normalize
from shards import read_shard


def load(folder):
    saved = json.loads((folder / "config.json").read_text())
    config = Config("llama", "PRE", saved["num_hidden_layers"], saved["hidden_size"], saved["intermediate_size"],
                    saved["num_attention_heads"], saved["num_key_value_heads"], saved["head_dim"], saved["vocab_size"],
                    saved["max_position_embeddings"], saved["rms_norm_eps"], saved["rope_theta"])
    return config, {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def variance(x):
    return x.var(-1, unbiased=False)


def shares(values, names, top):
    """The largest of `values`, as shares of their sum."""
    order = values.argsort(descending=True)[:top]
    return ", ".join(f"{names(i.item())} {100 * values[i].item() / values.sum().item():.1f} %" for i in order)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--block", type=int, default=1)
    arguments = parser.parse_args()
    config, params = load(arguments.checkpoint)
    T = arguments.seq_len
    rows = arguments.tokens // T
    tokens = torch.from_numpy(read_shard(arguments.shard)[: rows * T]).view(rows, T)

    with torch.no_grad():
        before = params["model.embed_tokens.weight"][tokens]
        for l in range(1, arguments.block):
            before = block_forward(params, config, l, before)[-1][1]
        (_, middle), (added, after) = block_forward(params, config, arguments.block, before)
        block = block_prefix(config, arguments.block)
        y = normalize(params, config, block + "post_attention_layernorm", middle)
        gate, up = (linear(params, config, block + f"mlp.{p}_proj", y) for p in ("gate", "up"))
        hidden = silu(gate) * up
        down = params[block + "mlp.down_proj.weight"]

        print(f"variance before block {arguments.block} {variance(before).mean():.4g}, after its attention "
              f"{variance(middle).mean():.4g}, after its MLP {variance(after).mean():.4g}")
        flat, of_token = after.flatten(0, 1), variance(after)
        energy = flat.square().mean(0)
        print(f"channels:      {shares(energy, lambda c: f'{c}:', 4)}")
        common = flat.mean(0)
        print(f"a vector that all tokens share holds {100 * (common.square().sum() / flat.square().sum(-1).mean()):.1f} %")
        directions = torch.linalg.svdvals(flat).square()
        print(f"directions:    {shares(directions, lambda i: f'{i + 1}:', 4)}")
        by_position = of_token.mean(0)
        print(f"positions:     first {by_position[0]:.4g}, second {by_position[1]:.4g}, the others "
              f"{by_position[2:].mean():.4g}")
        ordered = of_token.flatten().sort(descending=True).values
        print(f"tokens:        largest {ordered[0]:.4g}, median {ordered[len(ordered) // 2]:.4g}, smallest "
              f"{ordered[-1]:.4g}; the largest hundredth holds {100 * ordered[: len(ordered) // 100].sum() / ordered.sum():.1f} %")
        total, count = (torch.zeros(config.vocab, dtype=torch.double) for _ in range(2))
        total.scatter_add_(0, tokens.flatten(), of_token.flatten())
        count.scatter_add_(0, tokens.flatten(), torch.ones(tokens.numel(), dtype=torch.double))
        mean = total / count.clamp(min=1) * (count >= 20)
        print("bytes:         " + ", ".join(f"{bytes([i]) if i < 256 else 'end'} {mean[i]:.4g} ({int(count[i])} times)"
                                            for i in mean.argsort(descending=True)[:6].tolist()))
        units = hidden.flatten(0, 1).square().mean(0) * down.square().sum(0)
        print(f"hidden units:  {shares(units, lambda i: f'{i}:', 4)} of the sum over units of what each adds")


if __name__ == "__main__":
    main()
