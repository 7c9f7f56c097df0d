#!/usr/bin/env bash
# Tests scripts/ on logs and package tools made up here: nothing is installed or fetched.
# shellcheck disable=SC2016  # the made-up tools expand their variables themselves
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

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

# compare
compare() { run scripts/compare.py "$@" --out "$folder/compared"; }
column() { awk -v row="$1" "NR == row { print \$$2 }" <<<"$output"; }  # ROW COLUMN

compare --table "$folder/pre" "$folder/lns"
check "compare: succeeds" exits 0
check "compare: three lines" same "$(wc -l <<<"$output")" 3
check "compare: what tells the variants apart is in the name" says "LNS, lr 0.0005"
check "compare: loss, perplexity, difference" says "3.2500           25.79     -0.2500"
check "compare: a single pair of seeds has no interval" same "$(grep -c '\[' <<<"$output")" 0

# Losses that go up and down by 0.01, and four that do not: one before there are 1000 to compare with, one 6.9 deviations above
# their mean, two far above.
mkdir "$folder/spiky"
awk 'BEGIN { print "{\"event\":\"start\",\"norm\":\"PRE\",\"model\":\"tiny\",\"lr\":0.001,\"seed\":7}"
    for (step = 1; step <= 3000; step++) printf "{\"event\":\"train\",\"step\":%d,\"tokens\":%d,\"loss\":%.4f,\"tokens_per_s\":5}\n", step, step,
        step == 900 || step == 2200 || step == 2201 ? 3.2 : step == 2100 ? 3.069 : 3 + (step % 2 ? 0.01 : -0.01)
    print "{\"event\":\"val\",\"step\":3000,\"loss\":3}\n{\"event\":\"end\",\"reason\":\"done\"}" }' >"$folder/spiky/log.jsonl"
compare --table "$folder/spiky" --export "$folder/spiky.json"
check "compare: spikes over 7 deviations of the last 1000 steps" same "$(column 2 6)" 2
compare --table "$folder/spiky.json"
check "compare: an export keeps their number" same "$(column 2 6)" 2
compare --table "$folder/pre"
check "compare: a run of 40 steps has no such number" same "$(column 2 6)" 1020

compare --table "$folder/pre" "$folder/none"
check "compare: missing log exits 1" exits 1
check "compare: missing log is one line" one_line
check "compare: missing log is named" says "compare: $folder/none/log.jsonl: No such file"

# Tasks: 0.30 +- 0.02 of PRE, 0.32 +- 0.01 and, of another, 0.40 +- 0.01 of LNS.
evaluated() {  # RUN TASK VALUE STDERR [SCORE]
    local score=${5:-acc}
    sed -i "/\"event\":\"end\"/i {\"event\":\"eval\",\"step\":40,\"task\":\"$2\",\"n\":500,\"$score\":$3,\"${score}_stderr\":$4}" "$folder/$1/log.jsonl"
}
log asked PRE 0.001 3.5
log taught LNS 0.001 3.25
for task in piqa sciq; do evaluated asked $task 0.30 0.02; done
evaluated taught piqa 0.32 0.01
evaluated taught sciq 0.40 0.01
evaluated asked lambada 30 3 ppl
evaluated taught lambada 20 4 ppl
compare --table "$folder/asked" "$folder/taught"
check "compare: tasks have a table" exits 0
task_row() { grep "$1, ${2:-acc} *LNS" <<<"$output" | xargs; }
check "compare: a difference within its error is no gain" same "$(task_row piqa)" "piqa, acc LNS 500 0.3200 0.0100 +0.0200 0.0224 within the error"
check "compare: one beyond it is" same "$(task_row sciq)" "sciq, acc LNS 500 0.4000 0.0100 +0.1000 0.0224 gain"
check "compare: of a perplexity the lower one" same "$(task_row lambada ppl)" "lambada, ppl LNS 500 20.0000 4.0000 -10.0000 5.0000 gain"
compare --table --export "$folder/asked.json" "$folder/asked" "$folder/taught"
compare --table "$folder/asked.json"
check "compare: tasks are exported" same "$(task_row sciq)" "sciq, acc LNS 500 0.4000 0.0100 +0.1000 0.0224 gain"
cp -r "$folder/asked" "$folder/wrong"
evaluated wrong piqa '"many"' 0.1
compare --table "$folder/wrong"
check "compare: a score that is no number is named" says "acc of eval: expected a number or null, found \"many\""

# Seeds 1 to 3: PRE ends at 3.0, 3.1, 3.2, LNS always 0.1, 0.2 or 0.3 below.
for seed in 1 2 3; do
    log "p$seed" PRE 0.001 "3.$((seed - 1))"
    log "l$seed" LNS 0.001 "2.9"
    sed -i "s/\"seed\":7/\"seed\":$seed/" "$folder/p$seed/log.jsonl" "$folder/l$seed/log.jsonl"
