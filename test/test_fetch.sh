#!/usr/bin/env bash
# Tests scripts/fetch_data.py against a server of our own that answers as Hugging Face does, and fails as networks do.
# Needs build/tokenize. Ends with "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
tokenize=$PWD/build/tokenize fetch_data=$PWD/scripts/fetch_data.py

folder=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null; rm -rf "$folder"' EXIT
cd "$folder" || exit 1

# --- The server: files of hub/, listed three a page; bodies come from another address, as Hugging Face's CDN does.
# `faults` has lines PATTERN FAULT NUMBER, read at each request. `requests` is its log, from which it also knows whether
# a path is asked for the first time.
cat >server.py <<'END'
import fnmatch, hashlib, http.server, json, os, re, threading, time

def faults(path):
    lines = [line.split() for line in open("faults") if line.strip()]
    return {fault: int(number) for pattern, fault, number in lines if fnmatch.fnmatch(path, pattern)}

lock = threading.Lock()

class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        with lock:
            with open("requests", "a") as log:
                log.write(f"{path} {self.headers.get('Range', '-')} {self.headers.get('Authorization', '-')}\n")
            self.first = sum(line.startswith(path + " ") for line in open("requests")) == 1
        fault = faults(path)
        if "status" in fault:
            return self.answer(fault["status"], b"<html>no</html>")
        if "busy" in fault and self.first:
            return self.answer(503, b"<html>busy</html>")
        if "token" in fault and self.headers.get("Authorization") != "Bearer secret":
            return self.answer(401, b"<html>who are you?</html>")
        if found := re.fullmatch("/api/(.*)/tree/main/?(.*)", path):
            return self.list(found[1], found[2], query)
        if path.startswith("/cdn/"):
            return self.file("hub/" + path[5:], fault)
        found = re.fullmatch("/(datasets/)?(.*)/resolve/main/(.*)", path)
        name = f"{found[1] or 'models/'}{found[2]}/{found[3]}" if found else ""
        if not os.path.exists("hub/" + name):
            return self.answer(404, b"<html>Entry not found</html>")
        self.answer(302, b"", Location=f"http://localhost:{self.server.server_port}/cdn/{name}")

    def list(self, repository, folder, query):
        root = f"hub/{repository}"
        if not os.path.isdir(f"{root}/{folder}"):
            return self.answer(404, b'{"error":"Repository not found"}')
        entries = [{"type": "directory", "path": "somewhere", "oid": "0", "size": 0}]
        for name in sorted(os.listdir(f"{root}/{folder}"), reverse=True):
            content = open(f"{root}/{folder}/{name}", "rb").read()
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": f"{folder}/{name}".lstrip("/"), "oid": git, "size": len(content)}
            if name != "tokenizer.json":
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        page = int(query.partition("cursor=")[2] or 0)
        following = f"http://127.0.0.1:{self.server.server_port}{self.path.partition('?')[0]}?cursor={page + 1}"
        more = {"Link": f'<{following}>; rel="next"'} if len(entries) > 3 * page + 3 else {}
        self.answer(200, json.dumps(entries[3 * page:3 * page + 3]).encode(), **more)

    def file(self, name, fault):
        content = open(name, "rb").read()
        if "damage" in fault:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and "norange" not in fault:
            start, size = int(asked[1]), len(content)
            self.answer(206, content[start:], fault, **{"Content-Range": f"bytes {start}-{size - 1}/{size}"})
        else:
            self.answer(200, content, fault)

    def answer(self, status, body, fault={}, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "drop" in fault or ("droponce" in fault and self.first):
            self.wfile.write(body[:fault.get("drop", fault.get("droponce"))])
            self.close_connection = True
        elif "hang" in fault:
            self.wfile.write(body[:fault["hang"]])
            self.wfile.flush()
            time.sleep(60)
        else:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
server.daemon_threads = True
open("port", "w").write(str(server.server_port))
server.serve_forever()
END

# --- What it serves
en=hub/datasets/allenai/c4/en
mkdir -p $en
python3 - $en <<'END'
import gzip, json, random, sys
words = "amber bridge candle delta ember forest granite harbor island jungle kettle lantern".split()
for split, files, of, first in (("train", 4, 1024, 0), ("validation", 2, 8, 4000)):
    for i in range(files):
        with gzip.open(f"{sys.argv[1]}/c4-{split}.{i:05}-of-{of:05}.json.gz", "wt") as out:
            for n in range(first + 300 * i, first + 300 * (i + 1)):
                random.seed(n)
                text = f"Document {n}: " + " ".join(random.choices(words, k=40))
                out.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x.org"}) + "\n")
END
fineweb=hub/datasets/kjj0/fineweb10B-gpt2 gpt2=hub/models/openai-community/gpt2
mkdir -p $fineweb $gpt2 made
gzip -dc $en/c4-train.0000[0-2]* >made/text.jsonl
"$tokenize" train --vocab-size 300 --out $gpt2/tokenizer.json made/text.jsonl 2>made/log
"$tokenize" encode --tokenizer $gpt2/tokenizer.json --out made --val-fraction 0.2 --shard-tokens 10K made/text.jsonl \
    2>made/log
for i in 1 2 3; do cp made/train_00000$i.bin $fineweb/fineweb_train_00000$i.bin; done
cp made/val_000000.bin $fineweb/fineweb_val_000000.bin
echo '# FineWeb' >$fineweb/README.md

: >faults
: >requests
python3 server.py 2>server.log &
server=$!
wait_for test -s port
HF_ENDPOINT=http://127.0.0.1:$(cat port)
export HF_ENDPOINT HF_TOKEN=

fetch() {  # [VARIABLE=VALUE ...] ARGUMENTS
    local settings=()
    while [[ $1 == *=* ]]; do settings+=("$1"); shift; done
    : >requests
    output=$(env "${settings[@]}" "$fetch_data" "$@" --retry-wait 0.01 2>&1)
    status=$?
}
faults() { printf '%s\n' "$@" >faults; }
asked() { grep -cE -- "$1" requests || true; }
# documents FOLDER SHARD...: the numbers of the documents in the shards
documents() {
    local shard
    for shard in "${@:2}"; do "$tokenize" decode --tokenizer "$1/tokenizer.json" "$1/$shard"; done |
        grep -oE 'Document [0-9]+' | grep -oE '[0-9]+'
}
# holds FOLDER SHARDS: with the tokenizer, with or without shards.json (their checksums), and nothing else
holds() { same "$(cd "$1" && echo .[a-z]* * | sed 's/ shards.json / /')" ".fetched .lock tokenizer.json $2"; }

# --- Ready-made shards
fetch fineweb --files 2 --out fineweb
check "fineweb: succeeds" exits 0
check "fineweb: named as the trainer expects, with the tokenizer" \
    holds fineweb "train_000001.bin train_000002.bin val_000000.bin"
check "fineweb: the right bytes" cmp fineweb/train_000002.bin $fineweb/fineweb_train_000002.bin
check "fineweb: says how to train on it" says "./train_gpt --train 'fineweb/train_*.bin' --val 'fineweb/val_*.bin'"
check "fineweb: the listing's pages were followed" test "$(asked 'api/datasets/kjj0')" -gt 2
fetch fineweb --files 2 --out fineweb
check "fineweb: a second call asks for nothing" same "$status:$(wc -l <requests)" 0:0
weird=$'a b[1]\'\xff'
fetch fineweb --out "$weird"
check "fineweb: a folder with blanks, brackets, quotes and a byte that is no UTF-8" exits 0
check "fineweb: whose shards are named so that a shell and the trainer find them" \
    says "./train_gpt --train 'a b[[]1]'\"'\"'\\xff/train_*.bin' --val"
fetch fineweb --out "$weird"
check "fineweb: and there again" same "$status:$(wc -l <requests)" 0:0
fetch fineweb --files 3 --out fineweb
check "fineweb: more files are added to those that are there" same "$status:$(asked cdn)" 0:1
fetch fineweb --files 4 --out fineweb
check "fineweb: more than there are exits 1" exits 1
check "fineweb: and says how many there are" says "--files 4: fineweb has 3"
check "fineweb: in one line" one_line

# --- Connections that break
faults '/cdn/*train* drop 3000'
fetch fineweb --out dropped
check "drop: goes on to the end" exits 0
check "drop: from where it was" same "$(asked 'cdn/.*train_000001.bin bytes=6000-')" 1
check "drop: the right bytes" cmp dropped/train_000001.bin $fineweb/fineweb_train_000001.bin

faults '/cdn/*train* norange 1' '/cdn/*train* droponce 3000'
rm -r dropped
fetch fineweb --out dropped
check "a server that ignores Range: starts over" exits 0
check "a server that ignores Range: having been asked for the rest" \
    same "$(asked 'cdn/.*train_000001.bin bytes=3000-')" 1
check "a server that ignores Range: the right bytes" cmp dropped/train_000001.bin $fineweb/fineweb_train_000001.bin

faults '/cdn/*train* norange 1' '/cdn/*train* drop 3000'
fetch fineweb --out never
check "a server that never sends the whole: exits 1" exits 1
check "a server that never sends the whole: says how far it came" says "bytes; check the network and call this again"
check "a server that never sends the whole: in one line" one_line

faults '/cdn/*train* damage 1'
fetch fineweb --out damaged
check "damage: exits 1" exits 1
check "damage: names both checksums" says "published is $(sha256sum <$fineweb/fineweb_train_000001.bin | cut -c -64)"
check "damage: in one line" one_line
check "damage: nothing of it stays" test ! -e damaged/train_000001.bin -a ! -e damaged/train_000001.bin.part
faults '/cdn/*tokenizer.json damage 1'
fetch gpt2-tokenizer --out gpt2
check "damage: found by git's checksum where there is no LFS" same "$status:$(ls gpt2)" 1:
faults
fetch gpt2-tokenizer --out gpt2
check "tokenizer: is fetched" cmp gpt2/tokenizer.json $gpt2/tokenizer.json

faults '/datasets/* busy 1'
fetch fineweb --files 3 --out busy
check "a busy server: is asked again" exits 0
faults '/cdn/*train* status 404'
fetch fineweb --out gone
check "404: exits 1" exits 1
check "404: says what to do" says "HTTP 404: not there (any more): check HF_ENDPOINT"
check "404: in one line" one_line
check "404: is not asked again" same "$(asked 'cdn/.*train_000001')" 1
faults '/api/* status 404'
fetch c4 --out gone
check "404 of a listing: one line" same "$status:$(grep -c 'HTTP 404' <<<"$output"):$(wc -l <<<"$output")" 1:1:1
faults '*/resolve/* token 1'
fetch fineweb --out token
check "401: exits 1" exits 1
check "401: asks for HF_TOKEN" says "set HF_TOKEN"
fetch HF_TOKEN=secret fineweb --out token
check "token: is sent" exits 0
check "token: but not on to another host" same "$(asked 'cdn.*secret')" 0
check "token: is not printed" same "$(grep -c secret <<<"$output")" 0
faults
fetch HF_ENDPOINT=http://127.0.0.1:1 fineweb --out nowhere
check "no server: exits 1" exits 1
check "no server: one line that says what to do" says "check the network, or name a mirror in HF_ENDPOINT"
check "no server: is one line" one_line

# --- Stopped and called again
faults '/cdn/*train* hang 15000'
"$fetch_data" fineweb --out stopped >stopped.log 2>&1 &
script=$!
wait_for test -s stopped/train_000001.bin.part
fetch fineweb --out stopped
check "two at a time in one folder: refused" says "stopped: another fetch_data is at work there"
curls=$(pgrep -P $script curl)
began=$SECONDS
kill $script
wait $script
status=$? output=$(cat stopped.log)
check "stopped: exits with the signal's status" exits 143
check "stopped: without waiting for the server" test $((SECONDS - began)) -lt 30
check "stopped: had curl at work" test -n "$curls"
check "stopped: leaves no curl behind" test ! -e "/proc/${curls%%$'\n'*}"
kept=$(stat -c %s stopped/train_000001.bin.part)
check "stopped: keeps what it has" test "$kept" -gt 0
faults
fetch fineweb --out stopped
check "called again: goes on" same "$status:$(asked "cdn/.*train_000001.bin bytes=$kept-")" 0:1
check "called again: the right bytes" cmp stopped/train_000001.bin $fineweb/fineweb_train_000001.bin

# --- Text
fetch c4 --files 3 --vocab-size 300 --out c4
check "c4: succeeds" exits 0
check "c4: keeps shards and tokenizer only" holds c4 "train_000000.bin val_000000.bin"
check "c4: trains on the first files" same "$(documents c4 train_000000.bin)" "$(seq 0 899)"
check "c4: validates on the first validation file" same "$(documents c4 val_000000.bin)" "$(seq 4000 4299)"
fetch c4 --files 1 --tokenizer $gpt2/tokenizer.json --keep-text --out with_tokenizer
check "c4: with a given tokenizer" cmp with_tokenizer/tokenizer.json $gpt2/tokenizer.json
check "c4: --keep-text keeps it" same "$(cd with_tokenizer/text && echo *)" \
    "c4-train.00000-of-01024.jsonl.gz c4-validation.00000-of-00008.jsonl.gz"
fetch c4 --files 1 --tokenizer nowhere.json --out x
check "c4: a tokenizer that is not there: before anything is fetched" same "$status:$(wc -l <requests)" 1:0
rm c4/.fetched
faults '/cdn/*train.00001* drop 0'
fetch c4 --files 3 --out c4
check "c4: when fetching again fails, the old shards are whole" \
    same "$status:$(documents c4 train_000000.bin | wc -l)" 1:900
faults

# FineWeb's text, with a pyarrow of our own: its parquet is JSON.
edu=hub/datasets/HuggingFaceFW/fineweb-edu/sample/10BT
mkdir -p $edu none arrow/pyarrow
echo 'raise ImportError' >none/pyarrow.py
touch arrow/pyarrow/__init__.py
cat >arrow/pyarrow/parquet.py <<'END'
import json

class Column(list):
    to_pylist = lambda self: self

class Batch(list):
    column = list.__getitem__

class ParquetFile:
    def __init__(self, path):
        self.rows = json.load(open(path))

    def iter_batches(self, columns, batch_size):
        assert columns == ["text"]
        for i in range(0, len(self.rows), batch_size):
            yield Batch([Column(self.rows[i:i + batch_size])])
END
python3 - $edu/000_00000.parquet <<'END'
import json, sys
json.dump([f"Document {i}: quartz and \u00e9clair\n" * 20 for i in range(1500)], open(sys.argv[1], "w"))
END
fetch PYTHONPATH=none fineweb-edu --out edu
check "parquet: without pyarrow exits 1" same "$status:$(wc -l <requests)" 1:0
check "parquet: and says how to get it" says "bin/pip install pyarrow"
check "parquet: in one line" one_line
fetch PYTHONPATH=arrow fineweb-edu --vocab-size 300 --out edu
check "parquet: is encoded" exits 0
check "parquet: every document" \
    same "$(documents edu train_000000.bin val_000000.bin | sort -un)" "$(seq 0 1499)"
check "parquet: keeps shards and tokenizer only" holds edu "train_000000.bin val_000000.bin"
echo 'not it' >$edu/000_00000.parquet
fetch PYTHONPATH=arrow fineweb-edu --out broken
check "parquet: a file that is none: one line" same "$status:$(wc -l <<<"$output")" 1:1

# --- Wrong usage
fetch c5
check "unknown corpus: exits 2" exits 2
fetch fineweb --files 0
check "--files 0: exits 2" exits 2
check "--files 0: one line" same "$output" "fetch_data: argument --files: expected a whole number from 1, found '0'; see \
scripts/fetch_data.py --help"
fetch fineweb --jobs 1e3
check "--jobs 1e3: exits 2" exits 2
fetch fineweb --tokenizer x.json
check "a tokenizer for what is encoded already: exits 2" exits 2

conclude
