#!/usr/bin/env bash
# Trains every combination of variants, learning rates, seeds and depths, and compares them (scripts/compare.py).
#
#   scripts/sweep.sh --norms "PRE LNS" --lrs "1e-3 3e-3" --seeds "1 2 3" -- --model llama-9m --steps 2000
#
#   --norms "PRE LNS"   variants, each built once; the first is the baseline
#   --lrs "1e-3 3e-3"   learning rates [the preset's]
#   --seeds "1 2 3"     [1]
#   --layers "12 24"    depths [the preset's]
#   --out DIR           the sweep's folder [runs/sweep]
#   --jobs N            runs side by side [1]
#   --ranks N           ranks a run [1]
#   --hosts FILE        spread them over these hosts
#   --slurm             submit them as a job array, one job a run, and the comparison after it
#   --print             only print the commands
#   -- FLAGS            for every run: see ./train_gpt --help
#   DEVICE, PRECISION   in the environment: as for make
#
# Called again it goes on: finished runs are kept, others resume from their newest checkpoint (FLAGS with --save-every).
# Side by side, CPU runs share the cores and GPU runs take --ranks GPUs each. FILE has lines "HOST [slots=N]", as for
# mpirun; the folder must be the same on all hosts. Inside a Slurm job the ranks are started by srun.
# Exits 1 when a run failed, 2 on wrong usage, 3 when the runs were told to stop (the trainer's own 3).
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "sweep: $*"; }
fail() { echo "sweep: $*" >&2; exit 1; }
wrong() { echo "sweep: $*; see the head of scripts/sweep.sh" >&2; exit 2; }

norms="PRE LNS" lrs=- seeds=1 layers=- out=runs/sweep jobs='' ranks=1 hosts='' mode=run only=''
while (($# > 0)) && [[ $1 != -- ]]; do
    case $1 in
        --slurm | --print) mode=${1#--}; shift; continue ;;
        --norms | --lrs | --seeds | --layers | --out | --jobs | --ranks | --hosts | --only) ;;
        *) wrong "unknown argument $1" ;;
    esac
    [[ ${2:-} ]] || wrong "$1 needs a value"
    printf -v "${1#--}" %s "$2"
    shift 2
