#!/usr/bin/env python3
"""Fetches a published corpus from Hugging Face, and makes token shards of it where it is text.

  fineweb                            FineWeb in GPT-2's tokens, ready-made for llm.c: up to 103 files of 100M tokens
  c4                                 C4's English text: up to 1024 files of 0.3 GB, about 356,000 documents
  fineweb-text, fineweb-edu          the text of FineWeb's 10B-token samples, 2 GB a file; needs pyarrow
  gpt2-tokenizer, qwen2.5-tokenizer  a tokenizer.json

  scripts/fetch_data.py c4 --files 8

Text is encoded by build/tokenize, with the tokenizer.json that --tokenizer names or else with one that is trained on
the first files, and then removed. Every file is checked against the checksum that Hugging Face publishes for it, and a
dropped connection goes on where it was. So does this script when it was stopped and is called again.

HF_ENDPOINT names a mirror [https://huggingface.co]; HF_TOKEN is sent where it is set.
"""

import fnmatch
import glob
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from command_line import Failure, Parser, locked, not_negative, positive, printable, run_script

TOKENIZE = Path(__file__).resolve().parent.parent / "build" / "tokenize"
MAX_FAILURES = 6  # attempts in a row that bring nothing new


@dataclass
class Source:
    """Files of a repository: the first --files of those that match `train`, and all that match `val`."""
    repository: str  # datasets/OWNER/NAME, or models/OWNER/NAME
    folder: str
    train: str  # a glob
    val: str = ""

    def files_url(self):
        kind, name = self.repository.split("/", 1)
        return f"{ENDPOINT}/{'' if kind == 'models' else kind + '/'}{name}/resolve/main"


GPT2_TOKENIZER = Source("models/openai-community/gpt2", "", "tokenizer.json")
SOURCES = {
    "fineweb": Source("datasets/kjj0/fineweb10B-gpt2", "", "fineweb_train_*.bin", "fineweb_val_*.bin"),
    "c4": Source("datasets/allenai/c4", "en", "c4-train.*.json.gz", "c4-validation.00000-*.json.gz"),
    "fineweb-text": Source("datasets/HuggingFaceFW/fineweb", "sample/10BT", "*.parquet"),
    "fineweb-edu": Source("datasets/HuggingFaceFW/fineweb-edu", "sample/10BT", "*.parquet"),
    "gpt2-tokenizer": GPT2_TOKENIZER,
    "qwen2.5-tokenizer": Source("models/Qwen/Qwen2.5-0.5B", "", "tokenizer.json"),
}
ENDPOINT = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


class Stopped(Exception):
    """Another download failed, or the user stopped the script."""


# ---------------------------------------------------------------------------------------------------------------------
# curl

stop = threading.Event()
running = set()


