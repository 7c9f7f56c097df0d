// modeling_norms.py: code for transformers that computes the models of every NORM, written into the folders of those
// that no class of transformers computes. It knows no NORM by name: config.json says what surrounds each sublayer.
#pragma once

constexpr const char* modeling_norms_py =
    R"python("""Models with norms elsewhere than in LLaMA and GPT-2, for transformers 4 and 5: trust_remote_code=True.

"sublayers" of config.json says of each attention and each MLP, in their order, what surrounds it:

    F = F(N?(x))      z = alpha x + beta N?(F)      x = N?(z)

input_norm, output_norm and sum_norm name these norms; null: none stands there.
"""

import re

import torch
import transformers
from torch import nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.pytorch_utils import Conv1D


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.gpt2 = layer, config.model_type.startswith("gpt2")
        C, heads = config.hidden_size, config.num_attention_heads
        self.head_dim = C // heads if self.gpt2 else config.head_dim
        if self.gpt2:
            F = config.n_inner or 4 * C
            self.attn = nn.ModuleDict({"c_attn": Conv1D(3 * C, C), "c_proj": Conv1D(C, C)})
            self.mlp = nn.ModuleDict({"c_fc": Conv1D(F, C), "c_proj": Conv1D(C, F)})
        else:
            F, q, kv = config.intermediate_size, heads * self.head_dim, config.num_key_value_heads * self.head_dim
            bias = config.model_type.startswith("qwen2")
            self.self_attn = nn.ModuleDict({
                "q_proj": nn.Linear(C, q, bias), "k_proj": nn.Linear(C, kv, bias), "v_proj": nn.Linear(C, kv, bias),
                "o_proj": nn.Linear(q, C, False)})
            if config.model_type.startswith("qwen3"):
                for name in ("q_norm", "k_norm"):
                    self.self_attn[name] = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
            self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(C, F, False), "up_proj": nn.Linear(C, F, False),
                                      "down_proj": nn.Linear(F, C, False)})
        self.sublayers = config.sublayers[2 * layer : 2 * layer + 2]
        norm = nn.LayerNorm if self.gpt2 else LlamaRMSNorm
        eps = config.layer_norm_epsilon if self.gpt2 else config.rms_norm_eps
        for sublayer in self.sublayers:
            for place in ("input_norm", "output_norm", "sum_norm"):
                if sublayer[place]:
                    setattr(self, sublayer[place], norm(C, eps=sublayer["input_eps"] if place == "input_norm" else eps))

    def attention(self, x, rotation, mask, cache):
        def heads(y):  # (B, heads, T, head_dim)
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        if self.gpt2:
            q, k, v = map(heads, self.attn["c_attn"](x).chunk(3, dim=-1))
        else:
            q, k, v = (heads(self.self_attn[name](x)) for name in ("q_proj", "k_proj", "v_proj"))
            if "q_norm" in self.self_attn:
                q, k = self.self_attn["q_norm"](q), self.self_attn["k_norm"](k)
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.attn["c_proj"](y) if self.gpt2 else self.self_attn["o_proj"](y)

    def feed_forward(self, x):
        if self.gpt2:
            return self.mlp["c_proj"](gelu(self.mlp["c_fc"](x), approximate="tanh"))
        return self.mlp["down_proj"](silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))

    def forward(self, x, rotation, mask, cache):
        def norm(name, y):
            return getattr(self, name)(y) if name else y

        for s, compute in zip(self.sublayers, (lambda y: self.attention(y, rotation, mask, cache), self.feed_forward)):
            y = norm(s["output_norm"], compute(norm(s["input_norm"], x)))
            x = norm(s["sum_norm"], s["alpha"] * x + s["beta"] * y)
        return x


class Model(transformers.PreTrainedModel, transformers.GenerationMixin):
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        C, V, self.gpt2 = config.hidden_size, config.vocab_size, config.model_type.startswith("gpt2")
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        if self.gpt2:
            self.transformer = nn.ModuleDict({
                "wte": nn.Embedding(V, C), "wpe": nn.Embedding(config.n_positions, C), "h": blocks,
                "ln_f": nn.LayerNorm(C, eps=config.layer_norm_epsilon)})
        else:
            self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(V, C), "layers": blocks,
                                        "norm": LlamaRMSNorm(C, config.rms_norm_eps),
                                        "rotary": LlamaRotaryEmbedding(config)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(C, V, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"] if self.gpt2 else self.model["embed_tokens"]

    def set_input_embeddings(self, value):
        if self.gpt2:
            self.transformer["wte"] = value
        else:
            self.model["embed_tokens"] = value

    def get_output_embeddings(self):
        return getattr(self, "lm_head", None)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, logits_to_keep=0, cache=None, **kwargs):
        cache = past_key_values if cache is None else cache  # what transformers 5 calls it
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = transformers.DynamicCache()
        past, T = 0 if cache is None else cache.get_seq_length(), x.shape[1]
        rows = torch.arange(past, past + T, device=x.device)
        keys = torch.arange(past + T, device=x.device)
        mask = (keys <= rows[:, None])[None, None]  # (B or 1, 1, T, keys); padding sees itself, lest it sees nothing
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, None, : past + T].bool() | (keys == rows[:, None]))
        if getattr(self.config, "sliding_window", None):
            mask = mask & (keys > rows[:, None] - self.config.sliding_window)
        position_ids = rows[None] if position_ids is None else position_ids
        rotation = None
        if self.gpt2:
            x = x + self.transformer["wpe"](position_ids)
        else:
            rotation = [y[:, None] for y in self.model["rotary"](x, position_ids)]
        for block in self.transformer["h"] if self.gpt2 else self.model["layers"]:
            x = block(x, rotation, mask, cache)
        x = self.transformer["ln_f"](x) if self.gpt2 else self.model["norm"](x)
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.get_output_embeddings() or self.get_input_embeddings()
        logits = linear(x[:, last], head.weight)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, self.config.vocab_size, **kwargs)
        name = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{name: cache})


def __getattr__(name):
    """The classes of one kind, POSTLlamaConfig and POSTLlamaForCausalLM say, as transformers asks for model_type there."""
    found = re.fullmatch("([A-Z_]+?)(Llama|Mistral|Qwen2|Qwen3|GPT2)(Config|ForCausalLM|LMHeadModel)", name)
    if not found:
        raise AttributeError(name)
    norm, kind, _ = found.groups()
    config = type(f"{norm}{kind}Config", (getattr(transformers, kind + "Config"),),
                  {"model_type": f"{kind}_{norm}".lower(), "__module__": __name__})
    model = type(norm + kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"), (Model,),
                 {"config_class": config, "__module__": __name__})
    globals().update({made.__name__: made for made in (config, model)})
    return globals()[name]
)python";
