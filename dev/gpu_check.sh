#!/usr/bin/env bash
# What only a GPU can show: the tests of the kernels and of the model run on it, compute-sanitizer's findings, a short
# training run, and how fast a step is. Ends with "N passed, N failed".
#   dev/gpu_check.sh           where there are a GPU, nvcc, and what `make deps` installs
# For a bare machine with a GPU, build elsewhere and take the checkout with build/gpu_check along:
#   dev/gpu_check.sh build     needs nvcc, no GPU; CUDA_ARCHS="80 90" chooses the architectures
#   dev/gpu_check.sh run       needs CUDA's libraries and NCCL, on LD_LIBRARY_PATH if the loader does not know them
set -euo pipefail
case ${*:-both} in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
    both | build | run | 'train fp32' | 'train bf16') ;;
    *) echo "gpu_check: unknown arguments '$*'; see $0 --help" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
packed=build/gpu_check

build() {
    export DEVICE=cuda CUDA_ARCHS=${CUDA_ARCHS:-80 90}
    local precision program programs=()
    for precision in fp32 bf16; do
        for program in test_kernels test_model train_gpt step; do programs+=("build/cuda-$precision-LNS/$program"); done
    done
    make -j"$(nproc)" --no-print-directory "${programs[@]}"
    mkdir -p "$packed/lib"
    cp --parents "${programs[@]}" "$packed"
    # The small libraries; CUDA's own and NCCL are large and come with the GPU's machine, the C library with its system.
    ldd "${programs[@]}" | awk '/=> \// { print $3 }' | sort -u | grep -vE 'libcu|libnccl|/lib(c|m|dl|rt|pthread)\.so' |
        xargs -I{} cp -L {} "$packed/lib"
}

# Two runs on data/ must give the same bits, and learn.
train() {
    local program=$packed/build/cuda-$1-LNS/train_gpt out i
    out=$(mktemp -d)
    for i in 1 2; do
        "$program" --model llama-130m --batch-size 8 --seq-len 256 --total-batch-size 16384 --steps 20 --warmup 5 --out "$out/$i"
        grep '"event":"train"' "$out/$i/log.jsonl" | grep -o '"loss":[^,]*' >"$out/losses$i"
    done
    awk -F: 'NR == 1 { first = $2 } END { exit !($2 < first - 1) }' "$out/losses1"
    cmp "$out/losses1" "$out/losses2"
    rm -rf "$out"
    echo "1 passed, 0 failed"
}

run() {
    local precision checks=()
    nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}:$PWD/$packed/lib
    for precision in fp32 bf16; do
        checks+=("$packed/build/cuda-$precision-LNS/test_kernels" "$packed/build/cuda-$precision-LNS/test_model")
    done
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            for precision in fp32 bf16; do
                checks+=("compute-sanitizer --error-exitcode 1 --tool $tool $packed/build/cuda-$precision-LNS/test_kernels")
            done
        done
    else
        echo "compute-sanitizer is not on PATH: not run"
    fi
    if compgen -G 'data/train_*.bin' >/dev/null; then
        for precision in fp32 bf16; do checks+=("dev/gpu_check.sh train $precision"); done
    else
        echo "no data/ (make data): the training run is left out"
    fi
    local status=0
    test/run_tests.sh "${checks[@]}" | tee "$packed/summary" || status=1
    for precision in bf16 fp32; do "$packed/build/cuda-$precision-LNS/step" || status=1; done
    tail -n 1 "$packed/summary"
    return $status
}

case ${1:-both} in
    build) build ;;
    run) run ;;
    train) train "$2" ;;
    both) build && run ;;
esac
