#!/usr/bin/env python3
"""Compares our tokenizer with Hugging Face's `tokenizers`, id for id.

    pip install tokenizers
    make build/bench/tokenizer_speed
    dev/reference/tokenizer_check.py TOKENIZER.json [TEXT FILE...]

Besides the files it encodes made-up text: every code point in several contexts, combining sequences, random mixtures
of scripts, emoji, blanks and punctuation, malformed UTF-8 (which `tokenizers` gets as Python decodes it, with U+FFFD),
control characters, runs of blanks and of letters up to 1 MB, and lines of 10 MB. Prints each difference; exits 1 if
there is any.
"""

import argparse
import random
import struct
import subprocess
import sys
from pathlib import Path

import tokenizers

ROOT = Path(__file__).resolve().parents[2]


class Ours:
    """build/bench/tokenizer_speed --ids: see there for what goes through the pipes."""

    def __init__(self, program, tokenizer):
        self.process = subprocess.Popen([program, "--ids", tokenizer], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self, size):
        data = self.process.stdout.read(size)
        if len(data) < size:
            sys.exit("tokenizer_check: our tokenizer stopped; the line above may say why")
        return data

    def encode(self, text):
        try:
            self.process.stdin.write(struct.pack("<Q", len(text)) + text)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # read() says so
        (count,) = struct.unpack("<Q", self.read(8))
        return list(struct.unpack(f"<{count}I", self.read(4 * count)))


def every_code_point():
    """All code points, each between letters, after a space, doubled, before a digit, after an apostrophe ..."""
    contexts = ["a{0}b", " {0}", "{0}{0}", "{0}1", "'{0}x", " {0}\n", ".{0}!", "\n{0} a", "e{0}\u0301", "\u0915{0}"]
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for context in contexts:
        for start in range(0, len(points), 1024):
            yield f"code points {context!r}", "".join(context.format(c) for c in points[start : start + 1024]).encode()


SCRIPTS = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF),
           (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2100, 0x2BFF),
           (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFE00, 0xFFFD), (0x10D00, 0x10D9F),
           (0x11000, 0x11FFF), (0x16100, 0x1613F), (0x1D400, 0x1D7FF), (0x1F1E6, 0x1F1FF), (0x1F300, 0x1FAFF),
           (0x2EBF0, 0x2EE5D), (0xE0000, 0xE01EF)]  # fmt: skip
PIECES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\u180e", "\x85", "\x0b", "\x1c", "\0", "\x7f",
          "'s", "'S", "'\u017f", "'LL", "'ve", "'rE", "'", "\u2019s", "don't", "I'M", "12345", "\u0663\u0664", "\u2167",
          "\u00bd", "--", "...", "!?", "e\u0301", "\u0344", "\u1100\u1161\u11a8", "\uac00\u11a8", "\U0001f469\u200d\U0001f4bb",
          "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "<|endoftext|>", "<|im_start|>", "<tool_call>",
          "<|begin_of_text|>", "<|endof", "word", " the", "if(x==1){", "_a", "\u4f60\u597d"]  # fmt: skip


def mixtures(count):
    for seed in range(count):
        rng = random.Random(seed)
        text = ""
        for _ in range(rng.randrange(1, 400)):
            if rng.random() < 0.5:
                text += rng.choice(PIECES)
            else:
                first, last = rng.choice(SCRIPTS)
                text += "".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 5)))
        yield f"mixture {seed}", text.encode()


def combining(count):
    """Random sequences of what normal forms look at: bases, marks of all classes, parts of Hangul syllables."""
    import unicodedata

    bases = [c for c in range(0x110000) if unicodedata.decomposition(chr(c))] + list(range(0x1100, 0x1200)) + [0x41, 0x65]
    marks = [c for c in range(0x110000) if unicodedata.combining(chr(c))] + [0x1161, 0x11A8, 0x0DCF, 0x09BE]
    for seed in range(count):
        rng = random.Random(seed)
        text = "".join(chr(rng.choice(bases if rng.random() < 0.4 else marks)) for _ in range(400))
        yield f"combining {seed}", text.encode()


def malformed(count):
    leads = [0x80, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF, 0x9F, 0xA0, 0x90, 0x8F, 0x20, 0x41]
    for seed in range(count):
        rng = random.Random(seed)
        yield f"malformed {seed}", bytes(rng.choice(leads) for _ in range(300))
        yield f"random bytes {seed}", rng.randbytes(300)


def long_runs(size):
    for run in ["a", " ", "\n", "\t", "1", ".", "'", "\u4e16", "\u0301", "ab", " \n", "\r\n", "xyz ", "\U0001f600"]:
        for length in [1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 127, 128, 129, 1000, size]:
            text = run * (length // len(run) + 1)
            yield f"run of {run!r}, {length}", text.encode()
            yield f"run of {run!r}, {length}, then x", f"{text}x".encode()
            yield f"run of {run!r}, {length}, between", f"x{text}\n{text}y".encode()


def long_lines():
    rng = random.Random(1)
    words = [("".join(rng.choices("etaoinshrdlu", k=rng.randrange(1, 12)))) for _ in range(5000)]
    yield "a line of 10 MB", " ".join(rng.choices(words, k=1_600_000)).encode()[:10_000_000]
    yield "10 MB of random letters", "".join(rng.choices("abcdefgh", k=10_000_000)).encode()
    yield "10 MB of a", b"a" * 10_000_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--program", default=ROOT / "build/bench/tokenizer_speed")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter texts, no line of 10 MB")
    options = parser.parse_args()

    theirs = tokenizers.Tokenizer.from_file(options.tokenizer)
    ours = Ours(options.program, options.tokenizer)
    count = 200 if options.quick else 2000
    texts = [*((path, Path(path).read_bytes()) for path in options.files), ("nothing", b"")]
    sources = [texts, every_code_point(), mixtures(count), combining(count // 4), malformed(count // 4),
               long_runs(10_000 if options.quick else 1_000_000), [] if options.quick else long_lines()]  # fmt: skip

    texts = failures = size = 0
    for source in sources:
        for name, text in source:
            texts += 1
            size += len(text)
            expected = theirs.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids
            found = ours.encode(text)
            if found == expected:
                continue
            failures += 1
            at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
            print(f"{name}: {len(found)} ids, expected {len(expected)}; from id {at} on:")
            print(f"  found    {[theirs.id_to_token(i) for i in found[max(0, at - 2) : at + 6]]}")
            print(f"  expected {[theirs.id_to_token(i) for i in expected[max(0, at - 2) : at + 6]]}", flush=True)
            if failures == 20:
                sys.exit("tokenizer_check: stopped after 20 differences")
    print(f"{options.tokenizer}: {texts} texts, {size / 1e6:.1f} MB, {failures} differ "
          f"(tokenizers {tokenizers.__version__})")  # fmt: skip
    sys.exit(failures != 0)


if __name__ == "__main__":
    main()
