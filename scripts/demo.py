#!/usr/bin/env python3
"""The main job end to end, minutes on a CPU: the same deep and narrow model trained twice on the same batches, once
with Pre-LN and once with LayerNorm Scaling, then compared. Called by `make demo`, which installs what is missing and
makes the data. Every setting below can be given in the environment: STEPS=1000 LR=1e-3 make demo
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import scheduler
from command_line import Parser, printable, run_script
from scheduler import Job, train_alone

SETTINGS = {"LAYERS": "24", "HIDDEN": "96", "FFN": "256", "HEADS": "3", "SEQ_LEN": "128", "BATCH": "16",
            "TOTAL_BATCH": "2048", "STEPS": "600", "WARMUP": "60", "LR": "2e-3", "SEED": "1",
            "DEVICE": "cpu", "PRECISION": "fp32"}
NORMS = ("PRE", "LNS")


def say(message):
    print(f"\n== {printable(message)}", flush=True)


def main():
    Parser("demo.py", __doc__).parse_args()
    os.chdir(scheduler.ROOT)
    settings = {name: os.environ.get(name) or default for name, default in SETTINGS.items()}
    say(f"building {' and '.join(NORMS)} for {settings['DEVICE']}, {settings['PRECISION']} (about a minute)")
    os.environ.update(DEVICE=settings["DEVICE"], PRECISION=settings["PRECISION"])
    for norm in NORMS:
        scheduler.trainer(norm)

    flags = ["--layers", settings["LAYERS"], "--hidden", settings["HIDDEN"], "--ffn", settings["FFN"],
             "--heads", settings["HEADS"], "--seq-len", settings["SEQ_LEN"], "--batch-size", settings["BATCH"],
             "--total-batch-size", settings["TOTAL_BATCH"], "--steps", settings["STEPS"], "--lr", settings["LR"],
             "--warmup", settings["WARMUP"], "--seed", settings["SEED"], "--model", "tiny", "--eval-every", "50",
             "--eval-tokens", "16384", "--sample-every", settings["STEPS"], "--probe-every", settings["STEPS"],
             "--save-every", settings["STEPS"]]
    jobs = [Job(norm, flags, Path(f"runs/demo-{norm}")) for norm in NORMS]
    for i, job in enumerate(jobs):
        say(f"training {job.norm} ({i + 1} of {len(jobs)}): {settings['LAYERS']} blocks, {settings['HIDDEN']} wide, "
            f"{settings['STEPS']} steps of {settings['TOTAL_BATCH']} tokens, lr {settings['LR']}")
        train_alone(job)

    say("comparing")
    compared = subprocess.run(["scripts/compare.py", *[str(job.folder) for job in jobs], "--out", "runs/demo",
                               "--title", "The demo: PRE and LNS"])
    if compared.returncode:
        sys.exit(compared.returncode)
    shutil.copy("runs/demo/loss.png", "runs/demo.png")
    print("""
The picture is runs/demo.png, runs/demo/report.html the whole comparison. One seed at one learning rate: the difference
depends on the learning rate, so compare variants each at its best one, over several seeds, before you believe it.

What to try next:
  LR=1e-3 make demo                               the same at another learning rate (or SEED=2)
  make data TEXT="my.txt" && make demo            your own text
  make train_gpt NORM=PERI && ./train_gpt --help  another variant, every flag
  mpirun -np 2 ./train_gpt --out runs/two-ranks   the same work on two ranks (./train_gpt is what make train_gpt made)""")


if __name__ == "__main__":
    run_script("demo", main)
