"""The model of train_gpt.cu in plain PyTorch: both families, every NORM, the loss and the optimizer.

Written from the formulas alone, to be an independent witness for the CUDA code. Shapes: B sequences of T tokens,
C channels (hidden), NH query heads on KV key/value heads of HS channels each, V tokens in the vocabulary, L blocks
counted from 1. Parameters live in a dict under Hugging Face names; their dtype is the dtype of the computation.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, silu

NORMS = ("PRE", "LNS", "POST", "DEEPNORM", "MIX", "PERI", "LNS_INIT", "RES_SQRT", "PRORES", "KEEL", "REORDERED")
FAMILIES = ("llama", "gpt2")


@dataclass(frozen=True)
class Config:
    family: str
    norm: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int  # gpt2: the same as heads
    head_dim: int
    vocab: int
    max_seq_len: int  # rows of gpt2's position table
    eps: float  # 1e-6 for llama, 1e-5 for gpt2
    rope_theta: float = 10000.0
    qkv_bias: bool = False  # llama only: gpt2 has every bias
    qk_norm: bool = False  # llama only: Qwen3's norms over each head's query and key
    tied: bool = False  # the head is the embedding; gpt2 always
    step: int = 1  # of the run: PRORES's factors follow it

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r}: expected one of {', '.join(FAMILIES)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r}: expected one of {', '.join(NORMS)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} kv_heads evenly")
        if self.family == "gpt2" and not (self.tied and self.qkv_bias and self.kv_heads == self.heads):
            raise ValueError("gpt2 has a tied head, all biases and kv_heads = heads")


@dataclass(frozen=True)
class Placement:
    """A block's update x <- on_sum(alpha x + beta after(F(scale * before(x)))), for F = attention, then F = MLP.

    before, after, on_sum: the norm's name for each of the two, or None where there is no norm.
    """

    before: tuple = (None, None)
    after: tuple = (None, None)
    on_sum: tuple = (None, None)
    scale: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0


def placement(config, l):
    """What block l (from 1) does with its norms: the only place where the variants differ."""
    pre = ("input_layernorm", "post_attention_layernorm") if config.family == "llama" else ("ln_1", "ln_2")
    post = ("post_attention_layernorm", "post_feedforward_layernorm")
    norm = config.norm
    if norm == "MIX":
        norm = "POST" if l <= math.floor(0.25 * config.layers) else "PRE"
    if norm == "LNS_INIT" or (norm == "KEEL" and l == 1):
        norm = "PRE"
    before = ("input_layernorm", "pre_feedforward_layernorm")
    return {
        "PRE": Placement(before=pre),
        "LNS": Placement(before=pre, scale=1 / math.sqrt(l)),
        "POST": Placement(on_sum=post),
        "DEEPNORM": Placement(on_sum=post, alpha=(2 * config.layers) ** 0.25),
        "PERI": Placement(before=before, after=post),
        "RES_SQRT": Placement(before=pre, beta=1 / math.sqrt(l)),
        "PRORES": Placement(before=pre, beta=min(config.step / (1000 * l), 1)),
        "KEEL": Placement(before=before, on_sum=post, alpha=2 * config.layers),
        "REORDERED": Placement(after=post),
    }[norm]


def block_prefix(config, l):
    return f"model.layers.{l - 1}." if config.family == "llama" else f"transformer.h.{l - 1}."


def parameter_shapes(config):
    """Name and shape of every trained tensor, in the order of the forward pass."""
    C, F, V = config.hidden, config.ffn, config.vocab
    q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {}

    def add_norm(name):
        shapes[name + ".weight"] = (C,)
        if config.family == "gpt2":
            shapes[name + ".bias"] = (C,)

    def add_linear(name, out_width, in_width, bias):
        # GPT-2's Conv1D stores (in, out), everything else (out, in).
        shapes[name + ".weight"] = (in_width, out_width) if config.family == "gpt2" else (out_width, in_width)
        if bias:
            shapes[name + ".bias"] = (out_width,)

    def add_attention(block):
        if config.qk_norm:
            shapes[block + "self_attn.q_norm.weight"] = shapes[block + "self_attn.k_norm.weight"] = (config.head_dim,)
        if config.family == "llama":
            add_linear(block + "self_attn.q_proj", q_width, C, config.qkv_bias)
            add_linear(block + "self_attn.k_proj", kv_width, C, config.qkv_bias)
            add_linear(block + "self_attn.v_proj", kv_width, C, config.qkv_bias)
            add_linear(block + "self_attn.o_proj", C, q_width, False)
        else:
            add_linear(block + "attn.c_attn", 3 * q_width, C, True)
            add_linear(block + "attn.c_proj", C, q_width, True)

    def add_mlp(block):
        if config.family == "llama":
            add_linear(block + "mlp.gate_proj", F, C, False)
            add_linear(block + "mlp.up_proj", F, C, False)
            add_linear(block + "mlp.down_proj", C, F, False)
        else:
            add_linear(block + "mlp.c_fc", F, C, True)
            add_linear(block + "mlp.c_proj", C, F, True)

    if config.family == "llama":
        shapes["model.embed_tokens.weight"] = (V, C)
    else:
        shapes["transformer.wte.weight"] = (V, C)
        shapes["transformer.wpe.weight"] = (config.max_seq_len, C)
    for l in range(1, config.layers + 1):
        block, at = block_prefix(config, l), placement(config, l)
        for i, add_sublayer in enumerate((add_attention, add_mlp)):
            if at.before[i]:
                add_norm(block + at.before[i])
            add_sublayer(block)
            for name in (at.after[i], at.on_sum[i]):
                if name:
                    add_norm(block + name)
    add_norm("model.norm" if config.family == "llama" else "transformer.ln_f")
    if not config.tied:
        shapes["lm_head.weight"] = (V, C)
    return shapes


def normalize(params, config, name, x):
    """RMSNorm: g x / rms(x). LayerNorm: g (x - mean) / std + b, with the variance over all (not all - 1) channels."""
    if config.family == "llama":
        return params[name + ".weight"] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.eps)
    x = x - x.mean(-1, keepdim=True)
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.eps)
    return params[name + ".weight"] * unit + params[name + ".bias"]


def linear(params, config, name, x):
    weight, bias = params[name + ".weight"], params.get(name + ".bias")
    y = x @ (weight if config.family == "gpt2" else weight.T)
    return y if bias is None else y + bias


def rotate(config, x):
    """RoPE, rotate-half form: channels i and i + HS/2 of each head turn together by position * theta^(-2i/HS)."""
    T, half = x.shape[-2], config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(T, dtype=x.dtype)[:, None] * frequency  # (T, HS/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(params, config, block, x):
    B, T, _ = x.shape
    if config.family == "llama":
        q, k, v = (linear(params, config, block + f"self_attn.{p}_proj", x) for p in "qkv")
    else:
        q, k, v = linear(params, config, block + "attn.c_attn", x).chunk(3, dim=-1)
    q, k, v = (t.view(B, T, -1, config.head_dim).transpose(1, 2) for t in (q, k, v))  # (B, NH or KV, T, HS)
    if config.qk_norm:
        q, k = (normalize(params, config, block + f"self_attn.{n}_norm", x) for n, x in (("q", q), ("k", k)))
    if config.family == "llama":
        q, k = rotate(config, q), rotate(config, k)
    # Query head h reads key/value head h / (NH / KV): neighbours share.
    k, v = (t.repeat_interleave(config.heads // config.kv_heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)  # (B, NH, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    y = (weights @ v).transpose(1, 2).reshape(B, T, -1)
    return linear(params, config, block + ("self_attn.o_proj" if config.family == "llama" else "attn.c_proj"), y)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(params, config, block, x):
    if config.family == "llama":
        gate, up = (linear(params, config, block + f"mlp.{p}_proj", x) for p in ("gate", "up"))
        return linear(params, config, block + "mlp.down_proj", silu(gate) * up)
    return linear(params, config, block + "mlp.c_proj", gelu(linear(params, config, block + "mlp.c_fc", x)))


def block_forward(params, config, l, x):
    """Block l on x (B, T, C): for its attention and its MLP what it adds to alpha x, and the stream after it."""
    block, at = block_prefix(config, l), placement(config, l)
    sublayers = []
    for i, sublayer in enumerate((attention, mlp)):
        y = at.scale * normalize(params, config, block + at.before[i], x) if at.before[i] else x
        y = sublayer(params, config, block, y)
        if at.after[i]:
            y = normalize(params, config, block + at.after[i], y)
        y = at.beta * y
        x = at.alpha * x + y
        if at.on_sum[i]:
            x = normalize(params, config, block + at.on_sum[i], x)
        sublayers.append((y, x))
    return sublayers


def read_out(params, config, x):
    """A residual stream (B, T, C) -> logits (B, T, V)."""
    llama = config.family == "llama"
    x = normalize(params, config, "model.norm" if llama else "transformer.ln_f", x)
    tied = "model.embed_tokens.weight" if llama else "transformer.wte.weight"
    return x @ params[tied if config.tied else "lm_head.weight"].T


def forward(params, config, tokens, without=()):
    """tokens (B, T) -> logits (B, T, V) and the residual streams h_0 .. h_L, each (B, T, C). Blocks in `without` pass
    their input on; the others keep their own l."""
    if config.family == "llama":
        x = params["model.embed_tokens.weight"][tokens]
    else:
        x = params["transformer.wte.weight"][tokens] + params["transformer.wpe.weight"][: tokens.shape[1]]
    streams = [x]
    for l in range(1, config.layers + 1):
        if l not in without:
            x = block_forward(params, config, l, x)[-1][1]
        streams.append(x)
    return read_out(params, config, x), streams


def mean_loss(params, config, inputs, targets, without=()):
    """Mean cross entropy in nats over the targets that are not -1."""
    logits, _ = forward(params, config, inputs, without)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def gradients(params, config, inputs, targets):
    """The mean loss, and its gradient with respect to each parameter."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = mean_loss(leaves, config, inputs, targets)
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def global_norm(grads):
    return math.sqrt(sum(g.square().sum().item() for g in grads.values()))


@dataclass
class AdamW:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip: float

    def start(self, params):
        self.steps = 0
        self.m = {name: torch.zeros_like(p) for name, p in params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in params.items()}

    def step(self, params, grads):
        """One update, in place; returns the gradient's norm before clipping."""
        norm = global_norm(grads)
        clip = min(1.0, self.grad_clip / norm)
        self.steps += 1
        for name, p in params.items():
            g = clip * grads[name]
            self.m[name] = self.beta1 * self.m[name] + (1 - self.beta1) * g
            self.v[name] = self.beta2 * self.v[name] + (1 - self.beta2) * g.square()
            m_hat = self.m[name] / (1 - self.beta1**self.steps)
            v_hat = self.v[name] / (1 - self.beta2**self.steps)
            decay = self.weight_decay if p.dim() == 2 else 0.0
            p -= self.lr * (m_hat / (v_hat.sqrt() + self.eps) + decay * p)
        return norm
