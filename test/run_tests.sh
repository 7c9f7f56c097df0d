#!/usr/bin/env bash
# Runs test programs one after the other: run_tests.sh COMMAND... [-- COMMAND...]...
# A command is one argument, environment included. The groups behind a -- run side by side, after those before the first.
# Prints a line for each, the output of those that fail, and the sum of their test cases: "N passed, N failed".
# GoogleTest binaries and scripts that end with such a line are understood; a crash counts as a failure.
set -u
start=$SECONDS
export GTEST_COLOR=no  # mpirun hands its programs a terminal
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

run() {  # run GROUP COMMAND...: their sums to $work/GROUP.sums
    local group=$1 output=$work/$1.output command began status good bad
    shift
    # last PATTERN: the number in the last line that matches, or 0
    last() { tr -d '\r' <"$output" | sed -nE "s/$1/\1/p" | tail -n 1 | grep . || echo 0; }
    for command; do
        began=$SECONDS
        timeout 1200 env bash -c "$command" >"$output" 2>&1 </dev/null
        status=$?
        good=$(last '^\[  PASSED  \] ([0-9]+) tests?\.$') bad=$(last '^\[  FAILED  \] ([0-9]+) tests?, listed below:$')
        ((good += $(last '^([0-9]+) passed, [0-9]+ failed$'), bad += $(last '^[0-9]+ passed, ([0-9]+) failed$')))
        if ((status != 0 && bad == 0)); then bad=1; fi
        if ((good + bad == 0)); then bad=1; echo "no test ran" >>"$output"; fi
        echo "$good $bad" >>"$work/$group.sums"
        {
            if ((bad)); then sed 's/^/    /' "$output" | tail -n 100; fi
            printf '%-6s %4d passed, %d failed, %4d s  %s\n' "$( ((bad)) && echo FAILED || echo ok)" "$good" "$bad" \
                $((SECONDS - began)) "$command$( ((status)) && echo " (exit $status)")"
        } >"$work/$group.report"
        cat "$work/$group.report"  # at once, so that groups do not mix
    done
}

groups=0 tests=0 commands=()
for argument in "$@" --; do
    if [[ $argument != -- ]]; then commands+=("$argument"); continue; fi
    if ((groups == 0)); then run 0 "${commands[@]}"; else run $groups "${commands[@]}" & fi
    ((groups += 1, tests += ${#commands[@]}))
    commands=()
done
wait
echo "tests took $((SECONDS - start)) s"
# A command without a sum has not come to its end.
cat "$work"/*.sums 2>/dev/null | awk -v tests=$tests '{ passed += $1; failed += $2 }
    END { failed += tests - NR; printf "%d passed, %d failed\n", passed, failed; exit failed > 0 }'
