#!/usr/bin/env bash
# What goes wrong while a model is trained: files that vanish, full disks, ranks that hang, signals, two runs in one
# folder. Nothing that was trained is lost. Needs what test_train.sh needs. Ends with "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
source test/training.sh

long=("${small[@]}" --steps 100000 --warmup 2 --schedule constant --eval-every 0)  # ends by what is done to it
steps() { losses "$1" | cut -d' ' -f1 | paste -sd ' '; }
saved() { (cd "$1/checkpoints" && echo step_*); }
last_step() { losses "$1" | tail -n 1 | cut -d' ' -f1; }
start() {  # start NAME COMMAND...: in the background as $!, until it has trained 3 steps
    rm -f "$1.out"
    "${@:2}" >"$1.out" 2>"$1.err" &
    wait_for has_trained "$1.out"
}
has_trained() { (($(grep -c '^step [0-9]*/' "$1") >= 3)); }
ends() {  # ends WHAT PID STATUS: within a minute
    for _ in $(seq 600); do kill -0 "$2" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$2" 2>/dev/null
    wait "$2"
    check "$1" same $? "$3"
}
one_fault() { same "$(grep -c '^train_gpt:' "$1")" 1 && contains "$1" "$2"; }  # one_fault FILE PATTERN
one_of_each() { [[ $(steps "$1") == "$(seq -s ' ' "$(last_step "$1")")" ]] || mismatch "each step once" "$(steps "$1")"; }

# A file that vanishes
cp -r data gone
start val "$train" "${long[@]}" --steps 400 --val "gone/val_*.bin" --out runs/val; pid=$!
mv gone/val_*.bin .
ends "a validation shard that is gone at the end" $pid 1
check "is named" one_fault val.err "cannot open gone/val_000000.bin"
check "after the last step was saved" same "$(saved runs/val)" step_00000400
check "and logged" same "$(last_step runs/val)" 400
mv val_*.bin gone
check "resumed, the run is only validated" runs "$train" --config runs/val/config.toml --resume
check "once" same "$(grep -c '"event":"val","step":400' runs/val/log.jsonl)" 1
check "resumed again" runs "$train" --config runs/val/config.toml --resume
check "not even that" same "$(grep -c '"event":"val","step":400' runs/val/log.jsonl)" 1

