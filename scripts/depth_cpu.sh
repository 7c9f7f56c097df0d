#!/usr/bin/env bash
# The depth study that a machine without a GPU can afford, end to end: text, every NORM built, training, pictures, tables.
#
#   scripts/depth_cpu.sh                # 8 to 28 hours on two cores; started again, it goes on where it stopped
#   scripts/depth_cpu.sh --report       # draws the pictures and tables again from dev/results/depth_cpu/runs/*.json
#   scripts/depth_cpu.sh --help         # the rest
#
# scripts/depth_study.py decides what is trained, and in which order.
set -euo pipefail
cd "$(dirname "$0")/.."

data=data/depth_cpu

case " $* " in
*" --report "* | *" --help "* | *" -h "*) exec /usr/bin/env python3 scripts/depth_study.py "$@" ;;
esac
# The arguments are looked at before anything is fetched or built.
! command -v python3 >/dev/null || python3 scripts/depth_study.py "$@" --check

make --no-print-directory deps
make --no-print-directory --silent build/tokenize DEVICE=cpu

# Every hundredth document is for validation. Tokens are bytes: a vocabulary of 257, so that the blocks, not the head, are
# what a step computes.
if [[ ! -e $data/done ]]; then
    scripts/prepare_data.py --large --data "$data"
    rm -rf "$data"/{train,val}{,-text}
    mkdir -p "$data"/{train,val}-text
    (cd "$data/corpus" && LC_ALL=C ls -- *.txt) | awk '{ print (NR % 100 == 51 ? "val" : "train") "-text/" $0 }' |
        while IFS= read -r file; do ln "$data/corpus/${file#*/}" "$data/$file"; done
    build/tokenize train --vocab-size 257 --out "$data/tokenizer.json" "$data/val-text"
    for part in train val; do
        build/tokenize encode --tokenizer "$data/tokenizer.json" --out "$data/$part" --val-fraction 0 "$data/$part-text"
    done
    touch "$data/done"
fi
exec /usr/bin/env python3 scripts/depth_study.py --data "$data" "$@"
