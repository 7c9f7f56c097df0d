# shellcheck shell=bash
# Sourced by the tests of scripts: counts checks of `output` and `status`, which each test's own `run` sets.
passed=0 failed=0 output='' status=0

check() {  # check WHAT COMMAND...: the command must succeed
    local what=$1
    shift
    if "$@"; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    echo "FAILED: $what"
    echo "  exit $status, said: $output"
}
exits() { [[ $status == "$1" ]]; }
says() { [[ $output == *"$1"* ]]; }
one_line() { [[ $output != *$'\n'* && -n $output ]]; }

# The last line of a test, and its exit status.
conclude() {
    echo "$passed passed, $failed failed"
    ((failed == 0))
}
