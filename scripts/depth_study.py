#!/usr/bin/env python3
"""Trains and compares every NORM on a CPU; called by scripts/depth_cpu.sh, which makes the programs and the data.

Order of work, so that any number of hours gives a whole answer:
  1. PRE and LNS at 24 blocks, learning rates 1e-3, 2e-3, 4e-3; further ones while the best is the highest or the lowest
  2. each at its best rate, two more seeds
  3. the other four variants the same way
  4. PRE and LNS at 6, 12, 48 and 96 blocks, each at its best rate for 24

A finished run is a file of --results/runs and is never repeated. All runs of a study train on as many tokens as
--results/plan.json says, which the first start computes from --hours and the speed it measures.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import run_log

RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3)
NORMS = ("PRE", "LNS")
OTHER_NORMS = ("POST", "DEEPNORM", "MIX", "PERI")
LAYERS, OTHER_LAYERS = 24, (6, 12, 48, 96)
MODEL = ("--model", "tiny", "--hidden", "64", "--ffn", "176", "--heads", "2", "--seq-len", "256", "--batch-size", "8",
         "--total-batch-size", "2048")
BATCH_TOKENS = 2048
# Runs of 24 blocks that the whole study costs: (3 rates, about 1 more, 2 seeds) x 6 variants, and the other depths.
STUDY_COST = 6 * 6 + 2 * sum(OTHER_LAYERS) / LAYERS
EXTRA_COST = 1.2  # validation, probes and start-up over the training alone


class Failure(Exception):
    """Ends the study with one line."""


def name_of(norm, layers, rate, seed):
    return f"{norm}-{layers}-{rate:g}-{seed}"


class Study:
    def __init__(self, arguments):
        self.data, self.work, self.results, self.jobs = (arguments.data, arguments.work, arguments.results,
                                                         arguments.jobs)
        self.hours = arguments.hours
        self.plan = None
        self.started, self.finished_here, self.cost_here = time.time(), 0, 0.0

    # --- Sizing ---

    def trainer(self, norm):
        program = Path(f"build/cpu-fp32-{norm}/train_gpt")
        if not program.exists():
            raise Failure(f"{program} is missing; start scripts/depth_cpu.sh, which builds it")
        return str(program)

    def train(self, norm, layers, flags, out):
        command = [self.trainer(norm), *MODEL, "--layers", str(layers), "--train", f"{self.data}/train/train_*.bin",
                   "--val", f"{self.data}/val/train_*.bin", "--out", str(out), *map(str, flags)]
        with open(f"{out}.console", "a") as console:
            return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    def measured_speed(self):
        """Tokens a second of a run of 24 blocks while --jobs of them run side by side."""
        print(f"measuring the speed of {self.jobs} runs side by side", flush=True)
        outs = [self.work / f"speed-{job}" for job in range(self.jobs)]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda out: self.train("LNS", LAYERS, ["--steps", 12, "--eval-tokens", 256], out), outs))
        return min(run_log.read_runs(out)[0].speed() for out in outs)

    def make_plan(self):
        path = self.results / "plan.json"
        if path.exists():
            self.plan = json.loads(path.read_text())
            print(f"{path}: {self.plan['steps']} steps of {BATCH_TOKENS} tokens a run, as at the first start")
            return
        speed = self.measured_speed()
        tokens = self.hours * 3600 * self.jobs * speed / (STUDY_COST * EXTRA_COST)
        self.plan = {"hours": self.hours, "jobs": self.jobs, "tokens_per_s": round(speed), "batch_tokens": BATCH_TOKENS,
                     "steps": max(20, round(tokens / BATCH_TOKENS / 20) * 20)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.plan, indent=1) + "\n")
        print(f"{path}: {self.plan['steps']} steps of {BATCH_TOKENS} tokens a run")

    # --- Runs ---

    def result_path(self, *setting):
        return self.results / "runs" / f"{name_of(*setting)}.json"

    def result(self, *setting):
        return run_log.read_runs(self.result_path(*setting))[0]

    def run(self, setting):
        norm, layers, rate, seed = setting
        out = self.work / name_of(*setting)
        steps = self.plan["steps"]
        flags = ["--steps", steps, "--lr", rate, "--seed", seed, "--warmup", steps // 10, "--eval-every", steps // 10,
                 "--eval-tokens", 32768, "--probe-every", steps // 4, "--probe-tokens", 2048, "--save-every",
                 steps // 4, "--keep", 1, "--resume"]
        self.train(norm, layers, flags, out)
        try:
            run = run_log.read_runs(out)[0]
        except run_log.LogError:
            raise Failure(f"{out}.console: the run wrote no log: {last_line(Path(f'{out}.console'))}") from None
        # A run that ended because its loss is no number is a result; any other end is not.
        if not run.finished or (run.end["reason"] != "done" and "not finite" not in run.end["reason"]):
            raise Failure(f"{out}.console: the run did not end: {last_line(Path(f'{out}.console'))}")
        temporary = self.result_path(*setting).with_suffix(".tmp")
        run_log.export([run], temporary)
        temporary.rename(self.result_path(*setting))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        self.finished_here += 1
        self.cost_here += layers / LAYERS
        self.say(setting, run)

    def say(self, setting, run):
        done = sum(int(path.stem.split("-")[1]) for path in (self.results / "runs").glob("*.json")) / LAYERS
        hours = (time.time() - self.started) / 3600
        left = max(0.0, STUDY_COST - done) * hours / self.cost_here
        loss = f"{run.final_loss():.4f}" if math.isfinite(run.final_loss()) else "diverged"
        print(f"{time.strftime('%H:%M')}  {name_of(*setting):22} validation loss {loss}; {hours:.2f} h, "
              f"about {100 * done / STUDY_COST:.0f} % of the study done, {left:.1f} h left", flush=True)

    def run_all(self, settings):
        missing = [setting for setting in settings if not self.result_path(*setting).exists()]
        with ThreadPoolExecutor(self.jobs) as pool:
            for future in [pool.submit(self.run, setting) for setting in missing]:
                future.result()

    # --- The order of work ---

    def rates_tried(self, norm, layers):
        paths = (self.results / "runs").glob(f"{norm}-{layers}-*-{SEEDS[0]}.json")
        rates = [float(path.stem[len(f"{norm}-{layers}-"):-len(f"-{SEEDS[0]}")]) for path in paths]
        return {rate: self.result(norm, layers, rate, SEEDS[0]).final_loss() for rate in rates}

    def best_rate(self, norm):
        losses = self.rates_tried(norm, LAYERS)
        return min(losses, key=losses.get)

    def next_rate(self, norm):
        """One step beyond the grid, where the best rate is its end; at most to 16 times the first grid's ends."""
        rates, best = sorted(self.rates_tried(norm, LAYERS)), self.best_rate(norm)
        rate = best * 2 if best == rates[-1] else best / 2 if best == rates[0] else None
        return rate if rate and RATES[0] / 16 <= rate <= RATES[-1] * 16 else None

    def compare_at_best_rates(self, norms):
        self.run_all([(norm, LAYERS, rate, SEEDS[0]) for rate in RATES for norm in norms])
        while beyond := [(norm, LAYERS, self.next_rate(norm), SEEDS[0]) for norm in norms if self.next_rate(norm)]:
            self.run_all(beyond)
        self.run_all([(norm, LAYERS, self.best_rate(norm), seed) for seed in SEEDS[1:] for norm in norms])

    def work_through(self):
        self.work.mkdir(parents=True, exist_ok=True)
        (self.results / "runs").mkdir(parents=True, exist_ok=True)
        self.make_plan()
        self.compare_at_best_rates(NORMS)
        self.compare_at_best_rates(OTHER_NORMS)
        for layers in OTHER_LAYERS:
            self.run_all([(norm, layers, self.best_rate(norm), SEEDS[0]) for norm in NORMS])


def last_line(path):
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1] if lines else "nothing was written"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=3, help="that the whole study may take [3]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, a thread each [the cores]")
    parser.add_argument("--data", type=Path, default=Path("data/depth_cpu"), help="[data/depth_cpu]")
    parser.add_argument("--work", type=Path, default=Path("runs/depth_cpu"), help="run folders [runs/depth_cpu]")
    parser.add_argument("--results", type=Path, default=Path("dev/results/depth_cpu"), help="[dev/results/depth_cpu]")
    parser.add_argument("--report", action="store_true", help="train nothing; draw pictures and tables again")
    arguments = parser.parse_args()
    try:
        if not arguments.report:
            Study(arguments).work_through()
    except (Failure, run_log.LogError, OSError) as error:
        sys.exit(f"depth_study: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
