#!/usr/bin/env bash
# --resume and checkpoints when something is wrong: another run's settings or data, damaged files, ranks that differ.
# Needs the trainers named below; `make test` builds them. Ends with "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
root=$PWD
train=$root/${TRAIN:-build/cpu-fp32-LNS/train_gpt}
train_pre=$root/build/cpu-fp32-PRE/train_gpt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

# Shards of 300 tokens' vocabulary: data; the same elsewhere; other text of the same length; and twice with checksums, the
# second with one token changed far from either end.
python3 - <<'END'
import array, json, os, random, zlib
def shard(path, tokens):
    header = array.array("i", [20240520, 1, len(tokens)] + [0] * 253)
    with open(path, "wb") as file: file.write(header.tobytes() + tokens.tobytes())
def text(seed, length):
    draw, tokens = random.Random(seed), array.array("H", [0])
    while len(tokens) < length: tokens.append((tokens[-1] * 5 + draw.choice((1, 1, 1, 7))) % 300)
    return tokens
def corpus(folder, seed, changed=False, checksums=False, val=9):
    os.makedirs(folder)
    list = []
    for i in range(2):
        tokens = text(seed + i, 100000)
        if changed: tokens[50000] ^= 1
        shard(f"{folder}/train_{i}.bin", tokens)
        list.append({"name": f"train_{i}.bin", "crc32": zlib.crc32(tokens.tobytes())})
    shard(f"{folder}/val_0.bin", text(val, 2000))
    if checksums: json.dump({"shards": list}, open(f"{folder}/shards.json", "w"))
corpus("data", 1)
corpus("moved", 1)
corpus("other", 3)
corpus("other_val", 1, val=8)
corpus("checksums", 1, checksums=True)
corpus("checksums_other", 1, changed=True, checksums=True)
END

small=(--layers 2 --hidden 32 --ffn 48 --heads 2 --vocab 300 --seq-len 32 --batch-size 2 --total-batch-size 256 --lr 3e-3
    --warmup 2 --schedule constant --eval-every 0 --eval-tokens 200)
folder=("${small[@]:10}" --train 'data/train_*.bin' --val 'data/val_*.bin')  # with a --model of its own dimensions
trains() { "$train" "${small[@]}" --train 'data/train_*.bin' --val 'data/val_*.bin' "$@"; }  # trains FLAG...: the last of a flag counts
resumes() { trains --out "$1" --resume "${@:2}"; }                                          # resumes RUN FLAG...
losses() { grep '"event":"train"' "$1/log.jsonl" | sed -E 's/.*"step":([0-9]+).*"loss":([^,]+).*"grad_norm":([^,]+).*/\1 \2 \3/'; }
names() { find "$1" -mindepth 1 -maxdepth 1 -printf '%f\n' | sort | xargs; }
fresh() { rm -rf r && cp -r "${1:-a}" r; }
untouched() { diff -r "${2:-a}" "$1"; }  # untouched RUN [AS]
flip() {  # flip FILE [SEED]: one bit of it
    python3 - "$1" "${2:-1}" <<'END'
import random, sys
data = bytearray(open(sys.argv[1], "rb").read())
draw = random.Random(int(sys.argv[2]))
data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
open(sys.argv[1], "wb").write(data)
END
}
edit() {  # edit FILE STATEMENT: of a JSON file, as j
    python3 -c 'import json, sys; j = json.load(open(sys.argv[1])); exec(sys.argv[2]); json.dump(j, open(sys.argv[1], "w"))' "$1" "$2"
}

check "a run" runs trains --steps 8 --save-every 4 --out a
check "uninterrupted" runs trains --steps 10 --out whole

