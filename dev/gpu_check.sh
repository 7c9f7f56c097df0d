#!/usr/bin/env bash
# What only a GPU can show, in steps of under ten minutes, each with a report of its own in build/gpu_check/reports.
#   dev/gpu_check.sh             where there are a GPU, nvcc, and what `make deps` installs: build, then run
# For a bare machine with a GPU, build elsewhere and take the checkout with build/gpu_check along:
#   dev/gpu_check.sh build       needs nvcc, no GPU; CUDA_ARCHS="80 90" chooses the architectures
#   dev/gpu_check.sh run         the steps that have no report yet: after an interruption, the same command goes on.
#                                Needs CUDA's libraries and NCCL, on LD_LIBRARY_PATH if the loader does not know them
#   dev/gpu_check.sh run STEP... these, again
#   dev/gpu_check.sh summary     what the reports say; steps: lists the steps
# DEVICE=cpu builds and runs the same on the CPU, but for what asks for the GPU. STEP_SECONDS [570] ends a step.
# Ends with "N passed, N failed"; a step that cannot be done here (no compute-sanitizer, no torch) is skipped, with why.
set -euo pipefail
usage() { echo "gpu_check: $*; see $0 --help" >&2; exit 2; }
script=$(realpath "$0")
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
packed=build/gpu_check
reports=$packed/reports
skipped=77  # exit status of a step that cannot be done here
precisions=(fp32 bf16)

steps=(machine)
for precision in "${precisions[@]}"; do steps+=("tests-$precision"); done
for tool in memcheck racecheck initcheck synccheck; do
    for precision in "${precisions[@]}"; do steps+=("$tool-$precision"); done
done
steps+=(against-cpu)
for precision in "${precisions[@]}"; do steps+=("train-$precision"); done
for precision in bf16 fp32; do steps+=("speed-$precision"); done
steps+=(torch)

program() { echo "$packed/build/$device-$1-LNS/$2"; }  # PRECISION NAME
# A small model, the same on both devices.
small=(--layers 4 --hidden 64 --ffn 176 --heads 4 --kv-heads 2 --seq-len 128 --batch-size 4 --total-batch-size 1024
    --steps 50 --lr 3e-3 --warmup 10 --seed 3 --eval-every 0 --sample-every 0 --save-every 0
    --train "$packed/data/train_*.bin" --val "$packed/data/val_*.bin")

# --- build -----------------------------------------------------------------------------------------------------------

# Shards of a text that needs no network: the trainer's own source.
pack_data() {
    rm -rf "$packed/data"
    mkdir -p "$packed/data"
    cat train_gpt.cu lns_layers.cuh trainer/* README.md >"$packed/data/text.txt"
    build/tokenize train --vocab-size 512 --out "$packed/data/tokenizer.json" "$packed/data/text.txt"
    build/tokenize encode --tokenizer "$packed/data/tokenizer.json" --out "$packed/data" --val-fraction 0.05 \
        --shard-tokens 1M "$packed/data/text.txt"
}

build() {
    export CUDA_ARCHS=${CUDA_ARCHS:-80 90}
    local precision name programs=()
    for precision in "${precisions[@]}"; do
        for name in test_kernels test_model train_gpt step; do programs+=("build/$device-$precision-LNS/$name"); done
    done
    make -j"$(nproc)" --no-print-directory DEVICE="$device" "${programs[@]}"
    make -j"$(nproc)" --no-print-directory DEVICE=cpu build/cpu-fp32-LNS/train_gpt build/tokenize
    rm -rf "$packed"
    mkdir -p "$packed/lib"
    cp --parents "${programs[@]}" "$packed"
    # The small libraries; CUDA's own and NCCL are large and come with the GPU's machine, the C library with its system.
    ldd "${programs[@]}" | awk '/=> \// { print $3 }' | sort -u | grep -vE 'libcu|libnccl|/lib(c|m|dl|rt|pthread)\.so' |
        xargs -I{} cp -L {} "$packed/lib"
    pack_data
    build/cpu-fp32-LNS/train_gpt "${small[@]}" --out "$packed/cpu"
}

# --- The steps -------------------------------------------------------------------------------------------------------

skip() { echo "skipped: $*"; exit $skipped; }

# The GPU, and whether every program finds its libraries.
do_machine() {
    if [[ $device == cuda ]]; then
        nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader
    fi
    local precision missing
    for precision in "${precisions[@]}"; do
        missing=$(ldd "$(program "$precision" train_gpt)" | grep 'not found') || continue
        echo "train_gpt ($precision) needs libraries that are not here; add their folders to LD_LIBRARY_PATH:"
        echo "$missing"
        return 1
    done
}

do_tests() { test/run_tests.sh "$(program "$1" test_kernels)" "$(program "$1" test_model)"; }

# The tools slow a kernel down a hundredfold: the kernels that share memory among threads, but not the whole model.
sanitized=${SANITIZED:-Norm.*:Linear.BiasBackward:Swiglu.*:Embedding.*:Rope.*:Attention.*:Classifier.*:Optimizer.*}
do_sanitizer() {  # TOOL PRECISION
    command -v compute-sanitizer >/dev/null || skip "compute-sanitizer is not on PATH"
    compute-sanitizer --error-exitcode 1 --tool "$1" "$(program "$2" test_kernels)" --gtest_filter="$sanitized"
}

losses() { grep '"event":"train"' "$1/log.jsonl" | sed -E 's/.*"loss":([^,]+).*/\1/'; }

# 50 steps in fp32 beside those of the CPU. Sums of n terms in another order differ by about sqrt(n) 2^-24, 2e-6 for the
# longest here, and the steps carry that on: with another instruction set (DNNL_MAX_CPU_ISA=AVX2) the CPU's own 50 steps
# differ by 2.5e-4 at most. A wrong kernel differs in the first digits.
do_against_cpu() {
    local out=$packed/against_cpu
    rm -rf "$out"
    "$(program fp32 train_gpt)" "${small[@]}" --out "$out"
    paste <(losses "$packed/cpu") <(losses "$out") | awk '
        $2 !~ /^[0-9.]+(e-?[0-9]+)?$/ { print "step", NR, "has loss", $2; bad = 1 }
        { d = $2 > $1 ? $2 - $1 : $1 - $2; if (d > worst) { worst = d; at = NR } if (NR == 1) first = d }
        END {
            printf "%d steps, losses differ by at most %.3g (step %d), ", NR, worst, at
            printf "in the first step by %.3g\n", first
            exit !(!bad && NR == 50 && worst <= 2e-3 && first <= 2e-5)
        }'
}

# Two runs must give the same bits, and learn.
do_train() {  # PRECISION
    local out=$packed/train i data=()
    compgen -G 'data/train_*.bin' >/dev/null || data=(--train "$packed/data/train_*.bin" --val "$packed/data/val_*.bin")
    local model=(--model llama-130m --batch-size 8 --seq-len 256 --total-batch-size 16384 --steps 20 --warmup 5)
    if [[ $device == cpu ]]; then model=("${small[@]}"); fi
    for i in 1 2; do
        rm -rf "$out$i"
        "$(program "$1" train_gpt)" "${model[@]}" "${data[@]}" --save-every 0 --sample-every 0 --out "$out$i"
        losses "$out$i" >"$out$i/losses"
    done
    cmp "$out"{1,2}/losses
    awk 'NR == 1 { first = $1 } END { print "loss", first, "to", $1; exit !($1 < first - 1) }' "$out"1/losses
    rm -rf "$out"{1,2}
}

# MODEL B T of a precision
shape() {
    case $device-$1 in
        cpu-*) echo tiny 1 64 ;;
        *-bf16) echo llama-130m 32 1024 ;;
        *) echo llama-130m 8 1024 ;;
    esac
}
do_speed() {  # PRECISION
    local shape
    read -ra shape < <(shape "$1")
    "$(program "$1" step)" "${shape[@]}"
    if command -v nsys >/dev/null; then
        nsys profile --force-overwrite true --output "$packed/step-$1" "$(program "$1" step)" "${shape[@]}" >/dev/null
        nsys stats --report cuda_gpu_kern_sum "$packed/step-$1.nsys-rep"
    fi
}

