#!/usr/bin/env python3
"""Makes test/fixtures/*.safetensors: what the CUDA code's forward pass, backward pass and optimizer must reproduce.

Weights are stored as float32 and everything is computed from them in float64, so a stored value is exact to its last
digit. With --check it writes nothing, and verifies the numbers another way instead (see check()).
"""

import argparse
import json
import math
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from model import NORMS, AdamW, Config, block_prefix, forward, gradients, mean_loss, parameter_shapes

FIXTURES = Path(__file__).resolve().parents[2] / "test" / "fixtures"
STEPS, B, T = 10, 2, 13
SEED = 20250

# Awkward on purpose: a hidden width that neither a warp nor a vector of 8 divides; odd MLP, vocabulary and T.
LLAMA = Config("llama", "PRE", layers=4, hidden=36, ffn=27, heads=3, kv_heads=1, head_dim=12, vocab=61,
               max_seq_len=16, eps=1e-6)
GPT2 = Config("gpt2", "PRE", layers=4, hidden=36, ffn=27, heads=3, kv_heads=3, head_dim=12, vocab=61,
              max_seq_len=16, eps=1e-5, qkv_bias=True, tied=True)
# Qwen2's features, with two query heads on each of two key/value heads, so that their mapping matters.
QWEN2 = Config("llama", "LNS", layers=5, hidden=32, ffn=29, heads=4, kv_heads=2, head_dim=8, vocab=61,
               max_seq_len=16, eps=1e-6, qkv_bias=True, tied=True)

# Qwen3's: norms over heads whose channels are not those of the model.
QWEN3 = replace(QWEN2, layers=3, head_dim=12, qkv_bias=False, qk_norm=True)

CASES = {f"{base.family}-{norm.lower()}": replace(base, norm=norm) for base in (LLAMA, GPT2) for norm in NORMS}
for base in (LLAMA, GPT2):  # far apart, so that its factors change: step 500, 1000, ..
    CASES[f"{base.family}-prores"] = replace(base, norm="PRORES", step=500)
# As in OLMo 2: no norm bounds what query and key are made of, and in bf16 large scores would be noise.
CASES["llama-reordered"] = replace(LLAMA, norm="REORDERED", qk_norm=True)
CASES["llama-lns-bias-tied"] = QWEN2
CASES["llama-lns-qk-norm-tied"] = QWEN3


def first_gain(config, name):
    """What a norm's gain starts from."""
    blocks = [l for l in range(1, config.layers + 1) if name.startswith(block_prefix(config, l))]
    return 1 / math.sqrt(blocks[0]) if config.norm == "LNS_INIT" and blocks else 1


def make_params(config):
    """float32 weights, each tensor from a generator seeded by its name: the same tensor in every NORM that has it."""
    params = {}
    for name, shape in parameter_shapes(config).items():
        noise = np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape)
        if len(shape) == 1:
            noise = first_gain(config, name) + 0.2 * noise if name.endswith(".weight") else 0.2 * noise
        elif "embed_tokens" in name or ".wte." in name or ".wpe." in name:
            noise = 0.4 * noise
        else:
            noise = 0.2 * noise  # times sqrt(36): outputs of order 1, far from a uniform softmax
        params[name] = torch.from_numpy(noise.astype(np.float32))
    return params


def make_batches(config):
    """STEPS batches of a language to be learned: a few frequent tokens, each mostly followed by the same other one."""
    rng = np.random.default_rng(SEED)
    frequency = 1 / (1 + np.arange(config.vocab))
    frequency /= frequency.sum()
    successor = rng.permutation(config.vocab)
    tokens = rng.choice(config.vocab, size=(STEPS, B, T + 1), p=frequency)
    for t in range(T):
        follow = rng.random((STEPS, B)) < 0.6
        tokens[..., t + 1] = np.where(follow, successor[tokens[..., t]], tokens[..., t + 1])
    inputs, targets = tokens[..., :-1], tokens[..., 1:].copy()
    targets[rng.random(targets.shape) < 0.1] = -1
    return inputs.astype(np.int32), targets.astype(np.int32)


