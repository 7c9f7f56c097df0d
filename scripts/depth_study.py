#!/usr/bin/env python3
"""Trains and compares variants on a CPU, on bytes; called by scripts/depth_cpu.sh, which makes the data.

Order of work, so that any number of hours gives an answer to something:
  1. the learning rate: five of them for each of PRE, LNS and LNS_INIT, on 2M bytes
  2. two more seeds of each at the best of these rates
  3. does warm-up matter: PRE and LNS on 2M bytes at the highest rates, warmed up over 1, 10 and 50 % of the run
  4. these three at 24 blocks on 20M bytes, at the half of the best of those rates, then at the half and the double of
     the best so far, until both are tried
  5. each at its best rate, two more seeds
  6. PRE and LNS with 48 blocks at their best rates, two seeds
  7. PRE and LNS with scaled initialization at their best rates, two seeds
  8. PRORES, KEEL, DEEPNORM and PERI: five rates on 2M bytes, then on 20M as in 4
  9. the best of these four, two more seeds

A finished run is a file of --results/runs and is never repeated; one that is stopped goes on where it saved last.
"""

import glob
import json
import math
import os
import shutil
import struct
import time
from pathlib import Path
from typing import NamedTuple

import run_log
import scheduler
from command_line import Failure, Parser, positive, run_script
from scheduler import Job, Scheduler, Slots

BATCH = 2048  # bytes a step
SHORT, LONG = 976, 9760  # steps of a run: 2M and 20M bytes
STAGE = 488  # steps between validations, probes and checkpoints: 1M bytes
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
PAIR, NORMS = ("PRE", "LNS"), ("PRE", "LNS", "LNS_INIT")
OTHER_NORMS = ("PRORES", "KEEL", "DEEPNORM", "PERI")
LAYERS, DEEP_LAYERS = 24, 48
STAGES = (2, 5, 10, 20)  # at which the page looks back
WARMUPS = (1, 10, 50)  # percent of the run
WARMUP = 10
MODEL = ("--model", "tiny", "--hidden", "64", "--ffn", "176", "--heads", "2", "--seq-len", "128", "--batch-size", "16",
         "--total-batch-size", BATCH)
# What a run's file keeps of each probe; of the last it keeps all.
PROBED = ("loss", "variance", "variance_attention", "variance_first", "variance_largest", "max_abs", "lens_kl", "lens_top",
          "prune_loss", "prune_last_loss", "jacobian", "effective_depth")
# What the whole study costs, in long runs of 24 blocks: the list above.
STUDY_COST = (len(NORMS) * ((len(RATES) + len(SEEDS) - 1) * SHORT / LONG + len(SEEDS) + 2) +
              2 * 2 * DEEP_LAYERS / LAYERS + 2 * 2 + 2 * 4 * SHORT / LONG + len(OTHER_NORMS) * (len(RATES) * SHORT / LONG + 3) +
              len(SEEDS) - 1)


def amount(steps, of=" bytes"):
    return f"{steps * BATCH / 1e6:.0f}M{of}"


class Setting(NamedTuple):
    norm: str
    layers: int
    rate: float
    seed: int = SEEDS[0]
    steps: int = LONG
    init: str = "normal"
    warmup: int = WARMUP  # percent

    @property
    def name(self):
        return (f"{self.norm}-{self.layers}-{self.rate:g}-{self.seed}-{amount(self.steps, '')}" +
                (f"-{self.init}" if self.init != "normal" else "") +
                (f"-warmup{self.warmup}" if self.warmup != WARMUP else ""))

    @property
    def cost(self):
        """In long runs of 24 blocks."""
        return self.layers / LAYERS * self.steps / LONG


def read_result(path):
    """The run of a file of --results/runs, and its norms' gains by step."""
    start = {"layers", "steps", "lr", "seed"}
    probe = {"loss", "variance", "variance_first", "prune_loss", "prune_last_loss", "lens_kl", "effective_depth"}
    runs = run_log.read_runs(path)
    for run in runs[:1] if len(runs) == 1 else []:
        probed = {field for field, value in (run.final_probe() or {}).items() if value not in (None, [])}
        if start <= run.start.keys() and run.speed() and (run.diverged or probe <= probed):
            run.gains = json.loads(path.read_text())["runs"][0].get("gains", {})
            return run
    raise Failure(f"{path}: expected one run with its speed, {', '.join(sorted(start))}, and a probe with "
                  f"{', '.join(sorted(probe))}; remove the file, and scripts/depth_cpu.sh trains it again")