# --- Another run
refuses() {  # refuses PATTERN FLAG...: in one line, with nothing touched
    fresh
    status_is 1 "$1" resumes r --steps 10 "${@:2}" && untouched r
}
check "other heads" refuses 'heads: was 2, now 4' --heads 4
check "other key/value heads" refuses 'kv-heads: was 2, now 1' --kv-heads 1
check "other shapes" refuses 'layers: was 2, now 3; give what it was made with, or another --out$' --layers 3
check "which cannot be forced" refuses 'model.layers.2.* is missing or has another shape' --layers 3 --resume-force layers
check "--doc-mask" refuses 'doc-mask: was false, now true' --doc-mask --eot-token 0
check "--pack" refuses 'pack: was stream, now documents' --pack documents --eot-token 0
check "--seq-len" refuses 'seq-len: was 32, now 16' --seq-len 16
check "--total-batch-size" refuses 'total-batch-size: was 256, now 512' --total-batch-size 512
check "--seed" refuses 'seed: was 1, now 2' --seed 2
check "other text of the same length" refuses 'train: was ends [0-9a-f]{8}, now ends [0-9a-f]{8};' --train 'other/train_*.bin'
check "a shard less" refuses 'train: was shards 2, now shards 1;' --train 'data/train_0.bin'
check "other validation text" refuses ': val: was ends [0-9a-f]{8}, now ends' --val 'other_val/val_*.bin'
check "all differences at once" refuses 'heads: was 2, now 4; seed: was 1, now 2; .*--resume-force heads,seed$' --heads 4 --seed 2 --lr 1
cp -r a/checkpoints/step_00000008 rotary && rm -r rotary/state && edit rotary/config.json 'j["rope_theta"] = 5e5'
fresh
check "what only config.json says" status_is 1 'model: was rope_theta 10000.0, now rope_theta 500000.0;' "$train" --model rotary \
    "${folder[@]}" --steps 10 --out r --resume
check "another NORM" status_is 1 'norm: was LNS, now PRE;' "$train_pre" "${small[@]}" "${folder[@]}" --steps 10 --out r --resume
check "both touch nothing" untouched r
check "a run on data with checksums" runs trains --train 'checksums/train_*.bin' --val 'checksums/val_*.bin' --steps 4 --out sums
fresh sums
check "one token that the ends do not show" status_is 1 'train: was checksum [0-9a-f]{8}, now checksum' resumes r --train 'checksums_other/train_*.bin' --val 'checksums_other/val_*.bin' --steps 6
check "the same data elsewhere, without its checksums" runs resumes r --train 'moved/train_*.bin' --val 'moved/val_*.bin' --steps 6
fresh
check "--resume-force takes what is meant" runs resumes r --steps 10 --heads 4 --resume-force seed,heads
check "and says it" contains last.out '^resume   heads: was 2, now 4$'
check "--resume-force heads is not for the seed" refuses ': seed: was 1, now 2;' --heads 4 --seed 2 --resume-force heads
check "--resume-force of what is no setting" status_is 2 '"head" is no setting' resumes a --resume-force heads,head
fresh
check "learning rate, steps and batch size may change" runs resumes r --steps 10 --lr 1e-3 --batch-size 4 --beta2 0.9 --save-every 4 --cooldown 1
check "and are named" same "$(grep -oE '^resume   [a-z0-9-]+: .*' last.out | xargs)" \
    'resume batch-size: was 2, now 4 resume steps: was 8, now 10 resume lr: was 0.003, now 0.001 resume beta2: was 0.95, now 0.9'
fresh
check "another total batch" runs resumes r --steps 10 --total-batch-size 512 --resume-force total-batch-size
check "has the tokens that were trained on" same "$(grep '"event":"train"' r/log.jsonl | grep -oE '"tokens":[0-9]+' | tail -n 3 | xargs)" 'tokens:2048 tokens:2560 tokens:3072'
check "in the checkpoint too" contains r/checkpoints/step_00000010/state/trainer.json '"tokens": 3072'