def at_step(config, step):
    """In the run's step with this number, from 0."""
    return replace(config, step=(step + 1) * config.step)


def as_batch(inputs, targets, step):
    return torch.from_numpy(inputs[step]).long(), torch.from_numpy(targets[step]).long()


def train(params, config, inputs, targets, optimizer):
    """Losses and gradient norms of one AdamW step a batch; params are left as they were."""
    params = {name: p.clone() for name, p in params.items()}
    optimizer.start(params)
    losses, norms = [], []
    for step in range(STEPS):
        loss, grads = gradients(params, at_step(config, step), *as_batch(inputs, targets, step))
        losses.append(loss)
        norms.append(optimizer.step(params, grads))
    return np.array(losses), np.array(norms)


def make_optimizer(params, config, inputs, targets):
    """Clipping at the median gradient norm of an unclipped run, so that it acts at some steps and not at others."""
    # With the usual eps of 1e-8, an element whose gradient is zero but for rounding would move by a whole lr in a
    # random direction, and float32 losses would scatter. With 1e-5, a rounding error d moves it by about lr d / 1e-5.
    settings = dict(lr=5e-3, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1)
    _, norms = train(params, config, inputs, targets, AdamW(grad_clip=math.inf, **settings))
    return AdamW(grad_clip=float(f"{np.median(norms):.2g}"), **settings)


def make_fixture(config):
    stored = make_params(config)
    params = {name: p.double() for name, p in stored.items()}
    inputs, targets = make_batches(config)
    optimizer = make_optimizer(params, config, inputs, targets)
    settings = asdict(optimizer)

    losses, norms = train(params, config, inputs, targets, optimizer)
    _, grads = gradients(params, config, *as_batch(inputs, targets, 0))
    logits, streams = forward(params, config, as_batch(inputs, targets, 0)[0])
    variance = [h.var(dim=-1, unbiased=False).mean().item() for h in streams]

    tensors = {"inputs": inputs, "targets": targets, "losses": losses, "grad_norms": norms,
               "residual_variance": np.array(variance), "logits_last": logits[:, -1].float().numpy()}
    for name in stored:
        tensors["param." + name] = stored[name].numpy()
        tensors["grad." + name] = grads[name].float().numpy()
    younger = {"qk_norm": False, "step": 1}  # than the files
    fields = {key: value for key, value in asdict(config).items() if younger.get(key) != value}
    return tensors, {"config": json.dumps(fields), "optimizer": json.dumps(settings)}


# Conversations: prompt and answers by turns, as (prompt tokens, answer tokens); the last one is cut at max_seq_len.
TURNS = [[(4, 3)], [(2, 1), (3, 4)], [(1, 6)], [(5, 2)], [(12, 9)]]
# What of the gradient is stored: both ends of the model, and a matrix of either sublayer.
KEPT_GRADIENTS = {"llama": ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight",
                            "model.layers.3.mlp.down_proj.weight", "model.norm.weight"),
                  "gpt2": ("transformer.wpe.weight", "transformer.h.0.attn.c_attn.bias",
                           "transformer.h.3.mlp.c_proj.weight", "transformer.ln_f.bias")}


def make_conversations(config):
    """Tokens of conversations, one after the other, and for each answer (conversation, begin, end) in them."""
    rng = np.random.default_rng(SEED)
    tokens, answers = [], []
    for turns in TURNS:
        conversation = len(tokens)
        tokens.append(0)
        for prompt, answer in turns:
            tokens += list(rng.integers(1, config.vocab, prompt))
            answers.append((conversation, len(tokens), len(tokens) + answer))
            tokens += list(rng.integers(1, config.vocab, answer - 1)) + [0]  # the end is the token that starts the next
    return np.array(tokens, np.int32), np.array(answers, np.int32)


