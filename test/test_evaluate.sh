#!/usr/bin/env bash
# --evaluate and --evaluate-every on a tiny model and tiny tasks. Needs build/tokenize and the trainer; `make test`
# builds them. Ends with "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
source test/training.sh

check "a model is trained" runs "$train" "${small[@]}" --total-batch-size 512 --steps 30 --out runs/a
model=runs/a/checkpoints/step_00000030

# Sentences of the corpus, of which the other choices are none; contexts of several lengths; choices of one token and of more.
python3 - <<'END'
import json, random
random.seed(1)
names, verbs = ["cat", "dog", "bird", "model", "layer"], ["sees", "learns", "likes", "forgets"]
with open("animals.jsonl", "w") as file:
    for i in range(12):
        context = "The question: " * (i % 3) + f"the {random.choice(names)} {random.choice(verbs)} the"
        choices = [random.choice(names), "zqxj", "w v" * (1 + i % 2), "éé"]
        gold = i % 4
        choices[0], choices[gold] = choices[gold], choices[0]
        print(json.dumps({"id": f"q{i}", "context": context, "choices": choices, "gold": gold}), file=file)
with open("last.jsonl", "w") as file:
    for noun in names * 2:
        print(json.dumps({"context": f"a {noun} sees a", "choices": ["cat."]}), file=file)
with open("pairs.jsonl", "w") as file:  # a context for each choice
    for noun in names:
        print(json.dumps({"context": [f"the {noun}", "the qqq "], "choices": ["sees the cat", "sees the cat"], "gold": 0}), file=file)
END
evaluate() { "$train" --model $model --seq-len 64 "$@"; }
field() { awk -v task="$1" -v column="$2" '$1 == task { print $column }' last.out; }
column() { python3 -c 'import json,sys; [print(json.loads(l)[sys.argv[2]]) for l in open(sys.argv[1])]' "$@"; }
sums() { column "$1" log_probabilities; }
close() {  # close FILE FILE: the same log-probabilities to 1e-4
    python3 - "$@" <<'END'
import json, sys
a, b = ([x for line in open(path) for x in json.loads(line)["log_probabilities"]] for path in sys.argv[1:])
worst = max(abs(x - y) for x, y in zip(a, b, strict=True))
print(f"expected: a difference up to 1e-4\nfound:    {worst}")
sys.exit(not worst < 1e-4)
END
}

check "tasks are evaluated" runs evaluate --evaluate animals.jsonl last.jsonl pairs.jsonl --evaluate-out a.jsonl
check "a heading and a line each" same "$(wc -l <last.out)" 4
check "with its questions" same "$(field animals 2) $(field last 2) $(field pairs 2)" "12 10 5"
check "and an id for each" same "$(column a.jsonl id | xargs)" "q0 q1 q2 q3 q4 q5 q6 q7 q8 q9 q10 q11 1 2 3 4 5 6 7 8 9 10 1 2 3 4 5"
check "the model tells what it has read" awk -v acc="$(field pairs 3)" 'BEGIN { exit !(acc == 1) }'
check "no run folder is made" test ! -e "runs/$(basename $model)-LNS-1"
check "in batches of 1" runs evaluate --evaluate animals.jsonl,last.jsonl,pairs.jsonl --evaluate-out b.jsonl --batch-size 1
check "it is the same" close a.jsonl b.jsonl
export OMP_NUM_THREADS=1  # how oneDNN splits, and thus rounds, a sum may depend on their number
check "in batches of 5, on 3 ranks" runs ranks 3 "$train" --model $model --seq-len 64 --evaluate animals.jsonl last.jsonl pairs.jsonl --evaluate-out c.jsonl --batch-size 5 --total-batch-size 960
check "too" close a.jsonl c.jsonl
check "and on one" runs evaluate --evaluate animals.jsonl last.jsonl pairs.jsonl --evaluate-out d.jsonl --batch-size 5
check "bit for bit" same "$(sums d.jsonl)" "$(sums c.jsonl)"
unset OMP_NUM_THREADS

