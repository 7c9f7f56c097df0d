#!/usr/bin/env python3
"""Trains every combination of variants, learning rates, seeds and depths, and compares them (scripts/compare.py).

  scripts/sweep.py --norms "PRE LNS" --lrs "1e-3 3e-3" --seeds "1 2 3" -- --model llama-9m --steps 2000

FLAGS are for every run: see ./train_gpt --help. DEVICE and PRECISION in the environment are as for make.

Called again it goes on: finished runs are kept, others resume from their newest checkpoint (FLAGS with --save-every).
Side by side, CPU runs share the cores and GPU runs take --ranks GPUs each. FILE has lines "HOST [slots=N]", as for
mpirun; the folder must be the same on all hosts. Inside a Slurm job the ranks are started by srun.
Exits 1 when a run failed, 2 on wrong usage, 3 when the runs were told to stop (the trainer's own 3).
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import scheduler
from command_line import Failure, Parser, locked, positive, printable, run_script, warn
from scheduler import Job, Scheduler, Slots


def say(message):
    print(f"sweep: {printable(message)}", flush=True)


def words(text, kind=str, what="words"):
    found = text.split()
    try:
        valid = found and len(set(map(kind, found))) == len(found)
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"expected {what}, none of them twice, found '{text}'")
    return found


def whole_numbers(text):
    return words(text, int, "whole numbers")


def numbers(text):
    return words(text, float, "numbers")


def parse(argv):
    """The options, and behind -- the flags for every run."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("sweep.py", __doc__, usage="scripts/sweep.py [OPTIONS] [-- FLAGS]")
    parser.add_argument("--norms", type=words, default=["PRE", "LNS"], metavar='"PRE LNS"',
                        help="variants, each built once; the first is the baseline")
    parser.add_argument("--lrs", type=numbers, default=[None], metavar='"1e-3 3e-3"',
                        help="learning rates [the preset's]")
    parser.add_argument("--seeds", type=whole_numbers, default=["1"], metavar='"1 2 3"', help="[1]")
    parser.add_argument("--layers", type=whole_numbers, default=[None], metavar='"12 24"', help="depths [the preset's]")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="[runs/sweep]")
    parser.add_argument("--jobs", type=positive, metavar="N", help="runs side by side [1]")
    parser.add_argument("--ranks", type=positive, default=1, metavar="N", help="ranks a run [1]")
    parser.add_argument("--hosts", metavar="FILE", help="spread them over these hosts")
    parser.add_argument("--slurm", action="store_true",
                        help="submit them as a job array, one job a run, and the comparison after it")
    parser.add_argument("--print", action="store_true", help="only print the commands")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what a job of the array does: a run's number, or compare
    options = parser.parse_args(argv[:end])
    if options.hosts and not os.access(options.hosts, os.R_OK):
        raise Failure(f"--hosts {options.hosts}: no such file", 2)
    return options, argv[end + 1:]


def make_jobs(options, flags):
    jobs = []
    for norm, layers, lr, seed in itertools.product(options.norms, options.layers, options.lrs, options.seeds):
        name, own = norm, ["--seed", seed]
        if layers:
            name, own = f"{name}-{layers}", [*own, "--layers", layers]
        if lr:
            name, own = f"{name}-lr{lr}", [*own, "--lr", lr]
        folder = options.out / f"{name}-seed{seed}"
        jobs.append(Job(norm, [*flags, *own], folder, console=Path(f"{folder}.txt")))
    return jobs


def remember_flags(folder, flags):
    """Refuses a folder with checkpoints that other flags made: resuming them would mix two sweeps."""
    path = folder / ".flags"
    ours = shlex.join(flags)
    theirs = os.fsdecode(path.read_bytes()).rstrip("\n") if path.exists() else ours
    if theirs != ours and any(folder.glob("*/checkpoints/step_*")):
        raise Failure(f"{folder} holds runs with other flags ({theirs}): choose another --out")
    path.write_bytes(os.fsencode(ours + "\n"))


