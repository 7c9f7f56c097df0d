#!/usr/bin/env bash
# The trainer as a user runs it: command line, log, checkpoints, resume, ranks, errors. Needs build/tokenize and the
# trainers named below; `make test` builds them. Ends with "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1
source test/checks.sh
source test/training.sh

ranks_say() { ! ranks "${@:2}" >last.out 2>last.err && contains last.err "$1"; }  # ranks_say PATTERN N COMMAND...: and fail
near() {  # near FOUND EXPECTED TOLERANCE: lists of numbers, equal to a relative tolerance
    /usr/bin/env awk -v a="$1" -v b="$2" -v t="$3" 'BEGIN {
        n = split(a, x); m = split(b, y); if (n == 0 || n != m) exit 1
        for (i = 1; i <= n; i++) { d = x[i] - y[i]; if (d < 0) d = -d; if (d > t * (y[i] < 0 ? -y[i] : y[i])) exit 1 }
    }' || mismatch "$2, to a relative $3" "${1:-nothing}"
}
fall() {  # fall LOSSES BY: the last is lower than the first, by more than that
    awk -v losses="$1" -v by="$2" 'BEGIN { n = split(losses, loss); exit !(n && loss[n] < loss[1] - by) }' ||
        mismatch "a fall by more than $2" "${1:-nothing}"
}

# A run and its log
check "a run ends well" runs "$train" "${small[@]}" --save-every 4 --out runs/a --sample-every 8 --prompt "the cat"
check "it prints a sample" contains last.out "^sample: the cat"
check "every step is logged" same "$(losses runs/a | cut -d' ' -f1 | xargs)" "1 2 3 4 5 6 7 8"
check "validation at start, every 4 steps and the end" same "$(grep -o '"event":"val","step":[0-9]*' runs/a/log.jsonl | grep -o '[0-9]*$' | xargs)" "0 4 8"
check "the log begins and ends" same "$(head -n 1 runs/a/log.jsonl | cut -d , -f 1,2) $(tail -n 1 runs/a/log.jsonl)" \
    '{"event":"start","norm":"LNS" {"event":"end","reason":"done"}'
check "the log is JSON" python3 -c 'import json; [json.loads(l) for l in open("runs/a/log.jsonl")]'
check "and says what compare.py groups by" contains runs/a/log.jsonl '"family":"llama",.*"init":"normal",.*"warmup":2,"schedule":"cosine","weight_decay":0.1,.*"train_tokens":[0-9]*,"val_tokens":1000,"doc_mask":false,"pack":"stream",.*"log_version":1'
# In most of the eight steps: on a machine with other work a thread may get no core in time.
check "the reading thread is ahead of training" test "$(grep -c '"event":"train".*"data_wait_ms":0}' runs/a/log.jsonl)" -ge 5
check "the model learns" fall "$(losses runs/a | cut -d ' ' -f 2 | xargs)" 0.3
check "checkpoints are there" test -f runs/a/checkpoints/step_00000004/model.safetensors -a -f runs/a/checkpoints/step_00000008/state/trainer.json

