#!/usr/bin/env python3
"""Greedy text of --generate, token for token beside that of transformers' generate, in fp32.

generate_check.py TRAIN_GPT FOLDER [--chat TEMPLATE] PROMPT...    of a program built with PRECISION=fp32, and a checkpoint
                                                                  or a model of others; with --chat, prompts are questions
"""

import argparse
import json
import subprocess
from pathlib import Path

import torch
import transformers

TOKENS = 100
DOCUMENT_ENDS, ANSWER_ENDS = ("<|endoftext|>", "<|end_of_text|>"), ("<|im_end|>", "<|eot_id|>")


def prompt_tokens(tokenizer, prompt, trained_here, chat):
    """As anybody asks, but that the token before a document goes before the prompt of a model trained here."""
    if chat:
        question = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=False)
    ids, start = tokenizer(prompt).input_ids, [tokenizer.bos_token_id]
    return ids if not trained_here or ids[:1] == start else start + ids


def end_tokens(tokenizer, model, chat):
    own = model.generation_config.eos_token_id
    named = DOCUMENT_ENDS[:1] + (ANSWER_ENDS if chat else ())
    return {*(own if isinstance(own, list) else [own]), *(tokenizer.get_vocab().get(name) for name in named)} - {None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--chat", metavar="TEMPLATE", help="chatml or llama3, which the folder's tokenizer must write too")
    arguments = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32, trust_remote_code=True)
    trained_here = "norm" in json.loads((arguments.folder / "config.json").read_text())
    ends = end_tokens(tokenizer, model, arguments.chat)
    for prompt in arguments.prompts:
        command = [arguments.program, "--generate", "--model", arguments.folder, "--prompt", prompt, "--temperature", "0",
                   "--max-tokens", str(TOKENS), *(["--chat", "--template", arguments.chat] if arguments.chat else [])]
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
        ids = torch.tensor([prompt_tokens(tokenizer, prompt, trained_here, arguments.chat)])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
                               eos_token_id=sorted(ends), pad_token_id=min(ends, default=0))[0, ids.shape[1]:].tolist()
        expected = ("" if arguments.chat else prompt) + tokenizer.decode([i for i in found if i not in ends]) + "\n"
        if said != expected:
            raise SystemExit(f"{prompt!r}: transformers goes on with\n{expected}--generate with\n{said}")
        print(f"{prompt!r}: {len(found)} tokens are the same")


if __name__ == "__main__":
    main()