def compare(jobs, out):
    """Whether what has ended could be compared."""
    ended = [str(job.folder) for job in jobs if job.done or job.diverged]
    return not ended or subprocess.run(["scripts/compare.py", *ended, "--out", str(out / "compared"),
                                        "--title", out.name]).returncode == 0


def print_commands(jobs, slots):
    for job in jobs:
        environment, launcher = slots.launcher(0, job.norm)
        assignments = [f"{name}={value}" for name, value in environment.items()]
        print(shlex.join(["env", *assignments, *launcher, *job.command()]))


def submit(jobs, options, flags):
    device, precision = scheduler.built_for(jobs[0].norm)
    own = ["env", f"DEVICE={device}", f"PRECISION={precision}", "scripts/sweep.py", "--norms", " ".join(options.norms),
           "--seeds", " ".join(options.seeds), "--ranks", str(options.ranks), "--out", str(options.out)]
    for name in ("lrs", "layers"):
        if getattr(options, name) != [None]:
            own += [f"--{name}", " ".join(getattr(options, name))]

    def sbatch(*arguments):
        done = subprocess.run(["sbatch", *arguments], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)  # sbatch has said why
        return done.stdout.strip()

    array = sbatch("--parsable", "--job-name=sweep", f"--array=0-{len(jobs) - 1}", f"--ntasks={options.ranks}",
                   *([f"--gpus={options.ranks}"] if device == "cuda" else []), f"--output={options.out}/slurm-%a.txt",
                   "--open-mode=append", "--signal=USR1@120", "--requeue", "--wrap",
                   f"{shlex.join(own)} --only $SLURM_ARRAY_TASK_ID -- {shlex.join(flags)}")
    print(sbatch("--job-name=compare", f"--dependency=afterany:{array}", f"--output={options.out}/compared.txt",
                 "--wrap", f"{shlex.join(own)} --only compare"))


def train(jobs, slots):
    """Returns a line for each run that failed."""
    runs = Scheduler(slots)

    def on_start(job):
        say(f"{'resume' if job.resumes else 'start'} {job.name}")

    def on_end(job):
        if job.outcome != "done":
            say(f"{job.outcome} {job.name}")
            return
        done = sum(job.done for job in jobs)
        left = runs.time_left(len(jobs) - done - len(runs.failures))
        say(f"{done} of {len(jobs)} runs done, {scheduler.duration(left)} left: {job.name}")

    runs.train([job for job in jobs if not job.done], on_start, on_end)
    return [job.failure() for job in runs.failures]


def sweep(options, flags):
    slots = Slots(options.jobs, options.ranks, options.hosts)
    jobs = make_jobs(options, flags)
    with locked(options.out, "sweep", shared=options.only is not None):  # by the jobs of an array
        if options.only == "compare":
            sys.exit(0 if compare(jobs, options.out) else 1)
        remember_flags(options.out, flags)
        if options.only and options.only not in map(str, range(len(jobs))):
            raise Failure(f"--only {options.only}: expected a run's number below {len(jobs)}, or compare", 2)
        chosen = [jobs[int(options.only)]] if options.only else jobs
        for norm in dict.fromkeys(job.norm for job in chosen):
            say(f"building {norm}")
            scheduler.trainer(norm)
        if options.print:
            return print_commands([job for job in jobs if not job.done], slots)
        if options.slurm:
            return submit(jobs, options, flags)
        if scheduler.built_for(chosen[0].norm)[0] == "cuda" and not options.hosts and len(slots.places) > 1:
            here = scheduler.count_gpus()
            if len(slots.slots) > here:
                raise Failure(f"--jobs {options.jobs} x --ranks {options.ranks}: there are {here} GPUs", 2)
        if options.only:
            with scheduler.requeued():
                failures = train(chosen, slots)
        else:
            failures = train(chosen, slots)
            if not compare(jobs, options.out):
                failures.append("the comparison")
    for failure in failures:
        warn("sweep", f"failed: {failure}")
    if failures:
        sys.exit(1)


def main():
    os.chdir(scheduler.ROOT)
    sweep(*parse(sys.argv[1:]))


if __name__ == "__main__":
    run_script("sweep", main)
