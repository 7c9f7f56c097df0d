#!/usr/bin/env python3
"""Makes test/fixtures/probes.json: what trainer/probes.cuh must find in the models of the other fixtures.

Each quantity is computed from its definition (see trainer/probes.cuh), in float64, by other means than the trainer's where there
are any: angles by arccos, Jacobians in full, updates from the weights before and after. The model has made one AdamW step
on batch 0 and is probed on batch 1.
"""

import json
import math

import numpy as np
import torch
from torch.autograd.functional import jacobian

from make_fixtures import CASES, FIXTURES, as_batch, at_step, make_batches, make_optimizer, make_params
from model import block_forward, block_prefix, forward, gradients, mean_loss, read_out


def norm(x):
    return x.square().sum().sqrt()


def mean(x):
    return x.mean().item()


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def stream_gradients(params, config, inputs, targets):
    """Norms of the mean loss's gradients with respect to h_0 .. h_L."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    logits, streams = forward(leaves, config, inputs)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    return [norm(g).item() for g in torch.autograd.grad(loss, streams)]


def distance_from_identity(params, config, l, x):
    """|J - I|_F / sqrt(n), the root mean square of |J'v - v| / |v| over v of +-1, and the spread of one such v."""
    n = x.numel()
    flat = jacobian(lambda stream: block_forward(params, config, l, stream)[-1][1], x, vectorize=True).reshape(n, n)
    difference = flat - torch.eye(n, dtype=flat.dtype)
    gram = difference @ difference.T
    squares = gram.trace()
    # v'Gv has variance 2 (|G|_F^2 - |diag G|^2); a root has half its relative spread.
    variance = 2 * (gram.square().sum() - gram.diagonal().square().sum())
    return (squares / n).sqrt().item(), (0.5 * variance.clamp(min=0).sqrt() / squares).item()


def effects(whole, pruned, removed):
    """What the blocks behind the removed one do, against what they do in the whole model."""
    moves = [(b - a, d - c) for a, b, c, d in zip(whole, whole[1:], pruned, pruned[1:])]
    return [mean((other - own).norm(dim=-1) / own.norm(dim=-1)) if l > removed else 0.0
            for l, (own, other) in enumerate(moves, 1)]


def probe(config):
    params = {name: p.double() for name, p in make_params(config).items()}
    inputs, targets = make_batches(config)
    optimizer = make_optimizer(params, config, inputs, targets)
    config = at_step(config, 0)
    before = {name: p.clone() for name, p in params.items()}
    optimizer.start(params)
    optimizer.step(params, gradients(params, config, *as_batch(inputs, targets, 0))[1])

    batch = as_batch(inputs, targets, 1)
    logits, streams = forward(params, config, batch[0])
    lenses = [read_out(params, config, h) for h in streams]
    loss, grads = gradients(params, config, *batch)
    blocks = range(1, config.layers + 1)

    def loss_without(removed):
        return mean_loss(params, config, *batch, without=removed).item()

    found = {
        "loss": loss,
        "variance": [mean(h.var(dim=-1, unbiased=False)) for h in streams],
        "variance_first": [mean(h[:, 0].var(dim=-1, unbiased=False)) for h in streams],
        "variance_largest": [h.var(dim=-1, unbiased=False).max().item() for h in streams],
        "mean": [mean(h) for h in streams],
        "mean_abs": [mean(h.abs()) for h in streams],
        "max_abs": [h.abs().max().item() for h in streams],
        "angular": [[mean(cosine(a, b).clamp(-1, 1).arccos()) / math.pi if a is not b else 0.0 for b in streams]
                    for a in streams],
        "lens_kl": [mean((logits.softmax(-1) * (logits.log_softmax(-1) - lens.log_softmax(-1))).sum(-1))
                    for lens in lenses],
        "lens_top": [mean((lens.argmax(-1) == logits.argmax(-1)).double()) for lens in lenses],
        "grad_norm_stream": stream_gradients(params, config, *batch),
        "prune_loss": [loss_without({l}) for l in blocks],
        "prune_last_loss": [loss_without(set(blocks[-k:])) for k in range(1, config.layers // 2 + 1)],
        "prune_all_loss": loss_without(set(blocks)),
        "prune_effect": [effects(streams, forward(params, config, batch[0], without={l})[1], l) for l in blocks],
    }
    lists = ("variance_attention", "attention_ratio", "attention_cosine", "mlp_ratio", "mlp_cosine", "grad_norm_weights",
             "update_ratio", "jacobian", "jacobian_spread")
    found.update({name: [] for name in lists})
    for l in blocks:
        x, prefix = streams[l - 1], block_prefix(config, l)
        for (added, after), before_it, kind in zip(block_forward(params, config, l, x),
                                                   (x, block_forward(params, config, l, x)[0][1]), ("attention", "mlp")):
            found[kind + "_ratio"].append(mean(added.norm(dim=-1) / before_it.norm(dim=-1)))
            found[kind + "_cosine"].append(mean(cosine(added, before_it)))
            if kind == "attention":
                found["variance_attention"].append(mean(after.var(dim=-1, unbiased=False)))
        names = [name for name in params if name.startswith(prefix)]
        found["grad_norm_weights"].append(math.sqrt(sum(norm(grads[name]).item() ** 2 for name in names)))
        matrices = [name for name in names if params[name].dim() == 2]
        change = sum(norm(params[name] - before[name]).item() ** 2 for name in matrices)
        found["update_ratio"].append(math.sqrt(change / sum(norm(before[name]).item() ** 2 for name in matrices)))
        distance, spread = distance_from_identity(params, config, l, x)
        found["jacobian"].append(distance)
        found["jacobian_spread"].append(spread)
    return found


def rounded(value):
    return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.9g}")


def main():
    probes = {}
    for name, config in CASES.items():
        probes[name] = {key: rounded(value) for key, value in probe(config).items()}
        print(f"{name:20} loss {probes[name]['loss']:.4f}, |J - I| {np.mean(probes[name]['jacobian']):.3f}")
    lines = ",\n".join(json.dumps(name) + ":" + json.dumps(p, separators=(",", ":")) for name, p in probes.items())
    (FIXTURES / "probes.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