def curl(url, *options):
    """Returns curl's exit status, the HTTP status (0 without an answer), and the last line of its complaint."""
    token = os.environ.get("HF_TOKEN", "").strip()
    process = subprocess.Popen(
        ["curl", "--config", "-", "--fail", "--silent", "--show-error", "--location", "--connect-timeout", "15",
         "--speed-limit", "1000", "--speed-time", "60", "--write-out", "%{http_code}", *options, url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    running.add(process)
    if stop.is_set():
        process.terminate()
    # The token goes through the standard input: a command line is seen by everyone on the machine.
    out, complaint = process.communicate(f'header = "Authorization: Bearer {token}"\n' if token else "")
    running.discard(process)
    if stop.is_set():
        raise Stopped
    return process.returncode, int(out or 0), (complaint.strip() or "the connection was closed").splitlines()[-1]


def stop_all():
    stop.set()
    for process in list(running):
        process.terminate()


def refuse(url, http):
    """Raises for what another attempt would not change."""
    if http in (401, 403):
        raise Failure(f"{url}: HTTP {http}: it wants a token that may read it: set HF_TOKEN to one of yours")
    if http in (404, 410):
        raise Failure(f"{url}: HTTP {http}: not there (any more): check HF_ENDPOINT, or look for where it went on "
                      "https://huggingface.co and change scripts/fetch_data.py")


def pause(seconds):
    if stop.wait(min(seconds, 60)):
        raise Stopped


def get(url, retry_wait):
    """The body of a small page and the address of the next one, or None."""
    with tempfile.TemporaryDirectory() as folder:
        body, headers = Path(folder, "body"), Path(folder, "headers")
        for failures in range(MAX_FAILURES):
            if failures:
                pause(retry_wait * 2 ** failures)
            status, http, complaint = curl(url, "--dump-header", str(headers), "--output", str(body))
            if status == 0:
                link = re.search(r'^link:.*<([^>]+)>\s*;\s*rel="?next', headers.read_text(), re.I | re.M)
                return body.read_text(), link and link[1]
            refuse(url, http)
    raise Failure(f"{url}: {complaint}; check the network, or name a mirror in HF_ENDPOINT")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@dataclass
class File:
    url: str
    size: int
    checksum: str  # sha256, or of what is no LFS file git's own: sha1 of "blob SIZE\0" and the content
    path: Path  # where it goes

    @property
    def part(self):
        return self.path.with_name(self.path.name + ".part")

    def bytes_here(self):
        return self.size if self.path.exists() else min(size_of(self.part), self.size)

    def checksum_found(self):
        sha256 = len(self.checksum) == 64
        digest = hashlib.sha256() if sha256 else hashlib.sha1(f"blob {self.size}\0".encode())
        with open(self.part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def list_files(source, pattern, retry_wait):
    """(path, size, checksum) of the repository's files in the folder that match, in the order of their names."""
    url = f"{ENDPOINT}/api/{source.repository}/tree/main{'/' + source.folder if source.folder else ''}"
    found = []
    while url:
        body, following = get(url, retry_wait)
        try:
            for entry in json.loads(body):
                if entry["type"] == "file" and fnmatch.fnmatch(PurePosixPath(entry["path"]).name, pattern):
                    oid = entry["lfs"]["oid"] if entry.get("lfs") else entry["oid"]
                    found.append((entry["path"], entry["size"], oid.removeprefix("sha256:")))
        except (ValueError, KeyError, TypeError):
            raise Failure(f"{url}: not the list of files that Hugging Face's API gives; check HF_ENDPOINT") from None
        url = following
    if not found:
        raise Failure(f"{ENDPOINT}/{source.repository}: no file {source.folder or '.'}/{pattern}; look for where it "
                      "went on https://huggingface.co and change scripts/fetch_data.py")
    return sorted(found)


def download(file, retry_wait):
    """Fetches what is missing of the file; it gets its name when it is whole and its checksum right."""
    if size_of(file.part) > file.size:
        file.part.unlink()  # of another version
    failures, most = 0, size_of(file.part)
    while (have := size_of(file.part)) < file.size:
        status, http, complaint = curl(file.url, "--output", str(file.part), "--continue-at", str(have))
        refuse(file.url, http)
        if status == 23:
            raise Failure(f"{file.part}: {complaint}; make room or choose another --out")
        if status == 33 or http == 416:  # it can only send the whole
            file.part.unlink(missing_ok=True)
        size = size_of(file.part)
        failures, most = (0, size) if size > most else (failures + 1, most)
        if failures >= MAX_FAILURES:
            raise Failure(f"{file.url}: {complaint}, {failures} times at {size} of {file.size} bytes; check the "
                          "network and call this again: it goes on from there")
        if size < file.size:
            pause(retry_wait * 2 ** failures)
    found = file.checksum_found()
    if found != file.checksum or size_of(file.part) != file.size:
        file.part.unlink()
        raise Failure(f"{file.url}: checksum {found}, published is {file.checksum}: damaged on its way, and removed; "
                      "call this again")
    if file.url.endswith(".parquet"):
        text_of_parquet(file.part, file.path)
    else:
        file.part.rename(file.path)


def text_of_parquet(parquet, text):
    """Turns a parquet file into a .jsonl.gz."""
    partial = text.with_name("." + text.name)
    try:
        with gzip.open(partial, "wt", compresslevel=1, encoding="utf-8") as out:
            for batch in pyarrow_parquet().ParquetFile(parquet).iter_batches(columns=["text"], batch_size=1024):
                out.writelines(json.dumps({"text": document}) + "\n" for document in batch.column(0).to_pylist())
                if stop.is_set():
                    raise Stopped
    except (ValueError, LookupError) as error:  # pyarrow's are of these kinds
        raise Failure(f"{parquet}: no parquet with a column `text`: {str(error).splitlines()[0]}") from None
    partial.rename(text)
    parquet.unlink()


def pyarrow_parquet():
    try:
        import pyarrow.parquet
        return pyarrow.parquet
    except ImportError:
        raise Failure("FineWeb's text is parquet, which Python reads with pyarrow: python3 -m venv ~/arrow && "
                      "~/arrow/bin/pip install pyarrow, then start this with ~/arrow/bin/python; or take the "
                      "ready-made tokens: scripts/fetch_data.py fineweb") from None


def amount(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds):
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def show_progress(files, start_bytes, started, shown):
    """A line on a terminal five times a second, else one every half minute. Returns when it was last shown."""
    terminal, now = sys.stderr.isatty(), time.monotonic()
    have, size = sum(f.bytes_here() for f in files), sum(f.size for f in files)
    if now - shown < (0.2 if terminal else 30) and not (terminal and have == size):
        return shown
    rate = (have - start_bytes) / max(now - started, 1e-3)
    left = f"{duration((size - have) / rate)} left" if rate > 0 else "waiting"
    whole = sum(f.path.exists() for f in files)
    print(f"{chr(13) + chr(27) + '[K' if terminal else ''}fetch: {whole} of {len(files)} files, {amount(have)} of "
          f"{amount(size)}, {rate / 1e6:.1f} MB/s, {left}", end="" if terminal else "\n", file=sys.stderr, flush=True)
    return now


def download_all(files, jobs, retry_wait):
    """Several at a time; the first failure stops the others."""
    missing = [f for f in files if not f.path.exists()]
    if not missing:
        return
    start_bytes, started = sum(f.bytes_here() for f in files), time.monotonic()
    shown = started
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(download, f, retry_wait) for f in missing}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2)
                for future in done:
                    future.result()
                shown = show_progress(files, start_bytes, started, shown)
        except BaseException:
            stop_all()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            if sys.stderr.isatty():
                print(file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Text to shards


def tokenize(*arguments):
    if subprocess.run([str(TOKENIZE), *map(str, arguments)]).returncode:
        sys.exit(1)  # it has said why


def encode(train, val, out, tokenizer, vocab_size):
    """Shards of the text in out/. Without files for validation, a hundredth of the training text is taken for it."""
    if tokenizer is None:
        tokenizer = out / "tokenizer.json"
        if not tokenizer.exists():
            tokenize("train", "--vocab-size", vocab_size, "--out", tokenizer, *train[:2])
    val_shards = out / "val"
    shutil.rmtree(val_shards, ignore_errors=True)  # of a run that was stopped
    if val:
        tokenize("encode", "--tokenizer", tokenizer, "--out", val_shards, "--val-fraction", 0, *val)
    tokenize("encode", "--tokenizer", tokenizer, "--out", out, "--val-fraction", 0 if val else 0.01, *train)
    if val:
        for shard in sorted(val_shards.glob("train_*.bin")):
            shard.rename(out / shard.name.replace("train", "val"))
        shutil.rmtree(val_shards)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def is_text(name):
    return SOURCES[name].train.endswith((".json.gz", ".parquet"))


def plan(name, arguments):
    """The files to fetch: training, validation, others."""
    def place(path):
        base = PurePosixPath(path).name
        if is_text(name):
            return arguments.out / "text" / re.sub(r"\.(json\.gz|parquet)$", ".jsonl.gz", base)
        return arguments.out / base.removeprefix("fineweb_")

    def files(source, pattern, count=None):
        listed = list_files(source, pattern, arguments.retry_wait)
        if count and count > len(listed):
            raise Failure(f"--files {count}: {name} has {len(listed)}")
        return [File(f"{source.files_url()}/{path}", size, checksum, place(path))
                for path, size, checksum in listed[:count]]

    source = SOURCES[name]
    return (files(source, source.train, arguments.files), files(source, source.val) if source.val else [],
            files(GPT2_TOKENIZER, GPT2_TOKENIZER.train) if name == "fineweb" else [])


def fetch(name, arguments):
    out = arguments.out
    # What this folder holds when it is done; another request fetches what it has more.
    request = f"{name}, --files {arguments.files}"
    if arguments.tokenizer:
        request += f", --tokenizer {arguments.tokenizer}"
    stamp = out / ".fetched"
    if stamp.exists() and stamp.read_bytes() == os.fsencode(request):
        print(f"{printable(out)}: all there ({printable(request)}); remove {printable(stamp)} to fetch it again")
        return
    if is_text(name) and not TOKENIZE.exists():
        raise Failure("build/tokenize is missing: make tokenize")
    if arguments.tokenizer and not arguments.tokenizer.exists():
        raise Failure(f"--tokenizer {arguments.tokenizer}: no such file")
    parquet = SOURCES[name].train.endswith(".parquet")
    if parquet:
        pyarrow_parquet()

    train, val, others = plan(name, arguments)
    files = train + val + others
    # Parquet becomes about as much .jsonl.gz, and that about as many bytes of tokens.
    needed = sum(f.size - f.bytes_here() for f in files) * (2 if parquet else 1)
    if is_text(name):
        needed += sum(f.size for f in files)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise Failure(f"{out}: about {amount(needed)} are needed, {amount(free)} free; lower --files or choose another "
                      "--out")
    for file in files:
        file.path.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    download_all(files, arguments.jobs, arguments.retry_wait)
    if is_text(name):
        encode([f.path for f in train], [f.path for f in val], out, arguments.tokenizer, arguments.vocab_size)
        if not arguments.keep_text:
            shutil.rmtree(out / "text")
    stamp.write_bytes(os.fsencode(request))
    if name.endswith("-tokenizer"):
        print(printable(out / "tokenizer.json"))
        return
    shards = [len(list(out.glob(pattern))) for pattern in ("train_*.bin", "val_*.bin")]
    print(f"{printable(out)}: {shards[0]} shards to train on, {shards[1]} to validate on, and tokenizer.json. Next:")
    globs = [shlex.quote(f"{glob.escape(str(out))}/{part}_*.bin") for part in ("train", "val")]
    print(printable(f"  ./train_gpt --train {globs[0]} --val {globs[1]}"))


def main():
    parser = Parser("fetch_data.py", __doc__)
    parser.add_argument("what", choices=SOURCES, metavar="WHAT", help=", ".join(SOURCES))
    parser.add_argument("--files", type=positive, default=1, metavar="N", help="to train on [1]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="[data/WHAT]")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE",
                        help="encodes the text [DIR/tokenizer.json, trained on the first files if it is not there]")
    parser.add_argument("--vocab-size", type=positive, metavar="N", default=32000, help="of the tokenizer to train [32000]")
    parser.add_argument("--keep-text", action="store_true", help="keep what was encoded, in DIR/text")
    parser.add_argument("--jobs", type=positive, default=4, metavar="N", help="downloads at a time [4]")
    parser.add_argument("--retry-wait", type=not_negative, default=1, metavar="SECONDS",
                        help="before the first new attempt; then it doubles [1]")
    arguments = parser.parse_args()
    if arguments.tokenizer and not is_text(arguments.what):
        parser.error(f"--tokenizer: {arguments.what} is not encoded here")
    arguments.out = arguments.out or Path("data", arguments.what)
    # Leave through the clean-up when stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not shutil.which("curl"):
        raise Failure("curl is missing: apt-get install curl")
    with locked(arguments.out, "fetch_data"):
        fetch(arguments.what, arguments)


if __name__ == "__main__":
    run_script("fetch_data", main)