# The scores are those of the log-probabilities.
python3 - >expected <<'END'
import json, math
results = [json.loads(line) for line in open("a.jsonl")]
questions = [json.loads(line) for line in open("animals.jsonl")]
def score(length):
    right = [max(range(4), key=lambda i: r["log_probabilities"][i] / length(q["choices"][i], r["tokens"][i])) == q["gold"]
             for q, r in zip(questions, results)]
    mean = sum(right) / len(right)
    return f"{mean:.4f} {math.sqrt(sum((x - mean) ** 2 for x in right) / (len(right) - 1) / len(right)):.4f}"
bits = [-r["log_probabilities"][q["gold"]] / math.log(2) / len(q["choices"][q["gold"]].encode()) for q, r in zip(questions, results)]
print(score(lambda *_: 1), score(lambda c, t: len(c)), score(lambda c, t: len(c.encode())), score(lambda c, t: t), f"{sum(bits) / 12:.4f}")
last = [r for r in results if r["task"] == "last"]
print(f"{sum(r['greedy'][0] for r in last) / len(last):.4f} {math.exp(-sum(r['log_probabilities'][0] for r in last) / len(last)):.4g}")
END
check "acc, acc_norm, acc_bytes, acc_tokens, bits a byte" same \
    "$(evaluate --evaluate animals.jsonl 2>/dev/null | awk 'NR == 2 { print $3, $4, $5, $6, $7, $8, $9, $10, $11 }')" "$(sed -n 1p expected)"
check "last words and their perplexity" same \
    "$(evaluate --evaluate last.jsonl 2>/dev/null | awk 'NR == 2 { print $3, $(NF - 1) }')" "$(sed -n 2p expected)"

# Contexts that are too long lose their beginning, and that is said.
python3 -c 'import json; [print(json.dumps({"context": p + "the cat sees the", "choices": ["dog", "bird likes a dog."], "gold": 0})) for p in ("", "word " * 99)]' >long.jsonl
check "long contexts are cut" runs evaluate --evaluate long.jsonl
check "and counted" contains last.err "long: the contexts of 2 of 4 choices are cut from the left to 64 tokens"

# llm.c's format: the same tokens, the same result. 13 questions, of which the encoder here knows nothing.
python3 - <<'END'
import json, struct
vocab = {word: id for word, id in json.load(open("data/tokenizer.json"))["model"]["vocab"].items()}
ids = lambda text: [vocab["Ġ" if c == " " else c] for c in text]
def write(path, number, bad=0):
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", 20240522, 1, number, 0, *[0] * 252))
        for i in range(3):
            stream = [i, 1, 4, 3, *ids("the")]
            for choice in (" c", " zq", " d", " bird"):
                stream += [len(choice), *ids(choice)]
            file.write(struct.pack(f"<{len(stream) + 2}H", 65535, 2 * len(stream) + 4 + bad, *stream))
write("hellaswag.bin", 3)
write("cut.bin", 4)
write("bad.bin", 3, 2)
END
check "llm.c's HellaSwag" runs evaluate --evaluate hellaswag.bin --evaluate-out h.jsonl
check "is read" same "$(field hellaswag 2) $(sed -n 3p h.jsonl | grep -o '"tokens":[^]]*]')" '3 "tokens":[2,3,2,5]'
check "a file that ends early" status_is 1 "cut.bin: question 3: the file ends within it" evaluate --evaluate cut.bin
check "sizes that do not fit" status_is 1 "bad.bin: question 0: has [0-9]+ bytes, not [0-9]+ as it says" evaluate --evaluate bad.bin

