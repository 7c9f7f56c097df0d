#!/usr/bin/env bash
# What LayerNorm Scaling costs over Pre-LN: the median ratio of step times over 20 alternating pairs of runs.
#   dev/bench/norm_cost.sh [flags of train_gpt]   needs data/, and both variants built for the CPU
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "$0")/../.."
for norm in PRE LNS; do
    if [[ ! -x build/cpu-fp32-$norm/train_gpt ]]; then
        echo "norm_cost: no build/cpu-fp32-$norm/train_gpt: make train_gpt DEVICE=cpu NORM=$norm" >&2
        exit 1
    fi
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags=("$@")
[[ $# -gt 0 ]] || flags=(--layers 12 --hidden 256 --ffn 688 --heads 8 --batch-size 4 --seq-len 64 --total-batch-size 256)
# The fastest of a run's steps: what else the machine does only ever adds.
step_ms() {
    "build/cpu-fp32-$1/train_gpt" --model tiny "${flags[@]}" --steps 40 --eval-tokens 128 --out "$work/run" >/dev/null || exit
    sed -n 's/.*"step_ms":\([0-9.]*\).*/\1/p' "$work/run/log.jsonl" | sort -g | head -n 1
    rm -rf "$work"/run*
}
for pair in $(seq 20); do
    # Each goes first in turn: a machine that slows down or speeds up favours neither.
    if ((pair % 2)); then pre=$(step_ms PRE); lns=$(step_ms LNS); else lns=$(step_ms LNS); pre=$(step_ms PRE); fi
    awk -v p="$pre" -v l="$lns" 'BEGIN { printf "%.5f\n", l / p }' >>"$work/ratios"
    printf 'pair %2d: PRE %8.2f ms  LNS %8.2f ms  ratio %s\n' "$pair" "$pre" "$lns" "$(tail -n 1 "$work/ratios")"
done
sort -g "$work/ratios" | awk '{ r[NR] = $1 } END { printf "median ratio %.4f (smallest %.4f, largest %.4f)\n", (r[10] + r[11]) / 2, r[1], r[20] }'
