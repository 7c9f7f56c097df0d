# shellcheck shell=bash
# Sourced by the shell tests. `check` counts; of a check that fails it says what was expected and what was found.
passed=0 failed=0
tools=''  # a folder for programs made up by `tool`
output='' status=0  # what the last command that was `run` printed, and its exit status

check() {  # check WHAT COMMAND...: the command must succeed; otherwise what it prints is shown
    local what=$1 said
    shift
    if said=$("$@" 2>&1); then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    echo "FAILED: $what"
    tail -n 20 <<<"${said:-expected to succeed: $*}" | sed 's/^/  /'
    if [[ $output && $said != *"$output"* ]]; then
        echo "  the last command ended with exit status $status and printed: ${output:0:2000}"
    fi
}

# The last line of a test, and its exit status.
conclude() {
    echo "$passed passed, $failed failed"
    ((failed == 0))
}

run() { output=$("$@" 2>&1); status=$?; }
wait_for() { for _ in $(seq 300); do if "$@"; then return; fi; sleep 0.1; done; }
serve() {  # serve FOLDER: by HTTP, as $server; its port is in the file port, what is asked for in requests
    python3 -c '
import functools, http.server, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.HTTPServer(("127.0.0.1", 0), handler)
open("port", "w").write(str(server.server_port))
server.serve_forever()' "$1" 2>requests &
    server=$!
    wait_for test -s port
}
# tool NAME SCRIPT
tool() { printf '#!/usr/bin/env bash\n%s\n' "$2" >"$tools/$1"; chmod +x "$tools/$1"; }

# --- What can be checked

mismatch() {  # EXPECTED FOUND
    printf 'expected: %s\nfound:    %s\n' "${1:0:2000}" "${2:0:2000}"
    return 1
}
same() { [[ $1 && $1 == "$2" ]] || mismatch "$2" "${1:-nothing}"; }  # same FOUND EXPECTED
differ() { [[ $1 && $1 != "$2" ]] || mismatch "anything else" "${1:-nothing}"; }
contains() {  # contains FILE PATTERN: a line that matches
    grep -q -- "$2" "$1" || mismatch "a line in $1 that matches $2" "$(tail -n 5 "$1")"
}
# Of the command that was `run`
exits() { [[ $status == "$1" ]] || mismatch "exit status $1" "exit status $status"; }
says() { [[ $output == *"$1"* ]] || mismatch "$1" "$output"; }
one_line() { [[ $output && $output != *$'\n'* ]] || mismatch "one line" "${output:-nothing}"; }
# Of the command that follows, which leaves last.out and last.err behind
runs() { "$@" >last.out 2>last.err || mismatch "exit status 0" "exit status $?, $(tail -n 5 last.err)"; }
status_is() {  # status_is N PATTERN COMMAND...: that exit status, and one line on stderr that matches
    local expected=$1 pattern=$2 found=0
    shift 2
    "$@" >last.out 2>last.err || found=$?
    { ((found == expected)) && (($(wc -l <last.err) == 1)) && grep -qE -- "$pattern" last.err; } ||
        mismatch "exit status $expected, one line that matches $pattern" "exit status $found, $(tail -n 5 last.err)"
}