# Mistakes
wrong() {  # wrong WHAT PATTERN LINE
    printf '%s\n' '{"context": "a", "choices": ["b", "c"], "gold": 0}' "$3" >wrong.jsonl
    check "$1" status_is 1 "wrong.jsonl:2: $2" evaluate --evaluate wrong.jsonl
}
wrong "no JSON" "not valid JSON: expected ':' at byte 11, found the end; .*; a question is" '{"context"'
wrong "a byte that is not UTF-8" 'not valid JSON: expected UTF-8 at byte 15, found ' $'{"context": "a\xff", "choices": ["b", "c"], "gold": 0}'
wrong "no object" "not a JSON object" '[]'
wrong "choices that are no list" '"choices": expected a list, found null' '{"context": "a"}'
wrong "a choice that is no text" '"choices", entry 2: expected a string, found a number' '{"context": "a", "choices": ["b", 2], "gold": 0}'
wrong "a context too few" '2 choices, and 1 entries in "context"' '{"context": ["a"], "choices": ["b", "c"], "gold": 0}'
wrong "a gold in two halves" '"gold" is none of 0 to 1' '{"context": "a", "choices": ["b", "c"], "gold": 0.5}'
wrong "no choices" '"choices" is empty' '{"context": "a", "choices": [], "gold": 0}'
wrong "a delimiter that is no text" '"delimiter": expected a string, found a number' '{"context": "a", "choices": ["b", "c"], "gold": 0, "delimiter": 1}'
wrong "no such choice" '"gold" is none of 0 to 1' '{"context": "a", "choices": ["b", "c"], "gold": 2}'
wrong "no context" '"context": expected a string, found null' '{"choices": ["b", "c"], "gold": 1}'
wrong "an empty choice" "choice 1: a choice without any token" '{"context": "a", "choices": ["b", ""], "gold": 1}'
wrong "a choice that is too long" "a choice of [0-9]+ tokens, where the model sees 64" "{\"context\": \"a\", \"choices\": [\"b\", \"$(printf 'z%.0s' {1..200})\"], \"gold\": 1}"
check "no file" status_is 1 "nowhere.jsonl: no such file" evaluate --evaluate nowhere.jsonl
check "no model" status_is 2 "give --model FOLDER" "$train" --evaluate animals.jsonl
check "no tasks to train with" status_is 2 "requires --evaluate" "$train" --evaluate-every 2
check "no place for results" status_is 2 "requires --evaluate" "$train" --evaluate animals.jsonl --evaluate-every 2 --evaluate-out x
mkdir broken
cp $model/{config,tokenizer}.json broken
python3 -c 'import sys; d = open(sys.argv[1], "rb").read(); open("broken/model.safetensors", "wb").write(d[:-4] + b"\xff" * 4)' $model/model.safetensors
check "a broken model" status_is 1 "log-probabilities are NaN: its weights are broken" "$train" --model broken --evaluate animals.jsonl

# In training
check "a run is evaluated as it goes" runs "$train" "${small[@]}" --steps 5 --seq-len 64 --evaluate animals.jsonl last.jsonl --evaluate-every 2 --save-every 4 --out runs/b
evaluations() { grep '"event":"eval"' "$1/log.jsonl"; }
check "every 2 steps and at the end" same "$(evaluations runs/b | sed -E 's/.*"step":([0-9]+),"task":"([a-z]+)".*/\1 \2/' | xargs)" "2 animals 2 last 4 animals 4 last 5 animals 5 last"
check "with what there is" same "$(evaluations runs/b | head -n 2 | sed -E 's/:[^,}]*//g' | cut -d, -f 3-)" \
    '"task","n","acc","acc_stderr","acc_norm","acc_norm_stderr","acc_bytes","acc_bytes_stderr","acc_tokens","acc_tokens_stderr","bits_per_byte","bits_per_byte_stderr","cut"}
"task","n","acc","acc_stderr","bits_per_byte","bits_per_byte_stderr","ppl","ppl_stderr","cut"}'
check "its last checkpoint has the same scores" runs "$train" --model runs/b/checkpoints/step_00000005 --evaluate animals.jsonl
check "to the digits shown" same "$(field animals 11)" "$(evaluations runs/b | tail -n 2 | head -n 1 | sed -E 's/.*"bits_per_byte":([0-9.]+).*/\1/' | xargs printf %.4f)"
check "its config.toml repeats it" runs "$train" --config runs/b/config.toml --out runs/c
check "with its tasks" same "$(evaluations runs/c)" "$(evaluations runs/b)"
rm -r runs/c/checkpoints/step_00000005
sed -i '/"event":"eval","step":4,"task":"last"/,$d' runs/c/log.jsonl  # killed between the lines of two tasks
check "what a kill left out of an evaluation" runs "$train" --config runs/c/config.toml --out runs/c --resume
check "is made up for" same "$(evaluations runs/c | tail -n 3)" "$(evaluations runs/b | tail -n 3)"
check "training is not touched by it" runs "$train" "${small[@]}" --steps 5 --seq-len 64 --save-every 4 --out runs/d
check "in any bit" same "$(losses runs/d)" "$(losses runs/b)"

conclude
