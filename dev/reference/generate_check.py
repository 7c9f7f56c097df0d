#!/usr/bin/env python3
"""Greedy text of --generate, token for token beside that of transformers' generate, in fp32.

generate_check.py TRAIN_GPT FOLDER PROMPT...    of a program built with PRECISION=fp32, and one of its checkpoints
"""

import subprocess
import sys

import torch
import transformers
from tokenizers import Tokenizer

TOKENS = 100


def document_start(tokenizer):
    ids = [tokenizer.token_to_id(name) for name in ("<|begin_of_text|>", "<|endoftext|>", "<|end_of_text|>")]
    return [next(i for i in ids if i is not None)]


def main():
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    program, folder, *prompts = sys.argv[1:]
    tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    start, end = document_start(tokenizer), tokenizer.token_to_id("<|endoftext|>")
    for prompt in prompts:
        command = [program, "--generate", "--model", folder, "--prompt", prompt, "--temperature", "0"]
        run = subprocess.run([*command, "--max-tokens", str(TOKENS)], capture_output=True, text=True, check=True)
        ids = torch.tensor([start + tokenizer.encode(prompt, add_special_tokens=False).ids])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
                               eos_token_id=end, pad_token_id=end)[0].tolist()
        expected = tokenizer.decode([i for i in found[1:] if i != end], skip_special_tokens=False) + "\n"
        if run.stdout != expected:
            raise SystemExit(f"{prompt!r}: transformers goes on with\n{expected}--generate with\n{run.stdout}")
        print(f"{prompt!r}: {len(found) - ids.shape[1]} tokens are the same")


if __name__ == "__main__":
    main()
