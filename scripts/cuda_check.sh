#!/usr/bin/env bash
# Builds DEVICE=cuda for every NORM and PRECISION by nvcc (needs no GPU), for the architectures in CUDA_ARCHS ["80 90"].
# Fails on a warning, and when an attention or norm kernel spills registers to memory, which makes it several times slower.
# Then the machine code is held to dev/machine_code.txt, where there is a cuobjdump, or pip can fetch one.
#   scripts/cuda_check.sh
set -uo pipefail
case $* in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
    ?*) echo "cuda_check: unknown arguments '$*'; see $0 --help" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.." || exit 1
export CUDA_ARCHS=${CUDA_ARCHS:-80 90}
hot='attention|norm_(forward|backward)|classifier'
passed=0 failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# ptxas's report as lines "kernel architecture registers spilled-bytes".
kernels() {
    awk '
        /Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; architecture = part[4] }
        /bytes spill stores/ { spilled = $5 }
        /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); print kernel, architecture, substr($0, RSTART + 5, RLENGTH - 5), spilled }
    ' "$log" | c++filt -p
}

build() {
    local norm precision target problem='' targets=() began=$SECONDS
    for norm in $norms; do
        for precision in $precisions; do targets+=("build/cuda-$precision-$norm/train_gpt"); done
    done
    rm -f "${targets[@]}" build/cuda-*/train_gpt.o  # what is up to date would not be looked at
    make --no-print-directory --keep-going --jobs=2 --output-sync DEVICE=cuda NVCC_FLAGS='-Xptxas -v' "${targets[@]}" \
        >"$log" 2>&1
    if grep -q 'warning' "$log"; then problem="warnings"
    elif kernels | grep -E "^($hot)" | grep -qv ' 0$'; then problem="spills"; fi
    for target in "${targets[@]}"; do
        if [[ ! -e $target ]]; then echo "$target does not build"; ((failed += 1))
        elif [[ $problem ]]; then printf '%-40s %s\n' "$target" "$problem"; ((failed += 1))
        else printf '%-40s ok\n' "$target"; ((passed += 1)); fi
    done
    echo "in $((SECONDS - began)) s"
    if [[ $problem == spills ]]; then
        printf '  %-42s %-6s %9s %s\n' kernel for registers 'bytes spilled'
        kernels | grep -E "^($hot)" | grep -v ' 0$' | while read -r line; do
            # shellcheck disable=SC2086
            printf '  %-42s %-6s %9s %s\n' $line
        done
    fi
    grep -vE '^ptxas info|bytes stack frame' "$log" | grep -E -A 8 'warning|error|rror:' | head -n 60
}

# The toolkit's packages do not always bring cuobjdump and nvdisasm; PyPI's wheels hold the programs.
get_cuobjdump() {
    dev/machine_code.py --find >/dev/null && return
    timeout 60 python3 -m pip install --quiet --disable-pip-version-check --retries 0 --target build/cuobjdump \
        nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm >/dev/null 2>&1
    chmod -f +x build/cuobjdump/nvidia/*/bin/*
    dev/machine_code.py --find >/dev/null
}

read_machine_code() {  # PRECISION
    local object=build/cuda-$1/train_gpt.o verdict=ok
    [[ -e $object ]] || return
    dev/machine_code.py "$object" "$1" >"$log" 2>&1 || verdict='machine code'
    printf '%-40s %s\n' "$object" "$verdict"
    cat "$log"
    if [[ $verdict == ok ]]; then ((passed += 1)); else ((failed += 1)); fi
}

norms=$(make --silent norms) || exit 1
precisions='fp32 bf16'
build
if [[ ! -e build/cuda-fp32/train_gpt.o && ! -e build/cuda-bf16/train_gpt.o ]]; then :
elif get_cuobjdump; then
    for precision in $precisions; do read_machine_code "$precision"; done
else
    echo "machine code was not read: there is no cuobjdump, and pip could not fetch nvidia-cuda-cuobjdump"
fi
echo "$passed passed, $failed failed"
((failed == 0))