done
compare --table "$folder"/p[123] "$folder"/l[123]
check "compare: seeds are grouped" same "$(wc -l <<<"$output")" 3
check "compare: mean and spread over seeds" says "3.1000   0.1000"
# Mean -0.2, standard deviation 0.1, t of 2 degrees 4.303: -0.2 +- 4.303 * 0.1 / sqrt(3)
check "compare: paired interval" says "-0.2000  [-0.4484, +0.0484]"
# From 9 at 0 tokens to 2.9 at 40960: 3.1 is reached after 5.9 / 6.1 of them.
check "compare: tokens to the baseline's loss" says "39.6k (1.03x)"
compare --table --baseline LNS "$folder"/p[123] "$folder"/l[123]
check "compare: another baseline comes first" same "$(column 2 1)" LNS
check "compare: which the other does not reach" says "not reached"
compare --table "$folder"/p1 "$folder"/p1
check "compare: a seed given twice is refused" exits 1
check "compare: a seed given twice is one line" one_line

compare --table --export "$folder/few.json" "$folder"/p[123] "$folder"/l[123]
expected=$(head -n 3 <<<"$output")
compare --table "$folder/few.json"
check "compare: exported runs give the same table" same "$output" "$expected"
echo '{"runs":1}' >"$folder/wrong.json"
compare "$folder/wrong.json"
check "compare: another JSON file is said" says "not a file that scripts/compare.py --export wrote"

mkdir "$folder/cut"
head -n 20 "$folder/pre/log.jsonl" >"$folder/cut/log.jsonl"
printf '{"event":"train","step":19,"tok' >>"$folder/cut/log.jsonl"
compare --table "$folder/cut"
check "compare: unfinished run exits 1" exits 1
check "compare: unfinished run is one line" one_line
check "compare: unfinished run is named" says "$folder/cut/log.jsonl: the run has not ended"
compare --table --force "$folder/cut"
check "compare: unless forced" exits 0

mkdir "$folder/other"
sed 's/"seed":7/"seed":7,"seq_len":512/' "$folder/pre/log.jsonl" >"$folder/other/log.jsonl"
compare --table "$folder/pre" "$folder/other"
check "compare: other data is refused" says "seq_len is 512, but None"
sed -i 's/"seed":7,/"seed":7,"log_version":99,/' "$folder/other/log.jsonl"
compare --table "$folder/other"
check "compare: an unknown version of the log is said" says "log version 99, expected 1"

mkdir "$folder/fails"
sed '$d' "$folder/pre/log.jsonl" | sed 's/"norm":"PRE"/"norm":"POST"/' >"$folder/fails/log.jsonl"
echo '{"event":"end","reason":"loss was not finite"}' >>"$folder/fails/log.jsonl"
compare --table "$folder/pre" "$folder/fails"
check "compare: a run whose losses were not finite has diverged" same "$(column 3 NF)" diverged
compare --table "$folder/pre"
check "compare: one that is done has not" same "$(column 2 NF)" "done"
sed -i 's/loss was not finite/\\u001b[31mdisk full/' "$folder/fails/log.jsonl"
compare --table "$folder/pre" "$folder/fails"
check "compare: a run that failed otherwise has no result" exits 1
check "compare: in one line" one_line
check "compare: which says why, and nothing that a terminal obeys" says "the run failed: \\x1b[31mdisk full; go on with"
compare --table --force "$folder/pre" "$folder/fails"
check "compare: forced, its last loss stands, and how it ended" says "failed: \\x1b[31mdisk full"
check "compare: its last loss" same "$(column 3 4)" 3.5000
log infinite POST 0.001 NaN
compare --table "$folder/pre" "$folder/infinite"
check "compare: done with a loss that is not finite has diverged" same "$(column 3 NF)" diverged
log above POST 0.001 12.5
sed -i 's/"seed":7/"seed":7,"vocab":8/' "$folder/above/log.jsonl"
compare --table "$folder/above"
check "compare: a loss above that of guessing has not" same "$(column 2 4):$(column 2 NF)" 12.5000:done

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
compare --table "$folder/cut"
check "compare: resumed run succeeds" exits 0
check "compare: resumed run ends with its own last loss" same "$(column 2 4)" 2.0000
check "compare: the last start counts, though it stands on the cut line" same "$(column 2 2)" 0.002

# Resumed at step 10, which its start says, and stopped before a step was done.
mkdir "$folder/resumed"
{
    sed '$d' "$folder/pre/log.jsonl"
    echo '{"event":"start","norm":"PRE","lr":0.001,"seed":7,"step":10}'
} >"$folder/resumed/log.jsonl"
compare --diff "$folder/pre" "$folder/resumed"
check "compare: what was logged behind the step of a later start does not count" \
    says "training loss: the same in all 10 common steps, up to step 10"
check "compare: nor the validation there" says "validation loss: the same in all 1 common steps, up to step 0"

mkdir "$folder/again"
{ cat "$folder/pre/log.jsonl"; head -n 1 "$folder/pre/log.jsonl"; } >"$folder/again/log.jsonl"
compare --table "$folder/again"
check "compare: a run that goes on after its end has not ended" says "has not ended"

