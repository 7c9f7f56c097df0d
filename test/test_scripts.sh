#!/usr/bin/env bash
# Tests scripts/ on logs and package tools made up here: nothing is installed or fetched.
# shellcheck disable=SC2016  # the made-up tools expand their variables themselves
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
passed=0 failed=0 output='' status=0

pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAILED: $*"; echo "  exit $status, said: $output"; }

run() { output=$("$@" 2>&1); status=$?; }
check() { local what=$1; shift; if "$@"; then pass; else fail "$what"; fi; }
exits() { [[ $status == "$1" ]]; }
says() { [[ $output == *"$1"* ]]; }
one_line() { [[ $output != *$'\n'* && -n $output ]]; }

# log NAME NORM LR LOSS: a finished run of 40 steps that ends with that validation loss.
log() {
    local log=$folder/$1/log.jsonl step
    mkdir -p "$folder/$1"
    {
        echo "{\"event\":\"start\",\"norm\":\"$2\",\"model\":\"tiny\",\"lr\":$3,\"seed\":7,\"params\":1}"
        echo '{"event":"val","step":0,"loss":9,"ppl":8103}'
        for ((step = 1; step <= 40; step++)); do
            printf '{"event":"train","step":%d,"tokens":%d,"loss":%d.5,' "$step" $((step * 1024)) $((9 - step / 8))
            printf '"lr":%s,"grad_norm":1.5,"step_ms":10,"tokens_per_s":%d,"mfu":0.1}\n' "$3" $((1000 + step))
        done
        echo "{\"event\":\"val\",\"step\":40,\"loss\":$4,\"ppl\":1}"
        echo '{"event":"probe","step":40}'
        echo '{"event":"end","reason":"done"}'
    } >"$log"
}
log pre PRE 0.001 3.5
log lns LNS 0.0005 3.25

# compare_runs
run scripts/compare_runs.py "$folder/pre" "$folder/lns"
check "compare: succeeds" exits 0
check "compare: three lines" test "$(wc -l <<<"$output")" = 3
check "compare: learning rate, seed and steps" says "0.0005     7     40 "
check "compare: loss, perplexity, difference, median speed" says "3.2500  25.79     -0.2500      1020"
check "compare: the first differs by nothing" says "33.12     +0.0000"

run scripts/compare_runs.py "$folder/pre" "$folder/none"
check "compare: missing log exits 1" exits 1
check "compare: missing log is one line" one_line
check "compare: missing log is named" says "$folder/none/log.jsonl: No such file"

mkdir "$folder/cut"
head -n 20 "$folder/pre/log.jsonl" >"$folder/cut/log.jsonl"
printf '{"event":"train","step":19,"tok' >>"$folder/cut/log.jsonl"
run scripts/compare_runs.py "$folder/cut"
check "compare: unfinished run exits 1" exits 1
check "compare: unfinished run is one line" one_line
check "compare: unfinished run is named" says "$folder/cut/log.jsonl: the run has not ended"

# Resumed after step 10, behind a line that was cut: the steps of the first run from there on do not count.
{
    printf '{"event":"start","norm":"PRE","lr":0.001,"seed":7}\n{"event":"val","step":0,"loss":9}\n'
    for step in $(seq 1 15); do
        echo "{\"event\":\"train\",\"step\":$step,\"tokens\":$step,\"loss\":1,\"tokens_per_s\":5000}"
    done
    printf '{"event":"val","step":15,"loss":1}\n{"event":"train","st'
    printf '{"event":"start","norm":"PRE","lr":0.002,"seed":7}\n'
    for step in 11 12; do
        echo "{\"event\":\"train\",\"step\":$step,\"tokens\":$step,\"loss\":2,\"tokens_per_s\":5000}"
    done
    printf '{"event":"val","step":12,"loss":2}\n{"event":"end","reason":"done"}\n'
} >"$folder/cut/log.jsonl"
run scripts/compare_runs.py "$folder/cut"
check "compare: resumed run succeeds" exits 0
check "compare: resumed run ends at its own last step" says "12    2.0000"
check "compare: the last start counts, though it stands on the cut line" says " 0.002 "

mkdir "$folder/again"
{ cat "$folder/pre/log.jsonl"; head -n 1 "$folder/pre/log.jsonl"; } >"$folder/again/log.jsonl"
run scripts/compare_runs.py "$folder/again"
check "compare: a run that goes on after its end has not ended" says "has not ended"

# plot_runs
run scripts/plot_runs.py "$folder/pre" "$folder/lns" --out "$folder/new/plot.png"
if says "no Python here has matplotlib"; then
    check "plot: without matplotlib exits 1" exits 1
    check "plot: without matplotlib is one line" one_line
