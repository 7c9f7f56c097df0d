"""Trains runs: builds their trainers, places their ranks on slots, runs them side by side, resumes and stops them.
For sweep.py, paper_run.py, depth_study.py, demo.py and tune.py.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import run_log
from command_line import Failure

ROOT = Path(__file__).resolve().parent.parent
TOLD_TO_STOP = 3  # the trainer's exit status after SIGTERM, SIGINT or SIGUSR1: it has saved a checkpoint
# What a run that is to end gets, one after the other: a signal, and the seconds it has before the next one. The first
# must be SIGUSR1: mpirun and srun pass it on to the ranks and wait, while after SIGTERM mpirun kills them in a second,
# in the middle of a step or of saving. SIGTERM then makes mpirun take its ranks down, on all hosts.
ENDINGS = [(signal.SIGUSR1, 1800), (signal.SIGTERM, 5), (signal.SIGKILL, 0)]


class Stopped(Failure):
    """The runs were told to stop: by a signal to this script, or by one to a run."""

    def __init__(self, status):
        super().__init__("stopped; the same command goes on", status)


@contextlib.contextmanager
def requeued():
    """A Slurm job whose run was told to stop, because its time is up, queues itself again."""
    try:
        yield
    except Stopped as stop:
        if stop.status == TOLD_TO_STOP and in_slurm():
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
        raise


def in_slurm():
    return bool(os.environ.get("SLURM_JOB_ID"))


def cores():
    return len(os.sched_getaffinity(0))


def nvidia_smi(*arguments):
    """The lines it prints; none where there is no driver."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []


def count_gpus():
    """Those that may be used here."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    return sum(line.startswith("GPU") for line in nvidia_smi("--list-gpus"))


def duration(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min" if seconds < 6000 else f"{seconds // 3600:.0f} h"


@functools.cache
def trainer(norm):
    """Builds the trainer of a NORM, for the DEVICE and PRECISION in the environment; returns its path."""
    command = ["make", "--no-print-directory", "--silent", f"-j{cores()}", "trainer", f"NORM={norm}"]
    # MAKEFLAGS, of a make that called this script, would overrule -j.
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    path = None
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          text=True) as make:
        for line in make.stdout:
            if found := re.match(r"(build/\S+/train_gpt)$", line):
                path = Path(found[1])
            else:
                print(line, end="", file=sys.stderr)  # what is compiled
    if make.returncode:
        sys.exit(make.returncode)  # make has said why
    if path is None:
        raise Failure(f"{' '.join(command)}: expected a line build/DEVICE-PRECISION-NORM/train_gpt, found none")
    return path


def built_for(norm):
    """DEVICE and PRECISION of a trainer."""
    device, precision, _ = trainer(norm).parent.name.split("-", 2)  # build/DEVICE-PRECISION-NORM/train_gpt
    return device, precision


@dataclass
class Job:
    """A run to be trained."""
    norm: str
    flags: list
    folder: Path
    console: Path | None = None  # a file that takes what the trainer prints; None: the terminal
    cost: float = 1  # against the others', for the time that is left
    status: int | None = None  # once it has ended: the trainer's exit status,
    outcome: str = ""  # and what that means: "done", "stopped" or "failed"

    @property
    def name(self):
        return self.folder.name

    @property
    def done(self):
        return run_log.end_reason(self.folder) == "done"

    @property
    def diverged(self):
        return "not finite" in run_log.end_reason(self.folder)

    @property
    def resumes(self):
        return any(self.folder.glob("checkpoints/step_*"))

    def command(self):
        words = [str(trainer(self.norm)), *self.flags, "--out", str(self.folder)]
        return words + ["--resume"] if self.resumes else words

    def failure(self):
        """One line of what the trainer printed says why it failed."""
        lines = self.console.read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("train_gpt: ")] or lines or ["it printed nothing"]
        return f"{self.name}: exit {self.status}: {said[-1].removeprefix('train_gpt: ')}"


class Slot(NamedTuple):
    host: str  # "": this machine
    number: int  # from 0 on each host


def read_hosts(path, ranks):
    """The slots of a file with lines HOST [slots=N], as for mpirun."""
    slots = []
    for line in Path(path).read_text(errors="surrogateescape").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"(\S+)(?:\s+slots=([1-9]\d*))?", line)
        if not found:
            raise Failure(f"{path}: expected lines HOST [slots=N], found: {line}", 2)
        host, count = found[1], int(found[2] or 1)
        if count % ranks and ranks % count:
            raise Failure(f"{path}: {host} has {count} slots: neither a multiple nor a part of --ranks {ranks}", 2)
        slots += [Slot(host, number) for number in range(count)]
    return slots


class Slots:
    """Where runs are trained: --jobs side by side, each on --ranks slots of this machine or of those in --hosts."""

    def __init__(self, jobs=None, ranks=1, hosts=None):
        self.ranks, self.hosts = ranks, hosts
        if hosts:
            slots = read_hosts(hosts, ranks)
            jobs = jobs or max(1, len(slots) // ranks)
            if jobs * ranks > len(slots):
                raise Failure(f"--jobs {jobs} x --ranks {ranks}: {hosts} has {len(slots)} slots", 2)
        else:
            jobs = jobs or 1
            if jobs > 1 and in_slurm():
                raise Failure("inside a Slurm job the runs go one after the other: no --jobs", 2)
            slots = [Slot("", number) for number in range(jobs * ranks)]
        self.slots = slots[:jobs * ranks]
        self.places = range(0, jobs * ranks, ranks)  # the first slot of each run

    def launcher(self, place, norm):
        """What starts a run's ranks on the slots from `place` on: environment variables, words before the trainer's."""
        slots = self.slots[place:place + self.ranks]
        host, number = slots[0]
        on_host = sum(slot.host == host for slot in self.slots)
        environment = {}
        if built_for(norm)[0] == "cuda":
            if on_host > self.ranks:  # it shares the host, and takes GPUs of its own
                visible = os.environ.get("CUDA_VISIBLE_DEVICES")
                devices = visible.split(",") if visible else [str(n) for n in range(on_host)]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[number:number + self.ranks])
        elif not os.environ.get("OMP_NUM_THREADS"):
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // on_host))
        if in_slurm():
            # When all ranks end with 3, none may be killed for it: that would be srun's exit status, and the job would
            # not queue itself again. When one dies, the others, which wait for it, have a minute.
            return environment, ["srun", f"--ntasks={self.ranks}", "--mpi=pmix", "--kill-on-bad-exit=0", "--wait=60"]
        if self.ranks == 1 and not self.hosts:
            return environment, []
        words = ["mpirun", *(["--host", ",".join(slot.host for slot in slots)] if self.hosts else ["--oversubscribe"]),
                 "--bind-to", "none"]
        if self.hosts:
            words += [word for name, value in environment.items() for word in ("-x", f"{name}={value}")]
        if os.geteuid() == 0:
            words.append("--allow-run-as-root")
        return environment, [*words, "-np", str(self.ranks)]


class Scheduler:
    """Trains jobs, side by side in all places. A signal tells the runs to save and end; another, or time, ends them."""

    def __init__(self, slots):
        self.slots = slots
        self.running = {}  # process: job, place
        self.failures = []
        self.signal = 0  # the last that this script got
        self.urgency = 0  # how many of ENDINGS have begun
        self.told = {}  # process: how many of them it got
        self.stopping = False
        self.started, self.cost_done = time.monotonic(), 0

    def train(self, jobs, on_start=lambda job: None, on_end=lambda job: None):
        """Calls on_start before each job and on_end behind it. Throws Stopped if they were told to, once they have."""
        for job in jobs:
            trainer(job.norm)  # all are built before the first one starts
        waiting, free = list(jobs), list(self.slots.places)
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
        handlers = {number: signal.signal(number, self.stop) for number in signals
                    if signal.getsignal(number) != signal.SIG_IGN}
        try:
            while self.running or (waiting and not self.stopping):
                while waiting and free and not self.stopping:
                    on_start(waiting[0])
                    self.start(waiting.pop(0), free.pop(0))
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # until one has ended
                for process in [process for process in self.running if process.poll() is not None]:
                    job, place = self.running.pop(process)
                    free.append(place)
                    self.end(job, process.returncode)
                    on_end(job)
        finally:
            if self.running:  # only where an error ends this
                self.end_all()
            for process in self.running:
                process.wait()
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stopping:
            raise Stopped(128 + self.signal if self.signal else TOLD_TO_STOP)

    def start(self, job, place):
        environment, launcher = self.slots.launcher(place, job.norm)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(job.console, "wb") if job.console else contextlib.nullcontext() as console:
            # In a session of its own, a run does not get the terminal's Ctrl-C beside what it is told here.
            process = subprocess.Popen([*launcher, *job.command()], env={**os.environ, **environment},
                                       stdin=subprocess.DEVNULL, stdout=console, stderr=console and subprocess.STDOUT,
                                       start_new_session=True)
        self.running[process] = job, place
        self.tell()  # a signal may have come while the process was being started

    def end(self, job, returncode):
        job.status = returncode if returncode >= 0 else 128 - returncode
        if job.status == 0 and job.done:
            job.outcome = "done"
        elif job.status == TOLD_TO_STOP or self.signal:
            job.outcome, self.stopping = "stopped", True
        else:
            job.outcome = "failed"
            self.failures.append(job)
        if job.outcome == "done" or job.diverged:
            self.cost_done += job.cost

    def stop(self, number, _):
        if number != signal.SIGALRM:
            self.signal = number
        self.stopping = True
        self.end_all()

    def end_all(self):
        """Begins the next of ENDINGS, and sets the clock for the one behind it."""
        self.urgency = min(self.urgency + 1, len(ENDINGS))
        self.tell()
        signal.setitimer(signal.ITIMER_REAL, ENDINGS[self.urgency - 1][1])

    def tell(self):
        """Each run gets each signal once: a second SIGUSR1 would end it before it has saved."""
        for process in self.running:
            if self.told.get(process, 0) < self.urgency:
                self.told[process] = self.urgency
                number = ENDINGS[self.urgency - 1][0]
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)

    def time_left(self, cost):
        """Seconds that jobs of this cost will take, at the rate of those that have ended."""
        return (time.monotonic() - self.started) * cost / self.cost_done if self.cost_done else 0


def train_alone(job):
    """Trains it from its start, with every core. Ends this program where that was stopped or failed."""
    shutil.rmtree(job.folder, ignore_errors=True)
    try:
        Scheduler(Slots()).train([job])
    except Stopped as stop:
        raise Failure("stopped; called again, it starts anew", stop.status) from None
    if job.outcome == "failed":
        sys.exit(job.status)  # it has said why
