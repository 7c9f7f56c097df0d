#!/usr/bin/env bash
# Tests scripts/sweep.py, the paper's runs and the demo, on a trainer, GPUs and a cluster made up here; then a small
# sweep for real, which needs build/tokenize and the trainers named below. Ends with "N passed, N failed".
# shellcheck disable=SC2016  # the made-up tools expand their variables themselves
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
root=$PWD
train=$root/${TRAIN:-build/cpu-fp32-LNS/train_gpt}
train_pre=$root/build/cpu-fp32-PRE/train_gpt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r scripts "$work"
cd "$work" || exit 1

run() { : >calls; output=$("$@" 2>&1); status=$?; }
sweep() { run scripts/sweep.py "$@"; }
calls() { grep -cE -- "$1" calls || true; }  # how many match
compared() { sed -n 's/^compare \(.*\) --out .*/\1/p' <<<"$output"; }

# --- Made-up tools. `calls` is what they were called with; `faults` has lines PATTERN FAULT for the trainer.
tools=$work/tools
mkdir "$tools"
export PATH=$tools:$PATH WORK=$work
: >faults

tool make 'for word; do
    case $word in
        norms) echo PRE LNS POST; exit ;;
        NORM=*) norm=${word#NORM=} ;;
        build/*/train_gpt) norm=${word%/train_gpt} && norm=${norm##*-} ;;
    esac
done
[[ " PRE LNS POST MIX DEEPNORM " == *" $norm "* ]] || { echo "NORM=$norm is unknown" >&2; exit 2; }
echo "make $norm" >>"$WORK/calls"
device=${FAKE_DEVICE:-cpu} && folder=build/$device-${FAKE_PRECISION:-fp32}-$norm
mkdir -p $folder && cp "$WORK/tools/trainer" $folder/train_gpt
[[ " $* " != *" train_gpt "* ]] || ln -sfn $folder/train_gpt train_gpt
echo "$folder/train_gpt"'
tool trainer 'echo "build/${0##*build/} $* | ${OMP_NUM_THREADS:-} | ${CUDA_VISIBLE_DEVICES:-}" >>"$WORK/calls"
if [[ $* == *--dry-run* ]]; then cat "$WORK/dry"; exit; fi
while (($#)); do case $1 in --out) out=$2 ;; --seed) seed=$2 ;; --lr) lr=$2 ;; esac; shift; done
fault=$(while read -r pattern fault; do if [[ $out == $pattern ]]; then echo "$fault"; fi; done <"$WORK/faults")
mkdir -p "$out"
log() { echo "$1" >>"$out/log.jsonl"; }
log "{\"event\":\"start\",\"norm\":\"$(cut -d- -f3 <<<"${0%/train_gpt}")\",\"lr\":${lr:-1},\"seed\":$seed}"
case $fault in
    fails) echo "a warning" >&2; echo "train_gpt: no memory: lower --batch-size" >&2; exit 1 ;;
    ignores) trap "" TERM USR1; echo $$ >"$WORK/ignoring"; while true; do sleep 0.1; done ;;
    hangs) mkdir -p "$out/checkpoints/step_00000005"; echo $$ >"$WORK/hanging"; exec sleep 1000 ;;
    meets) touch "$WORK/met.$seed"  # ends when three others have begun
        for ((i = 0; i < 100; i++)); do met=("$WORK"/met.*); ((${#met[@]} < 4)) || break; sleep 0.1; done
        ((i < 100)) || exit 1 ;;
    saves) trap "saving=1" USR1; touch "$WORK/working.$seed"  # takes longer to save than mpirun waits after SIGTERM
        until [[ ${saving:-} ]]; do sleep 0.1; done
        sleep 2; mkdir -p "$out/checkpoints/step_00000005"; log "{\"event\":\"end\",\"reason\":\"stopped by SIGUSR1\"}"; exit 3 ;;
    stops) log "{\"event\":\"end\",\"reason\":\"SIGUSR1\"}"; exit 3 ;;
    diverges) log "{\"event\":\"end\",\"reason\":\"loss was not finite\"}"; echo "train_gpt: not finite" >&2; exit 1 ;;
esac
log "{\"event\":\"val\",\"step\":1,\"loss\":3}"
log "{\"event\":\"end\",\"reason\":\"done\"}"
mkdir -p "$out/checkpoints/step_00000001"'
tool mpirun 'echo "mpirun $*" >>"$WORK/calls"
while [[ $1 != build/* ]]; do if [[ $1 == -x ]]; then export "$2"; fi; shift; done
set -m  # the rank is in a group of its own
"$@" & rank=$!
trap "kill -USR1 $rank" USR1
trap "kill -TERM $rank; sleep 1; kill -KILL $rank; exit 1" TERM INT
while true; do wait $rank; status=$?; kill -0 $rank 2>/dev/null || exit $status; done'
tool srun 'echo "srun $*" >>"$WORK/calls"; while [[ $1 != build/* ]]; do shift; done; exec "$@"'
tool sbatch 'printf "%s\n" "${@: -1}" >>"$WORK/batch"; echo "sbatch $*" >>"$WORK/calls"; echo 77'
tool scontrol 'echo "scontrol $*" >>"$WORK/calls"'
echo 'import os
os.sched_getaffinity = lambda process: range(8)' >tools/sitecustomize.py  # which Python imports first: a machine of 8 cores
export PYTHONPATH=$tools
tool nvidia-smi '[[ ${FAKE_MEMORY:-} ]] || exit 9
case $* in
    *memory*) echo "$FAKE_MEMORY"; echo 200000 ;;
    *list*) seq ${FAKE_GPUS:-2} | sed "s/^/GPU /" ;;
esac'
mv scripts/compare.py scripts/real_compare.py
printf '#!/usr/bin/env bash\necho "compare $*"\nmkdir -p runs/demo && touch runs/demo/loss.png\n' >scripts/compare.py
chmod +x scripts/compare.py

# --- Combinations
sweep --norms "PRE LNS" --lrs "1e-3 3e-3" --seeds "1 2" --layers "2 4" -- --steps 1 --prompt "two words"
check "a sweep succeeds" exits 0
check "each combination is one run" same "$(calls '^build')" 16
check "each variant is built once" same "$(calls '^make')" 2
its='--steps 1 --prompt two words --seed 2 --layers 4 --lr 3e-3 --out runs/sweep/LNS-4-lr3e-3-seed2'
check "a run has its flags" same "$(calls "^build/cpu-fp32-LNS/train_gpt $its ")" 1
check "it says how far it is" says "sweep: 7 of 16 runs done, "
check "and ends in the comparison of all" same "$(compared | wc -w)" 16
check "the first variant first" same "$(compared | cut -d ' ' -f 1)" runs/sweep/PRE-2-lr1e-3-seed1
check "one after the other, a run has all cores" same "$(calls '\| 8 \|')" 16
sweep --norms "PRE LNS" --lrs "1e-3 3e-3" --seeds "1 2" --layers "2 4" -- --steps 1 --prompt "two words"
check "again: what is finished is kept" same "$status:$(calls '^build')" 0:0
check "again: and compared" same "$(compared | wc -w)" 16
sweep --norms "PRE LNS" --lrs "1e-3 3e-3" --seeds "1 2 3" --layers 2 -- --steps 1 --prompt "two words"
check "another seed: only what is missing" same "$(calls '^build'):$(calls 'seed3')" 4:4
sweep --norms PRE -- --steps 2
check "other flags in the same folder: exits 1" exits 1
check "and says so in one line" one_line
echo 'runs/other/* fails' >faults
sweep --norms PRE --out runs/other -- --batch-size 64
: >faults
sweep --norms PRE --out runs/other -- --batch-size 32
check "other flags where nothing has been trained yet: go on" exits 0
sweep --norms PRE --out runs/plain
check "without lists the preset decides" same "$(calls 'fp32-PRE/train_gpt --seed 1 --out runs/plain/PRE-seed1 ')" 1

# --- Unfinished and failed runs
one=runs/sweep/LNS-2-lr1e-3-seed1
sed -i '$ d' $one/log.jsonl
sed -i '$ d' runs/sweep/LNS-2-lr1e-3-seed2/log.jsonl
rm -r runs/sweep/LNS-2-lr1e-3-seed2/checkpoints
all=(--norms "PRE LNS" --lrs "1e-3 3e-3" --seeds "1 2" --layers "2 4" -- --steps 1 --prompt "two words")
sweep "${all[@]}"
check "unfinished runs are trained" same "$(calls '^build')" 2
check "from the checkpoint, where there is one" same "$(calls "$one --resume")" 1
check "from the start, where there is none" same "$(calls 'resume')" 1

printf 'runs/faulty/PRE-lr1e-3* fails\nruns/faulty/PRE-lr1e-2* diverges\n' >faults
sweep --norms "PRE LNS" --lrs "1e-3 1e-2" --out runs/faulty
check "a run fails: exits 1" exits 1
check "the others go on" same "$(calls '^build')" 4
check "its reason stands at the end" same "$(grep '^sweep: failed: ' <<<"$output" | head -n 1)" \
    "sweep: failed: PRE-lr1e-3-seed1: exit 1: no memory: lower --batch-size"
check "what failed is not compared, what diverged is" same "$(compared)" \
    "runs/faulty/PRE-lr1e-2-seed1 runs/faulty/LNS-lr1e-3-seed1 runs/faulty/LNS-lr1e-2-seed1"
: >faults
sweep --norms "PRE LNS" --lrs "1e-3 1e-2" --out runs/faulty
check "a failed run is tried again" same "$status:$(calls '^build')" 0:2

echo 'runs/stop/LNS* stops' >faults
sweep --norms "LNS PRE" --out runs/stop
check "a run that was told to stop stops the sweep: exits 3" same "$status:$(calls '^build')" 3:1
check "and nothing is compared" same "compared:$(compared)" compared:

# --- Side by side
echo 'runs/side/* meets' >faults
sweep --norms PRE --seeds "1 2 3 4 5 6 7 8" --jobs 4 --out runs/side
check "four at a time" exits 0
check "and share the cores" same "$(calls '\| 2 \|')" 8
echo 'runs/hang/*seed1 hangs' >faults
: >calls
env --default-signal=INT scripts/sweep.py --norms PRE --seeds "1 2" --out runs/hang >hang.log 2>&1 &
sweeping=$!
wait_for test -s hanging
run timeout 20 scripts/sweep.py --norms PRE --seeds "1 2" --out runs/hang
check "two sweeps in a folder: refused" same "$status:$output" "1:sweep: runs/hang: another sweep is at work there"
kill -INT $sweeping
wait $sweeping
status=$? output=$(cat hang.log)
check "Ctrl-C: exits 130" exits 130
check "Ctrl-C: stops the run" test ! -e "/proc/$(cat hanging)"
: >faults
sweep --norms PRE --seeds "1 2" --out runs/hang
check "Ctrl-C: the same command goes on" same "$status:$(calls 'seed1 --resume'):$(calls '^build')" 0:1:2

# told SIGNAL OPTION...: a sweep whose run takes a while to save gets that signal.
told() {
    echo 'runs/saves/* saves' >faults
    rm -rf runs/saves working.*
    env --default-signal=INT scripts/sweep.py --norms PRE --out runs/saves "${@:2}" >saves.log 2>&1 &
    sweeping=$!
    wait_for test -e working.1
    kill "-$1" $sweeping
    wait $sweeping
    status=$? output=$(cat saves.log)
    : >faults
}
for ranks in 1 2; do
    for pair in INT:130 TERM:143; do
        told ${pair%:*} --ranks $ranks
        check "SIG${pair%:*} to a sweep of $ranks ranks: the exit status says so" exits ${pair#*:}
        check "SIG${pair%:*} to a sweep of $ranks ranks: they have saved" test -d runs/saves/PRE-seed1/checkpoints/step_00000005
        check "SIG${pair%:*} to a sweep of $ranks ranks: it says how to go on" says "sweep: stopped; the same command goes on"
    done
done

cp -r scripts impatient
sed -i 's/SIGUSR1, 1800/SIGUSR1, 1/' impatient/scheduler.py
echo 'runs/patience/* ignores' >faults
timeout 60 impatient/sweep.py --norms PRE --out runs/patience >deaf.log 2>&1 &
sweeping=$!
wait_for test -s ignoring
kill $sweeping
wait $sweeping
status=$?
check "a run that does not stop in time is ended: exits 143" exits 143
check "by force, where nothing else helps" test ! -e "/proc/$(cat ignoring)"
rm ignoring

echo 'runs/deaf/* ignores' >faults
scripts/sweep.py --norms PRE --out runs/deaf >deaf.log 2>&1 &
sweeping=$!
wait_for test -s ignoring
kill $sweeping
sleep 0.5
check "a run that does not stop is waited for" test -e "/proc/$(cat ignoring)"
kill $sweeping
wait $sweeping
status=$? output=$(cat deaf.log)
check "until a second signal: exits 143" exits 143
check "which kills the run" test ! -e "/proc/$(cat ignoring)"
: >faults

# --- Ranks, hosts, GPUs
sweep --norms PRE --seeds "1 2" --jobs 2 --ranks 2 --out runs/ranks
check "ranks are started by mpirun" same "$status:$(calls '^mpirun .*-np 2 build/cpu-fp32-PRE/train_gpt')" 0:2
check "and share the cores too" same "$(calls '^build.*\| 2 \|')" 2
printf '# two hosts\none slots=2\ntwo slots=2\n' >hosts
sweep --norms PRE --seeds "1 2 3 4" --ranks 2 --hosts hosts --out runs/hosts
check "hosts: each run on the slots of one" same "$status:$(calls '^mpirun --host (one,one|two,two) ')" 0:4
check "hosts: all are used" differ "$(calls '--host one'):$(calls '--host two')" 4:0
sweep --norms PRE --ranks 4 --hosts hosts --out runs/hosts4
check "hosts: a run over two" same "$status:$(calls '^mpirun --host one,one,two,two .*-np 4')" 0:1
printf 'one slots=3\n' >hosts
sweep --norms PRE --ranks 2 --hosts hosts --out runs/x
check "hosts: ranks that do not fit: exits 2" exits 2
export FAKE_DEVICE=cuda FAKE_PRECISION=bf16
export FAKE_MEMORY=81559 FAKE_GPUS=4
sweep --norms PRE --seeds "1 2" --jobs 2 --ranks 2 --out runs/gpus
check "side by side, each run has GPUs of its own" same "$(calls '\| 0,1'):$(calls '\| 2,3')" 1:1
CUDA_VISIBLE_DEVICES=4,5,6,7 sweep --norms PRE --seeds "1 2" --jobs 2 --ranks 2 --out runs/gpus2
check "out of those that may be used" same "$(calls '\| 4,5'):$(calls '\| 6,7')" 1:1
sweep --norms PRE --seeds "1 2" --jobs 3 --ranks 2 --out runs/gpus3
check "and not more than there are" same "$status:$(calls '^build')" 2:0
sweep --norms PRE --ranks 2 --out runs/gpus3
check "alone, a run sees all" same "$(calls '\| $')" 1

# --- Slurm
: >"batch"
sweep --norms "PRE LNS" --seeds "1 2" --ranks 2 --slurm --out runs/slurm -- --prompt "two words"
check "slurm: a job a run" same "$status:$(calls 'sbatch .*--array=0-3 --ntasks=2 --gpus=2')" 0:1
check "slurm: the comparison waits for them" same "$(calls 'sbatch .*--dependency=afterany:77')" 1
check "slurm: nothing is trained here" same "$(calls '^build')" 0
for task in 0 1 2 3; do run env SLURM_JOB_ID=77 SLURM_ARRAY_TASK_ID=$task bash -c "$(head -n 1 batch)"; done
check "slurm: a job trains its run by srun" \
    same "$status:$(calls '^srun --ntasks=2 .* --prompt two words --seed 2 --out runs/slurm/LNS-seed2')" 0:1
check "slurm: and no other" same "$(calls '^build'):$(calls '^make')" 1:1
run bash -c "$(tail -n 1 batch)"
check "slurm: all are compared" same "$(compared)" \
    "runs/slurm/PRE-seed1 runs/slurm/PRE-seed2 runs/slurm/LNS-seed1 runs/slurm/LNS-seed2"
echo 'runs/slurm2/* stops' >faults
run env SLURM_JOB_ID=79 scripts/sweep.py --norms PRE --out runs/slurm2 --only 0
check "slurm: a job that is told to stop queues itself again" same "$status:$(calls '^scontrol requeue 79')" 3:1
# Ranks that all end with 3 must not be killed for it, or srun's exit status is another; one that died is not waited for.
check "slurm: ranks that end do not end the others at once" same "$(calls '^srun .*--kill-on-bad-exit=0 --wait=60 ')" 1
echo 'runs/llama-130m-LNS-80 stops' >faults
run env SLURM_JOB_ID=80 bash scripts/slurm_train.sbatch
check "slurm_train: told to stop, queues itself again" same "$status:$(calls '^scontrol requeue 80')" 0:1
check "slurm_train: ranks that end do not end the others at once" same "$(calls '^srun .*--kill-on-bad-exit=0 --wait=60 ')" 1
mkdir -p runs/llama-130m-LNS-80/checkpoints/step_00000500
echo 'runs/llama-130m-LNS-80 fails' >faults
run env SLURM_JOB_ID=80 bash scripts/slurm_train.sbatch
check "slurm_train: resumes; a failure ends it" same "$status:$(calls '^scontrol'):$(calls '^build.* --resume ')" 1:0:1
run scripts/cuda_check.sh
check "no script has changed what ./train_gpt is" same "$(calls '^make POST'):$(ls -d train_gpt 2>/dev/null || echo none)" 1:none
unset FAKE_DEVICE FAKE_PRECISION FAKE_MEMORY FAKE_GPUS

# --- Wrong usage
sweep --norm PRE
check "unknown flag: exits 2" exits 2
check "unknown flag: one line" one_line
sweep --norms PRE --jobs 0
check "no jobs: exits 2" exits 2
for list in "--seeds 1.5" "--seeds ''" "--lrs 1e-3,2e-3" "--lrs '1e-3 0.001'" "--layers -"; do
    eval "sweep --norms PRE $list"
    check "$list: one line, exits 2" same "$status:$(wc -l <<<"$output"):$(calls .)" 2:1:0
done
run scripts/sweep.py --norms PRE --out runs/x --only 7
check "--only that is no run: one line, exits 2" same "$status:$(wc -l <<<"$output")" 2:1
weird=runs/$'a b[1]\'"\xff'
sweep --norms PRE --out "$weird" -- --prompt $'\e[31m\xff "'
check "a folder and flags with blanks, brackets, quotes and bytes that are no UTF-8" exits 0
sweep --norms "PRE LNS" --out "$weird" -- --prompt $'\e[31m\xff "'
check "and again" same "$status:$(calls '^build')" 0:1
sweep --norms PRE --out "$weird" -- --prompt other
check "other flags there: one line, harmless to a terminal" same "$status:$output" "1:sweep: runs/a b[1]'\"\\xff holds \
runs with other flags (--prompt '\\x1b[31m\\xff \"'): choose another --out"
sweep --norms "PRE LSN" --out runs/x
check "unknown variant: exits 2" same "$status:$(calls '^build')" 2:0
sweep --norms "PRE LNS" --print --out runs/printed -- --steps 3
check "--print prints the commands" \
    same "$(grep -c 'train_gpt --steps 3 --seed 1 --out runs/printed/' <<<"$output")" 2
check "--print trains nothing" same "$(calls '^build')" 0

# --- The paper's runs
tr -d '\n' >dry <<'END'
{"model":"llama-130m","norm":"LNS","precision":"bf16","device":"cuda","ranks":1,"params":134105856,"layers":12,
"batch_size":64,"seq_len":256,"total_batch_size":131072,"steps":20000,"tokens":2621440000,
"operations_per_token":6.7122e8,"operations":1.7596e18,
"memory":{"parameters (fp32 masters)":536423424,"parameters (working copy)":268211712,"gradients":536423424,
"AdamW moments":1072846848,"activations":5522325504},"memory_bytes":8495353037,"state_bytes":2413952000}
END
export FAKE_DEVICE=cuda FAKE_PRECISION=bf16 FAKE_MEMORY=81559
table1() { run scripts/table1_130m.sh "$@"; }
table1 --print
check "table 1: --print succeeds" exits 0
# 1.7596e18 / (2 GPUs x 989e12 x 0.4) = 2224 s
check "table 1: parameters, steps, tokens" says \
    "LNS      134105856 parameters, 20000 steps, 2621440000 tokens with padding,"
check "table 1: operations, hours, memory" says " 1.7596e+18 operations: 0.6 h, 8101.8 MiB a GPU"
check "table 1: the five variants together, and what that supposes" says \
    "together 3.1 h on 2 GPUs of 989 TFLOP/s (PEAK_TFLOPS) at an MFU of 0.4 (MFU, assumed)"
check "table 1: --print trains nothing" same "$(calls '^build'):$(calls '^build.*dry-run')" 5:5
run env GPUS=1 PEAK_TFLOPS=312 MFU=0.5 NORMS=LNS scripts/table1_130m.sh --print
check "table 1: another GPU" says "together 3.1 h on 1 GPUs of 312 TFLOP/s"  # 1.7596e18 / 156e12 = 11280 s
mkdir -p dev/bench
echo '{"models": {"llama-130m": {"H100": {"peak_tflops": 989.0, "mfu": 0.2}}}}' >dev/bench/kernel_report.json
table1 --print
check "table 1: the kernel report's estimate, where there is one" says \
    "together 6.2 h on 2 GPUs of 989 TFLOP/s (PEAK_TFLOPS) at an MFU of 0.2 (MFU, estimated by make kernel-report, not measured)"
rm -r dev
table1
check "table 1: without data exits 1" exits 1
check "table 1: and says how to get it" says "no shards in data/c4: scripts/fetch_data.py c4 --files 29 --out data/c4"
mkdir -p data/c4
touch data/c4/train_000000.bin
table1
check "table 1: trains" exits 0
check "table 1: all five" same "$(calls '^build.*--out runs/table1_130m/')" 5
for flags in '--model llama-130m --lr 1e-3 --steps 20000 --warmup 2000' '--total-batch-size 131072 --seq-len 256' \
    '--pack documents' '--beta1 0.9 --beta2 0.999 --eps 1e-8 --weight-decay 0 --grad-clip 0' \
    '--schedule cosine --min-lr-ratio 0.1'; do
    check "table 1: with $flags" same "$(calls "^build.* $flags .*--out")" 5
done
check "table 1: on all GPUs" same "$(calls '^mpirun .*-np 2 build.*--out')" 5
check "table 1: ends in the comparison" same "$(compared | wc -w)" 5
run env DATA="data/a [1]" NORMS=PRE scripts/table1_130m.sh --print
check "table 1: a folder of data is no pattern" same "$(calls '--train data/a \[\[\]1\]/train_\*\.bin ')" 1
run env FAKE_MEMORY=8192 NORMS=PRE scripts/table1_130m.sh
check "too little memory: exits 1 before it trains" same "$status:$(calls '^build.*--out')" 1:0
check "too little memory: says what to do" says \
    "needs 8101.8 MiB a GPU and 1024 for CUDA, the smallest GPU has 8192: lower BATCH (now 64)"
run env FAKE_MEMORY=2048 NORMS=PRE scripts/pretrain_7b.sh
check "too little for any batch: says so" says "2302.1 MiB of it whatever BATCH is, so it takes larger GPUs"
run env FAKE_MEMORY= scripts/table1_130m.sh
check "no GPU: exits 1" exits 1
check "no GPU: says where to start it" says \
    "no GPU answers: start it on a machine that has one, or: sbatch scripts/table1_130m.sh"
run env GPUS=3 scripts/table1_130m.sh --print
check "a step that does not divide: one line" same "$output" \
    "table1_130m: BATCH=64 on 3 GPUs: their product must divide a step's 512 sequences"
run env NORMS="LNS LSN" scripts/table1_130m.sh --print
check "a variant that make does not know: make says so" same "$status:${output##*$'\n'}" "2:NORM=LSN is unknown"
table1 --wrong
check "wrong usage: exits 2" exits 2
run env MFU=high scripts/table1_130m.sh --print
check "a setting that is no number: one line" same "$status:$output" "2:table1_130m: MFU=high: expected a number above 0"
cp dry good
for said in 'model    llama-130m' '{"params":1,"steps":2,"tokens":3,"operations":"many"}' '[1]' ''; do
    echo "$said" >dry
    run env NORMS=PRE scripts/table1_130m.sh --print
    check "a trainer that says '$said': exits 1" exits 1
    check "a trainer that says '$said': one line" one_line
    check "a trainer that says '$said': which names what was expected, and shows it" says "expected a line of JSON \
with the numbers params, steps, tokens, operations, memory_bytes, state_bytes, found '$said"
done
mv good dry
mkdir spool
cp scripts/table1_130m.sh spool/slurm_script
echo 'runs/table1_slurm/LNS* stops' >faults
run env SLURM_JOB_ID=5 SLURM_SUBMIT_DIR="$work" SLURM_NTASKS=8 NORMS=LNS OUT=runs/table1_slurm bash spool/slurm_script
check "slurm: a copy of the script finds the rest, and srun starts its ranks" same "$(calls '^srun --ntasks=8')" 1
check "slurm: told to stop, it queues itself again" same "$status:$(calls '^scontrol requeue 5')" 3:1
for script in scripts/table1_*.sh scripts/pretrain_7b.sh; do
    run env NORMS=PRE "$script" --print
    check "$script: --print" same "$status:$(calls '^build.*--dry-run')" 0:1
done
unset FAKE_DEVICE FAKE_PRECISION FAKE_MEMORY

# --- The demo
run env LR=1e-3 STEPS=7 scripts/demo.py
check "demo: succeeds" exits 0
trained() { sed -nE "s#^build/[^ ]*-(.*)/train_gpt .*$1.*#\1#p" calls | xargs; }  # the variants, with these flags
check "demo: trains both with the settings given, in order" same "$(trained ' --steps 7 --lr 1e-3 ')" "PRE LNS"
check "demo: says what it does" says "== training LNS (2 of 2): 24 blocks, 96 wide, 7 steps of 2048 tokens, lr 1e-3"
check "demo: ends in the comparison" same "$(compared)" "runs/demo-PRE runs/demo-LNS"
check "demo: and its picture" test -e runs/demo.png
run scripts/demo.py
check "demo: again, from the start" same "$status:$(calls '^build'):$(calls 'resume')" 0:2:0
echo 'runs/demo-LNS fails' >faults
run scripts/demo.py
check "demo: a run that fails ends it: its exit status" exits 1
check "demo: says why" same "${output##*$'\n'}" "train_gpt: no memory: lower --batch-size"
check "demo: compares nothing" same "compared:$(compared)" compared:
: >faults

# --- A sweep for real
rm tools/sitecustomize.py tools/mpirun
mv scripts/real_compare.py scripts/compare.py
cp "$train" real-LNS && cp "$train_pre" real-PRE
tool make 'for word; do if [[ $word == NORM=* ]]; then norm=${word#NORM=}; fi; done
mkdir -p build/cpu-fp32-$norm && cp "$WORK/real-$norm" build/cpu-fp32-$norm/train_gpt
echo "build/cpu-fp32-$norm/train_gpt"'
awk 'BEGIN { for (i = 0; i < 3000; i++) printf "the %s %s. ", rand() < 0.5 ? "cat" : "dog", i % 3 ? "sees" : "is" }' \
    >text.txt
"$root/build/tokenize" train --vocab-size 270 --out data/tokenizer.json text.txt 2>tokenize.log
"$root/build/tokenize" encode --tokenizer data/tokenizer.json --out data --val-fraction 0.1 text.txt 2>tokenize.log
sweep --norms "PRE LNS" --lrs "1e-3 3e-3" --seeds "1 2" --jobs 2 --out runs/real -- --layers 2 --hidden 32 --ffn 48 \
    --heads 2 --seq-len 32 --batch-size 2 --total-batch-size 256 --steps 4 --eval-tokens 500
if says "no Python here has matplotlib" >/dev/null; then
    check "for real: all runs end, whose picture needs matplotlib" says "8 of 8 runs done"
else
    check "for real: succeeds" exits 0
    check "for real: the comparison has a row for each variant and rate" \
        same "$(grep -E '^(PRE|LNS), lr [0-9.]+ +[0-9.]+ +1,2 ' <<<"$output" | sort -u | wc -l)" 4
fi

conclude
