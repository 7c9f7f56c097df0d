#!/usr/bin/env python3
"""A saved folder as transformers finds it: the ids of its tokenizer, where a text ends, and that it can be saved again.

export_check.py TOKENIZE FOLDER [TEXT...]    TOKENIZE is build/tokenize; run it by each version of transformers in question
"""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

CONVERSATION = [("system", "Be short."), ("user", "Who is it?"), ("assistant", "The cat."), ("user", "And?"),
                ("assistant", "A dog.")]
TEXTS = ["the cat sat on a Mat, 1234 times.", "don't\n\n  indent\t\u00fcber \u4e16\u754c", " "]


def tokenize(program, folder, text, name="text.txt", *options):
    """What the trainer would train on: the shard of one document."""
    with tempfile.TemporaryDirectory() as work:
        Path(work, name).write_text(text)
        subprocess.run([program, "encode", "--tokenizer", f"{folder}/tokenizer.json", "--out", work, "--val-fraction",
                        "0", *options, f"{work}/{name}"], check=True, capture_output=True)
        raw = Path(work, "train_000000.bin").read_bytes()
    width = "H" if struct.unpack_from("<i", raw)[0] == 20240520 else "I"
    return list(struct.unpack_from(f"<{(len(raw) - 1024) // struct.calcsize(width)}{width}", raw, 1024))


def require(condition, text):
    if not condition:
        raise SystemExit("export_check: " + text)


def main():
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    program, folder, *texts = sys.argv[1:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    require(tokenizer.eos_token_id is not None, "the tokenizer has no eos_token")
    for text in texts or TEXTS:
        ours, theirs = tokenize(program, folder, text)[1:], tokenizer(text).input_ids
        require(ours == theirs, f"{text!r}: build/tokenize says {ours}, {type(tokenizer).__name__} {theirs}")
        require(tokenizer.decode(theirs) == text, f"{text!r}: decoded as {tokenizer.decode(theirs)!r}")

    if tokenizer.chat_template:
        template = json.loads(Path(folder, "tokenizer_config.json").read_text())["conversation_template"]
        messages = [{"role": role, "content": text} for role, text in CONVERSATION]
        ours = tokenize(program, folder, json.dumps({"messages": messages}), "chat.jsonl", "--template", template)
        theirs = tokenizer.apply_chat_template(messages, return_dict=False)
        require(ours == theirs, f"{template}: build/tokenize says {ours}, {type(tokenizer).__name__} {theirs}")
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        require(ours[: len(asked)] == asked, f"{template}: a question is {asked}, and is trained on as {ours}")

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ends = {e for e in [model.generation_config.eos_token_id] for e in (e if isinstance(e, list) else [e])}
    require(tokenizer.eos_token_id in ends, f"generate() ends at {ends}, the tokenizer's end is another")
    torch.manual_seed(1)
    prompt = tokenizer([tokenizer.bos_token] * 8, return_tensors="pt")
    written = model.generate(**prompt, do_sample=True, max_new_tokens=min(500, tokenizer.model_max_length - 1))
    stopped = sum(int(row[-1]) in ends for row in written[:, 1:])
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work), tokenizer.save_pretrained(work)
        again = transformers.AutoModelForCausalLM.from_pretrained(work, trust_remote_code=True)
        logits = [m(input_ids=prompt.input_ids).logits for m in (model, again)]
        require(torch.equal(*logits), "saved by transformers and read again it computes something else")
    print(f"transformers {transformers.__version__}: {type(model).__name__}, {type(tokenizer).__name__}; the same ids; "
          f"{stopped} of 8 texts ended within {written.shape[1] - 1} tokens")


if __name__ == "__main__":
    main()
