#!/usr/bin/env python3
"""The CPU device beside PyTorch (pip install torch), on as many threads: medians of a training step's time.

  dev/bench/against_pytorch.py [--rounds 5] [--precision fp32|bf16] [WORK...]
                                              WORK: MODEL:B:T:fp32|bf16; without, those of the README in that precision

Needs build/cpu-PRECISION-LNS/step; make bench DEVICE=cpu builds it and, where there is PyTorch, calls this. In a round ours, eager
and compiled each run for some seconds; a ratio is taken within a round, where the machine is as fast for both.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch_model import Training

WORKS = ["demo:16:128:fp32", "depth-study:16:128:fp32", "llama-130m:4:256:fp32", "llama-130m:4:256:bf16",
         "gpt2-124m:4:64:fp32"]
ROOT = Path(__file__).resolve().parents[2]


def ours_ms(name, B, T, precision, seconds):
    step = ROOT / f"build/cpu-{precision}-LNS/step"
    if not step.exists():
        sys.exit(f"against_pytorch: {step} is missing: make bench DEVICE=cpu PRECISION={precision}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    return float(subprocess.run([step, name, B, T, str(seconds)], env=environment, check=True, capture_output=True,
                                text=True).stdout)


def torch_ms(training, seconds):
    training.step()
    times = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        training.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each in a round")
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("works", nargs="*", metavar="WORK")
    arguments = parser.parse_args()
    works = arguments.works or [work for work in WORKS if work.endswith(arguments.precision or "")]
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; ms a step, medians of {arguments.rounds}"
          " rounds; ratios: median (smallest, largest) of the rounds'")
    print(f"{'work':30} {'ours':>8} {'eager':>8} {'compiled':>8}  {'ours / eager':>20}  ours / compiled")
    for work in works:
        name, B, T, precision = work.split(":")
        trainings = [Training(name, int(B), int(T), "cpu", precision == "bf16", compiled) for compiled in (False, True)]
        trainings[1].step()  # compiles
        rounds = []
        for _ in range(arguments.rounds):
            rounds.append([ours_ms(name, B, T, precision, arguments.seconds)]
                          + [torch_ms(training, arguments.seconds) for training in trainings])
        medians = [statistics.median(column) for column in zip(*rounds)]
        ratios = [sorted(row[0] / row[other] for row in rounds) for other in (1, 2)]
        shown = [f"{statistics.median(r):.2f} ({r[0]:.2f}, {r[-1]:.2f})" for r in ratios]
        print(f"{work:30} {medians[0]:8.1f} {medians[1]:8.1f} {medians[2]:8.1f}  {shown[0]:>20}  {shown[1]}", flush=True)


if __name__ == "__main__":
    main()
