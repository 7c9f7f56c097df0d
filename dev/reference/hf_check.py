#!/usr/bin/env python3
"""Lets plain, unpatched `transformers` be the judge.

hf_check.py CHECKPOINT SHARD... --seq-len T --tokens N    a checkpoint's loss, to compare with the trainer's "val" line
hf_check.py --self-test                                   the fixtures against transformers' own LLaMA, Qwen2 and GPT-2
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from shards import read_shard
from torch.nn.functional import cross_entropy

FIXTURES = Path(__file__).resolve().parents[2] / "test" / "fixtures"


def fail(text):
    raise SystemExit("hf_check: " + text)


def load_checkpoint(folder):
    """The class that config.json names, and nothing else; where transformers has none, the code in the folder."""
    config = json.loads((folder / "config.json").read_text())
    names = config["architectures"]
    own = "auto_map" in config
    if hasattr(transformers, names[0]) == own:
        fail(f"{folder}: transformers has {'a' if own else 'no'} {names[0]}")
    model_class = transformers.AutoModelForCausalLM if own else getattr(transformers, names[0])
    dtype = "dtype" if [int(n) for n in transformers.__version__.split(".")[:2]] >= [4, 56] else "torch_dtype"
    model, report = model_class.from_pretrained(folder, trust_remote_code=own, output_loading_info=True,
                                                **{dtype: torch.float32})
    wrong = {kind: keys for kind, keys in report.items() if keys}
    if wrong:
        fail(f"{folder}: the tensors do not fit {names[0]}: {wrong}")
    return model.eval()


@torch.no_grad()
def validation_loss(model, tokens, seq_len, batch_size=8):
    """Mean over all predictions. Window i predicts tokens iT+1 .. iT+T from iT .. iT+T-1, the last one what is left."""
    inputs, targets = tokens[:-1], tokens[1:]
    total, start = 0.0, 0
    while start < len(inputs):
        T = min(seq_len, len(inputs) - start)
        B = min(batch_size, (len(inputs) - start) // T)
        stretch = slice(start, start + B * T)
        logits = model(input_ids=inputs[stretch].view(B, T)).logits
        total += cross_entropy(logits.flatten(0, 1).double(), targets[stretch], reduction="sum").item()
        start += B * T
    return total / len(targets)


def transformers_model(config):
    """The unpatched class that computes what a fixture's config says (for LNS: once the scale is in the gains)."""
    if config["family"] == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=config["vocab"], n_positions=config["max_seq_len"], n_embd=config["hidden"],
            n_layer=config["layers"], n_head=config["heads"], n_inner=config["ffn"], layer_norm_epsilon=config["eps"]))
    name = "Qwen3" if config.get("qk_norm") else "Qwen2" if config["qkv_bias"] else "Llama"
    return getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(
        vocab_size=config["vocab"], hidden_size=config["hidden"], intermediate_size=config["ffn"],
        num_hidden_layers=config["layers"], num_attention_heads=config["heads"],
        num_key_value_heads=config["kv_heads"], head_dim=config["head_dim"], max_position_embeddings=config["max_seq_len"],
        rms_norm_eps=config["eps"], rope_theta=config["rope_theta"], tie_word_embeddings=config["tied"]))


def lns_scale(config, name):
    """1/sqrt(l) for the norms of block l of an LNS model, 1 for everything else."""
    parts = name.split(".")
    is_block_norm = parts[1] in ("layers", "h") and (parts[3].endswith("layernorm") or parts[3].startswith("ln_"))
    return 1 / math.sqrt(int(parts[2]) + 1) if config["norm"] == "LNS" and is_block_norm else 1.0


def self_test():
    """Largest differences relative to each tensor's norm; float32 with float32 inside the norms allows about 1e-6."""
    for path in sorted(FIXTURES.glob("gpt2-*.safetensors")) + sorted(FIXTURES.glob("llama-*.safetensors")):
        with safe_open(path, "pt") as fixture:
            config = json.loads(fixture.metadata()["config"])
            tensors = {name: fixture.get_tensor(name) for name in fixture.keys()}
        if config["norm"] not in ("PRE", "LNS"):
            continue
        model = transformers_model(config).eval()
        scales = {name[6:]: lns_scale(config, name[6:]) for name in tensors if name.startswith("param.")}
        weights = {name: scale * tensors["param." + name] for name, scale in scales.items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"} or ("lm_head.weight" in missing) != config["tied"]:
            fail(f"{path.name}: missing {missing}, unexpected {unexpected}")

        logits = model(input_ids=tensors["inputs"][0].long()).logits
        loss = cross_entropy(logits.flatten(0, 1), tensors["targets"][0].long().flatten(), ignore_index=-1)
        loss.backward()

        def distance(ours, theirs):
            return ((ours - theirs).norm() / theirs.norm()).item()

        errors = {
            "loss": abs(loss.item() - tensors["losses"][0].item()),
            "logits": distance(logits[:, -1], tensors["logits_last"]),
            # The folded gain is scale * gain, so d loss / d gain = scale * d loss / d folded gain.
            "gradients": max(distance(scales[name] * p.grad, tensors["grad." + name])
                             for name, p in model.named_parameters()),
        }
        print(f"{path.stem:20} {type(model).__name__:17}",
              "  ".join(f"{what} {error:.1e}" for what, error in errors.items()))
        if max(errors.values()) > 1e-5:
            fail(f"{path.name}: differs from {type(model).__name__}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder with config.json and model.safetensors")
    parser.add_argument("shards", type=Path, nargs="*", metavar="SHARD", help="llm.c token shards, one stream")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a window (default 256)")
    parser.add_argument("--tokens", type=int, default=0, help="predict the first N tokens only (default 0: all)")
    parser.add_argument("--self-test", action="store_true", help="compare the fixtures with transformers")
    arguments = parser.parse_args()
    if arguments.self_test:
        return self_test()
    if not arguments.shards:
        parser.error("expected CHECKPOINT and SHARD, or --self-test")
    tokens = torch.from_numpy(np.concatenate([read_shard(path) for path in sorted(arguments.shards)]))
    if arguments.tokens:
        tokens = tokens[: arguments.tokens + 1]
    if len(tokens) < 2:
        fail("one token alone predicts nothing")
    model = load_checkpoint(arguments.checkpoint)
    loss = validation_loss(model, tokens, arguments.seq_len)
    print(f"{type(model).__name__}: loss {loss:.9g}, ppl {math.exp(loss):.9g}, "
          f"{len(tokens) - 1} tokens predicted in windows of {arguments.seq_len}")


if __name__ == "__main__":
    main()