def setting_of(run):
    start = run.start
    return Setting(run.norm, start["layers"], run.lr, run.seed, start["steps"], start.get("init", "normal"),
                   round(100 * start.get("warmup", 0) / start["steps"]))


def read_gains(folder):
    """{tensor name: [smallest, mean, largest]} of the norms' gains in a checkpoint."""
    with open(folder / "model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        begin = file.tell()
        gains = {}
        for name, tensor in header.items():
            if name.endswith("norm.weight"):
                file.seek(begin + tensor["data_offsets"][0])
                size = math.prod(tensor["shape"])
                values = struct.unpack(f"<{size}f", file.read(4 * size))
                gains[name] = [run_log.rounded(value) for value in (min(values), sum(values) / size, max(values))]
    return gains


class Study:
    def __init__(self, arguments):
        self.data, self.work, self.results = arguments.data, arguments.work, arguments.results
        self.scheduler = Scheduler(Slots(arguments.jobs))
        os.environ.update(DEVICE="cpu", PRECISION="fp32", OMP_NUM_THREADS="1")

    # --- Runs ---

    def result_path(self, setting):
        return self.results / "runs" / f"{setting.name}.json"

    def job_of(self, setting):
        data = glob.escape(str(self.data))
        flags = [*MODEL, "--layers", setting.layers, "--train", f"{data}/train/train_*.bin",
                 "--val", f"{data}/val/train_*.bin", "--steps", setting.steps, "--lr", setting.rate,
                 "--seed", setting.seed, "--init", setting.init, "--warmup", round(setting.steps * setting.warmup / 100),
                 "--eval-every", STAGE, "--eval-tokens", 131072, "--probe-every", STAGE, "--probe-tokens", 4096,
                 "--save-every", STAGE]
        return Job(setting.norm, list(map(str, flags)), self.work / setting.name, self.work / f"{setting.name}.console",
                   setting.cost)

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

    def keep(self, setting, folder):
        """The run's files: its config.toml; its log, shortened, with the norms' gains at each checkpoint. The last
        checkpoint stays."""
        run = run_log.read_runs(folder)[0]
        checkpoints = sorted(folder.glob("checkpoints/step_*"))
        gains = {int(checkpoint.name.removeprefix("step_")): read_gains(checkpoint) for checkpoint in checkpoints}
        shutil.copyfile(folder / "config.toml", self.result_path(setting).with_suffix(".toml"))
        temporary = self.result_path(setting).with_suffix(".tmp")
        run_log.export([run], temporary, probe_fields=PROBED, more={"gains": gains})
        temporary.rename(self.result_path(setting))
        for checkpoint in checkpoints[:-1]:
            shutil.rmtree(checkpoint)
        done = sum(setting_of(finished).cost for finished in self.finished())
        loss = f"{run.final_loss():.4f}" if math.isfinite(run.final_loss()) else "diverged"
        hours = (time.monotonic() - self.scheduler.started) / 3600
        left = self.scheduler.time_left(max(0.0, STUDY_COST - done)) / 3600
        print(f"{time.strftime('%H:%M')}  {setting.name:26} validation loss {loss}; {hours:.2f} h, "
              f"about {100 * done / STUDY_COST:.0f} % of the study done, {left:.1f} h left", flush=True)

    # --- The order of work ---

    def finished(self):
        return [read_result(path) for path in (self.results / "runs").glob("*.json")]

    def best_rate(self, norm, steps):
        """Of those tried with 24 blocks and the first seed; None where none was."""
        losses = {run.lr: run.final_loss() for run in self.finished()
                  if setting_of(run) == Setting(norm, LAYERS, run.lr, steps=steps)}
        return min(losses, key=losses.get, default=None)

    def find_rates(self, norms):
        """At full length, where lower rates are best: the half of the short runs' best, then the neighbours of the best so
        far, until that has both."""
        def untried(norm):
            rate = self.best_rate(norm, LONG) or self.best_rate(norm, SHORT) / 2
            settings = [Setting(norm, LAYERS, rate * factor) for factor in (1, 0.5, 2)]
            return [setting for setting in settings if not self.result_path(setting).exists()]

        while wanted := [settings[0] for norm in norms if (settings := untried(norm))]:
            self.run_all(wanted)

    def work_through(self):
        self.work.mkdir(parents=True, exist_ok=True)
        (self.results / "runs").mkdir(parents=True, exist_ok=True)

        def short(norms):
            self.run_all([Setting(norm, LAYERS, rate, steps=SHORT) for rate in RATES for norm in norms])

        def best(norm, layers=LAYERS, steps=LONG, **fields):
            return Setting(norm, layers, self.best_rate(norm, steps), steps=steps, **fields)

        short(NORMS)
        self.run_all([best(norm, steps=SHORT, seed=seed) for seed in SEEDS for norm in NORMS])
        self.run_all([Setting(norm, LAYERS, rate, steps=SHORT, warmup=warmup)
                      for norm in PAIR for warmup in WARMUPS for rate in RATES[-2:]])
        self.find_rates(NORMS)
        self.run_all([best(norm, seed=seed) for seed in SEEDS for norm in NORMS])
        self.run_all([best(norm, layers=DEEP_LAYERS, seed=seed) for seed in SEEDS[:2] for norm in PAIR])
        self.run_all([best(norm, init="scaled", seed=seed) for seed in SEEDS[:2] for norm in PAIR])
        short(OTHER_NORMS)
        self.find_rates(OTHER_NORMS)
        winner = min(map(best, OTHER_NORMS), key=lambda setting: read_result(self.result_path(setting)).final_loss())
        self.run_all([winner._replace(seed=seed) for seed in SEEDS])


# ---------------------------------------------------------------------------------------------------------------------
# The report: pictures and tables from the runs' files alone


def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|"] + lines[1:]) + "\n"


def shown(value, digits=4):
    return "" if value is None else "diverged" if math.isinf(value) else f"{value:.{digits}f}"


def with_interval(values):
    """Mean and half width of the 95 % interval."""
    center, half, _ = run_log.mean_interval(values)
    return f"{center:.4g}" + ("" if half is None else f" ± {half:.2g}")


def change_cells(change, interval, p):
    """Of run_log.mean_interval: the mean, its 95 % interval, p."""
    return ["" if change is None else f"{change:+.4f}",
            "" if interval is None else f"[{change - interval:+.4f}, {change + interval:+.4f}]", shown(p, 3)]


def with_factor(values):
    """Of positive values that differ by factors: the geometric mean and its 95 % interval."""
    center, half, _ = run_log.mean_interval([math.log(value) for value in values])
    return f"{math.exp(center):.4g}" + ("" if half is None else
                                        f" [{math.exp(center - half):.3g}, {math.exp(center + half):.3g}]")


def deep_half(values):
    """The mean over the second half of the blocks."""
    half = values[len(values) // 2:]
    return sum(half) / len(half)


# What a probe says of the deep blocks, as columns: title, a number.
DEEP = [
    ("loss if a deep block is removed", lambda probe: deep_half(probe["prune_loss"]) - probe["loss"]),
    ("loss if all are", lambda probe: probe["prune_last_loss"][-1] - probe["loss"]),
    ("lens at half depth, KL", lambda probe: probe["lens_kl"][len(probe["lens_kl"]) // 2]),
    ("blocks that count", lambda probe: probe["effective_depth"]),
]
VARIANCES = [
    ("variance after block 1", lambda probe: probe["variance"][1]),
    ("after the last", lambda probe: probe["variance"][-1]),
    ("growth behind block 1", lambda probe: probe["variance"][-1] / probe["variance"][1]),
    ("after block 1's attention", lambda probe: probe["variance_attention"][0]),
    ("first tokens', after block 1", lambda probe: probe["variance_first"][1]),
    ("largest of a token", lambda probe: probe["variance_largest"][1]),
    ("largest value, squared", lambda probe: probe["max_abs"][1] ** 2),
]


LEAD = "Loss less PRE's, each at its best rate, seed by seed"  # a panel's title
GAINS = (("input", "attention"), ("post_attention", "MLP"))


def gain_over_start(run, step, kind, block):
    """LNS's checkpoint holds the scale in its gains, LNS_INIT's gains start there."""
    mean = run.gains[str(step)][f"model.layers.{block - 1}.{kind}_layernorm.weight"][1]
    return mean if run.norm == "PRE" else mean * block ** 0.5


class Report:
    def __init__(self, results):
        self.results = results
        self.runs = {}  # by setting
        for path in sorted((results / "runs").glob("*.json")):
            run = read_result(path)
            self.runs[setting_of(run)] = run
        if not self.runs:
            raise Failure(f"{results}/runs: no finished run yet; scripts/depth_cpu.sh makes them")
        self.norms = [norm for norm in NORMS + OTHER_NORMS if any(setting.norm == norm for setting in self.runs)]

    def rates(self, norm, steps):
        """{rate: run} of the first seed at 24 blocks."""
        return {setting.rate: run for setting, run in self.runs.items()
                if setting == Setting(norm, LAYERS, setting.rate, steps=steps)}

    def best(self, norm, steps=LONG):
        rates = self.rates(norm, steps)
        return min(rates, key=lambda rate: rates[rate].final_loss(), default=None)

    def group(self, norm, layers=LAYERS, steps=LONG, **fields):
        """The runs of a variant at its best rate, of all seeds; None without any."""
        wanted = Setting(norm, layers, self.best(norm, steps), steps=steps, **fields)
        runs = [run for setting, run in self.runs.items() if setting._replace(seed=wanted.seed) == wanted]
        return run_log.Group(runs) if runs else None

    def best_groups(self, steps=LONG):
        return {norm: group for norm in self.norms if (group := self.group(norm, steps=steps))}

    def beside_the_usual(self):
        """(heading, name, what the usual runs have instead, groups) of the runs that differ from the usual ones in one
        setting, and of those."""
        usual = self.best_groups()
        for heading, name, fields, others in (
                (f"{DEEP_LAYERS} blocks", f"blocks_{DEEP_LAYERS}", {"layers": DEEP_LAYERS}, f"{LAYERS} blocks"),
                ("Scaled initialization", "scaled_init", {"init": "scaled"}, "normal init")):
            groups = {norm: group for norm in PAIR if (group := self.group(norm, **fields))}
            if "PRE" in groups:
                groups |= {f"{norm}, {others}": usual[norm] for norm in PAIR if norm in usual}
                for label, group in groups.items():
                    group.label = label
                yield heading, name, others, groups

    # --- Tables ---

    def rates_table(self, steps):
        """Final loss of the first seed at each learning rate."""
        found = {norm: rates for norm in self.norms if (rates := self.rates(norm, steps))}
        columns = sorted({rate for rates in found.values() for rate in rates})
        rows = [["NORM"] + [f"lr {rate:g}" for rate in columns]]
        for norm, rates in found.items():
            cells = [shown(rates[rate].final_loss()) if rate in rates else "" for rate in columns]
            best = columns.index(self.best(norm, steps))
            cells[best] = f"**{cells[best]}**"
            rows.append([norm] + cells)
        return markdown(rows)

    def probes_table(self, titles, groups):
        """What the last probes of each (first cell, runs) say: positive numbers."""
        rows = [["run", "final loss"] + [title for title, _ in titles]]
        for cell, runs in groups:
            probes = [run.final_probe() for run in runs if not run.diverged]
            rows.append([cell, shown(run_log.mean([run.final_loss() for run in runs]))] +
                        [with_factor(list(map(get, probes))) if probes else "" for _, get in titles])
        return markdown(rows)

    def variance_table(self, groups):
        return self.probes_table(VARIANCES, [(f"{norm}, lr {group.first.lr:g}", group.runs) for norm, group in groups.items()])

    def seeds_table(self, groups, baseline="PRE"):
        """(label: group): losses of each seed, and the difference to the baseline's, seed by seed."""
        rows = [["run", "best lr", "final loss of each seed", "mean", f"difference to {baseline}", "95 % interval", "p"]]
        for label, group in groups.items():
            difference = None, None, None
            if label != baseline and baseline in groups:
                difference = run_log.paired_difference(group, groups[baseline])
            rows.append([label, f"{group.first.lr:g}", ", ".join(map(shown, group.losses())), shown(group.mean())] +
                        change_cells(*difference))
        return markdown(rows)

    def usual_changes_table(self, others, groups):
        """What the setting changes, seed by seed: each variant's loss, and the difference of the two."""
        rows = [["of", f"change from {others}", "95 % interval", "p"]]
        changes = {}  # by seed
        for norm in PAIR:
            ours, usual = (groups[label].by_seed() if label in groups else {} for label in (norm, f"{norm}, {others}"))
            changes[norm] = {seed: ours[seed].final_loss() - usual[seed].final_loss() for seed in ours if seed in usual}
            rows.append([norm] + change_cells(*run_log.mean_interval(list(changes[norm].values()))))
        pre, lns = (changes[norm] for norm in PAIR)
        both = [lns[seed] - pre[seed] for seed in lns if seed in pre]
        rows.append(["LNS less PRE"] + change_cells(*run_log.mean_interval(both)))
        return markdown(rows)

    def lead_table(self, groups, stages=STAGES):
        """Loss of each variant against PRE's on the way, and what its deep blocks did by then: means over the seeds."""
        rows = [["after", "variant", "loss", "difference to PRE", "95 % interval"] + [title for title, _ in DEEP]]
        for stage in stages:
            step = stage * STAGE
            for norm, group in groups.items():
                runs = [run for run in group.good_runs() if step in run.val and step in run.probe]
                if not runs:
                    continue
                change = interval = None
                if norm != "PRE":
                    change, interval, _ = run_log.paired_difference(group, groups["PRE"],
                                                                    lambda run: run.val[step]["loss"])
                rows.append([f"{stage}M bytes", norm, shown(run_log.mean([run.val[step]["loss"] for run in runs])),
                             "" if change is None else f"{change:+.4f}", "" if interval is None else f"± {interval:.4f}"] +
                            [with_interval([get(run.probe[step]) for run in runs]) for _, get in DEEP])
        return markdown(rows)

    def leads(self, norm, steps, step):
        """{seed: loss - PRE's} after a step of the runs of a length, each at its best rate."""
        groups = [self.group(norm, steps=steps), self.group("PRE", steps=steps)]
        ours, theirs = ({run.seed: run.val[step]["loss"] for run in group.good_runs() if step in run.val} if group else {}
                        for group in groups)
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    def lead_changes_table(self):
        """How the difference to PRE at the end of the long runs differs from those before, seed by seed."""
        starts = [(f"the end of runs of {amount(SHORT)}", SHORT, SHORT)]
        starts += [(f"{stage}M bytes of the same runs", LONG, stage * STAGE) for stage in STAGES[:-1]]
        rows = [["variant", "since", "change of the difference to PRE", "95 % interval", "p"]]
        for norm in NORMS[1:]:
            end = self.leads(norm, LONG, LONG)
            for since, *start in starts:
                begin = self.leads(norm, *start)
                change, interval, p = run_log.mean_interval([end[seed] - begin[seed] for seed in begin if seed in end])
                if interval is not None:
                    rows.append([norm, since] + change_cells(change, interval, p))
        return markdown(rows) if len(rows) > 1 else None

    def gains_table(self, groups, blocks=(1, 2, 6, 12, 18, 24)):
        """How many times its start the mean gain of a norm is at the end, and in how many blocks it has all but gone."""
        rows = [["gains", "before"] + [f"block {block}" for block in blocks] + ["blocks below 0.2"]]
        for norm in NORMS:
            runs = [run for run in groups[norm].good_runs() if run.gains] if norm in groups else []
            for kind, where in GAINS if runs else ():
                gains = [[gain_over_start(run, LONG, kind, block) for block in range(1, LAYERS + 1)] for run in runs]
                rows.append([norm, where] + [with_interval([of_run[block - 1] for of_run in gains]) for block in blocks] +
                            [with_interval([sum(gain < 0.2 for gain in of_run) for of_run in gains])])
        return markdown(rows)

    def sections(self):
        """(heading, text, table)"""
        for steps in (SHORT, LONG):
            if any(self.rates(norm, steps) for norm in self.norms):
                yield f"Final loss by learning rate, {amount(steps)}", "Seed 1, the best in bold.", self.rates_table(steps)
        shorts = [(f"{norm}, lr {rate:g}", [run]) for norm in NORMS for rate, run in sorted(self.rates(norm, SHORT).items())]
        yield f"The stream's variance by learning rate, {amount(SHORT)}", "Seed 1.", self.probes_table(VARIANCES, shorts)
        warm = [(f"{setting.norm}, lr {setting.rate:g}, warm-up {setting.warmup} %", [run]) for setting, run in
                sorted(self.runs.items()) if (setting.steps, setting.seed) == (SHORT, SEEDS[0]) and
                any(other.warmup != WARMUP and setting._replace(warmup=other.warmup) == other for other in self.runs)]
        if warm:
            yield "The stream's variance by warm-up", "", self.probes_table(VARIANCES, warm)
        for steps in (SHORT, LONG):
            if not (groups := self.best_groups(steps)):
                continue
            yield (f"Each at its best rate, {amount(steps)}", "The difference is seed by seed: a seed fixes the order of "
                   "the data and the shape of the initialization. p is the paired t-test's.", self.seeds_table(groups))
        scaled = {norm: groups[norm] for norm in ("LNS", "LNS_INIT") if norm in groups}
        if len(scaled) == 2:
            yield (f"LNS_INIT beside LNS, {amount(LONG)}", "A fixed scale, and gains that start there and are trained.",
                   self.seeds_table(scaled, baseline="LNS"))
        if "PRE" not in groups:
            return
        yield ("On the way", "Means over the seeds, ± half the width of their 95 % interval; deep: the second half of the "
               "blocks. A block counts if its removal costs over 1 % of what removing all of them does.",
               self.lead_table(groups))
        if changes := self.lead_changes_table():
            yield ("Does the lead grow", f"A variant's loss less PRE's at the end of the runs of {amount(LONG)}, less what it was "
                   "before: means over the seeds that have both.", changes)
        yield (f"The stream's variance, {amount(LONG)}", "Geometric means over the seeds, with their 95 % intervals.",
               self.variance_table(groups))
        yield (f"Gains, {amount(LONG)}", "The mean over a norm's channels, over what it starts from: 1 in PRE and LNS, "
               "1/sqrt(l) in LNS_INIT.", self.gains_table(groups))
        for heading, _, others, groups in self.beside_the_usual():
            yield heading, f"At the best rates of {LAYERS} blocks, which are there to compare.", "\n".join(
                [self.seeds_table(groups), self.usual_changes_table(others, groups),
                 self.lead_table(groups, STAGES[-2:]), self.variance_table(groups)])

    # --- Pictures ---

    def plot_on_the_way(self, axis, groups, title, get=None):
        """Against the bytes trained on: get(probe), or without get the loss less PRE's, seed by seed."""
        from run_plots import band
        base = groups["PRE"].by_seed()
        for i, (norm, group) in enumerate(groups.items()):
            if get is None and norm == "PRE":
                axis.axhline(0, color="0.6", linewidth=0.8)
                continue
            runs = [run for run in group.good_runs() if get or run.seed in base]
            # A run that was stopped also has those of where it stopped.
            steps = sorted(step for step in set.intersection(*(set(run.probe) & set(run.val) for run in runs))
                           if step and step % STAGE == 0) if runs else []
            rows = [[get(run.probe[step]) if get else run.val[step]["loss"] - base[run.seed].val[step]["loss"]
                     for step in steps] for run in runs]
            band(axis, [step * BATCH / 1e6 for step in steps], rows, norm, i)
        axis.set(xlabel="million bytes", ylabel="nats a byte", title=title)
        axis.legend()

    def draw_on_the_way(self, groups):
        from run_plots import figure_of
        figure, [axes] = figure_of(3, width=5.2)
        self.plot_on_the_way(axes[0], groups, LEAD)
        self.plot_on_the_way(axes[1], groups, "Rise of the loss without the deep half", DEEP[1][1])
        self.plot_on_the_way(axes[2], groups, "KL(output || lens) at half depth", DEEP[2][1])
        return figure

    def draw_beside(self, heading, groups):
        from run_plots import VARIANCE, figure_of, plot_by_depth
        figure, [axes] = figure_of(3, width=5.2)
        self.plot_on_the_way(axes[0], groups, f"{heading}: loss less PRE's, seed by seed")
        self.plot_on_the_way(axes[1], groups, "Rise of the loss without the deep half", DEEP[1][1])
        plot_by_depth(axes[2], list(groups.values()), *VARIANCE)
        return figure

    def draw_gains(self, groups):
        """How far the norms' gains of the first seed have moved from where they start, on the way."""
        from run_plots import COLOURS, figure_of
        runs = [(groups[norm].label, groups[norm].runs[0]) for norm in NORMS if norm in groups]
        figure, [axes] = figure_of(len(runs), width=5.2)
        blocks = range(1, LAYERS + 1)
        for axis, (label, run) in zip(axes, runs):
            for i, stage in enumerate(STAGES):
                if str(stage * STAGE) in run.gains:
                    for (kind, _), line in zip(GAINS, ("-", "--")):
                        axis.plot(blocks, [gain_over_start(run, stage * STAGE, kind, block) for block in blocks], line,
                                  color=COLOURS[i], label=f"{stage}M bytes" if line == "-" else None)
            axis.axhline(1, color="0.6", linewidth=0.8)
            axis.set(xlabel="block", ylabel="mean gain / its start", title=f"{label}: before attention (dashed: MLP)")
            axis.legend()
        return figure

    def pictures(self):
        """(name, figure) of each that the runs allow."""
        from run_plots import FIGURES, VARIANCE, draw_by_setting, figure_of, plot_by_depth, plot_by_setting
        for steps in (SHORT, LONG):
            runs = [run for norm in self.norms for run in self.rates(norm, steps).values()]
            if len(runs) > 1:
                yield (f"rates_{amount(steps, '')}",
                       draw_by_setting(run_log.grouped(runs), "lr", "learning rate", f"{LAYERS} blocks, {amount(steps)}"))
        groups = self.best_groups()
        if "PRE" not in groups:
            return
        for norm, group in groups.items():
            group.label = f"{norm}, lr {group.first.lr:g}"
        for name, _, _, draw in FIGURES:
            if name in ("loss", "variance", "variance_over_time", "pruning", "effect", "lens", "angular"):
                yield name, draw(list(groups.values()), groups["PRE"])
        main = {norm: group for norm, group in groups.items() if norm in NORMS}
        others = {norm: group for norm, group in groups.items() if norm == "PRE" or norm not in NORMS}
        yield "on_the_way", self.draw_on_the_way(main)
        if len(others) > 1:
            yield "other_norms", self.draw_beside("Other variants", others)
        for heading, name, _, compared in self.beside_the_usual():
            yield name, self.draw_beside(heading, compared)
        yield "gains", self.draw_gains(main)
        overview, [[left, middle, right]] = figure_of(3, width=5.2)
        seeds = [run for setting, run in self.runs.items()
                 if setting.norm in NORMS and setting == Setting(setting.norm, LAYERS, setting.rate, setting.seed)]
        plot_by_setting(left, run_log.grouped(seeds), "lr", "learning rate", f"Loss after {amount(LONG)}, {LAYERS} blocks")
        left.set(ylabel="nats a byte")
        self.plot_on_the_way(middle, main, LEAD)
        plot_by_depth(right, [groups[norm] for norm in PAIR if norm in groups], *VARIANCE)
        yield "overview", overview

    def write(self):
        from run_plots import plt
        for name, figure in self.pictures():
            if figure is None:
                continue
            figure.savefig(self.results / f"{name}.png")
            plt.close(figure)
            print(self.results / f"{name}.png")
        hours = sum(run.trained_tokens / run.speed() for run in self.runs.values()) / 3600
        text = (f"# Tables\n\nWritten by `scripts/depth_cpu.sh --report` from runs/: {len(self.runs)} runs, {hours:.1f} "
                "hours of training on one core. Losses are in nats a byte.\n" +
                "".join(f"\n## {heading}\n\n{text and text + chr(10) * 2}{table}"
                        for heading, text, table in self.sections()))
        (self.results / "tables.md").write_text(text)
        print(self.results / "tables.md")


def main():
    parser = Parser("depth_cpu.sh", __doc__)
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
