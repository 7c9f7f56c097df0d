#!/usr/bin/env bash
# Tests dev/gpu_check.sh's steps, reports and verdicts on programs and a GPU made up here.
# shellcheck disable=SC2016  # the made-up tools expand their variables themselves
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{dev,test,tools} "$work"/build/gpu_check/{lib,data,cpu}
cp dev/gpu_check.sh "$work/dev"
cp test/run_tests.sh "$work/test"
cd "$work" || exit 1
tools=$work/tools
export PATH=$tools:$PATH WORK=$work
unset DEVICE

# `calls`: what was called. `faults`: lines PROGRAM FAULT.
fault='fault() { grep -qx "$1" "$WORK/faults"; }; echo "${0##*/} $*" >>"$WORK/calls"; '
tool nvidia-smi 'echo "A GPU, 9.0, 80 MiB, 580"'
tool python3 'exit 1'
tool compute-sanitizer "$fault"'if fault "$4 fails"; then exit 1; fi'
for precision in fp32 bf16; do
    folder=build/gpu_check/build/cuda-$precision-LNS
    mkdir -p "$folder"
    tools=$folder
    for name in test_kernels test_model; do
        tool $name "$fault"'if fault "'$name' hangs"; then sleep 30; fi; echo "[  PASSED  ] 3 tests."'
    done
    tool step "$fault"
    tool train_gpt "$fault"'while (($#)); do [[ $1 == --out ]] && out=$2; shift; done
        mkdir -p "$out"; off=0
        fault "loss differs" && off=0.01
        fault "bits differ" && off=0.00$$
        for ((i = 1; i <= 50; i++)); do
            loss=$(awk "BEGIN { printf \"%.9f\", 6 - $i / 20 + ($i > 9) * $off }")
            fault "loss is nan" && loss=nan
            echo "{\"event\":\"train\",\"step\":$i,\"loss\":$loss,\"lr\":1}"
        done >"$out/log.jsonl"'
done
: >faults
"$work/build/gpu_check/build/cuda-fp32-LNS/train_gpt" --out build/gpu_check/cpu
gpu_check() { : >calls; run dev/gpu_check.sh "$@"; }
verdict() { tail -n 1 "build/gpu_check/reports/$1.txt" | sed 's/,[^,]*$//'; }
clear() { rm -rf build/gpu_check/reports; }

steps=$(dev/gpu_check.sh steps)
gpu_check run
check "all steps: succeeds" exits 0
check "ends in the sum" same "$(tail -n 1 <<<"$output")" "16 passed, 0 failed"
reports() { find build/gpu_check/reports -name '*.txt' | wc -l; }
check "each step has a report" same "$(reports)" "$(wc -l <<<"$steps")"
check "without torch, that step is skipped and says why" says "skipped: python3 has no torch"
check "the four sanitizers, in both precisions" same "$(grep -c '^compute-sanitizer ' calls)" 8
check "on a part of the kernels" same "$(grep -c '^compute-sanitizer .*--gtest_filter=.*Attention' calls)" 8
check "the tests ran" same "$(grep -cE '^test_(kernels|model) ' calls)" 4
gpu_check run
check "again: nothing is left to do" same "$(wc -l <calls):$status" 0:0
rm build/gpu_check/reports/speed-bf16.txt
echo half >build/gpu_check/reports/speed-bf16.running
gpu_check summary
check "a step without a report counts as failed" same "$(tail -n 1 <<<"$output"):$status" "15 passed, 1 failed:1"
gpu_check run
check "after an interruption: only the step that had not ended" same "$(cut -d ' ' -f 1 calls | xargs)" step

clear
printf '%s\n' 'racecheck fails' 'loss differs' >faults
gpu_check run
check "findings: fails" same "$(tail -n 1 <<<"$output"):$status" "13 passed, 3 failed:1"
check "the sanitizer's step says so" same "$(verdict racecheck-bf16)" "racecheck-bf16: failed (exit 1)"
check "the steps behind it ran" same "$(verdict speed-fp32)" "speed-fp32: passed"
check "a loss beside the CPU's" same "$(verdict against-cpu)" "against-cpu: failed (exit 1)"
check "says where" contains build/gpu_check/reports/against-cpu.txt \
    'by at most 0.01 (step [1-5].), in the first step by 0'
: >faults
gpu_check run racecheck-fp32 racecheck-bf16 against-cpu
check "these steps again: mended" same "$(tail -n 1 <<<"$output"):$status" "16 passed, 0 failed:0"
check "and no others" same "$(cut -d ' ' -f 1 calls | sort -u | xargs)" "compute-sanitizer train_gpt"
echo 'loss is nan' >faults
gpu_check run against-cpu
check "a loss that is no number" same "$(verdict against-cpu)" "against-cpu: failed (exit 1)"
echo 'bits differ' >faults
gpu_check run train-bf16
check "two runs with other bits" same "$(verdict train-bf16)" "train-bf16: failed (exit 1)"
echo 'test_model hangs' >faults
run env STEP_SECONDS=1 dev/gpu_check.sh run tests-fp32
check "a step that takes too long is ended" same "$(verdict tests-fp32)" "tests-fp32: failed (took more than 1 s)"

rm "$work/tools/compute-sanitizer"
gpu_check run memcheck-fp32
check "without compute-sanitizer: skipped" same "$(verdict memcheck-fp32)" "memcheck-fp32: skipped"
gpu_check run memcheck-fp64
check "unknown step: one line" one_line
check "unknown step: exits 2" exits 2
gpu_check build now
check "unknown arguments: exit 2" exits 2
rm -rf build/gpu_check
gpu_check run
check "nothing was built: says what to do" says "dev/gpu_check.sh build"

conclude