do_torch() {
    if [[ $device == cpu ]]; then skip "is for a GPU"; fi
    python3 -c 'import torch' 2>/dev/null || skip "python3 has no torch"
    local shape
    read -ra shape < <(shape bf16)
    python3 dev/bench/torch_step.py "${shape[@]}"
}

# --- run -------------------------------------------------------------------------------------------------------------

do_step() {
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}:$PWD/$packed/lib
    case $1 in
        machine | torch) "do_$1" ;;
        against-cpu) do_against_cpu ;;
        tests-* | train-* | speed-*) "do_${1%-*}" "${1#*-}" ;;
        *) do_sanitizer "${1%-*}" "${1#*-}" ;;
    esac
}

# The report gets its name when the step has ended, and its last line is the verdict.
run_step() {
    local began=$SECONDS status=0 verdict report=$reports/$1
    mkdir -p "$reports"
    rm -f "$report.txt"
    echo "== $1"
    timeout "${STEP_SECONDS:-570}" "$script" step "$1" 2>&1 | tee "$report.running" || status=${PIPESTATUS[0]}
    case $status in
        0) verdict=passed ;;
        "$skipped") verdict=skipped ;;
        124) verdict="failed (took more than ${STEP_SECONDS:-570} s)" ;;
        *) verdict="failed (exit $status)" ;;
    esac
    echo "$1: $verdict, $((SECONDS - began)) s" | tee -a "$report.running"
    mv "$report.running" "$report.txt"
}

summary() {
    local step
    for step in "${steps[@]}"; do
        tail -n 1 "$reports/$step.txt" 2>/dev/null || echo "$step: not run"
    done | tee "$packed/summary"
    local passed failed
    passed=$(grep -c ': passed' "$packed/summary") || true
    failed=$(grep -cE ': (failed|not run)' "$packed/summary") || true
    echo "$passed passed, $failed failed"
    ((failed == 0))
}

run() {
    [[ -d $packed/lib ]] || { echo "gpu_check: nothing in $packed: $0 build" >&2; exit 1; }
    local step
    if (($#)); then
        for step; do run_step "$step"; done
    else
        for step in "${steps[@]}"; do [[ -e $reports/$step.txt ]] || run_step "$step"; done
    fi
    summary
}

is_step() { [[ " ${steps[*]} " == *" $1 "* ]]; }
command=${1:-both}
shift || true
case $command in
    run | step) for step; do is_step "$step" || usage "there is no step '$step' (they are: ${steps[*]})"; done ;;
    *) (($# == 0)) || usage "unknown arguments '$*'" ;;
esac
case $command in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script" ;;
    steps) printf '%s\n' "${steps[@]}" ;;
    build) build ;;
    run) run "$@" ;;
    step) do_step "$1" ;;
    summary) summary ;;
    both) build && run ;;
    *) usage "unknown arguments '$command'" ;;
esac