# Text from a checkpoint
model=runs/a/checkpoints/step_00000008
write() { "$train" --generate --model $model --max-tokens 30 "$@"; }  # on stdout
check "--generate needs no data" runs write --prompt "the cat" --train "nowhere/*.bin"
check "and goes on from the prompt" contains last.out "^the cat"
check "it says how fast" contains last.err "^prompt [0-9]* tokens, [0-9.]* tokens/s; generated [0-9]* tokens, [0-9.]* tokens/s$"
check "and nothing else" same "$(wc -l <last.err)" 1
check "the same seed draws the same" same "$(write --seed 5 2>/dev/null)" "$(write --seed 5 2>/dev/null)"
check "another one does not" differ "$(write --seed 6 2>/dev/null)" "$(write --seed 5 2>/dev/null)"
check "--top-k 1 is greedy" same "$(write --top-k 1 2>/dev/null)" "$(write --temperature 0 2>/dev/null)"
check "so is --top-p 0" same "$(write --top-p 0 2>/dev/null)" "$(write --temperature 0 2>/dev/null)"
written=$(write --prompt "the" --temperature 0 2>/dev/null)
behind=${written#the}
check "--stop ends before its text" same "$(write --prompt "the" --temperature 0 --stop "do" 2>/dev/null)" "the${behind%%do*}"
check "which was there" differ "$behind" "${behind%%do*}"
printf 'a dog\none bird' >prompts.txt
check "--prompt-file" runs write --prompt-file prompts.txt
check "begins with the first line" contains last.out "^a dog"
check "and goes on with the next" contains last.out "^one bird"
check "it ends at the longest text that the model takes" runs write --max-tokens 5000 --top-k 2
check "or at the text's end" awk '/^stopped at 1024 tokens/ { full = 1 } /generated/ { n = $7 } END { exit !(full ? n == 1023 : n < 1023) }' last.err
check "no prompts" status_is 1 "nowhere.txt" write --prompt-file nowhere.txt
check "a prompt that is too long" status_is 1 "2[0-9]* tokens are more than the model takes, 1024" write --prompt "$(head -c 6000 text.txt)"
check "a temperature below 0" status_is 2 "--temperature: must be at least 0" write --temperature -1
check "a preset has no weights" status_is 2 "--generate needs --model FOLDER" "$train" --generate --model tiny
check "--top-k alone" status_is 2 "--top-k requires --generate" "$train" --top-k 3
cp -r $model wordless && rm wordless/tokenizer.json
check "no tokenizer" status_is 1 "wordless/tokenizer.json: no such file" "$train" --generate --model wordless
cp -r $model ends && rm -r ends/state && echo "{\"eos_token_id\": [$(seq -s , 0 298)]}" >ends/generation_config.json
check "generation_config.json says what ends a text" runs "$train" --generate --model ends --prompt "the" --stop "never"
check "at once" same "$(cat last.out) $(grep -o 'generated 0' last.err)" "the generated 0"
check "runs are as they were" same "$(ls runs)" a

# A model of others is asked as transformers asks it: without the token that starts a document, unless that says so.
mkdir other && cp $model/{tokenizer.json,model.safetensors} other && grep -v '"norm"' $model/config.json >other/config.json
prompt_tokens() { "$train" --generate --max-tokens 1 --prompt "the" "$@" 2>&1 >/dev/null | sed -n 's/prompt \([0-9]*\).*/\1/p'; }
check "before a model of others no document starts" same "$(prompt_tokens --model other)" $(($(prompt_tokens --model $model) - 1))
all=$(prompt_tokens --model other --chat)
echo '{"chat_template": "{{ bos_token + message }}"}' >other/tokenizer_config.json
check "unless its template says so" same "$(prompt_tokens --model other --chat)" "$all"
echo '{{ message }}' >other/chat_template.jinja
check "which may be a file" same "$(prompt_tokens --model other --chat)" $((all - 1))

echo '{"mine": 1}' >ends/tokenizer_config.json
check "a folder is tuned" runs "$train" --model ends --seq-len 32 --batch-size 2 --total-batch-size 64 --steps 1 --eval-every 0 --eval-tokens 100 --out runs/own
check "and what it says of its tokenizer goes along" cmp ends/tokenizer_config.json runs/own/checkpoints/step_00000001/tokenizer_config.json
check "but no end that is a token like others" contains runs/own/checkpoints/step_00000001/generation_config.json '"eos_token_id": 299'

# Conversations
for i in $(seq 200); do echo "{\"question\": \"bird $i?\", \"answer\": \"the cat\"}"; done >chat.jsonl
check "conversations are encoded" runs "$root/build/tokenize" encode --tokenizer data/tokenizer.json --template alpaca --out chat --val-fraction 0.1 chat.jsonl
check "and trained on" runs "$train" --model $model --train 'chat/train_*.bin' --val 'chat/val_*.bin' --pack documents --seq-len 160 --batch-size 6 --total-batch-size 960 --steps 150 --lr 5e-3 --eval-every 0 --out runs/chat
tuned=runs/chat/checkpoints/step_00000150
check "--chat answers and ends" same "$("$train" --generate --chat --model $tuned --prompt 'bird 7?' --temperature 0 2>last.err)" "the cat"
check "by the template of training" contains $tuned/tokenizer_config.json '"conversation_template": "alpaca"'
check "which transformers reads" contains $tuned/tokenizer_config.json '"chat_template": ".*### Response:'
check "another template asks otherwise" differ "$("$train" --generate --chat --template plain --model $tuned --prompt 'bird 7?' --max-tokens 20 --temperature 0 2>&1)" "the cat"
check "tokens that a template needs" status_is 1 "no token <|im_start|>" "$train" --generate --chat --template chatml --model $tuned
check "--template alone" status_is 2 "--template requires --chat" "$train" --generate --template plain --model $tuned

# MPI loads its parts by name, which a machine with one GPU need not have.
hidden=OMPI_MCA_mca_base_component_path=/nonexistent
check "one rank, started by no launcher, trains without MPI's parts" runs env $hidden "$train" "${small[@]}" --out runs/alone
check "and computes the same" same "$(losses runs/alone)" "$(losses runs/a)"
run env $hidden PMIX_RANK=0 "$train" "${small[@]}" --out runs/launched
check "a process that a launcher started asks MPI" says "opal_init failed"
output=''

# --dry-run
memory() { sed -n '/^memory/,$ p' last.out | grep MiB | grep -v -e 'program and libraries' -e total; }
check "a short run" runs "$train" "${small[@]}" --steps 1 --out runs/short
needed=$(memory)
check "--dry-run says the same memory" runs "$train" "${small[@]}" --steps 1 --out runs/dry --dry-run
check "as the run takes" same "$(memory)" "$needed"
check "--dry-run needs no data" runs "$train" --model llama-130m --train 'nowhere/*.bin' --out runs/dry --dry-run
check "counts parameters" contains last.out " 134,105,856 parameters"  # 2 V C + L (4 C^2 + 3 C F + 2 C) + C
check "and tokens" contains last.out "20,000 steps x 131,072 tokens = 2,621,440,000 tokens; 6.7122e+08 operations a token"
check "and writes nothing" test ! -e runs/dry
as_json() { "$train" --model llama-130m --batch-size 8 --seq-len 1024 --dry-run --json "$@"; }
kept_by() { as_json --recompute "$1" | grep -o '"activations":[0-9]*' | cut -d : -f 2; }
most() { as_json | grep -o "\"$1\":{\"24\":[0-9]*" | grep -o '[0-9]*$'; }  # sequences that fit 24 GB
largest=$(most none)
check "it says what fits 24 GB" runs "$train" --model llama-130m --seq-len 1024 --total-batch-size $((1024 * largest)) --batch-size "$largest" --dry-run
check "as what is planned for it does" awk -v mib="$(awk '$1 == "total" { print $2 }' last.out)" 'BEGIN { exit !(mib * 1048576 < 0.95 * 24e9) }'
check "and one more does not" runs "$train" --model llama-130m --seq-len 1024 --total-batch-size $((1024 * (largest + 1))) --batch-size $((largest + 1)) --dry-run
check "fit" awk -v mib="$(awk '$1 == "total" { print $2 }' last.out)" 'BEGIN { exit !(mib * 1048576 > 0.95 * 24e9) }'

# The same again
check "config.toml repeats the run" runs "$train" --config runs/a/config.toml --out runs/b
check "bit for bit" same "$(losses runs/a)" "$(losses runs/b)"
check "another seed is another run" runs "$train" "${small[@]}" --seed 2 --out runs/seed
check "with other losses" differ "$(losses runs/seed)" "$(losses runs/a)"
check "a second run moves the first aside" runs "$train" "${small[@]}" --steps 1 --out runs/seed
check "whole" test -f runs/seed.old-1/log.jsonl

# What the backward pass computes again
for again in norm block; do
    check "--recompute $again" runs "$train" --config runs/a/config.toml --recompute $again --out runs/again_$again
    check "changes no bit" same "$(losses runs/again_$again)" "$(losses runs/a)"
    check "down to the weights" cmp runs/again_$again/checkpoints/step_00000008/model.safetensors runs/a/checkpoints/step_00000008/model.safetensors
    check "and is written down" contains runs/again_$again/config.toml "recompute = \"$again\""
    check "it takes less memory" awk -v kept="$(kept_by none)" -v now="$(kept_by $again)" 'BEGIN { exit !(now > 0 && now < kept) }'
    check "so that more fits" awk -v most="$(most none)" -v now="$(most $again)" 'BEGIN { exit !(most > 0 && now > most) }'
done

# Resume
cp -r runs/a runs/resumed && rm -r runs/resumed/checkpoints/step_00000008
check "resume" runs "$train" --config runs/a/config.toml --out runs/resumed --resume
check "starts behind the checkpoint" same "$(losses runs/resumed | cut -d' ' -f1 | xargs)" "1 2 3 4 5 6 7 8 5 6 7 8"
check "bit for bit as uninterrupted" same "$(losses runs/resumed | tail -n 4)" "$(losses runs/a | tail -n 4)"
check "down to the weights" cmp runs/resumed/checkpoints/step_00000008/model.safetensors runs/a/checkpoints/step_00000008/model.safetensors
check "and the moments" cmp runs/resumed/checkpoints/step_00000008/state/optimizer.safetensors runs/a/checkpoints/step_00000008/state/optimizer.safetensors
cp -r runs/a runs/damaged && truncate -s 1000 runs/damaged/checkpoints/step_00000008/model.safetensors
check "a damaged checkpoint is passed over" runs "$train" --config runs/a/config.toml --out runs/damaged --resume
check "and named" contains last.err "damaged.*step_00000008"
check "for the one before" contains last.out "resume .*step_00000004"
check "resume with another variant is refused" status_is 1 "norm: was LNS, now PRE" "$train_pre" --config runs/a/config.toml --out runs/a --resume
check "--keep 1 keeps the newest" runs "$train" "${small[@]}" --save-every 2 --keep 1 --out runs/keep
check "alone" same "$(ls runs/keep/checkpoints)" step_00000008

# Signals. 2000 steps take longer than to send one.
for signal in TERM INT USR1; do
    run=runs/stopped-$signal
    "$train" "${small[@]}" --steps 2000 --eval-every 0 --out "$run" >"$signal.out" 2>&1 &
    wait_for grep -q "^step 3/" "$signal.out"
    kill -"$signal" $!
    wait $!
    check "SIG$signal ends a run with 3" same $? 3
    check "and a checkpoint of its last step" test -f \
        "$run/checkpoints/step_$(printf %08d "$(losses "$run" | tail -n 1 | cut -d' ' -f1)")/state/trainer.json"
    check "and says so in the log" contains "$run/log.jsonl" "\"reason\":\"stopped by SIG$signal\""
done
last=$(losses runs/stopped-TERM | tail -n 1 | cut -d' ' -f1)
check "the resumed run" runs "$train" --config runs/stopped-TERM/config.toml --out runs/stopped-TERM --resume --steps $((last + 4)) --warmup 2 --schedule constant
check "goes on behind it" same "$(losses runs/stopped-TERM | tail -n 4 | cut -d' ' -f1 | xargs)" "$((last + 1)) $((last + 2)) $((last + 3)) $((last + 4))"

# Probes
probe_field() { grep '"event":"probe"' "$1/log.jsonl" | tail -n 1 | grep -oE "\"$2\":(\[[^]]*\]|[^,]*)" | grep -oE '[-0-9.e]+' | xargs; }
check "probes" runs "$train" "${small[@]}" --probe-every 4 --probe-tokens 96 --out runs/probed
check "a row for the embedding and each block" same "$(grep -cE '^ +[0-3] +[0-9]' last.out)" 12
check "at the start, every 4 steps and the end" same "$(grep -o '"event":"probe","step":[0-9]*' runs/probed/log.jsonl | grep -o '[0-9]*$' | xargs)" "0 4 8"
check "change no loss" same "$(losses runs/probed)" "$(losses runs/a)"
check "and no weight" cmp runs/probed/checkpoints/step_00000008/model.safetensors runs/a/checkpoints/step_00000008/model.safetensors
check "--probe-only of a checkpoint" runs "$train" --model runs/a/checkpoints/step_00000008 --probe-only --seq-len 32 --batch-size 1 \
    --train nowhere --probe-tokens 96 --eval-tokens 1000 --out runs/probe_only
for field in loss variance grad_norm_stream prune_loss; do
    check "finds the same $field" near "$(probe_field runs/probe_only $field)" "$(probe_field runs/probed $field)" 2e-5
done
check "in a PRE program too" runs "$train_pre" --model runs/a/checkpoints/step_00000008 --probe-only --seq-len 32 --batch-size 1 \
    --probe-tokens 96 --eval-tokens 1000 --out runs/probe_only_pre
check "the same" near "$(probe_field runs/probe_only_pre prune_loss)" "$(probe_field runs/probed prune_loss)" 2e-5
check "too few tokens for a probe" status_is 1 "probe-tokens" "$train" "${small[@]}" --probe-every 4 --probe-tokens 31 --out runs/x

# Ranks, batch sizes
for n in 2 4; do
    check "$n ranks" runs ranks $n "$train" "${small[@]}" --out runs/ranks$n
    check "$n ranks have the losses of one" near "$(losses runs/ranks$n | xargs)" "$(losses runs/a | xargs)" 2e-5
    check "$n ranks validate as one" near "$(val_losses runs/ranks$n | xargs)" "$(val_losses runs/a | xargs)" 2e-5
done
check "a larger micro-batch" runs "$train" "${small[@]}" --batch-size 8 --out runs/large
check "has the same losses" near "$(losses runs/large | xargs)" "$(losses runs/a | xargs)" 2e-5
check "and the same validation loss" near "$(val_losses runs/large | xargs)" "$(val_losses runs/a | xargs)" 2e-5

# Documents: 1 to 9 sentences each
awk 'NR > 1 { exit } { n = split($0, s, "[.] *"); for (i = 1; i < n; i += k) { k = i * 7 % 9 + 1; printf "{\"text\": \""
    for (j = i; j < i + k && j < n; j++) printf "%s. ", s[j]; print "\"}" } }' RS= text.txt >text.jsonl
