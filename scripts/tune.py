#!/usr/bin/env python3
"""Tunes trained models on the same questions, evaluates each before and after, and compares them.

  scripts/tune.py                                     the two models of `make demo`, on questions made of the sample corpus
  scripts/tune.py runs/A runs/B --questions q.jsonl --tasks test.jsonl --epochs 4 --lr 3e-4 --template alpaca

A RUN is a run folder, of which the last checkpoint is taken. Questions are what build/tokenize encode takes, tasks what
--evaluate takes. Everything goes to --out: shards, a run each, and the page of scripts/compare.py. Flags behind -- go to the
trainer: -- --batch-size 8

The questions made here name four headings of PostgreSQL's documentation and ask under which a sentence stands; those of a
fifth of the sections are kept for the test. A guess is right in a quarter of them. Models as small as the demo's know too
little to answer: what lies within two standard errors of 0.25 is no better than a guess, and no difference between models.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import scheduler
from command_line import Failure, Parser, not_negative, positive, printable, run_script, write_atomically
from scheduler import Job, train_alone

TOKENIZE = "build/tokenize"
CHOICES, TEST_SHARE, TEST_QUESTIONS, SENTENCES = 4, 5, 400, 6


def say(message):
    print(f"\n== {printable(message)}", flush=True)


def from_root(path):
    """As it is named in the repository's folder, where the trainers are built."""
    path = path.absolute()
    return path.relative_to(scheduler.ROOT) if path.is_relative_to(scheduler.ROOT) else path


def run(*command):
    """Ends with what fails, which has said why."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def sections(corpus):
    """(heading, sentences) of each file that starts with a heading."""
    for path in sorted(corpus.glob("*.txt")):
        paragraphs = [p for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
        heading = re.sub(r"^[\w.]*\d[\w.]*\s+", "", paragraphs[0]).strip() if paragraphs else ""
        sentences = [re.split(r"(?<=[.!?]) ", p)[0].strip() for p in paragraphs[1:]]
        sentences = [s for s in sentences if 40 <= len(s) <= 200]
        if 3 <= len(heading) <= 60 and not heading.endswith(".") and sentences:
            yield heading, sentences[:SENTENCES]


def make_questions(corpus, folder):
    """Writes tuning questions and a task of others, about other sections; returns their paths."""
    found = list(dict(sections(corpus)).items())
    if len(found) < 10 * CHOICES:
        raise Failure(f"{corpus}: only {len(found)} sections with a heading; run `make data` for the sample corpus, or name "
                      "your own --questions and --tasks")
    draw = random.Random(1)
    draw.shuffle(found)
    parts = found[len(found) // TEST_SHARE:], found[:len(found) // TEST_SHARE]
    questions, task = [], []
    for part, out in zip(parts, (questions, task)):
        for heading, sentences in part:
            for sentence in sentences:
                choices = [heading] + draw.sample([other for other, _ in part if other != heading], CHOICES - 1)
                draw.shuffle(choices)
                asked = f"Under which heading does this stand: {'; '.join(choices)}?\n{sentence}"
                out.append((asked, choices, choices.index(heading)))
    draw.shuffle(task)
    paths = folder / "questions.jsonl", folder / "headings.jsonl"
    write_atomically(paths[0], "".join(json.dumps({"question": q, "answer": choices[gold]}) + "\n"
                                       for q, choices, gold in questions).encode())
    write_atomically(paths[1], "".join(
        json.dumps({"id": str(i), "context": q, "choices": choices, "gold": gold, "delimiter": "\n"}) + "\n"
        for i, (q, choices, gold) in enumerate(task[:TEST_QUESTIONS])).encode())
    print(f"{len(questions)} questions to tune on, {min(len(task), TEST_QUESTIONS)} of other sections to be asked")
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Models


def norm_of(folder):
    """As the run's log says it."""
    try:
        with open(folder / "log.jsonl", encoding="utf-8") as log:
            for line in log:
                event = json.loads(line)
                if event.get("event") == "start":
                    return event["norm"]
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    raise Failure(f"{folder}: no run: expected its log.jsonl with a start event; `make demo` trains two")


def last_checkpoint(folder):
    found = sorted(folder.glob("checkpoints/step_????????"))
    if not found:
        raise Failure(f"{folder}: no checkpoint; train it with --save-every, or to its end")
    return found[-1]