sed '$d' "$folder/pre/log.jsonl" >"$folder/again/log.jsonl"
echo '{"event":"end","reason":"stopped by SIGTERM"}' >>"$folder/again/log.jsonl"
compare --table "$folder/again"
check "compare: nor has one that was stopped" says "has not ended (stopped)"

# What runs/* names beside runs: the comparison's own files, a sweep's, and what was moved aside.
mkdir -p "$folder/glob/"{compared,sweep,empty}
cp -r "$folder/pre" "$folder/glob/a b[1]"
cp -r "$folder/pre" "$folder/glob/a b[1].old-1"
touch "$folder/glob/"{demo.png,PRE-seed1.txt,compared/report.html,sweep/.flags}
few=''
for again in first second; do
    compare --table --export "$folder/glob/few.json" "$folder/glob/"*
    check "compare: RUNS/* with what is no run, $again time" same "$status:$(column 3 4)" 0:3.5000
    check "compare: which is named in one line, $again time" same "$(head -n 1 <<<"$output")" "compare: left out, being no \
runs, moved aside or written here: $(printf '%s, ' "$folder/glob/"{PRE-seed1.txt,'a b[1].old-1',compared,demo.png,empty}\
)${few:+$few, }$folder/glob/sweep"
    few=$folder/glob/few.json
done
compare --table "$folder/glob/empty"
check "compare: nothing but that is an error" same "$status:${output##*$'\n'}" "1:compare: no runs among what is named"
compare --diff "$folder/glob/a b[1]" "$folder/glob/a b[1].old-1"
check "compare: --diff takes one that was moved aside" says "the same in all 40 common steps"
ln -s "$folder/pre" "$folder/glob/link"
compare --table "$folder/glob/link"
check "compare: a link to a run" exits 0
weird=$folder/glob/$'\e[31m\xff <b>$\\frac{"'
cp -r "$folder/pre" "$weird"
compare --table "$folder/pre" "$weird"
check "compare: the same seed twice: both paths, harmless to a terminal" same "$status:$output" "1:compare: \
$folder/pre/log.jsonl, $folder/glob/\\x1b[31m\\xff <b>\$\\frac{\"/log.jsonl: the same setting and the same seed 7; name one of them"

# Damaged logs: one line each, which names the place.
mkdir "$folder/damaged"
damaged() {  # WHAT LINE EXPECTED: the log with that line behind its fourth
    sed "4a $2" "$folder/pre/log.jsonl" >"$folder/damaged/log.jsonl"
    compare --table "$folder/damaged"
    check "compare: $1: exits 1" exits 1
    check "compare: $1: one line" one_line
    check "compare: $1: says where, and what" says "compare: $folder/damaged/log.jsonl:5: $3: was it"
}
damaged "no step" '{"event":"train","loss":1}' "step of train: expected a whole number, found nothing"
damaged "a step of another type" '{"event":"val","step":"4","loss":1}' 'step of val: expected a whole number, found "4"'
damaged "a loss that is a list" '{"event":"val","step":4,"loss":[1]}' "loss of val: expected a number or null, found [1]"
damaged "a number beyond all" '{"event":"val","step":4,"loss":1'"$(printf '0%.0s' {1..400})}" \
    "loss of val: expected a number or null, found 1$(printf '0%.0s' {1..39})"
damaged "a learning rate that is null" '{"event":"start","norm":"PRE","lr":null}' \
    "lr of start: expected a number or null, found null"
damaged "a probe that is no list" '{"event":"probe","step":4,"variance":["a"]}' \
    'variance of probe: expected a list of numbers, found ["a"]'
damaged "a reason that is no text" '{"event":"end","reason":5}' "reason of end: expected a text, found 5"
{ sed '4a {"event":"tr\n\n[[[' "$folder/pre/log.jsonl"; printf '{"event":"va'; } >"$folder/damaged/log.jsonl"
compare --table "$folder/damaged"
check "compare: lines that are no events are passed over, with a line; the last may be cut" \
    same "$status:$(head -n 1 <<<"$output")" "0:compare: $folder/damaged/log.jsonl: passed over what is no event: 2 lines, the first is line 5"
sed '/"val"/d' "$folder/pre/log.jsonl" >"$folder/damaged/log.jsonl"
compare --table "$folder/damaged"
check "compare: a run without validation: one line" same "$status:$output" \
    "1:compare: $folder/damaged/log.jsonl: no validation loss"
compare --table --force "$folder/damaged" "$folder/lns"
check "compare: forced, it is left out, with a line" same "$status:$(head -n 1 <<<"$output")" \
    "0:compare: $folder/damaged/log.jsonl: left out, no validation loss yet (done)"
: >"$folder/damaged/log.jsonl"
compare --table "$folder/damaged"
check "compare: an empty log: one line" same "$status:$output" "1:compare: $folder/damaged/log.jsonl: no start event"
for flag in "--every -1" "--tolerance nan" "--nonsense" "--tab"; do
    # shellcheck disable=SC2086
    compare $flag "$folder/pre"
    check "compare: $flag: exits 2" exits 2
    check "compare: $flag: one line" one_line
