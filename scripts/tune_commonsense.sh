#!/usr/bin/env bash
# The paper's fine-tuning as far as it can be known: 4 epochs at 3e-4 on Commonsense170K, then tasks, for trained runs of PRE
# and LNS side by side (or others). What the paper does not say is as in LLM-Adapters, where the data come from: 16 rows a
# step, 100 steps of warm-up, linear decay, Alpaca's prompts.
#
#   scripts/tune_commonsense.sh runs/table1_130m/PRE runs/table1_130m/LNS [flags of scripts/tune.py]
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; fi
if [[ ${1:-} == -* ]]; then echo "tune_commonsense: unknown argument '$1'; see $0 --help" >&2; exit 2; fi
cd "$(dirname "$0")/.."
(($# >= 2)) || { echo 'tune_commonsense: expected two run folders: scripts/tune_commonsense.sh PRE_RUN LNS_RUN' >&2; exit 2; }
tasks=(boolq piqa siqa hellaswag winogrande arc_easy arc_challenge openbookqa)
scripts/fetch_tuning.py
files=("${tasks[@]/#/data/eval/}")
files=("${files[@]/%/.jsonl}")
for file in "${files[@]}"; do
    if [[ ! -e $file ]]; then scripts/fetch_eval.py "${tasks[@]}"; break; fi
done
exec scripts/tune.py "$1" "$2" --questions data/commonsense170k.jsonl --tasks "${files[@]}" --template alpaca --epochs 4 \
    --lr 3e-4 --seq-len 256 --sequences 16 --out runs/commonsense "${@:3}" -- --warmup 100 --schedule linear --min-lr-ratio 0 \
    --weight-decay 0