def show_answers(trainer, checkpoint, task, count):
    """What the model itself answers to the first questions."""
    questions = [json.loads(line) for line in task.read_text(encoding="utf-8").splitlines()[:count]]
    for question in questions:
        if not isinstance(question["context"], str):
            continue
        done = subprocess.run([str(trainer), "--generate", "--model", str(checkpoint), "--temperature", "0",
                               "--max-tokens", "24", "--prompt", question["context"] + question.get("delimiter", "\n")],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              errors="replace")
        answer = done.stdout.rstrip("\n").removeprefix(question["context"]).strip() or "nothing"
        print(printable(f"  asked: {question['context'][-100:]} | right: {question['choices'][question['gold']]} | "
                        f"answer: {answer}"))


def main():
    own, trainers = sys.argv[1:], []
    if "--" in own:
        trainers, own = own[own.index("--") + 1:], own[:own.index("--")]
    parser = Parser("tune.py", __doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="[runs/demo-PRE runs/demo-LNS]")
    parser.add_argument("--questions", type=Path, nargs="+", metavar="FILE", help=".jsonl to tune on [made here]")
    parser.add_argument("--tasks", type=Path, nargs="+", metavar="FILE", help="of --evaluate [made here]")
    parser.add_argument("--template", default="plain", help="of build/tokenize encode [plain]")
    parser.add_argument("--epochs", type=not_negative, default=2, help="[2]")
    parser.add_argument("--lr", type=not_negative, default=3e-4, help="[3e-4]")
    parser.add_argument("--seq-len", type=positive, default=128, metavar="T", help="[128]")
    parser.add_argument("--sequences", type=positive, default=32, metavar="N", help="rows a step [32]")
    parser.add_argument("--seed", type=positive, default=1, help="[1]")
    parser.add_argument("--out", type=Path, default=scheduler.ROOT / "runs/tuned", metavar="DIR", help="[runs/tuned]")
    arguments = parser.parse_args(own)
    if bool(arguments.questions) != bool(arguments.tasks):
        raise Failure("--questions and --tasks: give both, or neither", 2)
    folders = [from_root(run) for run in arguments.runs] or [Path("runs/demo-PRE"), Path("runs/demo-LNS")]
    questions, tasks = (list(map(from_root, files or [])) for files in (arguments.questions, arguments.tasks))
    out = from_root(arguments.out)
    os.chdir(scheduler.ROOT)
    norms, checkpoints = [norm_of(run) for run in folders], [last_checkpoint(run) for run in folders]
    if len(set(norms)) < len(norms):
        raise Failure("runs of one NORM alone: name one of each that is to be compared", 2)
    tokenizer = checkpoints[0] / "tokenizer.json"
    for other in checkpoints[1:]:
        if (other / "tokenizer.json").read_bytes() != tokenizer.read_bytes():
            raise Failure(f"{other}: another tokenizer than {checkpoints[0]}: tune models of one vocabulary")
    out.mkdir(parents=True, exist_ok=True)

    say("questions")
    if not questions:
        made = make_questions(Path("data/corpus"), out)
        questions, tasks = [made[0]], [made[1]]
    run("make", "--silent", "tokenize")
    data = out / "data"
    run(TOKENIZE, "encode", "--tokenizer", tokenizer, "--out", data, "--template", arguments.template, "--val-fraction",
        0.02, *questions)

    flags = ["--train", data / "train_*.bin", "--val", data / "val_*.bin", "--pack", "packed", "--seq-len",
             arguments.seq_len, "--total-batch-size", arguments.sequences * arguments.seq_len, "--epochs",
             arguments.epochs, "--lr", arguments.lr, "--seed", arguments.seed, "--evaluate", *tasks,
             "--evaluate-every", 1000000, *trainers]
    jobs = []
    for norm, checkpoint in zip(norms, checkpoints):
        trainer = scheduler.trainer(norm)
        say(f"{norm} before tuning")
        run(trainer, "--model", checkpoint, "--evaluate", *tasks)
        job = Job(norm, ["--model", str(checkpoint), *map(str, flags)], out / norm)
        say(f"tuning {norm}")
        train_alone(job)
        jobs.append(job)

    say("answers")
    for job in jobs:
        print(f"{job.norm}:")
        show_answers(scheduler.trainer(job.norm), last_checkpoint(job.folder), tasks[0], 3)
    say("comparing")
    run("scripts/compare.py", *[job.folder for job in jobs], "--out", out / "compared", "--title",
        "Tuned on the same questions")
    print("\nOne seed: a score is a finding where it differs from the other by more than its error, and from a guess by two.")


if __name__ == "__main__":
    run_script("tune", main)
