#!/usr/bin/env python3
"""Lets lm-evaluation-harness judge `./train_gpt --evaluate`.

eval_check.py TRAIN_GPT FOLDER TASK.jsonl ... [--questions 200]

Of each task's first questions, every log-probability must be lm-eval's to 1e-3, and acc, acc_norm and acc_bytes (of one
choice: acc) the same. TRAIN_GPT is a program of PRECISION=fp32, FOLDER one of its checkpoints.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import lm_eval  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

TOLERANCE = 1e-3  # nats


def ours(program, folder, paths, work):
    """What the program prints and keeps: scores and log-probabilities by task."""
    out = work / "out.jsonl"
    command = [program, "--model", folder, "--evaluate", *paths, "--evaluate-out", out]
    table = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
    print(table, end="")
    sums = {}
    for line in out.read_text().splitlines():
        result = json.loads(line)
        sums.setdefault(result["task"], []).append(result["log_probabilities"])
    scores = {cells[0]: cells for cells in map(str.split, table.splitlines()[1:])}
    return {task: {"acc": scores[task][2], "acc_norm": scores[task][4], "acc_bytes": scores[task][6]} for task in sums}, sums


def lm_eval_task(path, one_choice):
    task = {"task": path.stem, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "doc_to_text": "{{context}}", "num_fewshot": 0}
    if one_choice:
        return {**task, "output_type": "loglikelihood", "doc_to_target": "{{' ' + choices[0]}}",
                "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]}
    return {**task, "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")]}


def load(folder):
    """As anybody would, with the folder's own code where transformers has no class."""
    config = json.loads((folder / "config.json").read_text())
    return HFLM(pretrained=str(folder), dtype="float32", trust_remote_code=True, batch_size=8, device="cpu",
                max_length=config.get("max_position_embeddings", config.get("n_positions")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks", type=Path, nargs="+")
    parser.add_argument("--questions", type=int, default=200)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        work, paths, tasks = Path(folder), [], []
        for path in arguments.tasks:
            lines = path.read_text().splitlines()[:arguments.questions]
            paths.append(work / path.name)
            paths[-1].write_text("\n".join(lines) + "\n")
            tasks.append(lm_eval_task(paths[-1], all(len(json.loads(line)["choices"]) == 1 for line in lines)))
        scores, sums = ours(arguments.program.resolve(), arguments.folder, paths, work)
        judged = lm_eval.simple_evaluate(model=load(arguments.folder), tasks=tasks, bootstrap_iters=0)
        for task, found in sums.items():
            theirs = [[float(answer[0][0]) for answer in sample["resps"]]
                      for sample in sorted(judged["samples"][task], key=lambda sample: sample["doc_id"])]
            worst = max(abs(a - b) for x, y in zip(found, theirs, strict=True) for a, b in zip(x, y, strict=True))
            pairs = {name: (f"{judged['results'][task][name + ',none']:.4f}", scores[task][name])
                     for name in scores[task] if name + ",none" in judged["results"][task]}
            good = worst < TOLERANCE and all(a == b for a, b in pairs.values())
            failed |= not good
            said = "; ".join(f"{name} {a}, here {b}" for name, (a, b) in pairs.items())
            print(f"{'ok' if good else 'FAILED'}  {task}: {len(found)} questions, {sum(map(len, found))} choices, "
                  f"log-probabilities within {worst:.1e}; lm-eval's {said}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