done
compare --table --baseline "$folder/lns" "$folder/pre" "$folder/lns"
check "compare: the baseline by a run's path" same "$(column 2 1)" "LNS,"

# compare --diff
mkdir "$folder/changed"
sed '/"step":33,/ s/"loss":5.5/"loss":5.5001/; /"step":36,/ s/"loss":5.5/"loss":5.75/' "$folder/pre/log.jsonl" \
    >"$folder/changed/log.jsonl"
compare --diff "$folder/pre" "$folder/pre"
check "diff: a run does not differ from itself" says "training loss: the same in all 40 common steps"
compare --diff "$folder/pre" "$folder/changed"
check "diff: the first step that differs" says "training loss: first differs at step 33: 5.5 and"
check "diff: the first beyond the tolerance" says "differs by more than 0.001 first at step 36: 5.5 and"
compare --diff "$folder/pre" "$folder/lns" --tolerance 0.5
check "diff: the validation losses differ, but not by that much" says "differs by more than 0.5 at no step"

# compare's pictures; a name from a log is no formula and no markup
sed -i 's/"norm":"LNS"/"norm":"$\\\\frac{<script>$"/' "$folder"/l[123]/log.jsonl
for run in p1 p2 p3; do evaluated $run piqa 0.30 0.02; done
for run in l1 l2 l3; do evaluated $run piqa 0.32 0.01; done
compare "$folder"/p[123] "$folder"/l[123]
if says "no Python here has matplotlib" >/dev/null; then
    check "pictures: without matplotlib exits 1" exits 1
else
    check "pictures: succeeds" exits 0
    check "pictures: names the page" says "$folder/compared/report.html"
    check "pictures: writes a PNG" same "$(head -c 4 "$folder/compared/loss.png" | tail -c 3)" PNG
    check "pictures: the page holds the picture" contains "$folder/compared/report.html" 'src="data:image/png;base64,iVBOR'
    check "pictures: and needs no network" same "$(grep -c -E 'https?://' "$folder/compared/report.html")" 0
    check "pictures: and has the tasks with their errors" contains "$folder/compared/report.html" \
        '<td>0.3200</td><td>0.0100</td><td>+0.0200</td><td>0.0224</td><td>within the error</td>'
    check "pictures: nothing is drawn of what was not logged" test ! -e "$folder/compared/variance.png"
    check "pictures: a hostile name stays text in it" same "$(grep -c '<script' "$folder/compared/report.html")" 0
    check "pictures: the table is printed once" same "$(grep -c '^variant' <<<"$output")" 1

    # What the last probes say: of PRE's 4 blocks the deeper 2 cost 0.1 and 0.3; LNS's overflowed in part.
    cp -r "$folder/pre" "$folder/probed" && cp -r "$folder/lns" "$folder/overflowed"
    probed='"loss":3.5,"variance":[1,2,4,8,16],"prune_loss":[9,8,3.6,3.8],"lens_kl":[5,4,2,1,0],"lens_top":[0,0,0,0.5,1],'
    probed+='"prune_effect":[[0,0.5,0.2,0.1],[0,0,0.3,0.2],[0,0,0,0.4],[0,0,0,0]],'
    probed+='"angular":[[0,0.5,1,1,1],[0,0,0.5,1,1],[0,0,0,0.1,1],[0,0,0,0,0.2],[0,0,0,0,0]]'
    sed -i "s/\"event\":\"probe\",/&$probed,/" "$folder/probed/log.jsonl"
    overflowed='"loss":null,"variance":[1,2,4,8,null],"prune_loss":[9,8,null,4]'
    sed -i "s/\"event\":\"probe\",/&$overflowed,/" "$folder/overflowed/log.jsonl"
    compare "$folder/probed" "$folder/overflowed"
    check "findings: the runs compare" exits 0
    check "pictures: the effect of a block on later ones" test -s "$folder/compared/effect.png"
    check "pictures: the logit lens" test -s "$folder/compared/lens.png"
    check "findings: variance" says "after the last: PRE, lr 0.001 2 to 16, 8 times."
    check "findings: pruning" says "(nats per token): PRE, lr 0.001 0.2."
    check "findings: angular distance" says "1 = opposite): PRE, lr 0.001 0.15."
    check "findings: stand on the page" contains "$folder/compared/report.html" "2 to 16, 8 times"
    cat >"$folder/labels.py" <<'END'
import sys
from pathlib import Path
sys.path.insert(0, "scripts")
import run_log, run_plots
groups = run_log.grouped(run_log.read_runs(Path(sys.argv[1])))
for name, _, _, draw in run_plots.FIGURES:
    if figure := draw(groups, groups[0]):
        figure.canvas.draw()
        labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels(which="both")]
        print(name, *[label for label in labels if label])