for ((i = 0; i < 6; i++)); do cat text.jsonl; done >documents.jsonl
check "documents are encoded" runs "$root/build/tokenize" encode --tokenizer data/tokenizer.json --out documents --val-fraction 0.1 \
    --shard-tokens 2K documents.jsonl
documents=("${small[@]}" --train "documents/train_*.bin" --val "documents/val_*.bin" --pack documents --doc-mask)
check "--pack documents --doc-mask trains" runs "$train" "${documents[@]}" --save-every 4 --out runs/doc
check "and says so" contains runs/doc/log.jsonl '"doc_mask":true,"pack":"documents"'
check "with 2 ranks and another batch size" runs ranks 2 "$train" "${documents[@]}" --batch-size 4 --out runs/doc2
check "to the same losses" near "$(losses runs/doc2 | xargs)" "$(losses runs/doc | xargs)" 2e-5
check "and the same validation loss" near "$(val_losses runs/doc2 | xargs)" "$(val_losses runs/doc | xargs)" 2e-5
rm -r runs/doc/checkpoints/step_00000008
check "resumed on 2 ranks" runs ranks 2 "$train" --config runs/doc/config.toml --out runs/doc --resume
check "likewise" near "$(losses runs/doc | tail -n 4 | xargs)" "$(losses runs/doc2 | tail -n 4 | xargs)" 2e-5
check "not with other rows" status_is 1 "pack: was documents, now stream" "$train" --config runs/doc/config.toml --out runs/doc \
    --resume --pack stream