# --- Checkpoints of programs that recorded less
old() { fresh; rm r/checkpoints/*/state/checksums.json; edit r/checkpoints/step_00000008/state/trainer.json 'del j["run"]'; }
old
check "one without a record" runs resumes r --steps 10
check "says what is not compared" contains last.out '^resume   not recorded.*: val, pack, doc-mask, seq-len\|^resume   not recorded.*pack'
check "and goes on as uninterrupted" same "$(losses r | tail -n 2)" "$(losses whole | tail -n 2)"
old
check "its config.json is compared" status_is 1 'heads: was 2, now 4' resumes r --steps 10 --heads 4
check "and its number of rows" status_is 1 'train: was rows 6248, now rows 3124' resumes r --steps 10 --train data/train_0.bin
check "and its seed" status_is 1 'seed: was 1, now 2' resumes r --steps 10 --seed 2

# --- Damage
passes_over() {  # passes_over: step 8 of r, by name, for step 4; afterwards it is set aside as it was
    cp -r r/checkpoints/step_00000008 damaged
    runs resumes r --steps 5 && contains last.out 'resume .*step_00000004' && contains last.err 'damaged checkpoint is set aside.*step_00000008' &&
        diff -r damaged r/checkpoints/step_00000008.damaged && test ! -e r/checkpoints/step_00000008 && test -e r/checkpoints/step_00000005
}
for file in model.safetensors config.json state/optimizer.safetensors state/trainer.json state/checksums.json; do
    fresh && rm -rf damaged && flip "r/checkpoints/step_00000008/$file"
    check "one bit of $file" passes_over
done
fresh && rm -rf damaged && sed -i s/model.safe/modem.safe/ r/checkpoints/step_00000008/state/checksums.json
check "one letter of a file's name" passes_over
check "names both files" contains last.err 'modem.safetensors: missing, and named in state/checksums.json'
old && edit r/checkpoints/step_00000008/config.json 'j["head_dim"] = "x"; j["model_type"] = 3'
check "text where config.json has a number" status_is 1 'model: was head_dim x, now head_dim' resumes r --steps 10
for step in -5 '"8"' 8.5 1e30 9 None; do
    fresh && rm -rf damaged r/checkpoints/*/state/checksums.json && edit r/checkpoints/step_00000008/state/trainer.json "j['step'] = $step"
    check "step $step in trainer.json" passes_over
done
for field in tokens window updates skipped; do
    fresh && rm -rf damaged r/checkpoints/*/state/checksums.json && edit r/checkpoints/step_00000008/state/trainer.json "j['$field'] = -1"
    check "$field -1 in trainer.json" passes_over
done
fresh && rm -rf damaged && mkdir r/checkpoints/step_00000008.damaged && flip r/checkpoints/step_00000008/model.safetensors
check "the name is taken" runs resumes r --steps 5
check "so there is another" test -d r/checkpoints/step_00000008.damaged-2
fresh && flip r/checkpoints/step_00000008/model.safetensors && flip r/checkpoints/step_00000004/model.safetensors && cp -r r before
check "none is whole" status_is 1 'none of the 2 checkpoints in r/checkpoints is whole.*step_00000008/model.safetensors' resumes r --steps 10 --keep 1
check "nothing is lost" untouched r before
check "no checkpoint at all: a new run" runs resumes new --steps 2
check "that says so" contains last.out 'no checkpoint in new: starting at step 1'
cp -r a/checkpoints/step_00000008 model && flip model/model.safetensors
check "a damaged model to start from" status_is 1 'model/model.safetensors: damaged: its checksum' "$train" --model model "${folder[@]}" --steps 0 --out from
check "no run begins" test ! -e from/log.jsonl
rm -r model/state
check "a folder without checksums" runs "$train" --model model "${folder[@]}" --steps 0 --out from

# --- --keep
check "many checkpoints" runs trains --steps 8 --save-every 2 --out many
fresh many && flip r/checkpoints/step_00000008/state/optimizer.safetensors && flip r/checkpoints/step_00000004/model.safetensors
check "--keep 2 counts whole ones" runs resumes r --steps 7 --keep 2
check "and removes no damaged one, nor what was resumed from" same "$(names r/checkpoints)" \
    'step_00000004.damaged step_00000006 step_00000007 step_00000008.damaged'
fresh many
check "--keep 1" runs resumes r --steps 12 --save-every 2 --keep 1
check "leaves what was resumed from" same "$(names r/checkpoints)" 'step_00000008 step_00000012'
check "a rate beyond all bounds makes a NaN, of which no checkpoint is saved" status_is 1 'is not finite: no checkpoint is saved' trains --steps 1 --lr 3e38 --weight-decay 100 --warmup 0 --out nan
check "not even a part" same "$(names nan/checkpoints) none" " none"

# --- Killed while it saves: the checkpoint of every step is there as a whole or not at all
check "uninterrupted" runs trains --steps 200 --out all
rm -rf r
for ((i = 0; i < 20; i++)); do
    "$train" "${small[@]}" "${folder[@]}" --steps 200 --save-every 1 --keep 2 --out r --resume >killed.out 2>&1 &
    wait_for grep -q '^saved' killed.out
    sleep "$(printf '0.0%02d' $((RANDOM % 40)))"
    kill -9 $!
    wait $! 2>/dev/null
done
check "killed 20 times, and resumed" runs resumes r --steps 200 --keep 2
check "after some of the steps" contains last.out '^resume   r/checkpoints/step_00000[01]'
check "nothing was damaged" same "$(names r/checkpoints | grep -c damaged)" 0
for file in model.safetensors state/optimizer.safetensors; do
    check "the same $file as uninterrupted" cmp {r,all}/checkpoints/step_00000200/$file
done

# --- Ranks
two() (  # two "FLAGS OF RANK 0" "FLAGS OF RANK 1" [PROGRAM OF RANK 1]
    set -f
    # shellcheck disable=SC2086
    timeout 60 mpirun --allow-run-as-root --oversubscribe -np 1 "$train" "${small[@]}" --val data/val_0.bin --steps 10 $1 : \
        -np 1 "${3:-$train}" "${small[@]}" --val data/val_0.bin --steps 10 $2 >last.out 2>last.err
)
differ_in() {  # differ_in PATTERN FLAGS0 FLAGS1 [PROGRAM1]
    two "${@:2}"
    same $? 1 && contains last.err "^train_gpt: rank 0: rank 1 is not as rank 0: .*$1" && same "$(grep -c ^train_gpt: last.err)" 1
}
train0='--train data/train_*.bin' train1='--train other/train_*.bin'
fresh && cp -r r r1 && rm -r r1/checkpoints/step_00000008
mkdir node0 node1 && ln -s "$PWD/data" node0/ && ln -s "$PWD/data" node1/ && mv r1 node1/r && cp -r r node0/r
nodes() {  # nodes: two ranks, each with a run folder of its own behind the same name
    # shellcheck disable=SC2016
    timeout 60 mpirun --allow-run-as-root --oversubscribe -np 2 bash -c 'cd node$OMPI_COMM_WORLD_RANK && exec "$@"' - \
        "$train" "${small[@]}" --train 'data/train_*.bin' --val 'data/val_*.bin' --steps 10 --out r --resume >last.out 2>last.err
}
lacks() {  # lacks PATTERN: nodes end with that
    nodes
    same $? 1 && contains last.err "^train_gpt: rank 0: $1" && same "$(grep -c ^train_gpt: last.err)" 1
}
check "other settings" differ_in 'lr: 0.003 on rank 0, 1.0 on rank 1' "$train0 --out x" "$train0 --out x --lr 1"
check "other data" differ_in 'train: ends [0-9a-f]* on rank 0' "$train0 --out x" "$train1 --out x"
check "another run folder" differ_in 'out: r on rank 0, node1/r on rank 1; checkpoint: r/checkpoints/step_00000008 .* on rank 0, none on rank 1' \
    "$train0 --out r --resume" "$train0 --out node1/r --resume"
check "another program" differ_in 'norm: LNS on rank 0, PRE on rank 1' "$train0 --out x" "$train0 --out x" "$train_pre"
check "one resumes, one does not" differ_in 'resume: true on rank 0, false on rank 1' "$train0 --out r --resume" "$train0 --out r"
check "a checkpoint that only rank 0 has" lacks 'rank 1 is not as rank 0: checkpoint: .*step_00000008 .*, none on rank 1'
check "with nothing touched" untouched node0/r
cp -r r/checkpoints/step_00000008 node1/r/checkpoints/ && flip node1/r/checkpoints/step_00000008/state/optimizer.safetensors 4
check "a copy that is damaged" lacks '.*rank 1 is not as rank 0: checksum of what was loaded'
check "with nothing touched there either" untouched node0/r
rm -r node1/r && cp -r a node1/r
check "the same on each" nodes
check "goes on as one rank" contains last.out '^step 10/10'

conclude