END
    sed -i '/"event":"train","step":20,/a {"event":"probe","step":20,"variance":[1,1,1,1,1]}' "$folder/probed/log.jsonl"
    run python3 "$folder/labels.py" "$folder/probed"
    check "pictures: logarithmic axes have numbers, no formulas" says "variance 0.01 0.1 1 10 100 1000"
    check "pictures: one with logarithmic colours is among them" says "variance_over_time "
    check "pictures: none has" same "$(grep -c '\$' <<<"$output")" 0

    # A Python without matplotlib, or with a PYTHONPATH that spoils it, before Debian's
    mkdir "$folder/without"
    echo 'raise ImportError' >"$folder/without/matplotlib.py"
    if /usr/bin/python3 -c 'import matplotlib' 2>/dev/null; then
        PYTHONPATH=$folder/without compare "$folder/pre"
        check "pictures: another Python comes first: Debian's draws" exits 0
    fi
    PYTHONPATH=$folder/without RUN_PLOTS_PYTHON=tried compare "$folder/pre"
    check "pictures: nowhere matplotlib: one line that says what to type" same "$status:$output" "1:compare: no Python here \
has matplotlib: run scripts/setup.sh, or python3 -m pip install matplotlib"

    # The depth study's order of work, with a trainer that only writes a log: each variant has a best learning rate, from
    # which the loss rises by the logarithm. Of the long runs it is this many times that of the short ones.
    study=$folder/order
    tools=$study/tools
    mkdir -p "$tools"
    tool make '[[ $* =~ NORM=([A-Z_]*) && $DEVICE-$PRECISION == cpu-fp32 ]] &&
        echo "build/cpu-fp32-${BASH_REMATCH[1]}/train_gpt"'
    while read -r norm best long; do
        mkdir -p "$study/build/cpu-fp32-$norm"
        cat >"$study/build/cpu-fp32-$norm/train_gpt" <<END
#!/usr/bin/env bash
norm=$norm best=$best long=$long
END
        cat >>"$study/build/cpu-fp32-$norm/train_gpt" <<'END'
while (($#)); do
    case $1 in
    --layers) layers=$2 ;; --steps) steps=$2 ;; --lr) lr=$2 ;; --seed) seed=$2 ;; --out) out=$2 ;; --init) init=$2 ;;
    --warmup) warmup=$2 ;; --save-every) stage=$2 ;;
    esac
    shift
