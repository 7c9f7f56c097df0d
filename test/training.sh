# shellcheck shell=bash
# Sourced by the tests of the trainer: a folder to work in, with tokenizer and shards, and what reads a run's log.
root=$PWD
train=$root/${TRAIN:-build/cpu-fp32-LNS/train_gpt}
train_pre=$root/build/cpu-fp32-PRE/train_gpt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

ranks() { local n=$1; shift; mpirun --allow-run-as-root --oversubscribe -np "$n" "$@"; }
losses() { grep '"event":"train"' "$1/log.jsonl" | sed -E 's/.*"step":([0-9]+).*"loss":([^,]+).*"grad_norm":([^,]+).*/\1 \2 \3/'; }
val_losses() { grep '"event":"val"' "$1/log.jsonl" | sed -E 's/.*"loss":([^,]+).*/\1/'; }

# A corpus with something to learn.
awk 'BEGIN { srand(7); split("the a one some every", d); split("cat dog bird model layer", n); split("sees learns likes forgets", v)
    for (i = 0; i < 6000; i++) printf "%s %s %s %s %s.%s", d[1+int(rand()*5)], n[1+int(rand()*5)], v[1+int(rand()*4)],
        d[1+int(rand()*5)], n[1+int(rand()*5)], i % 50 == 49 ? "\n\n" : " " }' >text.txt
check "tokenizer trains" runs "$root/build/tokenize" train --vocab-size 300 --out data/tokenizer.json text.txt
check "text is encoded" runs "$root/build/tokenize" encode --tokenizer data/tokenizer.json --out data --val-fraction 0.1 \
    --shard-tokens 20K text.txt

small=(--layers 3 --hidden 32 --ffn 44 --heads 4 --seq-len 32 --batch-size 2 --total-batch-size 256 --steps 8 --lr 3e-3
    --warmup 2 --eval-every 4 --eval-tokens 1000)
