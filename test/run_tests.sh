#!/usr/bin/env bash
# Runs test programs one after the other: run_tests.sh COMMAND...   (a command is one argument, environment included)
# Prints a line for each, the output of those that fail, and the sum of their test cases: "N passed, N failed".
# GoogleTest binaries and scripts that end with such a line are understood; a crash counts as a failure.
set -u
passed=0 failed=0 start=$SECONDS
export GTEST_COLOR=no  # mpirun hands its programs a terminal
output=$(mktemp)
trap 'rm -f "$output"' EXIT

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
    ((passed += good, failed += bad))
    if ((bad)); then sed 's/^/    /' "$output" | tail -n 100; fi
    printf '%-6s %4d passed, %d failed, %4d s  %s\n' "$( ((bad)) && echo FAILED || echo ok)" "$good" "$bad" \
        $((SECONDS - began)) "$command$( ((status)) && echo " (exit $status)")"
done
echo "tests took $((SECONDS - start)) s"
echo "$passed passed, $failed failed"
((failed == 0))