check "--doc-mask changes the losses of a stream" runs "$train" "${small[@]}" --train "documents/train_*.bin" --steps 1 --out runs/mask0
check "as it should" runs "$train" "${small[@]}" --train "documents/train_*.bin" --steps 1 --doc-mask --out runs/mask1
check "a little" differ "$(losses runs/mask1)" "$(losses runs/mask0)"

# Conversations: a model's folder is tuned on answers alone, one conversation a row or several
awk 'BEGIN { for (i = 0; i < 300; i++) printf "{\"question\": \"the cat %d sees %s?\", \"answer\": \"%s\"}\n", i, i % 7 ? "a dog" : "the bird and some layer",
    i % 3 ? "yes" : "the bird learns" }' >questions.jsonl
check "conversations are encoded" runs "$root/build/tokenize" encode --tokenizer data/tokenizer.json --out sft --val-fraction 0.1 questions.jsonl
tuned=(--model runs/a/checkpoints/step_00000008 --seq-len 32 --total-batch-size 256 --batch-size 2 --lr 1e-3 --eval-every 4
    --train "sft/train_*.bin" --val "sft/val_*.bin" --save-every 3)
check "with --pack alone" status_is 2 "hold conversations: give --pack documents" "$train" "${tuned[@]}" --out runs/x
check "--pack packed trains on them" runs "$train" "${tuned[@]}" --pack packed --steps 6 --out runs/packed
check "and says how many" contains last.out '^ *2[0-9][0-9] conversations in [0-9]* rows, [0-9.]* a row'
check "and on what" contains last.out 'targets are the answers. tokens'
check "the log has the step's targets" contains runs/packed/log.jsonl '"event":"train","step":6,.*"targets":[1-9]'
check "with 2 ranks and another batch size" runs ranks 2 "$train" "${tuned[@]}" --pack packed --steps 6 --batch-size 4 --out runs/packed2
check "to the same losses" near "$(losses runs/packed2 | xargs)" "$(losses runs/packed | xargs)" 2e-5
rm -r runs/packed/checkpoints/step_00000006
check "resumed on 2 ranks" runs ranks 2 "$train" --config runs/packed/config.toml --out runs/packed --resume
check "likewise" near "$(losses runs/packed | tail -n 3 | xargs)" "$(losses runs/packed2 | tail -n 3 | xargs)" 2e-5
check "not with prompts" status_is 1 "train-on-prompt: was false, now true" "$train" --config runs/packed/config.toml --out runs/packed \
    --resume --train-on-prompt