done
(($# == 0)) || shift
flags=("$@")
[[ ${jobs:-1} =~ ^[1-9][0-9]*$ && $ranks =~ ^[1-9][0-9]*$ ]] || wrong "--jobs and --ranks are numbers from 1"
[[ ! $hosts || -r $hosts ]] || wrong "--hosts $hosts: no such file"

# --- The runs: parallel arrays, one entry a run; "-" stands for the preset's value

names=() run_norms=() run_flags=()
for norm in $norms; do for depth in $layers; do for lr in $lrs; do for seed in $seeds; do
    name=$norm these="--seed $seed"
    if [[ $depth != - ]]; then name+=-$depth these+=" --layers $depth"; fi
    if [[ $lr != - ]]; then name+=-lr$lr these+=" --lr $lr"; fi
    names+=("$name-seed$seed") run_norms+=("$norm") run_flags+=("$these")
done; done; done; done

folder() { echo "$out/${names[$1]}"; }
last_event() { tail -n 1 "$(folder "$1")/log.jsonl" 2>/dev/null || true; }
is_done() { [[ $(last_event "$1") == '{"event":"end","reason":"done"}' ]]; }
diverged() { [[ $(last_event "$1") == '{"event":"end"'*'not finite'* ]]; }

# --- The slots, one a rank: hosts (none: this machine) and their GPUs

slot_hosts=() slot_numbers=()  # the number counts the slots of one host
if [[ $hosts ]]; then
    while read -r host slots; do
        [[ $host && $host != '#'* ]] || continue
        count=${slots:-slots=1}
        count=${count#slots=}
        [[ $count =~ ^[1-9][0-9]*$ ]] || wrong "$hosts: expected lines HOST [slots=N], found: $host $slots"
        ((count % ranks == 0 || ranks % count == 0)) ||
            wrong "$hosts: $host has $count slots: neither a multiple nor a part of --ranks $ranks"
        for ((n = 0; n < count; n++)); do slot_hosts+=("$host") slot_numbers+=("$n"); done
    done <"$hosts"
    ((${#slot_hosts[@]} >= ranks)) || wrong "$hosts has ${#slot_hosts[@]} slots, --ranks is $ranks"
    jobs=${jobs:-$((${#slot_hosts[@]} / ranks))}
    ((jobs * ranks <= ${#slot_hosts[@]})) || wrong "--jobs $jobs x --ranks $ranks: $hosts has ${#slot_hosts[@]} slots"
else
    jobs=${jobs:-1}
    [[ ! ${SLURM_JOB_ID:-} ]] || ((jobs == 1)) || wrong "inside a Slurm job the runs go one after the other: no --jobs"
    for ((n = 0; n < jobs * ranks; n++)); do slot_hosts+=('') slot_numbers+=("$n"); done
fi

# --- Commands

declare -A trainers=()
device='' precision=''
build() {  # NORM...
    local norm path
    for norm; do
        say "building $norm"
        path=$(env -u MAKEFLAGS make --no-print-directory --silent -j"$(nproc)" train_gpt NORM="$norm") || exit
        path=$(sed -n 's/^\.\/train_gpt is \([^ ]*\).*/\1/p' <<<"$path")
        trainers[$norm]=$path
        IFS=- read -r device precision _ <<<"${path#build/}"
    done
}

# What starts the ranks of a run on the slots that begin with $1, in `launcher`, and its environment, in `environment`.
place() {
    local slot on_host=0 host_list='' devices
    environment=() launcher=()
    for ((slot = 0; slot < jobs * ranks; slot++)); do
        if [[ ${slot_hosts[slot]} == "${slot_hosts[$1]}" ]]; then ((++on_host)); fi
    done
    if [[ $device == cuda ]]; then
        if ((on_host > ranks)); then
            IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((on_host - 1)))}"
            environment=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${devices[*]:${slot_numbers[$1]}:ranks}")")
        fi
    elif [[ ! ${OMP_NUM_THREADS:-} ]]; then
        environment=("OMP_NUM_THREADS=$((on_host < $(nproc) ? $(nproc) / on_host : 1))")
    fi
    if [[ ${SLURM_JOB_ID:-} ]]; then
        launcher=(srun --ntasks="$ranks" --mpi=pmix --kill-on-bad-exit=0)
    elif [[ $hosts ]]; then
        for ((slot = $1; slot < $1 + ranks; slot++)); do host_list+=,${slot_hosts[slot]}; done
        launcher=(mpirun --host "${host_list#,}" --bind-to none)
        for slot in "${environment[@]}"; do launcher+=(-x "$slot"); done
    elif ((ranks > 1)); then
        launcher=(mpirun --oversubscribe --bind-to none)
    fi
    if [[ ${launcher[0]:-} == mpirun ]]; then
        if ((EUID == 0)); then launcher+=(--allow-run-as-root); fi
        launcher+=(-np "$ranks")
    fi
}

# The command of run $1 on the slots that begin with $2, in `command`.
make_command() {
    local resume=() these
    read -ra these <<<"${run_flags[$1]}"
    place "$2"
    if compgen -G "$(folder "$1")/checkpoints/step_*" >/dev/null; then resume=(--resume); fi
    command=(env "${environment[@]}" "${launcher[@]}" "${trainers[${run_norms[$1]}]}" "${flags[@]}" "${these[@]}"
        --out "$(folder "$1")" "${resume[@]}")
}

# --- Running

declare -A running=() slot_of=()  # by process: the run, the first of its slots
total=0 done_before=0 done_now=0 failures=() stopped=0 started_at=$SECONDS

start() {  # RUN FIRST-SLOT
    make_command "$1" "$2"
    "${command[@]}" >"$(folder "$1").txt" 2>&1 </dev/null 9>&- &
    running[$!]=$1 slot_of[$!]=$2
    say "$([[ ${command[-1]} == --resume ]] && echo resume || echo start) ${names[$1]}"
}

duration() {
    if (($1 < 100)); then echo "$1 s"
    elif (($1 < 6000)); then echo "$(($1 / 60)) min"
    else echo "$(($1 / 3600)) h"; fi
}

finish() {  # PROCESS STATUS
    local run=${running[$1]} left reason said
    said=$(folder "$run").txt
    unset "running[$1]"
    if (($2 == 0)) && is_done "$run"; then
        ((++done_now))
        left=$(((SECONDS - started_at) * (total - done_before - done_now - ${#failures[@]}) / done_now))
        say "$((done_before + done_now)) of $total runs done, $(duration $left) left: ${names[run]}"
    elif (($2 == 3)); then
        stopped=1
        say "stopped ${names[run]}"
    else
        reason=$(grep -a '^train_gpt: ' "$said" | tail -n 1) || reason=$(tail -n 1 "$said")
        failures+=("${names[run]}: exit $2: ${reason#train_gpt: }")
        say "failed ${names[run]}"
    fi
}

stop_all() {
    trap 'kill -KILL "${!running[@]}"' INT TERM
    kill "${!running[@]}" 2>/dev/null || true
    wait
    say "stopped; the same command goes on"
    exit "$1"
}

run_all() {  # RUN...
    local run process status free=() slot
    for ((slot = 0; slot < jobs; slot++)); do free+=($((slot * ranks))); done
    # A background process ignores Ctrl-C, so the runs are told here.
    trap 'stop_all 130' INT
    trap 'stop_all 143' TERM
    total=$#
    for run; do
        if is_done "$run"; then ((++done_before)); fi
    done
    for run in "$@" end; do
        while ((${#running[@]})) && { ((${#free[@]} == 0)) || [[ $run == end ]] || ((stopped)); }; do
            status=0
            wait -n -p process "${!running[@]}" || status=$?
            free+=("${slot_of[$process]}")
            finish "$process" "$status"
        done
        if [[ $run == end ]] || ((stopped)) || is_done "$run"; then continue; fi
        start "$run" "${free[0]}"
        free=("${free[@]:1}")
    done
}

compare() {
    local run ended=() status=0
    for run in "${!names[@]}"; do
        if is_done "$run" || diverged "$run"; then ended+=("$(folder "$run")"); fi
    done
    if ((${#ended[@]})); then
        scripts/compare.py "${ended[@]}" --out "$out/compared" --title "$(basename "$out")" || status=1
    fi
    return $status
}

submit() {
    local self=(env "DEVICE=$device" "PRECISION=$precision" scripts/sweep.sh --norms "$norms" --lrs "$lrs"
        --seeds "$seeds" --layers "$layers" --ranks "$ranks" --out "$out") gpus=() array
    if [[ $device == cuda ]]; then gpus=(--gpus="$ranks"); fi
    array=$(sbatch --parsable --job-name=sweep --array="0-$((${#names[@]} - 1))" --ntasks="$ranks" "${gpus[@]}" \
        --output="$out/slurm-%a.txt" --open-mode=append --signal=USR1@120 --requeue \
        --wrap "${self[*]@Q} --only \$SLURM_ARRAY_TASK_ID -- ${flags[*]@Q}")
    sbatch --job-name=compare --dependency="afterany:$array" --output="$out/compared.txt" \
        --wrap "${self[*]@Q} --only compare"
}

# --- The sweep

mkdir -p "$out"
exec 9>"$out/.lock"
# The jobs of an array share the folder.
flock -n "$([[ $only ]] && echo --shared || echo --exclusive)" 9 || fail "$out: another sweep is at work there"
if [[ $only == compare ]]; then compare; exit; fi
if [[ -e $out/.flags && $(<"$out/.flags") != "${flags[*]@Q}" ]] &&
    compgen -G "$out/*/checkpoints/step_*" >/dev/null; then
    fail "$out holds runs with other flags ($(<"$out/.flags")): choose another --out"
fi
echo "${flags[*]@Q}" >"$out/.flags"

# shellcheck disable=SC2086  # a list of words
if [[ $only ]]; then build "${run_norms[$only]}"; else build $norms; fi
if [[ $mode == run && $device == cuda && ! $hosts ]] && ((jobs > 1)); then
    here=$(tr , '\n' <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --list-gpus)}" | wc -l)
    ((jobs * ranks <= here)) || wrong "--jobs $jobs x --ranks $ranks: there are $here GPUs"
fi
case $mode in
    print)
        for run in "${!names[@]}"; do
            if is_done "$run"; then continue; fi
            make_command "$run" 0
            echo "${command[*]@Q}"
        done
        exit ;;
    slurm) submit; exit ;;
esac
if [[ $only ]]; then run_all "$only"; else run_all "${!names[@]}"; fi
if ((stopped)); then
    if [[ $only ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
    say "stopped; the same command goes on"
    exit 3
fi
if [[ ! $only ]]; then compare || failures+=("the comparison"); fi
for failure in "${failures[@]}"; do echo "sweep: failed: $failure" >&2; done
((${#failures[@]} == 0))
