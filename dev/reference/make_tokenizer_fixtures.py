#!/usr/bin/env python3
"""Makes test/fixtures/tokenizer-*.json: small vocabularies with the pre-tokenizers of GPT-2, Llama 3 and Qwen2, and the
ids that Hugging Face's `tokenizers` gives for texts, with these files and with changes to them.

    pip install tokenizers
    dev/reference/make_tokenizer_fixtures.py
"""

import copy
import json
import random

from tokenizer_check import ROOT, combining, mixtures
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

FIXTURES = ROOT / "test/fixtures"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])  # fmt: skip
DEEPSEEK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def byte_level(prefix=False, regex=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps, byte_level()]}


def added(id, content, **flags):
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **defaults, **flags}


def trained(vocab_size):
    """A vocabulary trained on a text that will not change."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train([str(ROOT / "LICENSE")], trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    return json.loads(tokenizer.to_str())


def main():
    root = trained(500)
    model = root["model"]
    files = {name: copy.deepcopy(root) for name in ("gpt2", "llama3", "qwen2")}

    # GPT-2's file is of the old kind.
    gpt2 = files["gpt2"]
    gpt2["added_tokens"] = [added(500, "<|endoftext|>", normalized=True)]
    gpt2["model"] = {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                     "fuse_unk": False, "vocab": {**model["vocab"], "<|endoftext|>": 500},
                     "merges": [" ".join(merge) for merge in model["merges"]]}  # fmt: skip
    gpt2["pre_tokenizer"] = byte_level(regex=True)

    llama3 = files["llama3"]  # whole words that no merges lead to
    llama3["model"].update(ignore_merges=True, vocab={**model["vocab"], "Ġword": 500, "don": 501, "qqqq": 502})
    llama3["added_tokens"] = [added(503, "<|begin_of_text|>"), added(504, "<|end_of_text|>")]
    llama3["pre_tokenizer"] = sequence(split(LLAMA3))

    qwen2 = files["qwen2"]
    qwen2["normalizer"] = {"type": "NFC"}
    qwen2["added_tokens"] = [added(500, "<|endoftext|>"), added(501, "<|im_start|>"), added(502, "<tool_call>", special=False),
                             added(503, "<tool_call>.", special=False)]  # fmt: skip
    qwen2["pre_tokenizer"] = sequence(split(QWEN2))
    for name, content in files.items():
        (FIXTURES / f"tokenizer-{name}.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")))

    # Changes to the files: a JSON pointer, and what is to stand there.
    pre, normalizer, tokens = "/pre_tokenizer", "/normalizer", "/added_tokens"
    flags = [added(501, "<mask>", lstrip=True), added(502, "<end>", rstrip=True, lstrip=True), added(503, "cat", single_word=True),
             added(504, "caf\u00e9", special=False, normalized=True), added(505, "do", special=False, normalized=True,
             single_word=True), added(506, "\u00e9\u0301", normalized=True), added(507, "  ", normalized=True)]  # fmt: skip
    few = dict(list(model["vocab"].items())[:60])  # of the bytes, in the order of their characters
    few_merges = [merge for merge in model["merges"] if all(part in few for part in [*merge, "".join(merge)])]
    rules = {"/model/vocab": few, "/model/merges": few_merges}
    with_bytes = {"/model/vocab": {**few, "<unk>": 60, **{f"<0x{b:02X}>": 61 + b for b in range(0xC3, 0xC5)},
                                   **{f"<0x{b:02X}>": 100 + b for b in range(0x60, 0xA0)}},
                  "/model/merges": few_merges}  # fmt: skip
    flag_text = "z <end>  z a  <mask> b <end> \n <end>cat cats _cat cat! caf\u00e9 cafe\u0301 do undo do \u00e9\u0301   x\u2003<mask>\u24b6cat"
    bytes_text = "AB ab\u00e9\u4e16\n\nA\u00e9\u00e9~~z~ \x00 <unk>"
    digits_text = "1234567 v2.0 \u0663\u0664x\u2167\u00bd1 12"
    rng = random.Random(5)
    marks = ["".join(chr(rng.choice([0x41, 0x65, 0xE9, 0x1E9B, 0xAC00, 0x1100, 0x1161, 0x11A8, 0x300, 0x301, 0x323, 0x345, 0x5B0,
             0x93C, 0x915, 0x1ABF, 0x10F46, 0xFB01, 0x2126, 0x32FF, 0x1E030, 0x11935, 0x11930, 0x897])) for _ in range(60))
             for _ in range(4)]  # fmt: skip
    changes = [({tokens: flags}, [flag_text]), ({tokens: flags, normalizer: {"type": "NFC"}}, [flag_text])]
    changes += [({normalizer: {"type": form}}, marks) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    changes += [({normalizer: {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFC"}]}}, marks[:1])]
    changes += [({pre: byte_level(prefix=True, regex=True)}, ["a b", " a", "", "<|endoftext|>x<|endoftext|> y"])]
    changes += [({pre: {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": each},
                     byte_level(regex=True)]}}, [digits_text]) for each in (True, False)]  # fmt: skip
    for behavior in ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"):
        for invert in (False, True):
            changes += [({pre: sequence(split(r"\d\d?|-", behavior, invert))}, ["12345--x-9 the-the 77-"])]
            changes += [({pre: sequence(split(QWEN2, behavior, invert))}, ["the 12 words"])]
    changes += [({pre: sequence(split(" t", kind="String"))}, ["to the then"]),
                ({pre: sequence(split(r"(?=(\d{3})+(?!\d))"))}, ["1234567 12 123"]),
                ({pre: sequence(split("(?=h)"))}, ["the other that hhe"]), ({pre: sequence(split("h*"))}, ["the other that hhe \u00e9"])]  # fmt: skip
    mixed = [text.decode()[:250] for _, text in mixtures(6)]
    changes += [({pre: sequence(split(O200K))}, mixed), ({pre: sequence(split(BLOOM))}, mixed[:3]),
                ({pre: sequence(split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), split(DEEPSEEK))},
                 mixed)]  # fmt: skip
    for fuse in (False, True):
        changes += [({**rules, "/model/unk_token": "!", "/model/fuse_unk": fuse}, [bytes_text])]
        changes += [({**with_bytes, "/model/unk_token": "<unk>", "/model/fuse_unk": fuse, "/model/byte_fallback": True},
                     [bytes_text])]  # fmt: skip
    changes += [(rules, [bytes_text]), ({**with_bytes, "/model/byte_fallback": True}, [bytes_text])]

    # Characters on both sides of what the Unicode versions of the libraries disagree on.
    edges = [0x897, 0x1B4E, 0x1C89, 0xA7CB, 0xA7DC, 0x105C0, 0x105F4, 0x10D40, 0x10D4A, 0x113D3, 0x116D0, 0x11BC0, 0x13460, 0x143FB,
             0x16100, 0x16D70, 0x18CFF, 0x1CCF0, 0x1E5D0, 0x2EBF0, 0x2EE5E, 0x180E, 0x200B, 0x85, 0x1C, 0x2028, 0x17F, 0x212A]  # fmt: skip
    texts = mixed + [text.decode()[:200] for _, text in combining(2)]
    texts += ["".join(pattern.format(chr(c)) for c in edges) for pattern in ("a{0}b", " {0}", "'{0}1", "\n{0}\n")]
    texts += ["a" * 300 + " " * 300 + "x" + "ab" * 200, "don't DON'T we'LL\n\n  x \r\n\t y  ", "word qqqq don"]
    cases = [(name, {}, texts) for name in files] + [("gpt2", change, some) for change, some in changes]
    expected = []
    for name, change, some in cases:
        changed = copy.deepcopy(files[name])
        for pointer, value in change.items():
            *path, last = pointer[1:].split("/")
            place = changed
            for key in path:
                place = place[key]
            place[last] = value
        theirs = Tokenizer.from_str(json.dumps(changed))
        results = []
        for text in some:
            results.append({"text": text, "ids": theirs.encode(text, add_special_tokens=False).ids})
        expected.append({"file": name, "change": change, "results": results})
    lines = [json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in expected]
    (FIXTURES / "tokenizer-ids.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