def conversation_rows(tokens, answers, longest, train_on_prompt):
    """Of each conversation alone: inputs and targets, -1 where a token is not predicted."""
    starts = sorted({int(a[0]) for a in answers}) + [len(tokens)]
    for start, end in zip(starts, starts[1:]):
        row = torch.from_numpy(tokens[start:end]).long()[: longest + 1]
        is_target = torch.zeros(len(row), dtype=bool)
        for conversation, first, behind in answers:
            if conversation == start:
                is_target[first - start : behind - start] = True
        targets = torch.where(is_target | train_on_prompt, row, -1)[1:]
        yield row[:-1][None], targets[None]


def make_conversation_fixture(config):
    """The mean loss over answers' tokens, and its gradient; each conversation computed alone, without any padding."""
    stored = make_params(config)
    tokens, answers = make_conversations(config)
    losses, kept = [], {}
    for train_on_prompt in (False, True):
        params = {name: p.double().requires_grad_() for name, p in stored.items()}
        total, count = 0, 0
        for inputs, targets in conversation_rows(tokens, answers, config.max_seq_len, train_on_prompt):
            n = (targets >= 0).sum().item()
            if n > 0:
                total, count = total + mean_loss(params, config, inputs, targets) * n, count + n
        loss = total / count
        loss.backward()
        losses.append(loss.item())
        if not train_on_prompt:
            kept = {"grad." + name: params[name].grad.float().numpy() for name in KEPT_GRADIENTS[config.family]}
    return {"tokens": tokens, "answers": answers, "losses": np.array(losses), **kept}


def safetensors_bytes(tensors, metadata):
    dtypes = {"float32": "F32", "float64": "F64", "int32": "I32"}
    header, data = {"__metadata__": metadata}, []
    offset = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # widest first keeps all aligned
        array = np.ascontiguousarray(tensors[name])
        header[name] = {"dtype": dtypes[array.dtype.name], "shape": array.shape,
                        "data_offsets": [offset, offset + array.nbytes]}
        data.append(array.tobytes())
        offset += array.nbytes
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)


def file_difference(old, new, tensors):
    """The largest difference of two files' tensors, relative to the largest number of each; inf: other headers."""
    offset = 8 + int.from_bytes(new[:8], "little")
    if len(old) != len(new) or old[:offset] != new[:offset]:
        return np.inf
    worst = 0.0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        array = tensors[name]
        found = np.frombuffer(old, array.dtype, array.size, offset).reshape(array.shape)
        worst = max(worst, np.abs(found - array).max() / max(np.abs(array).max(), np.finfo(float).tiny))
        offset += array.nbytes
    return worst


def summary(name, size, tensors, metadata):
    losses, norms = tensors["losses"], tensors["grad_norms"]
    clip = json.loads(metadata["optimizer"])["grad_clip"]
    variance = tensors["residual_variance"]
    return (f"{name:20} {size / 1000:4.0f} kB  loss {losses[0]:.3f} -> {losses[-1]:.3f}  "
            f"grad norm {norms.min():.2f} .. {norms.max():.2f}, clipped {sum(norms > clip)} of {STEPS} at {clip}  "
            f"variance {variance[0]:.2f} -> {variance[-1]:.2f}")


def require(condition, text):
    if not condition:
        raise SystemExit("make_fixtures: " + text)


def finite_difference_error(params, config, batch, grads, h=1e-4):
    """Worst tensor's | directional derivative - gradient . direction | / | gradient |, along a random unit vector."""
    generator = torch.Generator().manual_seed(SEED)
    worst = 0.0
    for name, p in params.items():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        direction /= direction.norm()

        def slope(h):
            up, down = (mean_loss({**params, name: p + s * h * direction}, config, *batch).item() for s in (1, -1))
            return (up - down) / (2 * h)

        # Richardson: the two step sizes cancel the error in h^2.
        error = (4 * slope(h) - slope(2 * h)) / 3 - (grads[name] * direction).sum().item()
        worst = max(worst, abs(error) / grads[name].norm().item())
    return worst


