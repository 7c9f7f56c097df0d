#!/usr/bin/env python3
"""Our tokenizer's speed beside tiktoken's and Hugging Face's `tokenizers`, on one thread, in alternating runs.

    pip install tiktoken tokenizers
    make build/bench/tokenizer_speed
    dev/bench/tokenizer_against.py TOKENIZER.json TEXT...

All get the text in the same pieces of about 1 MB, and must give the same number of ids. A round runs each once; the
table shows medians over the rounds, the last column that of the ratios. TOKENIZER.json must be one that tiktoken can
read too: its ids are its ranks (GPT-2, Llama 3, Qwen).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import tiktoken  # noqa: E402
import tokenizers  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # as tiktoken writes it


def as_tiktoken(path):
    root = json.loads(Path(path).read_text())
    characters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(b): b for b in characters}
    byte_of.update((chr(0x100 + i), b) for i, b in enumerate(sorted(set(range(256)) - set(characters))))
    special = {token["content"]: token["id"] for token in root["added_tokens"]}
    ranks = {bytes(byte_of[c] for c in token): id for token, id in root["model"]["vocab"].items() if token not in special}
    steps = root["pre_tokenizer"].get("pretokenizers", [root["pre_tokenizer"]])
    pattern = next((step["pattern"]["Regex"] for step in steps if step["type"] == "Split"), GPT2)
    return tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def pieces_of(text):
    """As tokenizer_speed.cpp cuts them."""
    while text:
        newline = text.find(b"\n", min(1 << 20, len(text) - 1))
        length = newline + 1 if newline >= 0 else len(text)
        yield text[:length].decode("utf-8", errors="replace")
        text = text[length:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    tik, hf = as_tiktoken(options.tokenizer), tokenizers.Tokenizer.from_file(options.tokenizer)
    print(f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}; MB/s on one thread")
    print(f"{'text':24}{'ours':>8}{'tiktoken':>10}{'tokenizers':>12}{'ours / tiktoken':>17}{'ours / tokenizers':>19}")
    for path in options.texts:
        text = Path(path).read_bytes()
        pieces = list(pieces_of(text))

        def ours():
            command = [ROOT / "build/bench/tokenizer_speed", "--once", options.tokenizer, path]
            seconds, count = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            return float(seconds), int(count)

        def timed(encode):
            start = time.perf_counter()
            count = sum(len(encode(piece)) for piece in pieces)
            return time.perf_counter() - start, count

        rounds, counts = [], set()
        for _ in range(options.rounds):
            results = [ours(), timed(tik.encode_ordinary), timed(lambda piece: hf.encode(piece, add_special_tokens=False).ids)]
            rounds.append([len(text) / 1e6 / seconds for seconds, _ in results])
            counts.update(count for _, count in results)
        if len(counts) > 1:
            sys.exit(f"tokenizer_against: {path}: the numbers of ids differ: {sorted(counts)}")
        ours_, tik_, hf_ = (statistics.median(column) for column in zip(*rounds))
        print(f"{Path(path).name:24}{ours_:8.1f}{tik_:10.1f}{hf_:12.1f}{statistics.median(a / b for a, b, _ in rounds):17.1f}"
              f"{statistics.median(a / c for a, _, c in rounds):19.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