else
    check "plot: succeeds" exits 0
    check "plot: names the picture" says "$folder/new/plot.png"
    check "plot: writes a PNG" test "$(head -c 4 "$folder/new/plot.png" | tail -c 3)" = PNG
    run scripts/plot_runs.py "$folder/cut" --labels "one run" --out "$folder/one.png"
    check "plot: draws one run that was resumed" test -s "$folder/one.png"
    run scripts/plot_runs.py "$folder/pre" "$folder/none" --out "$folder/no.png"
    check "plot: missing log exits 1" exits 1
    check "plot: missing log is one line that names it" says "plot_runs: $folder/none/log.jsonl: No such file"
    check "plot: and there is no picture" test ! -e "$folder/no.png"
    run scripts/plot_runs.py "$folder/pre" --labels a b
    check "plot: one label a run" exits 2
fi

# setup, on a machine of our own making: PATH holds these tools only. `installed` lists the packages that are there.
tools=$folder/tools
mkdir "$tools"
for tool in bash env cat grep; do ln -s "$(command -v "$tool")" "$tools/$tool"; done
tool() { printf '#!/usr/bin/env bash\n%s\n' "$2" >"$tools/$1"; chmod +x "$tools/$1"; }
export FAKE=$folder/fake
mkdir "$FAKE"
setup() { run env PATH="$tools" SETUP="${SETUP:-}" bash scripts/setup "$@"; }

setup
check "setup: without dpkg lets the build try" exits 0
check "setup: without dpkg names the packages" says libdnnl-dev

tool dpkg-query 'grep -qxF -- "${@: -1}" "$FAKE/installed" && printf installed'
: >"$FAKE/installed"
setup --check
check "setup: check exits 1 when packages are missing" exits 1
check "setup: check lists them" says libgtest-dev
setup --wrong
check "setup: wrong argument exits 2" exits 2
setup
check "setup: without apt-get exits 1" exits 1
check "setup: without apt-get says so" says "no apt-get here"
check "setup: without apt-get is one line" one_line

env PATH="$tools" bash scripts/setup --check | grep -vx -e libgtest-dev -e pkg-config >"$FAKE/installed"
echo pkgconf >>"$FAKE/installed"
setup --check
check "setup: either of two names will do" test "$output" = libgtest-dev

tool apt-get 'echo "$*" >>"$FAKE/calls"; [[ $* == *update ]] && ((FAKE_UPDATE_FAILS)) && exit 100
[[ $* != *install* ]] || for name; do echo "$name" >>"$FAKE/installed"; done'
tool apt-cache 'true'
tool sleep 'true'
tool sudo 'if [[ $1 == -n ]]; then shift; fi; exec "$@"'
export FAKE_UPDATE_FAILS=0
setup
check "setup: installs" exits 0
check "setup: says what it installs, and that it takes a while" says "installing libgtest-dev (several hundred MB"
check "setup: installs nothing else" grep -q 'install --yes --no-install-recommends libgtest-dev$' "$FAKE/calls"
setup
check "setup: silent when all are there" test "$status:$output" = 0:

grep -vx libgtest-dev "$FAKE/installed" >"$FAKE/fewer" && cp "$FAKE/fewer" "$FAKE/installed"
: >"$FAKE/calls"
SETUP=skip setup
check "setup: SETUP=skip does nothing" test "$status:$output:$(cat "$FAKE/calls")" = 0::
FAKE_UPDATE_FAILS=1 setup
check "setup: goes on when update fails" exits 0
check "setup: having tried it twice" test "$(grep -c update "$FAKE/calls")" = 2

# prepare_data
mkdir -p "$folder/data/corpus"
echo mine >"$folder/data/corpus/mine.txt"
run scripts/prepare_data --data "$folder/data"
check "prepare_data: leaves another's corpus alone" test "$status:$(cat "$folder/data/corpus/mine.txt")" = 1:mine
check "prepare_data: says so in one line" one_line
echo '{"bytes": 5}' >"$folder/data/corpus/.complete"
run scripts/prepare_data --data "$folder/data"
check "prepare_data: does nothing when all is there" test "$status:$output" = 0:
echo '{"bytes": 6}' >"$folder/data/corpus/.complete"  # no longer what the stamp counts
rm "$tools/apt-get"
python=$(python3 -c 'import sys; print(sys.executable)')
run env PATH="$tools" "$python" scripts/prepare_data --data "$folder/data"
check "prepare_data: without apt and curl exits 1" exits 1
check "prepare_data: without apt and curl says what to do" says "make data TEXT="
check "prepare_data: leaves nothing half made" test "$(ls -A "$folder/data")" = corpus

echo "$passed passed, $failed failed"
((failed == 0))
