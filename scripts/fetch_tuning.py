#!/usr/bin/env python3
"""Fetches Commonsense170K, the questions that the paper tunes on: to data/commonsense170k.jsonl, 170,420 lines of
{"instruction", "input", "output", "answer"}, which build/tokenize encode takes as they are.

It is the file of LLM-Adapters (Hu et al., arXiv 2304.01933) on GitHub, about 90 MB; its authors publish no checksum, so
that the number of questions and their fields are what is checked. TUNING_URL names a mirror. Nothing is fetched again.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from command_line import Failure, Parser, locked, run_script, write_atomically

URL = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/ft-training_set/commonsense_170k.json"
QUESTIONS = 170420
FIELDS = ("instruction", "input", "output")


def download(url, path):
    done = subprocess.run(["curl", "--fail", "--silent", "--show-error", "--location", "--retry", "3",
                           "--connect-timeout", "15", "--output", str(path), url],
                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip() or "curl failed").splitlines()[-1]
        raise Failure(f"{url}: {reason}; check the network, or name a mirror in TUNING_URL")


def read_questions(url, path):
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{url}: not valid JSON: {error}; it is damaged, or another page") from None
    if not isinstance(rows, list) or len(rows) != QUESTIONS:
        found = f"{len(rows)} in a list" if isinstance(rows, list) else type(rows).__name__
        raise Failure(f"{url}: expected {QUESTIONS} questions in a list, found {found}: it is damaged, or another set")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in FIELDS):
            raise Failure(f"{url}: question {number}: expected texts {', '.join(FIELDS)}: it is damaged, or another set")
    return rows


def main():
    parser = Parser("fetch_tuning.py", __doc__)
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="[data]")
    out = parser.parse_args().out
    path, url = out / "commonsense170k.jsonl", os.environ.get("TUNING_URL") or URL
    if path.exists():
        return
    with locked(out, "fetch_tuning.py"), tempfile.TemporaryDirectory(dir=out) as folder:
        print(f"fetching {url}", flush=True)
        file = Path(folder, "questions.json")
        download(url, file)
        rows = read_questions(url, file)
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    run_script("fetch_tuning", main)
