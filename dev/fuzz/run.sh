#!/usr/bin/env bash
# Runs libFuzzer targets, two side by side, each for FUZZ_SECONDS: run.sh build/fuzz/NAME...
# Starts from dev/fuzz/corpus/NAME; what it finds on the way stays in build/fuzz/found/NAME for the next time.
# Prints a line for each target, the output of those that fail (the input is kept: build/fuzz/NAME FILE repeats the
# failure), and "N passed, N failed".
set -u
case ${1:-} in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
    '' | -*) echo "fuzz: expected targets build/fuzz/NAME, found '${1:-}'; see $0 --help, or: make fuzz" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/../.." || exit 1
export FUZZ_SECONDS=${FUZZ_SECONDS:-30}
results=$(mktemp)
trap 'rm -f "$results"' EXIT

fuzz() {
    local target=$1 name=${1##*/} log=$1.log began=$SECONDS status inputs
    mkdir -p "build/fuzz/found/$name" "build/fuzz/failed/$name"
    "$target" -max_total_time="$FUZZ_SECONDS" -timeout=10 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix="build/fuzz/failed/$name/" "build/fuzz/found/$name" "dev/fuzz/corpus/$name" >"$log" 2>&1
    status=$?
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    if ((status == 0 && ${inputs:-0} > 0)); then
        printf 'ok     %4d s  %s: %s inputs\n' $((SECONDS - began)) "$target" "$inputs"
    else
        printf '%s\nFAILED %4d s  %s (exit %d)\n' "$(tail -n 100 "$log" | sed 's/^/    /')" \
            $((SECONDS - began)) "$target" $status
    fi
}
export -f fuzz

printf '%s\n' "$@" | xargs -P 2 -I{} bash -c 'fuzz {}' | tee "$results"
passed=$(grep -c '^ok' "$results")
echo "$passed passed, $(($# - passed)) failed"
((passed == $#))