done
if [[ ${BREAK:-} ]]; then echo "train_gpt: no data"; exit 1; fi
echo "$norm $layers $lr $seed $steps $init $warmup" >>calls
mkdir -p "$out"
echo "lr = $lr" >"$out/config.toml"
((steps > 976)) || long=1
loss=$(awk -v lr="$lr" -v best="$best" -v long="$long" -v seed="$seed" -v shift=$(((${#norm} - 3) * (steps > 976 ? 1 : 2))) \
    'BEGIN { d = log(lr / best / long); print 2 + seed * seed * (1 + 0.1 * shift) / 100 + (d < 0 ? -d : d) }')
# With 48 blocks LNS is worse, by seed / 100.
[[ "$norm $layers" != "LNS 48" ]] || loss=$(awk "BEGIN { print $loss + $seed / 100 }")
# Before the end what is not PRE is worse, by seed / 1000 for each stage that is left.
on_the_way=($(awk -v loss="$loss" -v left=$((steps / stage)) -v more=$([[ $norm == PRE ]] || echo "$seed") \
    'BEGIN { while (left-- > 0) print loss + more * left / 1000 }'))
numbers=$(printf '0.5,%.0s' $(seq "$layers")) numbers=[${numbers%,}]
# After block 1 the seeds' variances are 0.1, 1 and 10.
probe='"loss":'$loss',"variance":[0.1,1e'$((seed - 2))${numbers#[0.5}',"max_abs":[1,'${numbers#[}',
    "variance_attention":'$numbers',"variance_first":[1,'${numbers#[}',"variance_largest":[1,'${numbers#[}',"prune_loss":'$numbers',
    "prune_last_loss":'$numbers',"lens_kl":[1,'${numbers#[}',"jacobian":'$numbers',"effective_depth":3'
header='{"model.embed_tokens.weight":{"shape":[2]}'
for ((block = 0; block < layers; block++)); do
    for kind in input post_attention; do
        offsets=0,8
        [[ $kind == input ]] || offsets=8,16
        header+=',"model.layers.'$block.$kind'_layernorm.weight":{"dtype":"F32","shape":[2],"data_offsets":['$offsets']}'
    done
done
header+='}'
{
    echo '{"event":"start","norm":"'$norm'","layers":'$layers',"lr":'$lr',"seed":'$seed',"steps":'$steps',"init":"'$init'",
        "warmup":'$warmup',"total_batch_size":2048}' | tr -d '\n' && echo
    for ((step = stage; step <= steps; step += stage)); do
        echo '{"event":"train","step":'$step',"tokens":'$((step * 2048))',"loss":3,"tokens_per_s":1000}'
        echo '{"event":"val","step":'$step',"loss":'${on_the_way[step / stage - 1]}'}'
        echo '{"event":"probe","step":'$step','$probe'}' | tr -d '\n' && echo
        if [[ $norm == LNS ]] && ((step == stage)); then  # stopped here, and resumed
            echo '{"event":"val","step":'$((step + 12))',"loss":'$loss'}'
            echo '{"event":"probe","step":'$((step + 12))','$probe'}' | tr -d '\n' && echo
        fi
        folder=$(printf '%s/checkpoints/step_%08d' "$out" $step)
        mkdir -p "$folder"
        {
            # Eight bytes of the header's length, the header, the numbers 1 and 3, twice 1/16
            printf "\\x$(printf %x $((${#header} % 256)))\\x$(printf %x $((${#header} / 256)))\\0\\0\\0\\0\\0\\0%s" "$header"
            printf '\0\0\x80\x3f\0\0\x40\x40\0\0\x80\x3d\0\0\x80\x3d'
        } >"$folder/model.safetensors"
    done
    echo '{"event":"end","reason":"done"}'
} >"$out/log.jsonl"
END
        chmod +x "$study/build/cpu-fp32-$norm/train_gpt"
    done <<'END'
PRE 0.004 0.5
LNS 0.008 2
LNS_INIT 0.002 0.5
PRORES 0.001 0.5
KEEL 0.0005 0.5
DEEPNORM 0.002 0.5
PERI 0.002 0.5
END
    depth_study() { run env -C "$study" PATH="$tools:$PATH" "$@" python3 "$PWD/scripts/depth_study.py" --jobs 2 --results results; }
    calls() { grep -c -E "$1" "$study/calls"; }
    depth_study BREAK=1
    check "study: a trainer that fails exits 1" exits 1
    depth_study
    check "study: works through" exits 0
    check "study: five rates on 2M bytes" same "$(calls '^(PRE|LNS|LNS_INIT) 24 .* 1 976 normal 98$')" 15
    check "study: and three seeds at the best of them" same \
        "$(calls '^(PRE 24 0.004|LNS 24 0.008|LNS_INIT 24 0.002) [123] 976 normal 98$')" 9
    check "study: five rates of the others too" same "$(calls '^(PRORES|KEEL|DEEPNORM|PERI) 24 .* 1 976 normal 98$')" 20
    check "study: on 20M the half of the best of these, and both its neighbours" same \
        "$(grep -E '^PRE 24 .* 1 9760 normal 976$' "$study/calls" | cut -d' ' -f3 | sort | xargs)" "0.001 0.002 0.004"
    check "study: and upwards to the best with both, where the grid ends" same \
        "$(grep -E '^LNS 24 .* 1 9760 normal 976$' "$study/calls" | cut -d' ' -f3 | sort | xargs)" "0.002 0.004 0.008 0.016 0.032"
    check "study: three seeds at the best" same \
        "$(calls '^(PRE 24 0.002|LNS 24 0.016|LNS_INIT 24 0.001) [123] 9760 normal 976$')" 9
    check "study: 48 blocks" same "$(calls '^(PRE 48 0.002|LNS 48 0.016) [12] 9760 normal 976$')" 4
    check "study: scaled initialization" same "$(calls '^(PRE 24 0.002|LNS 24 0.016) [12] 9760 scaled 976$')" 4
    check "study: shorter and longer warm-up" same "$(calls '^(PRE|LNS) 24 0.00[48] 1 976 normal (10|488)$')" 8
    check "study: the others at the half of their short runs' best, and both its neighbours" same \
        "$(grep -E '^(PRORES|KEEL) 24 .* 1 9760 normal 976$' "$study/calls" | cut -d' ' -f3 | sort -g | xargs)" \
        "0.000125 0.00025 0.00025 0.0005 0.0005 0.001"
    check "study: three seeds of the best of these" same "$(calls '^KEEL 24 0.00025 [123] 9760 normal 976$')" 3
    check "study: and nothing else" same "$(calls .)" 88
    check "study: keeps the norms' gains" contains "$study/results/runs/PRE-24-0.002-1-20M.json" \
        '"976":{"model.layers.0.input_layernorm.weight":\[1.0,2.0,3.0\],'
    check "study: and the settings" same "$(cat "$study/results/runs/PRE-24-0.002-1-20M.toml")" "lr = 0.002"
    check "study: and the last checkpoint" same "$(ls "$study/runs/depth_cpu/PRE-24-0.002-1-20M/checkpoints")" step_00009760
    rm "$study"/results/runs/{PRE-48-0.002-1-20M,LNS-24-0.008-1-2M}.json
    depth_study
    check "study: started again, trains what is missing" same "$(calls .)" 90
    # LNS_INIT's losses are PRE's + 0.005 seed^2: differences 0.005, 0.02, 0.045; after the short runs twice these.
    check "study: differences by seed, with interval and p" contains "$study/results/tables.md" \
        '| +0.0233 | \[-0.0269, +0.0735\] | 0.18[34] |'
    check "study: of LNS_INIT to LNS too" contains "$study/results/tables.md" '| mean | difference to LNS |'
    check "study: and how they change with the length of the runs" contains "$study/results/tables.md" \
        '^| LNS_INIT | the end of runs of 2M bytes | -0.0233 | \[-0.0735, +0.0269\] | 0.18[34] |'
    check "study: and on the way" contains "$study/results/tables.md" \
        '^| LNS | 5M bytes of the same runs | -0.0300 | \[-0.0673, +0.0073\] | 0.074 |'
    check "study: 48 blocks beside 24" contains "$study/results/tables.md" '^| PRE, 24 blocks | 0.002 | 2.0100, 2.0400, 2.0900 |'
    check "study: after half of the run too" contains "$study/results/tables.md" '^| 10M bytes | PRE, 24 blocks |'
    check "study: and what they change, seed by seed" contains "$study/results/tables.md" \
        '^| LNS less PRE | +0.0150 | \[-0.0485, +0.0785\] | 0.205 |'
    check "study: scaled initialization beside normal" contains "$study/results/tables.md" '^| 20M bytes | LNS, normal init |'
    check "study: intervals of what is many times another by factors" contains "$study/results/tables.md" \
        '^| PRE, lr 0.002 | 2.0467 | 1 \[0.00328, 305\] |'
    check "study: of the others by their difference" contains "$study/results/tables.md" \
        '^| 20M bytes | PRE | 2.0467 |  |  | -1.547 ± 0.1 |'
    check "study: gains over their start" contains "$study/results/tables.md" \
        '^| LNS_INIT | attention | 2 ± 0 | 2.828 ± 0 |.*| 0 ± 0 |$'
    check "study: and how many are nearly gone" contains "$study/results/tables.md" '^| LNS_INIT | MLP |.*| 10 ± 0 |$'
    for picture in on_the_way other_norms blocks_48 scaled_init; do
        check "study: draws $picture" test -s "$study/results/$picture.png"
    done

    run scripts/depth_cpu.sh --report --results "$study/results"
    check "study: the report from the runs alone" exits 0
    echo '{"runs":[{"name":"PRE","events":[{"event":"start","norm":"PRE"}]}]}' >"$study/results/runs/PRE.json"
    run scripts/depth_cpu.sh --report --results "$study/results"
    check "study: a file that lacks what it takes: one line" one_line
    check "study: which names it" says "depth_study: $study/results/runs/PRE.json: expected one run with its speed, layers,"
    rm "$study"/results/runs/*
    run scripts/depth_cpu.sh --report --results "$study/results"
    check "study: without runs: one line" same "$status:$output" \
        "1:depth_study: $study/results/runs: no finished run yet; scripts/depth_cpu.sh makes them"
    if compgen -G 'dev/results/depth_cpu/runs/*.json' >/dev/null; then
        mkdir "$folder/study"
        cp -r dev/results/depth_cpu/runs "$folder/study"
        run scripts/depth_cpu.sh --report --results "$folder/study"
        check "study: the committed tables are those of the committed runs" cmp "$folder/study/tables.md" \
            dev/results/depth_cpu/tables.md
    fi
fi

# What every script does with --help, and with an argument that it does not know: nothing, on programs that only note that
# they were called.
tools=$folder/untouched
mkdir "$tools"
export CALLED=$folder/called
: >"$CALLED"
for program in make apt-get nvcc nvidia-smi curl mpirun srun scontrol sudo; do tool "$program" 'echo "$0 $*" >>"$CALLED"'; done
started() { run env PATH="$tools:$PATH" "$@"; }
here() { ls -d build data runs train_gpt 2>/dev/null; echo always; }
was_here=$(here)
for script in scripts/*.{py,sh,sbatch} dev/*.sh dev/*/*.sh; do
    interpreter=bash arguments=()
    if [[ $script == *.py ]]; then
        grep -q __main__ "$script" || continue  # a library
        interpreter=python3
    fi
    started $interpreter "$script" --help
    check "$script --help: exits 0" exits 0
    check "$script --help: says what it is for" test "$(grep -c . <<<"$output")" -ge 2
    check "$script --help: no code" same "$(grep -c -E 'set -|import |#SBATCH|^#' <<<"$output")" 0
    case $script in
        dev/bench/norm_cost.sh) continue ;;  # its arguments are the trainer's
        *compare.py) arguments=("$folder/pre") ;;
        *fetch_data.py) arguments=(c4) ;;
        *paper_run.py) arguments=(name --) ;;
    esac
    started $interpreter "$script" "${arguments[@]}" --wr$'\e[1m'ong
    check "$script --wrong: exits 2" exits 2
    check "$script --wrong: one line" one_line
    check "$script --wrong: names it" says '--wr'
    [[ $interpreter == bash ]] || check "$script --wrong: harmlessly" says '--wr\x1b[1mong'
done
check "scripts: nothing was called" same "called:$(cat "$CALLED")" called:
check "scripts: nothing was made" same "$(here)" "$was_here"
started bash scripts/slurm_train.sbatch
check "slurm_train outside of Slurm: exits 2" exits 2
check "slurm_train outside of Slurm: one line" one_line
started bash dev/fuzz/run.sh
check "fuzz without a target: exits 2" exits 2
started python3 scripts/paper_run.py
check "paper_run alone: exits 2" same "$status:$output" "2:paper_run: called by scripts/table1_*.sh and \
scripts/pretrain_7b.sh: start one of those"
if make --silent -n trainer DEVICE=cpu NORM=PRE DEBUG=0 >"$folder/said" 2>&1; then
    check "make trainer: says where it is" same "$(tail -n 1 "$folder/said")" "echo build/cpu-fp32-PRE/train_gpt"
    check "make trainer: leaves ./train_gpt alone" same "$(grep -c 'ln ' "$folder/said")" 0
fi

# setup, on a machine of our own making: PATH holds these tools only. `installed` lists the packages that are there.
tools=$folder/tools
mkdir "$tools"
for tool in bash env cat grep; do ln -s "$(command -v "$tool")" "$tools/$tool"; done
export FAKE=$folder/fake
mkdir "$FAKE"
setup() { run env PATH="$tools" SETUP="${SETUP:-}" bash scripts/setup.sh "$@"; }

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
setup a-package --wrong
check "setup: behind a package too" same "$status:$output" "2:setup: unknown argument '--wrong'; see scripts/setup.sh --help"
setup
check "setup: without apt-get exits 1" exits 1
check "setup: without apt-get says so" says "no apt-get here"
check "setup: without apt-get is one line" one_line

env PATH="$tools" bash scripts/setup.sh --check | grep -vx -e libgtest-dev -e pkg-config >"$FAKE/installed"
echo pkgconf >>"$FAKE/installed"
setup --check
check "setup: either of two names will do" same "$output" libgtest-dev

tool apt-get 'echo "$*" >>"$FAKE/calls"; [[ $* == *update ]] && ((FAKE_UPDATE_FAILS)) && exit 100
[[ $* != *install* ]] || for name; do echo "$name" >>"$FAKE/installed"; done'
tool apt-cache 'true'
tool sleep 'true'
tool sudo 'if [[ $1 == -n ]]; then shift; fi; exec "$@"'
export FAKE_UPDATE_FAILS=0
setup
check "setup: installs" exits 0
check "setup: says what it installs, and that it takes a while" says "installing libgtest-dev (several hundred MB"
check "setup: installs nothing else" contains "$FAKE/calls" 'install --yes --no-install-recommends libgtest-dev$'
setup
check "setup: silent when all are there" same "$status:$output" 0:

setup another
check "setup: installs what else is asked for" contains "$FAKE/calls" 'install --yes --no-install-recommends another$'

grep -vx libgtest-dev "$FAKE/installed" >"$FAKE/fewer" && cp "$FAKE/fewer" "$FAKE/installed"
: >"$FAKE/calls"
SETUP=skip setup
check "setup: SETUP=skip does nothing" same "$status:$output:$(cat "$FAKE/calls")" 0::
FAKE_UPDATE_FAILS=1 setup
check "setup: goes on when update fails" exits 0
check "setup: having tried it twice" same "$(grep -c update "$FAKE/calls")" 2

# prepare_data
mkdir -p "$folder/data/corpus"
echo mine >"$folder/data/corpus/mine.txt"
run scripts/prepare_data.py --data "$folder/data"
check "prepare_data: leaves another's corpus alone" same "$status:$(cat "$folder/data/corpus/mine.txt")" 1:mine
check "prepare_data: says so in one line" one_line
echo '{"bytes": 5}' >"$folder/data/corpus/.complete"
run scripts/prepare_data.py --data "$folder/data"
check "prepare_data: does nothing when all is there" same "$status:$output" 0:
echo '{"bytes": 6}' >"$folder/data/corpus/.complete"  # no longer what the stamp counts
rm "$tools/apt-get"
python=$(python3 -c 'import sys; print(sys.executable)')
run env PATH="$tools" "$python" scripts/prepare_data.py --data "$folder/data"
check "prepare_data: without apt and curl exits 1" exits 1
check "prepare_data: without apt and curl says what to do" says "make data TEXT="
prose() { python3 -c 'import sys; sys.path.insert(0, "scripts"); import prepare_data; print(prepare_data.documents_of(sys.stdin.read()))'; }
sentence=$(printf 'All of this is %.0s' {1..100})
check "prepare_data: takes headings and sentences, no code, tables or lists of names" same \
    "$(prose <<<"<h1>One</h1><p>$sentence so.</p><p>(It is &ldquo;so.&rdquo;)</p><pre>code.</pre><table><tr><td>cell.</td></tr></table>
<ul><li>a name</li></ul><h1>Two</h1><p>Short.</p>")" "['One\\n\\n${sentence}so.\\n\\n(It is “so.”)\\n']"
check "prepare_data: leaves nothing half made" same "$(ls -A "$folder/data")" corpus

conclude