vanish=("${long[@]}" --steps 100000 --train "gone/train_*.bin")
start train mpirun --allow-run-as-root --oversubscribe -np 2 "$train" "${vanish[@]}" --out runs/train; pid=$!
mkdir away && mv gone/train_*.bin away
ends "a training shard that is gone" $pid 1
check "is named by one rank" one_fault train.err "rank [01]: cannot open gone/train_"
check "which saves the last step" same "$(saved runs/train)" "$(printf step_%08d "$(last_step runs/train)")"
mv away/* gone && stopped=$(last_step runs/train)
start again mpirun --allow-run-as-root --oversubscribe -np 2 "$train" "${vanish[@]}" --out runs/train --resume; pid=$!
wait_for grep -q "^step $((stopped + 4))/" again.out
kill -USR1 $pid
ends "resumed, and stopped by SIGUSR1 to mpirun" $pid 3
start whole mpirun --allow-run-as-root --oversubscribe -np 2 "$train" "${vanish[@]}" --out runs/whole; pid=$!
wait_for grep -q "^step $((stopped + 4))/" whole.out
kill -USR1 $pid
ends "as one that was not cut short" $pid 3
check "each step is there once" one_of_each runs/train
check "bit for bit" same "$(losses runs/train | head -n $((stopped + 4)))" "$(losses runs/whole | head -n $((stopped + 4)))"

# A disk that is full: from the third step on no file can grow beyond 16 KiB, until it can.
tools=$work
tool limited 'trap "" XFSZ; exec "$@"'  # writes fail, instead of ending the program
start full ./limited "$train" "${long[@]}" --save-every 10 --out runs/full; pid=$!
prlimit --pid $pid --fsize=16384:
wait_for grep -q "log.jsonl.*training goes on" full.err
check "training survives a full disk" contains full.err "step [0-9]*0 is not saved: .*File too large; training goes on"
check "and its log does" same "$(grep -c log.jsonl full.err)" 1
prlimit --pid $pid --fsize=unlimited:
wait_for grep -q "^saved" full.out
kill -TERM $pid
ends "there is room again" $pid 3
check "no line is lost" one_of_each runs/full
check "nor cut" python3 -c 'import json; [json.loads(l) for l in open("runs/full/log.jsonl")]'
check "the last checkpoint is there" test -f "runs/full/checkpoints/$(printf step_%08d "$(last_step runs/full)")/state/trainer.json"
tool narrow 'ulimit -f 16; exec ./limited "$@"'
check "a last checkpoint that cannot be written" status_is 1 "step 10 is not saved: .*File too large$" \
    ./narrow "$train" "${long[@]}" --steps 10 --out runs/last
check "leaves no half one" same "$(ls -A runs/last/checkpoints | wc -l)" 0
mkdir runs/unlogged && ln -s /dev/full runs/unlogged/log.jsonl
check "a log that cannot be written" status_is 1 "log.jsonl: No space left" "$train" "${small[@]}" --resume --out runs/unlogged
mkdir runs/closed && touch runs/closed/checkpoints
check "checkpoints that cannot be written, at the start" status_is 1 "runs/closed/checkpoints: " "$train" "${small[@]}" --out runs/closed
check "before any step" same "$(grep -c '^step [1-9]' last.out)" 0

# A change to a file of the run fails, one after another of some in a run that saves three times. Whatever it was, --resume goes on to the same model.
cat >failing.cpp <<'END'
#include <dlfcn.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <string>

static bool fails(const char* path) {  // the FAILING-th call about a path with "/faulty/"
    static int calls = 0;
    const char* failing = getenv("FAILING");
    if (!failing || !strstr(path, "faulty/") || ++calls != atoi(failing)) return false;
    errno = ENOSPC;
    return true;
}
static bool fails(int file) {
    char path[PATH_MAX] = "";
    return readlink(("/proc/self/fd/" + std::to_string(file)).c_str(), path, sizeof path - 1) > 0 && fails(path);
}
#define WRAP(result, name, parameters, subject, ...)                                        \
    extern "C" result name parameters {                                                     \
        static auto next = reinterpret_cast<result(*) parameters>(dlsym(RTLD_NEXT, #name)); \
        return fails(subject) ? -1 : next(__VA_ARGS__);                                     \
    }
WRAP(ssize_t, write, (int file, const void* data, size_t bytes), file, file, data, bytes)
WRAP(ssize_t, pwrite, (int file, const void* data, size_t bytes, off_t at), file, file, data, bytes, at)
WRAP(int, fsync, (int file), file, file)
WRAP(int, rename, (const char* from, const char* to), from, from, to)
WRAP(int, mkdir, (const char* path, mode_t mode), path, path, mode)
END
faulty=("$train" "${small[@]}" --steps 6 --save-every 2 --eval-every 0 --out faulty/r)
fails_at() {  # fails_at N: the run may end with exit status 1, and goes on with --resume
    local status=0
    rm -rf faulty && mkdir faulty
    LD_PRELOAD=$work/failing.so FAILING=$1 "${faulty[@]}" >last.out 2>last.err || status=$?
    cat last.err >>faults.err
    ((status <= 1)) || { mismatch "exit status 0 or 1" "$status, $(tail -n 5 last.err)"; return; }
    ((status == 0)) || contains last.err '^train_gpt: .*No space left on device' || return
    ((status == 1)) || test -e faulty/r/checkpoints/step_00000006 || mismatch "the last checkpoint" "none" || return
    "${faulty[@]}" --resume >last.out 2>last.err || { mismatch "a resumed run" "$(tail -n 5 last.err)"; return; }
    cmp {faulty,runs}/r/checkpoints/step_00000006/model.safetensors &&
        same "$(steps faulty/r | xargs -n 1 | sort -nu | xargs)" "1 2 3 4 5 6"
}
if ! ldd "$train" | grep -q libasan; then  # which wants to be loaded first
    check "a library whose calls fail" g++ -std=c++20 -shared -fPIC -o failing.so failing.cpp
    check "no call fails" runs "${faulty[@]/faulty/runs}"
    for n in 1 2 15 30 45 60 75; do check "call $n fails" fails_at $n; done
    check "and is said" test "$(grep -c '^train_gpt: .*No space left' faults.err)" -ge 6
fi

# The run's folder
start first "$train" "${long[@]}" --seed 1 --out runs/one; pid=$!
check "a second run in a folder" status_is 1 "runs/one: in use by another run .process $pid on .*: .*--out" "$train" "${small[@]}" --seed 2 --out runs/one
check "is refused" status_is 1 "runs/one: in use by another run" "$train" "${small[@]}" --seed 1 --resume --out runs/one
check "and moves nothing" test ! -e runs/one.old-1
kill -9 $pid && wait $pid 2>"$work/killed"
check "a killed run holds it no more" runs "$train" "${small[@]}" --seed 1 --out runs/one
printf '{"event":"train","st' >>runs/one/log.jsonl
cp runs/one/config.toml before.toml
check "a resume that is refused" status_is 1 "seed" "$train" "${small[@]}" --seed 2 --resume --out runs/one
check "leaves the settings" cmp runs/one/config.toml before.toml
check "one that is not" runs "$train" --config runs/one/config.toml --resume
check "ends the line that was cut" same "$(tail -n 3 runs/one/log.jsonl | head -n 1)" '{"event":"train","st'
check "and says where it goes on" contains runs/one/log.jsonl '^{"event":"start".*"step":8,'

# The clock
check "a run of more than --save-minutes" runs "$train" "${small[@]}" --steps 60 --save-minutes 0.00001 --keep 0 --save-every 20 --out runs/clock
check "keeps what the steps save" same "$(saved runs/clock)" "step_00000020 step_00000040 step_00000060"
check "and saved in between" test "$(grep -c ^saved last.out)" -gt 20
check "a short one" runs "$train" "${small[@]}" --out runs/short
check "saves at the end" same "$(grep -c ^saved last.out)" 1

# Signals
for signal in HUP PIPE; do
    start $signal env --default-signal=HUP "$train" "${long[@]}" --out runs/$signal; pid=$!
    kill -$signal $pid
    ends "SIG$signal ends a run" $pid 3
    check "with a checkpoint" same "$(saved runs/$signal)" "$(printf step_%08d "$(last_step runs/$signal)")"
done
start nohup nohup "$train" "${long[@]}" --out runs/nohup; pid=$!
kill -HUP $pid
at=$(last_step runs/nohup)
check "under nohup a run goes on" wait_for grep -q "^step $((at + 20))/" nohup.out
kill -TERM $pid
ends "until it is stopped" $pid 3
("$train" "${long[@]}" --out runs/head 2>head.err; echo $? >head.status) | head -n 15 >head.out
check "a reader that goes away stops it" same "$(cat head.status)" 3
check "with a checkpoint" same "$(saved runs/head)" "$(printf step_%08d "$(last_step runs/head)")"
"$train" "${small[@]}" --steps 1000 --out runs/early >early.out 2>early.err & pid=$!
wait_for test -e runs/early/.lock
kill -TERM $pid
ends "a signal before the first step" $pid 3
check "is in the log" same "$(tail -n 1 runs/early/log.jsonl)" '{"event":"end","reason":"stopped by SIGTERM"}'
"$train" "${long[@]}" --out runs/mute <&- >&- 2>mute.err & pid=$!
wait_for grep -qs '"step":3,' runs/mute/log.jsonl
check "nothing takes the place of a closed stdout" same "$(readlink /proc/$pid/fd/1)" /dev/null
kill -TERM $pid
ends "a run without one ends as any" $pid 3

# A rank that hangs
start hang mpirun --allow-run-as-root --oversubscribe -np 2 "$train" "${long[@]}" --timeout 3 --out runs/hang; pid=$!
kill -STOP "$(pgrep -P $pid | tail -n 1)"
ends "a rank that hangs ends the run" $pid 1
check "the other says where" contains hang.err "rank 0: step [0-9]*: no progress in 3 s, waiting for the other ranks"

beside() {  # beside "FLAGS OF RANK 1": rank 0 trains
    # shellcheck disable=SC2086
    timeout 60 mpirun --allow-run-as-root --oversubscribe -np 1 "$train" "${small[@]}" --timeout 3 --out runs/beside : \
        -np 1 "$train" "${small[@]}" --timeout 3 --out runs/beside $1 >last.out 2>last.err
    same $? 1
}
check "a rank that only prints --help ends the others" beside --help
check "as does one that only tries" beside --dry-run
check "which is said" contains last.err "rank 0: rank 1 is not as rank 0: dry-run: false on rank 0, true on rank 1"

# What is wrong is found before there is a run
check "too few --probe-tokens" status_is 1 "^train_gpt: --probe-tokens: 5 validation tokens" "$train" "${small[@]}" --probe-every 1 \
    --probe-tokens 5 --out runs/few
check "touch no folder" test ! -e runs/few

# Samples
check "a vocabulary larger than the tokenizer's" runs "$train" "${small[@]}" --vocab 512 --sample-every 1 --out runs/large
check "is sampled" same "$(grep -c '^sample' last.out)" 8

# Names
check "slashes behind the folder's name" runs "$train" "${small[@]}" --steps 1 --out runs/slash//
check "are none of it" runs "$train" "${small[@]}" --steps 1 --out runs/slash/
check "the earlier run is beside it" test -e runs/slash.old-1/log.jsonl
mkdir here && cd here || exit 1
check "the folder one is in" runs "$train" "${small[@]}" --train '../data/train_*.bin' --val '../data/val_*.bin' --steps 1 --out .
check "cannot be moved aside" status_is 1 '^train_gpt: .: the earlier run there cannot be moved aside: .*--out' \
    "$train" "${small[@]}" --train '../data/train_*.bin' --val '../data/val_*.bin' --steps 1 --out .
cd ..
check "a folder that is not UTF-8" status_is 1 'caf.xe9/r: is not UTF-8' "$train" "${small[@]}" --out $'caf\xe9/r'
mkdir latin && printf '{"author": "Andr\xe9"}' >latin/config.json
check "nor is a file" status_is 1 'latin/config.json: not valid JSON near byte' "$train" --model latin --steps 0 --out runs/latin
check "generate() stops at the end of text" contains runs/large/checkpoints/step_00000008/config.json '"eos_token_id": 299'

conclude
