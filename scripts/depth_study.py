#!/usr/bin/env python3
"""Trains and compares every NORM on a CPU; called by scripts/depth_cpu.sh, which makes the data.

Order of work, so that any number of hours gives a whole answer:
  1. PRE and LNS at 24 blocks, learning rates 1e-3, 2e-3, 4e-3; further ones while the best is the highest or the lowest
  2. each at its best rate, two more seeds
  3. the other four variants the same way
  4. PRE and LNS at 6, 12, 48 and 96 blocks, each at its best rate for 24 and at half of it
  5. PRE and LNS at 24 blocks, four times as long, at the same rates
  6. PRE and LNS at 24 blocks, each at its best rate, three more seeds

A finished run is a file of --results/runs and is never repeated. All but the long runs train on as many tokens as
--results/plan.json says, which the first start computes from --hours and the speed it measures.
"""

import glob
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import run_log
import scheduler
from command_line import Failure, Parser, not_negative, positive, run_script
from scheduler import Job, Scheduler, Slots

RATES = (1e-3, 2e-3, 4e-3)
SEEDS, MORE_SEEDS = (1, 2, 3), (4, 5, 6)
NORMS = ("PRE", "LNS")
OTHER_NORMS = ("POST", "DEEPNORM", "MIX", "PERI")
LAYERS, OTHER_LAYERS = 24, (6, 12, 48, 96)
LONG = 4  # times the tokens of the other runs
MODEL = ("--model", "tiny", "--hidden", "64", "--ffn", "176", "--heads", "2", "--seq-len", "128", "--batch-size", "16",
         "--total-batch-size", "2048")
BATCH_TOKENS = 2048
# What the whole study costs, in runs of 24 blocks: (3 rates, about 1 more, 2 seeds) x 6 variants, then 4 to 6 above.
STUDY_COST = 6 * 6 + 2 * (2 * sum(OTHER_LAYERS) / LAYERS + 2 * LONG + len(MORE_SEEDS))
EXTRA_COST = 1.2  # validation, probes and start-up over the training alone


class Setting(NamedTuple):
    norm: str
    layers: int
    rate: float
    seed: int
    length: int = 1  # in plan.json's steps

    @property
    def name(self):
        return f"{self.norm}-{self.layers}-{self.rate:g}-{self.seed}" + (f"-{self.length}x" if self.length > 1 else "")

    @property
    def cost(self):
        """In runs of 24 blocks."""
        return self.layers / LAYERS * self.length


def read_result(path):
    """The run of a file of --results/runs."""
    start, probe = {"layers", "steps", "lr", "seed"}, {"loss", "variance", "prune_loss", "prune_last_loss", "jacobian",
                                                       "effective_depth"}
    runs = run_log.read_runs(path)
    for run in runs[:1] if len(runs) == 1 else []:
        probed = {field for field, value in (run.final_probe() or {}).items() if value not in (None, [])}
        if start <= run.start.keys() and run.speed() and (run.diverged or probe <= probed):
            return run
    raise Failure(f"{path}: expected one run with its speed, {', '.join(sorted(start))}, and a probe with "
                  f"{', '.join(sorted(probe))}; remove the file, and scripts/depth_cpu.sh trains it again")