check "one a row has the same validation loss" runs "$train" "${tuned[@]}" --pack documents --epochs 0.01 --out runs/single
check "at the start" near "$(val_losses runs/single | head -n 1)" "$(val_losses runs/packed | head -n 1)" 2e-5
check "--epochs is steps" contains runs/single/config.toml '^steps = 1$'
check "not beside documents" status_is 1 "hold conversations, and data/val_.* hold documents" "$train" "${tuned[@]}" --pack packed \
    --val "data/val_*.bin" --out runs/x
mv sft/train_000000.targets kept
check "not without their targets" status_is 1 "train_000000.targets: missing" "$train" "${tuned[@]}" --pack packed --out runs/x
mv kept sft/train_000000.targets

# Models in and out
check "--steps 0 saves the initial model" runs "$train" "${small[@]}" --steps 0 --out runs/zero
check "as step 0" test -f runs/zero/checkpoints/step_00000000/config.json
# What a fresh model's gains are on disk, block by block: LNS's 1/sqrt(l) is folded in, POST has no norm before.
gains() {
    python3 - "$1/checkpoints/step_00000000/model.safetensors" <<'END'
import json, struct, sys
with open(sys.argv[1], "rb") as file:
    size, = struct.unpack("<Q", file.read(8))
    header, data = json.loads(file.read(size)), file.read()
for name in sorted(header):
    if name.startswith("model.layers.") and "layernorm" in name:
        value, = struct.unpack_from("<f", data, header[name]["data_offsets"][0])
        print(name.split(".", 2)[2].replace(".weight", ""), f"{value:.4f}")
END
}
if [[ $train == *-debug/* ]]; then norms="PRE POST"; else norms=$(make --silent -C "$root" norms); fi  # those that are built
for norm in $norms; do
    trainer=$root/build/cpu-fp32-$norm/train_gpt
    check "NORM=$norm: begins" runs "$trainer" "${small[@]}" --steps 0 --out "runs/zero_$norm"
    check "trains" runs "$trainer" "${small[@]}" --save-every 8 --out "runs/$norm"
    check "says what it is" contains "runs/$norm/log.jsonl" "\"event\":\"start\",\"norm\":\"$norm\","
    check "learns" fall "$(losses "runs/$norm" | cut -d ' ' -f 2 | xargs)" 0.2
    check "its model can be taken up" runs "$trainer" --model "runs/$norm/checkpoints/step_00000008" --seq-len 32 \
        --batch-size 2 --total-batch-size 512 --steps 0 --eval-tokens 1000 --out "runs/from_$norm"
    check "and computes the same" near "$(val_losses "runs/from_$norm")" "$(val_losses "runs/$norm" | tail -n 1)" 1e-5
done
check "the compiled NORM is what runs: LNS" same "$(gains runs/zero | grep '\.input' | xargs)" \
    "0.input_layernorm 1.0000 1.input_layernorm 0.7071 2.input_layernorm 0.5774"
check "PRE" same "$(gains runs/zero_PRE | grep '\.input' | xargs)" \
    "0.input_layernorm 1.0000 1.input_layernorm 1.0000 2.input_layernorm 1.0000"
check "POST" same "$(gains runs/zero_POST | grep '^0' | xargs)" "0.post_attention_layernorm 1.0000 0.post_feedforward_layernorm 1.0000"
check "a checkpoint is a model to start from" runs "$train" --model runs/a/checkpoints/step_00000008 --seq-len 32 --batch-size 2 \
    --total-batch-size 512 --steps 0 --eval-tokens 1000 --out runs/from
check "that computes the same" near "$(val_losses runs/from | head -n 1)" "$(val_losses runs/a | tail -n 1)" 1e-6
check "in a PRE program too, LNS's scale being folded in" runs "$train_pre" --model runs/a/checkpoints/step_00000008 --seq-len 32 \
    --batch-size 2 --total-batch-size 512 --steps 0 --eval-tokens 1000 --out runs/from_pre
check "the same" near "$(val_losses runs/from_pre | head -n 1)" "$(val_losses runs/a | tail -n 1)" 1e-6
if python3 -c 'import numpy, transformers' 2>/dev/null; then
    check "transformers computes its loss" runs python3 "$root/dev/reference/hf_check.py" runs/POST/checkpoints/step_00000008 data/val_*.bin --seq-len 32 --tokens 1000
    check "by the code in the folder" contains last.out "POSTLlamaForCausalLM: loss $(val_losses runs/POST | tail -n 1 | cut -c 1-6)"
    check "and has the fixtures' losses and gradients" runs python3 "$root/dev/reference/hf_check.py" --self-test
fi
check "and is not taken for a plain LLaMA" status_is 1 "model_type" "$train" --model runs/POST/checkpoints/step_00000008 --steps 0 --out runs/x
check "nor a plain LLaMA for POST" status_is 1 "Pre-LN" "$root/build/cpu-fp32-POST/train_gpt" --model runs/a/checkpoints/step_00000008 --steps 0 --out runs/x
check "GPT-2 trains" runs "$train" --model gpt2-124m "${small[@]}" --out runs/gpt2
check "and is loaded again" runs "$train" --model runs/gpt2/checkpoints/step_00000008 --seq-len 32 --batch-size 2 \
    --total-batch-size 512 --steps 0 --eval-tokens 1000 --out runs/gpt2_from
check "the same" near "$(val_losses runs/gpt2_from | head -n 1)" "$(val_losses runs/gpt2 | tail -n 1)" 1e-6

# Mistakes
check "help" runs "$train" --help
check "unknown flag" status_is 2 "--foo" "$train" --foo 3
check "bad number" status_is 2 "lr" "$train" --lr fast
check "bad choice" status_is 2 "cosine" "$train" --schedule cosin
check "unknown preset" status_is 2 "llama-130m" "$train" --model lama-130m
check "total batch that does not divide" status_is 2 "multiple of" "$train" "${small[@]}" --total-batch-size 500
check "heads that do not divide" status_is 2 "multiple" "$train" "${small[@]}" --hidden 33
check "--steps and --tokens" status_is 2 "one of them" "$train" "${small[@]}" --tokens 5000
check "unknown word in the config" sh -c 'echo "stepz = 3" >bad.toml'
check "is an error" status_is 2 "stepz" "$train" --config bad.toml
check "no data" status_is 1 "make data" "$train" --train "nowhere/*.bin"
head -c 3000 data/train_000000.bin >cut.bin
check "truncated shard" status_is 1 "cut.bin" "$train" "${small[@]}" --train cut.bin --out runs/x
check "validation data among the training data" ln -s "$PWD/data/train_000000.bin" linked.bin
check "is an error" status_is 1 "linked.bin .the same file as data/train_000000.bin." "$train" "${small[@]}" --val linked.bin --out runs/x
mkdir bare && cp data/*.bin bare
check "documents without a tokenizer" status_is 2 "--eot-token ID" "$train" "${small[@]}" --train "bare/train_*.bin" --pack documents
check "--eot-token outside the vocabulary" status_is 2 "0 to 299" "$train" "${small[@]}" --doc-mask --eot-token 300
check "--eot-token that is nowhere" status_is 1 "no document" "$train" "${small[@]}" --pack documents --eot-token 0 --out runs/x
cp -r data flipped
python3 - <<'END'  # one bit, in the last shard
import glob
with open(sorted(glob.glob("flipped/train_*.bin"))[-1], "r+b") as file:
    file.seek(-2, 2)
    last = file.read(1)[0]
    file.seek(-2, 2)
    file.write(bytes([last ^ 1]))
END
check "one flipped bit" status_is 1 "flipped/train_.*damaged.*checksum" "$train" "${small[@]}" --steps 1000 --train "flipped/train_*.bin" --out runs/x
check "on two ranks" ranks_say "damaged" 2 "$train" "${small[@]}" --steps 1000 --train "flipped/train_*.bin" --out runs/x
check "token outside the vocabulary" status_is 1 "data/" "$train" "${small[@]}" --vocab 64 --out runs/x
check "a learning rate that explodes ends the run with advice" status_is 1 "lower --lr" "$train" "${small[@]}" --lr 1e30 --eps 1e-30 \
    --grad-clip 0 --steps 40 --warmup 1 --schedule constant --out runs/x

conclude
