#!/usr/bin/env bash
# The command tokenize where only processes will do: killed and run again, threads, memory, full disks, two at once.
# Needs build/tokenize; `make test` builds it. Ends with "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
tokenize=$PWD/build/tokenize
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=1  # what is freed shall not count as memory

fails() { status_is 1 "$@"; }  # fails PATTERN COMMAND...
encode=("$tokenize" encode --tokenizer t.json --val-fraction 0.1 --shard-tokens 1M)
no_shards() { ! compgen -G "$1/*.bin" >/dev/null; }
same_shards() { for shard in "$1"/*.bin; do cmp "$shard" "$2/${shard##*/}" || return; done; }
whole() { no_shards "$1" || "$tokenize" stats --tokenizer t.json "$1"/*.bin; }  # each shard there is as shards.json says
wait_for_file() { until [ -e "$1" ] || ! kill -0 "$2" 2>/dev/null; do sleep 0.01; done; }

# write_corpus FILE MB: documents of words that repeat as those of a language do
write_corpus() {
    python3 - "$1" "$2" <<'END'
import json, random, sys
random.seed(1)
words = ["".join(random.choices("etaoinshrdlu", k=random.randint(1, 9))) for _ in range(5000)]
lines = []
for i in range(500):
    text = " ".join(words[int(5000 * random.random() ** 3)] for _ in range(random.randint(1, 700)))
    lines.append(json.dumps({"text": f"{i} {text}\n"}) + "\n")
unit = "".join(lines)
with open(sys.argv[1], "w") as out:
    for _ in range(int(sys.argv[2]) * 1000000 // len(unit)):
        out.write(unit)
END
}
write_corpus small.jsonl 10
write_corpus large.jsonl 60
gzip -1 <small.jsonl >small.jsonl.gz

# Threads
check "train" env OMP_NUM_THREADS=1 "$tokenize" train --vocab-size 1000 --out t.json small.jsonl
check "train on 3 threads" env OMP_NUM_THREADS=3 "$tokenize" train --vocab-size 1000 --out t3.json small.jsonl.gz
check "the same tokenizer on any number of threads" cmp t.json t3.json
OMP_NUM_THREADS=1 check "encode" "${encode[@]}" --out one small.jsonl
OMP_NUM_THREADS=3 check "encode on 3 threads" "${encode[@]}" --out three small.jsonl.gz
check "the same shards on any number of threads" same_shards one three
check "several train shards" test -e one/train_000001.bin
check "the shards are whole" whole one

# Memory: two batches in flight, whatever the size of the corpus
memory() {  # in MB, of encoding the file
    python3 - "$tokenize" "$1" <<'END'
import resource, subprocess, sys
subprocess.run([sys.argv[1], "encode", "--tokenizer", "t.json", "--out", "memory", sys.argv[2]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
END
}
grows_little() {
    head -c 20000000 large.jsonl | sed '$d' >medium.jsonl
    local little much
    little=$(memory medium.jsonl) much=$(memory large.jsonl)
    echo "20 MB of text: $little MB, 60 MB of text: $much MB"
    ((much > 0 && much < little + 15))
}
check "memory does not grow with the corpus" grows_little

# Killed at any moment and run again
export OMP_NUM_THREADS=1
"${encode[@]}" --out straight large.jsonl 2>/dev/null
"${encode[@]}" --out killed small.jsonl 2>/dev/null  # shards of an earlier run, which stay until those of the next are complete
kills=0 resumed=0
for attempt in {1..6}; do
    "${encode[@]}" --out killed large.jsonl 2>last.err &
    process=$!
    wait_for_file killed/resume.json $process
    ((attempt == 1)) || sleep "0.$(printf %03d $((RANDOM % 700)))"
    kill -KILL $process 2>/dev/null
    wait $process 2>/dev/null  # and the shell says nothing
    (($? == 137)) && kills=$((kills + 1))  # on a fast machine it may have completed
    grep -q resumes last.err && resumed=$((resumed + 1))
    check "killed: every shard is whole" whole killed
done
"${encode[@]}" --out killed large.jsonl 2>last.err
grep -q resumes last.err && resumed=$((resumed + 1))
check "killed: at least once" test "$kills" -gt 0
check "killed: resumed at least once" test "$resumed" -gt 0
check "killed: the same as without" diff -r straight killed

# Only one at a time
"${encode[@]}" --out locked large.jsonl 2>locked.err &
process=$!
wait_for_file locked/train_000000.bin.tmp $process
check "a second writer is refused" fails 'another tokenize is writing to locked' \
    "${encode[@]}" --out locked small.jsonl
wait $process
check "and the first completes" diff -r straight locked

# A full disk, as a limit on the size of files
full() { (trap '' XFSZ; ulimit -f 1000; exec "${encode[@]}" --out full large.jsonl); }
check "a full disk is said" fails 'cannot write full/.*(too large|No space)' full
check "a full disk: no shard" no_shards full
check "a full disk: run again" "${encode[@]}" --out full large.jsonl
check "a full disk: the shards are whole" whole full
check "decode to a full disk" fails 'standard output' bash -c "'$tokenize' decode --tokenizer t.json one/val_*.bin >/dev/full"
check "stats to a full disk" fails 'standard output' bash -c "'$tokenize' stats --tokenizer t.json one/val_*.bin >/dev/full"

conclude