class Study:
    def __init__(self, arguments):
        self.data, self.work, self.results, self.hours = (arguments.data, arguments.work, arguments.results,
                                                          arguments.hours)
        self.plan = None
        self.slots = Slots(arguments.jobs)
        self.scheduler = Scheduler(self.slots)
        os.environ.update(DEVICE="cpu", PRECISION="fp32", OMP_NUM_THREADS="1")

    # --- Sizing ---

    def job(self, name, norm, layers, flags, cost=1):
        data = glob.escape(str(self.data))
        flags = [*MODEL, "--layers", layers, "--train", f"{data}/train/train_*.bin", "--val", f"{data}/val/train_*.bin",
                 *flags]
        return Job(norm, list(map(str, flags)), self.work / name, self.work / f"{name}.console", cost)

    def measured_speed(self):
        """Tokens a second of a run of 24 blocks while --jobs of them run side by side."""
        jobs = [self.job(f"speed-{place}", "LNS", LAYERS, ["--steps", 12, "--eval-tokens", 256])
                for place in self.slots.places]
        print(f"measuring the speed of {len(jobs)} runs side by side", flush=True)
        for job in jobs:
            shutil.rmtree(job.folder, ignore_errors=True)
        measuring = Scheduler(self.slots)
        measuring.train(jobs)
        for job in measuring.failures:
            raise Failure(f"{job.console}: {job.failure()}")
        return min(run_log.read_runs(job.folder)[0].speed() for job in jobs)

    def make_plan(self):
        path = self.results / "plan.json"
        if path.exists():
            try:
                self.plan = json.loads(path.read_text())
                valid = self.plan["steps"] > 0
            except (ValueError, LookupError, TypeError):
                valid = False
            if not valid:
                raise Failure(f"{path}: expected the plan that the first start made, a JSON object with steps; move it and "
                              "runs/ away to start anew")
            print(f"{path}: {self.plan['steps']} steps of {BATCH_TOKENS} tokens a run, as at the first start")
            return
        speed, jobs = self.measured_speed(), len(self.slots.places)
        tokens = self.hours * 3600 * jobs * speed / (STUDY_COST * EXTRA_COST)
        self.plan = {"hours": self.hours, "jobs": jobs, "tokens_per_s": round(speed), "batch_tokens": BATCH_TOKENS,
                     "steps": max(20, round(tokens / BATCH_TOKENS / 20) * 20)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.plan, indent=1) + "\n")
        print(f"{path}: {self.plan['steps']} steps of {BATCH_TOKENS} tokens a run")

    # --- Runs ---

    def result_path(self, setting):
        return self.results / "runs" / f"{setting.name}.json"

    def run_all(self, settings):
        """Those that have no result yet."""
        settings = {setting.name: setting for setting in settings if not self.result_path(setting).exists()}

        def keep_result(job):
            # A run that ended because its loss is no number is a result; any other end is not.
            if job.outcome == "done" or job.diverged:
                self.keep(settings[job.name], job.folder)

        self.scheduler.train([self.job_of(setting) for setting in settings.values()], on_end=keep_result)
        for job in self.scheduler.failures:
            if not job.diverged:
                raise Failure(f"{job.console}: {job.failure()}")

    def job_of(self, setting):
        steps = self.plan["steps"] * setting.length
        flags = ["--steps", steps, "--lr", setting.rate, "--seed", setting.seed, "--warmup", steps // 10,
                 "--eval-every", steps // 5, "--eval-tokens", 32768, "--probe-every", steps // 3,
                 "--probe-tokens", 2048, "--save-every", steps // 3, "--keep", 1]
        return self.job(setting.name, setting.norm, setting.layers, flags, setting.cost)

    def keep(self, setting, folder):
        run = run_log.read_runs(folder)[0]
        temporary = self.result_path(setting).with_suffix(".tmp")
        run_log.export([run], temporary)
        temporary.rename(self.result_path(setting))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        done = sum(finished.cost for finished in self.finished())
        loss = f"{run.final_loss():.4f}" if math.isfinite(run.final_loss()) else "diverged"
        hours = (time.monotonic() - self.scheduler.started) / 3600
        left = self.scheduler.time_left(max(0.0, STUDY_COST - done)) / 3600
        print(f"{time.strftime('%H:%M')}  {setting.name:22} validation loss {loss}; {hours:.2f} h, "
              f"about {100 * done / STUDY_COST:.0f} % of the study done, {left:.1f} h left", flush=True)

    # --- The order of work ---

    def finished(self):
        """The runs that are there, by setting."""
        runs = [read_result(path) for path in (self.results / "runs").glob("*.json")]
        return {Setting(run.norm, run.start["layers"], run.lr, run.seed, run.start["steps"] // self.plan["steps"]): run
                for run in runs}

    def rates_tried(self, norm, layers):
        return {setting.rate: run.final_loss() for setting, run in self.finished().items()
                if setting == Setting(norm, layers, setting.rate, SEEDS[0])}

    def best_rate(self, norm):
        losses = self.rates_tried(norm, LAYERS)
        return min(losses, key=losses.get)

    def next_rate(self, norm):
        """One step beyond the grid, where the best rate is its end; at most to 16 times the first grid's ends."""
        rates, best = sorted(self.rates_tried(norm, LAYERS)), self.best_rate(norm)
        rate = best * 2 if best == rates[-1] else best / 2 if best == rates[0] else None
        return rate if rate and RATES[0] / 16 <= rate <= RATES[-1] * 16 else None

    def compare_at_best_rates(self, norms):
        self.run_all([Setting(norm, LAYERS, rate, SEEDS[0]) for rate in RATES for norm in norms])
        while beyond := [Setting(norm, LAYERS, rate, SEEDS[0]) for norm in norms if (rate := self.next_rate(norm))]:
            self.run_all(beyond)
        self.run_all([Setting(norm, LAYERS, self.best_rate(norm), seed) for seed in SEEDS[1:] for norm in norms])

    def work_through(self):
        self.work.mkdir(parents=True, exist_ok=True)
        (self.results / "runs").mkdir(parents=True, exist_ok=True)
        self.make_plan()
        self.compare_at_best_rates(NORMS)
        self.compare_at_best_rates(OTHER_NORMS)
        rates = [(norm, self.best_rate(norm) / part) for part in (1, 2) for norm in NORMS]
        for layers in OTHER_LAYERS:
            self.run_all([Setting(norm, layers, rate, SEEDS[0]) for norm, rate in rates])
        self.run_all([Setting(norm, LAYERS, rate, SEEDS[0], LONG) for norm, rate in rates])
        self.run_all([Setting(norm, LAYERS, self.best_rate(norm), seed) for seed in MORE_SEEDS for norm in NORMS])


# ---------------------------------------------------------------------------------------------------------------------
# The report: pictures and tables from the runs' files alone


def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|"] + lines[1:]) + "\n"


def shown(value, digits=4):
    return "diverged" if math.isinf(value) else f"{value:.{digits}f}"


def deep_half(values):
    """The mean over the second half of the blocks."""
    half = values[len(values) // 2:]
    return sum(half) / len(half)


class Report:
    def __init__(self, results):
        self.results = results
        runs = [read_result(path) for path in sorted((results / "runs").glob("*.json"))]
        if not runs:
            raise Failure(f"{results}/runs: no finished run yet; scripts/depth_cpu.sh --hours H makes them")
        self.steps = min(run.start["steps"] for run in runs)
        self.runs = runs
        order = NORMS + OTHER_NORMS
        self.norms = [norm for norm in order if any(run.seed == SEEDS[0] for run in self.of(norm, LAYERS))]
        if missing := [norm for norm in NORMS if norm not in self.norms]:
            raise Failure(f"{results}/runs: no run of {missing[0]} with {LAYERS} blocks and seed {SEEDS[0]} yet; "
                          "scripts/depth_cpu.sh --hours H makes them")
        self.best = {}
        for norm in self.norms:
            first = {run.lr: run.final_loss() for run in self.of(norm, LAYERS) if run.seed == SEEDS[0]}
            self.best[norm] = min(first, key=first.get)

    def of(self, norm, layers, length=1):
        return [run for run in self.runs
                if run.norm == norm and run.start["layers"] == layers and run.start["steps"] == length * self.steps]

    def at_best(self, norm):
        return [run for run in self.of(norm, LAYERS) if run.lr == self.best[norm]]

    def rates_table(self):
        """Final loss of seed 1 at each learning rate."""
        rates = sorted({run.lr for norm in self.norms for run in self.of(norm, LAYERS)})
        rows = [["NORM"] + [f"lr {rate:g}" for rate in rates]]
        for norm in self.norms:
            losses = {run.lr: run.final_loss() for run in self.of(norm, LAYERS) if run.seed == SEEDS[0]}
            cells = [shown(losses[rate]) if rate in losses else "" for rate in rates]
            best = rates.index(self.best[norm])
            cells[best] = f"**{cells[best]}**"
            rows.append([norm] + cells)
        return markdown(rows)

    def variances_table(self):
        """Variance after the first block, after the last, and the growth between, at each learning rate, seed 1."""
        rates = sorted({run.lr for norm in self.norms for run in self.of(norm, LAYERS)})
        rows = [["NORM"] + [f"lr {rate:g}" for rate in rates]]
        for norm in self.norms:
            probes = {run.lr: run.final_probe() for run in self.of(norm, LAYERS) if run.seed == SEEDS[0]}
            ends = {rate: (probe["variance"][1], probe["variance"][-1]) for rate, probe in probes.items() if probe}
            cells = {rate: f"{first:.3g} to {last:.3g}, {last / first:.3g}x" for rate, (first, last) in ends.items()}
            rows.append([norm] + [cells.get(rate, "") for rate in rates])
        return markdown(rows)

    def best_table(self):
        """Each at its best rate: mean and spread over seeds, difference to PRE, and what the last probe says."""
        rows = [["NORM", "best lr", "val loss of each seed", "mean", "± seeds", "difference to PRE", "95 % interval",
                 "variance after block 1", "after the last", "growth", "effective depth",
                 "loss if a deep block is removed", "if all are", "a deep block's Jacobian's distance to I"]]
        groups = {norm: run_log.Group(self.at_best(norm)) for norm in self.norms}
        for norm, group in groups.items():
            change, interval = (None, None) if norm == "PRE" else run_log.difference(group, groups["PRE"])

            def probe(get):
                return group.probe_mean(lambda p: [get(p)])[0]
            first, last = probe(lambda p: p["variance"][1]), probe(lambda p: p["variance"][-1])
            rows.append([
                norm, f"{group.first.lr:g}", ", ".join(map(shown, group.losses())), shown(group.mean()),
                "" if group.spread() is None else shown(group.spread()),
                "" if change is None else f"{change:+.4f}",
                "" if interval is None else f"[{change - interval:+.4f}, {change + interval:+.4f}]",
                f"{first:.3g}", f"{last:.3g}", f"{last / first:.1f}x",
                f"{probe(lambda p: p['effective_depth']):.1f} of {LAYERS}",
                f"{probe(lambda p: deep_half(p['prune_loss']) - p['loss']):+.4f}",
                f"{probe(lambda p: p['prune_last_loss'][-1] - p['loss']):+.4f}",
                f"{probe(lambda p: deep_half(p['jacobian'])):.3f}"])
        return markdown(rows)

    def pairs_table(self, title, settings):
        """PRE and LNS at each of (first cell, run of PRE, run of LNS)."""
        rows = [[title, "PRE loss", "LNS loss", "LNS - PRE", "PRE variance after the last block", "LNS", "PRE / LNS",
                 "PRE effective depth", "LNS", "PRE loss if the deep half is removed", "LNS"]]
        for cell, pre, lns in settings:
            losses = [run.final_loss() for run in (pre, lns)]
            probes = [run.final_probe() or {} for run in (pre, lns)]
            variances = [p.get("variance", [math.nan])[-1] for p in probes]
            prunings = [p.get("prune_last_loss", [math.nan])[-1] - p.get("loss", math.nan) for p in probes]
            rows.append([cell, *map(shown, losses),
                         f"{losses[1] - losses[0]:+.4f}" if all(map(math.isfinite, losses)) else "",
                         f"{variances[0]:.3g}", f"{variances[1]:.3g}", f"{variances[0] / variances[1]:.1f}",
                         *[f"{p.get('effective_depth', '')}" for p in probes], *[f"{p:+.4f}" for p in prunings]])
        return markdown(rows)

    def best_run(self, norm, layers):
        """Of seed 1, over the rates tried at this depth; None where there is none."""
        runs = [run for run in self.of(norm, layers) if run.seed == SEEDS[0]]
        return min(runs, key=run_log.Run.final_loss, default=None)

    def depth_pairs(self):
        depths = sorted((LAYERS, *OTHER_LAYERS))
        pairs = [(layers, *[self.best_run(norm, layers) for norm in NORMS]) for layers in depths]
        return [pair for pair in pairs if all(pair)]

    def depths_table(self):
        """Each at the best of the rates tried at that depth, seed 1."""
        return self.pairs_table("blocks", [(f"{layers}", *pair) for layers, *pair in self.depth_pairs()])

    def depths_and_rates_table(self):
        """Final loss of seed 1 at each rate and depth."""
        depths = sorted((LAYERS, *OTHER_LAYERS))
        rows = [["NORM, learning rate"] + [f"{layers} blocks" for layers in depths]]
        for norm in NORMS:
            for rate in sorted({run.lr for layers in OTHER_LAYERS for run in self.of(norm, layers)}):
                losses = {run.start["layers"]: run.final_loss() for layers in depths for run in self.of(norm, layers)
                          if run.lr == rate and run.seed == SEEDS[0]}
                rows.append([f"{norm}, lr {rate:g}"] + [shown(losses[layers]) if layers in losses else ""
                                                        for layers in depths])
        return markdown(rows)

    def lengths_table(self):
        """The same learning rate for both, where there is a long run, and the short one beside it."""
        pairs = []
        for rate in sorted({run.lr for norm in NORMS for run in self.of(norm, LAYERS, LONG)}):
            for length in (1, LONG):
                pair = [[run for run in self.of(norm, LAYERS, length) if run.seed == SEEDS[0] and run.lr == rate]
                        for norm in NORMS]
                if all(pair):
                    tokens = self.steps * length * BATCH_TOKENS / 1e6
                    pairs.append((f"lr {rate:g}, {tokens:.2f}M tokens", *[runs[0] for runs in pair]))
        return self.pairs_table("training", pairs)

    def long_groups(self):
        return run_log.grouped([min(runs, key=run_log.Run.final_loss) for norm in NORMS
                                if (runs := self.of(norm, LAYERS, LONG))])

    def pictures(self):
        """(name, figure) of each that the runs allow."""
        from run_plots import FIGURES, VARIANCE, draw_by_setting, figure_of, plot_by_depth, plot_by_setting
        rates = run_log.grouped([run for norm in self.norms for run in self.of(norm, LAYERS)])
        best = run_log.grouped([run for norm in self.norms for run in self.at_best(norm)])
        for group in best:
            group.label = f"{group.first.norm}, lr {group.first.lr:g}"
        yield "rates", draw_by_setting(rates, "lr", "learning rate", f"{LAYERS} blocks: the regime of each variant")
        for name, _, _, draw in FIGURES:
            yield name, draw(best, best[0])
        if len(depths := self.depth_pairs()) > 1:
            groups = run_log.grouped([run for _, *pair in depths for run in pair])
            overview, [[left, right]] = figure_of(2)
            plot_by_setting(left, groups, "layers", "blocks", "Loss after training, by depth of the model")
            title, *rest = VARIANCE
            plot_by_depth(right, best[:len(NORMS)], f"{title}, {LAYERS} blocks", *rest)
            yield "overview", overview
        if long := self.long_groups():
            for name, _, _, draw in FIGURES:
                if name in ("loss", "variance", "pruning"):
                    yield f"long_{name}", draw(long, long[0])

    def write(self):
        from run_plots import plt
        for name, figure in self.pictures():
            if figure is None:
                continue
            figure.savefig(self.results / f"{name}.png")
            plt.close(figure)
            print(self.results / f"{name}.png")
        hours = sum(run.trained_tokens / run.speed() for run in self.runs) / 3600
        text = (f"# Tables\n\nWritten by `scripts/depth_cpu.sh --report` from runs/: {len(self.runs)} runs of "
                f"{self.steps} steps, {self.steps * BATCH_TOKENS / 1e6:.2f}M tokens each, where no other length is "
                f"said; {hours:.1f} hours of training on one core. Losses are in nats a byte.\n\n"
                f"## {LAYERS} blocks: final validation loss of seed 1, best rate in bold\n\n{self.rates_table()}\n"
                f"## {LAYERS} blocks: variance after the first block and after the last, seed 1\n\n"
                f"{self.variances_table()}\n"
                f"## {LAYERS} blocks: each at its best rate\n\n{self.best_table()}\n"
                "Deep blocks: the second half, its mean. Effective depth: blocks whose removal costs over 1 % of what "
                f"removing all of them does.\n\n## By depth, seed 1\n\n{self.depths_and_rates_table()}\n"
                f"Each at the best of the rates tried at its depth:\n\n{self.depths_table()}\n"
                f"## By length of training, {LAYERS} blocks, seed 1\n\n{self.lengths_table()}")
        (self.results / "tables.md").write_text(text)
        print(self.results / "tables.md")


def main():
    parser = Parser("depth_cpu.sh", __doc__)
    parser.add_argument("--hours", type=not_negative, default=3, help="that the whole study may take [3]")
    parser.add_argument("--jobs", type=positive, default=scheduler.cores(),
                        help="runs side by side, a thread each [the cores]")
    parser.add_argument("--data", type=Path, default=Path("data/depth_cpu"), help="[data/depth_cpu]")
    parser.add_argument("--work", type=Path, default=Path("runs/depth_cpu"), help="run folders [runs/depth_cpu]")
    parser.add_argument("--results", type=Path, default=Path("dev/results/depth_cpu"), help="[dev/results/depth_cpu]")
    parser.add_argument("--report", action="store_true", help="train nothing; draw pictures and tables again")
    parser.add_argument("--check", action="store_true", help="only look at these arguments")
    arguments = parser.parse_args()
    if arguments.check:
        return
    if not arguments.report:
        Study(arguments).work_through()
    Report(arguments.results).write()


if __name__ == "__main__":
    run_script("depth_study", main)