def train_with_torch(params, config, inputs, targets, optimizer):
    """train() with torch's own AdamW and clipping in place of ours."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    groups = [{"params": [p for p in leaves.values() if p.dim() == 2], "weight_decay": optimizer.weight_decay},
              {"params": [p for p in leaves.values() if p.dim() != 2], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, optimizer.lr, (optimizer.beta1, optimizer.beta2), optimizer.eps)
    losses = []
    for step in range(STEPS):
        adam.zero_grad()
        loss = mean_loss(leaves, at_step(config, step), *as_batch(inputs, targets, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), optimizer.grad_clip)
        adam.step()
        losses.append(loss.item())
    return np.array(losses)


def check(name, config, tensors, metadata):
    """Gradients against finite differences, AdamW against torch's, no tiny gradient; and how far float32 is off."""
    stored = make_params(config)
    params = {key: p.double() for key, p in stored.items()}
    inputs, targets = tensors["inputs"], tensors["targets"]
    batch = as_batch(inputs, targets, 0)
    optimizer = AdamW(**json.loads(metadata["optimizer"]))
    _, grads = gradients(params, config, *batch)

    difference = finite_difference_error(params, config, batch, grads)
    require(difference < 1e-7, f"{name}: finite differences disagree with the gradient by {difference:.1e}")

    # torch clips by clip / (norm + 1e-6): a difference of at most about 1e-6 in the gradient.
    adam = np.abs(train_with_torch(params, config, inputs, targets, optimizer) - tensors["losses"]).max()
    require(adam < 1e-6, f"{name}: torch.optim.AdamW gives losses {adam:.1e} away")

    rms = {key: g.square().mean().sqrt().item() for key, g in grads.items()}
    smallest = min(rms, key=rms.get)
    require(rms[smallest] > 1e-4, f"{name}: the gradient of {smallest} is only {rms[smallest]:.1e}")
    norms, clip = tensors["grad_norms"], optimizer.grad_clip
    require(2 <= sum(norms > clip) <= STEPS - 2, f"{name}: clipping should act at some steps and not at others")
    require(tensors["losses"][-1] < tensors["losses"][0], f"{name}: the loss does not fall")

    _, grads32 = gradients(stored, config, *batch)
    worst = max(((grads32[key] - g).norm() / g.norm()).item() for key, g in grads.items())
    losses32, norms32 = train(stored, config, inputs, targets, optimizer)
    return (f"{name:20} finite differences {difference:.0e}  AdamW {adam:.0e}  "
            f"smallest gradient {rms[smallest]:.1e} rms ({smallest})  float32: gradients {worst:.0e}, "
            f"losses {np.abs(losses32 - tensors['losses']).max():.0e}, "
            f"grad norms {np.abs(norms32 / norms - 1).max():.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; verify the numbers another way")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation: the same bytes each time

    for name in ("llama-lns", "gpt2-lns"):
        content = safetensors_bytes(make_conversation_fixture(CASES[name]), {"parameters": name})
        path = FIXTURES / f"conversations-{CASES[name].family}.safetensors"
        if arguments.check:
            require(path.read_bytes() == content, f"{path.name}: other bytes")
        else:
            path.write_bytes(content)
    for name, config in CASES.items():
        tensors, metadata = make_fixture(config)
        content, path = safetensors_bytes(tensors, metadata), FIXTURES / f"{name}.safetensors"
        if arguments.check:
            difference = file_difference(path.read_bytes(), content, tensors)
            require(difference < 1e-7, f"{path.name}: differs by {difference:.1e}")
            print(check(name, config, tensors, metadata), " file: within", f"{difference:.0e}", flush=True)
        else:
            FIXTURES.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(summary(name, len(content), tensors, metadata), flush=True)


if __name__ == "__main__":
    main()
