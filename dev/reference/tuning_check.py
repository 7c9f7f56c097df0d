#!/usr/bin/env python3
"""Compares tuning with TRL: the loss of prompts and completions, and the tokens and targets of conversations.

tuning_check.py TRAINER CHECKPOINT     a LLaMA or GPT-2 folder with tokenizer.json, of PRE or LNS

The questions are made here. TRL's SFTTrainer computes its loss (completions alone) of the folder on all of them in one batch;
the trainer validates on the same, one a row and packed. Conversations are rendered by transformers' apply_chat_template.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZE = ROOT / "build/tokenize"
# How a message is written out: what stands before it, and the message with its end.
TEMPLATES = {"chatml": ("<|im_start|>{{ message.role }}\n", "{{ message.content }}<|im_end|>", "{{ '\n' }}"),
             "llama3": ("<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n", "{{ message.content | trim }}<|eot_id|>", "")}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ODD = ["", " lead", "trail  ", "\n\nlines\r\n", "\u65e5\u672c\u8a9e \U0001f642", "e\u0301", "\u00a0blank\u2003", "<b>&'\"", "\t", "1234567"]


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def make_questions():
    draw = random.Random(1)
    names = ["cat", "dog", "bird", "model", "layer"]
    for _ in range(64):
        a, b = draw.sample(names, 2)
        yield f"Which of {a} and {b} is longer, and why? " + "Think. " * draw.randrange(6), f"The {max(a, b, key=len)}." * draw.randrange(1, 4)


def read_shard(folder):
    """Tokens and whether each is a target."""
    tokens = np.fromfile(folder / "train_000000.bin", dtype="<u2", offset=1024)
    answers = np.fromfile(folder / "train_000000.targets", dtype="<u4", offset=32).reshape(-1, 3)
    mask = np.zeros(len(tokens), dtype=int)
    for _, begin, end in answers:
        mask[begin:end] = 1
    return tokens, mask


def check_loss(trainer, checkpoint, work):
    questions = list(make_questions())
    (work / "q.jsonl").write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in questions))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"), eos_token="<|endoftext|>",
                                        pad_token="<|endoftext|>")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rows = Dataset.from_list([{"prompt": "<|endoftext|>" + q, "completion": a} for q, a in questions])
    sft = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows, args=SFTConfig(
        output_dir=str(work / "trl"), per_device_eval_batch_size=len(questions), max_length=128, use_cpu=True, bf16=False,
        report_to=[], completion_only_loss=True))
    theirs = sft.evaluate()["eval_loss"]

    run(TOKENIZE, "encode", "--tokenizer", checkpoint / "tokenizer.json", "--out", work / "data", "--template", "plain",
        "--val-fraction", 0, work / "q.jsonl")
    tokens, mask = read_shard(work / "data")
    print(f"{len(tokens)} tokens, {mask.sum()} targets; TRL's loss {theirs:.6f}")
    (work / "val").mkdir()
    for name in ("train_000000.bin", "train_000000.targets"):
        (work / "val" / name).write_bytes((work / "data" / name).read_bytes())
    worst = 0
    for pack in ("documents", "packed"):
        out = work / pack
        run(trainer, "--model", checkpoint, "--train", work / "data/train_*.bin", "--val", work / "val/train_*.bin", "--pack",
            pack, "--seq-len", 128, "--eval-tokens", 0, "--steps", 0, "--out", out)
        ours = [json.loads(line) for line in open(out / "log.jsonl") if '"event":"val"' in line][0]["loss"]
        worst = max(worst, abs(ours - theirs))
        print(f"--pack {pack}: {ours:.6f}, {abs(ours - theirs):.1e} away")
    return worst < 1e-5 * theirs


def make_talks():
    """Some with a system's message, answers in a row, an open question at the end, and odd texts."""
    draw, questions = random.Random(2), [text for pair in make_questions() for text in pair]
    for _ in range(100):
        roles = ["system"] * draw.randrange(2) + draw.choices(["user", "assistant", "tool"], k=draw.randrange(1, 6)) + ["assistant"]
        roles += ["user"] * draw.randrange(2)
        yield [{"role": role, "content": draw.choice(ODD + questions)} for role in roles]


def check_conversations(work, template):
    (work / "text.txt").write_text(" ".join(q + a for q, a in make_questions()))
    run(TOKENIZE, "train", "--vocab-size", 320, *(word for token in SPECIAL for word in ("--special", token)), "--out",
        work / "t.json", work / "text.txt")
    talks = list(make_talks())
    (work / "c.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    run(TOKENIZE, "encode", "--tokenizer", work / "t.json", "--out", work / template, "--template", template,
        "--val-fraction", 0, work / "c.jsonl")
    before, message, behind = TEMPLATES[template]
    jinja = ("<|endoftext|>{% for message in messages %}" + before + "{% if message.role == 'assistant' %}{% generation %}" + message +
             "{% endgeneration %}{% else %}" + message + "{% endif %}" + behind + "{% endfor %}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(work / "t.json"), chat_template=jinja)
    ids, mask = [], []
    for talk in talks:
        made = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
        ids += made["input_ids"]
        mask += made["assistant_masks"]
    tokens, targets = read_shard(work / template)
    same = list(tokens) == ids and list(targets) == mask
    print(f"{len(talks)} conversations by {template}, {len(ids)} tokens, {sum(mask)} targets:",
          "the same" if same else "DIFFERENT")
    return same


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as work:
        good = all([check_conversations(Path(work), template) for template in TEMPLATES])
        good &= check_loss(Path(sys.argv[1]), Path(sys.argv[2]), Path(work))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
