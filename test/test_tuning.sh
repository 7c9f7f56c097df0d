#!/usr/bin/env bash
# Tests scripts/fetch_tuning.py with a server of our own, and what scripts/tune.py refuses and asks; no model is trained.
# Ends with "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
scripts=$PWD/scripts

folder=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null; rm -rf "$folder"' EXIT
cd "$folder" || exit 1

# --- Fetching: as many questions as there are, one too few, other fields, no JSON
python3 - <<'END_PYTHON'
import json, os
os.makedirs("files")
def write(name, rows):
    with open(f"files/{name}", "w", encoding="utf-8") as file:
        json.dump(rows, file)
rows = [{"instruction": f"Is {i} even? é", "input": "", "output": "yes", "answer": "true"} for i in range(170420)]
write("whole.json", rows)
write("short.json", rows[1:])
write("other.json", rows[1:] + [{"question": "a"}])
open("files/page.json", "w").write("<html>")
END_PYTHON
serve files
fetch() { TUNING_URL="http://127.0.0.1:$(<port)/$1" run "$scripts/fetch_tuning.py" --out "$2"; }

fetch whole.json data
check "questions are fetched" exits 0
check "and said" says "data/commonsense170k.jsonl: 170420 questions"
check "a line each" same "$(sed -n 4p data/commonsense170k.jsonl)" \
    '{"instruction": "Is 3 even? é", "input": "", "output": "yes", "answer": "true"}'
check "nothing else is left" same "$(ls data)" "commonsense170k.jsonl"
rm files/whole.json
fetch whole.json data
check "they are not fetched again" exits 0
for bad in "short.json expected 170420 questions in a list, found 170419 in a list" "other.json question 170420: expected texts" \
    "page.json not valid JSON" "gone.json 404"; do
    fetch "${bad%% *}" other
    check "${bad%% *} is refused" exits 1
    check "in words" says "${bad#* }"
    check "and leaves nothing" same "$(ls other | wc -l)" 0
done
check "a missing page says what to do" says "name a mirror in TUNING_URL"

# --- Tuning
tune() { run "$scripts/tune.py" "$@"; }
tune runs/none
check "a run that is none" exits 1
check "is named" says "runs/none: no run: expected its log.jsonl"
check "in one line" one_line
mkdir -p runs/{a,b}/checkpoints
for run in a b; do echo '{"event":"start","norm":"PRE"}' >runs/$run/log.jsonl; done
tune runs/a
check "a run without a checkpoint" says "runs/a: no checkpoint"
mkdir runs/{a,b}/checkpoints/step_00000010
tune runs/a runs/b
check "two runs of one variant" exits 2
echo '{"event":"start","norm":"LNS"}' >runs/b/log.jsonl
echo 1 >runs/a/checkpoints/step_00000010/tokenizer.json
echo 2 >runs/b/checkpoints/step_00000010/tokenizer.json
tune runs/a runs/b
check "two vocabularies" says "another tokenizer than $folder/runs/a"
tune runs/a --questions q.jsonl
check "questions without tasks" exits 2
tune runs/a --lr -1
check "a wrong number" says "expected a number, 0 or more, found '-1'"

mkdir corpus
for i in $(seq 60); do
    printf '5.%d. Heading %d\n\nHere is sentence one of section number %d, long enough. And more.\n\nToo short.\n\nThis is the second one of section number %d, which is asked too.\n' \
        "$i" "$i" "$i" "$i" >"corpus/$i.txt"
done
mkdir made
check "questions are made" python3 - "$scripts" <<'END_PYTHON'
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import tune
questions, task = (list(map(json.loads, open(path))) for path in tune.make_questions(Path("corpus"), Path("made")))
assert len(questions) == 96 and len(task) == 24, (len(questions), len(task))
def number(question, answer):
    asked, sentence = question.split("\n")
    assert answer in asked and "section number " + answer.split()[1] in sentence, question
    return answer
tuned = {number(q["question"], q["answer"]) for q in questions}
asked = {number(q["context"], q["choices"][q["gold"]]) for q in task}
assert len(tuned) == 48 and len(asked) == 12 and not tuned & asked, (tuned, asked)
assert all(len(set(q["choices"])) == 4 for q in task)
assert len({q["gold"] for q in task}) == 4
END_PYTHON

conclude
