#!/usr/bin/env python3
"""Makes test/fixtures/hf/: small random models as transformers 5 saves them, and what it computes of each in float32.

NAME/ is a model's folder; expected.json has the tokens (2, T + 1), each model's mean loss over them, and the greedy text
behind the first of the two rows.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers

FOLDER = Path(__file__).resolve().parents[2] / "test" / "fixtures" / "hf"
T, GREEDY, VOCAB = 24, 16, 48
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


def config(name, **fields):
    shape = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    return getattr(transformers, name + "Config")(**{**shape, **fields})


# The model, the type of its tensors, bytes a file at most.
MODELS = {
    "llama": (config("Llama", rope_parameters=PLAIN), torch.float32, 10**9),
    "llama-linear": (config("Llama", rope_parameters=LINEAR, rms_norm_eps=1e-5), torch.float16, 10**9),
    "llama3": (config("Llama", rope_parameters=LLAMA3, head_dim=12), torch.bfloat16, 10**9),
    "mistral": (config("Mistral", rope_parameters=PLAIN, sliding_window=48, head_dim=8), torch.float32, 10000),
    "qwen2": (config("Qwen2", rope_parameters=PLAIN), torch.bfloat16, 10**9),
    "qwen3": (config("Qwen3", rope_parameters=PLAIN, head_dim=12, tie_word_embeddings=True), torch.bfloat16, 4000),
    "gpt2": (transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_inner=40, n_layer=2, n_head=2,
                                     bos_token_id=1, eos_token_id=2), torch.float32, 10**9),
}
# Those that are written once more as transformers 4 does.
OLDER = ("llama", "llama-linear", "llama3")


def make_model(settings, dtype):
    """Weights of order 1, so that the loss depends on each, rounded to dtype."""
    torch.manual_seed(1)
    settings.dtype = dtype
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            vector, gain = p.dim() == 1, "norm" in name or "ln_" in name
            p.copy_(torch.randn(p.shape) * 0.3 + (1 if vector and gain and name.endswith("weight") else 0))
    return model.to(dtype)


def make_older(folder):
    """config.json in the form of transformers 4: rope_theta beside rope_scaling, torch_dtype."""
    fields = json.loads((folder / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    fields.update(rope_theta=rope.pop("rope_theta"), torch_dtype=fields.pop("dtype"), transformers_version="4.57.1",
                  rope_scaling=None if rope["rope_type"] == "default" else rope)
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    older = folder.with_name(folder.name + "-older")
    older.mkdir()
    (older / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    for file in folder.glob("*.safetensors*"):
        (older / file.name).symlink_to(f"../{folder.name}/{file.name}")
    return older


@torch.no_grad()
def compute(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    text = tokens[:1, :T]
    for _ in range(GREEDY):
        best = model(input_ids=text).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < 1e-3:
            raise SystemExit(f"{folder.name}: two tokens are nearly alike; take another seed")
        text = torch.cat((text, best.indices[:1][None]), dim=1)
    return loss.item(), text[0, T:].tolist()


def main():
    if int(transformers.__version__.split(".")[0]) < 5:
        raise SystemExit(f"make_hf_fixtures: needs transformers 5, found {transformers.__version__}")
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2, T + 1))
    expected = {"tokens": tokens.tolist(), "models": {}}
    for name, (settings, dtype, file_bytes) in MODELS.items():
        folder = FOLDER / name
        make_model(settings, dtype).save_pretrained(folder, max_shard_size=file_bytes)
        for made in [folder] + ([make_older(folder)] if name in OLDER else []):
            loss, greedy = compute(made, tokens)
            expected["models"][made.name] = {"loss": loss, "greedy": greedy}
            files = len(list(made.glob("*.safetensors")))
            print(f"{made.name:20} loss {loss:.6f}, {files} files of {settings.dtype}")
    (FOLDER / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
