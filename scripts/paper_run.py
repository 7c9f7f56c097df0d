#!/usr/bin/env python3
"""The paper's runs: called by table1_*.sh, one column of Table 1 each, and by pretrain_7b.sh.

  scripts/table1_130m.sh            on the GPUs of this machine
  sbatch scripts/table1_130m.sh     as a Slurm job, which queues itself again until all is done
  scripts/table1_130m.sh --print    only says what it takes

In the environment: NORMS ["POST DEEPNORM MIX PRE LNS"], SEEDS [1], GPUS [all], BATCH, sequences a GPU takes at a time
[64], DATA [data/c4], OUT [runs/NAME]; MFU [the estimate of dev/bench/kernel_report.json, else 0.4] and PEAK_TFLOPS [989:
H100, bf16; A100: 312], from which the hours follow.

A step takes 512 documents, each cut or padded to 256 tokens; Adam without decay or clipping, cosine to a tenth.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import run_log
import scheduler
import sweep
from command_line import Failure, Parser, run_script

STEP_SEQUENCES, SEQ_LEN = 512, 256
DOCUMENTS_A_FILE = 356317  # of C4: 364,868,892 in 1024 files
CUDA_MIB = 1024  # that CUDA and NCCL take for themselves, a guess on the safe side


def text(name, default):
    """A setting of the environment."""
    return os.environ.get(name) or default


def number(name, default, kind):
    try:
        value = kind(text(name, default))
        if value > 0:
            return value
    except ValueError:
        pass
    raise Failure(f"{name}={text(name, default)}: expected {'a whole' if kind is int else 'a'} number above 0", 2)


def shards(folder, part):
    """The glob of a folder's shards, whatever its name."""
    return f"{glob.escape(folder)}/{part}_*.bin"


def mib(size):
    return size / (1 << 20)


def estimated_mfu(model, peak):
    """What `make kernel-report` expects of the model on the GPU of that peak, and of where that is from; 0.4 where it
    says nothing."""
    path = Path(__file__).resolve().parent.parent / "dev/bench/kernel_report.json"
    try:
        for gpu in json.loads(path.read_text())["models"][model].values():
            if gpu["peak_tflops"] == peak and gpu["mfu"] > 0:
                return gpu["mfu"], "estimated by make kernel-report, not measured"
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        pass
    return 0.4, "assumed"


class PaperRun:
    def __init__(self, name, flags):
        self.name, self.norms = name, text("NORMS", "POST DEEPNORM MIX PRE LNS").split()
        self.data = text("DATA", "data/c4")
        self.gpus = number("GPUS", os.environ.get("SLURM_NTASKS") or scheduler.count_gpus() or 1, int)
        self.batch = number("BATCH", max(1, STEP_SEQUENCES // self.gpus) if self.gpus > 8 else 64, int)
        self.peak = number("PEAK_TFLOPS", 989, float)
        model = flags[flags.index("--model") + 1] if "--model" in flags[:-1] else ""
        estimate, self.mfu_source = estimated_mfu(model, self.peak)
        self.mfu = number("MFU", estimate, float)
        if os.environ.get("MFU"):
            self.mfu_source = "as given"
        if STEP_SEQUENCES % (self.batch * self.gpus):
            raise Failure(f"BATCH={self.batch} on {self.gpus} GPUs: their product must divide a step's "
                          f"{STEP_SEQUENCES} sequences")
        self.flags = [*flags, "--total-batch-size", STEP_SEQUENCES * SEQ_LEN, "--seq-len", SEQ_LEN,
                      "--batch-size", self.batch, "--pack", "documents", "--beta1", 0.9, "--beta2", 0.999,
                      "--eps", "1e-8", "--weight-decay", 0, "--grad-clip", 0, "--schedule", "cosine",
                      "--min-lr-ratio", 0.1, "--train", shards(self.data, "train"), "--val", shards(self.data, "val"),
                      "--eval-every", 1000, "--eval-tokens", 10000000, "--save-every", 1000, "--keep", 2]
        self.flags = [str(flag) for flag in self.flags]

    def needs(self, norm):
        """What --dry-run --json says of a variant."""
        trainer = scheduler.trainer(norm)
        done = subprocess.run([trainer, *self.flags, "--dry-run", "--json"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        fields = ("params", "steps", "tokens", "operations", "memory_bytes", "state_bytes")
        try:
            needs = json.loads(done.stdout)
            if all(run_log.is_finite(needs[field]) for field in fields):
                return needs
        except (ValueError, TypeError, LookupError):
            pass
        raise Failure(f"{trainer} --dry-run --json: expected a line of JSON with the numbers {', '.join(fields)}, "
                      f"found '{done.stdout[:80].rstrip()}': use the scripts that came with the trainer")

    def hours(self, operations):
        return f"{operations / (self.gpus * self.peak * 1e12 * self.mfu) / 3600:.1f} h"

    def plan(self):
        """Says what each variant takes, and returns it: a dictionary of `needs` each."""
        plan = []
        for norm in self.norms:
            needs = self.needs(norm)
            plan.append(needs)
            print(f"{norm:9}{needs['params']} parameters, {needs['steps']} steps, {needs['tokens']} tokens with "
                  f"padding, {needs['operations']:.5g} operations: {self.hours(needs['operations'])}, "
                  f"{mib(needs['memory_bytes']):.1f} MiB a GPU", flush=True)
        print(f"together {self.hours(sum(needs['operations'] for needs in plan))} on {self.gpus} GPUs of {self.peak:g} "
              f"TFLOP/s (PEAK_TFLOPS) at an MFU of {self.mfu:g} (MFU, {self.mfu_source}), without validation; memory as "
              f"planned by {scheduler.trainer(norm).parent}", flush=True)
        return plan

    def check_gpus(self, needs):
        """That the smallest GPU here has the memory of the variant that needs most."""
        if scheduler.built_for(self.norms[0])[0] == "cpu":
            if os.environ.get("DEVICE") != "cpu":
                raise Failure("this is the CPU's build: start it where nvcc and GPUs are, or with DEVICE=cpu")
            return
        sizes = scheduler.nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")
        memory = min((int(size) for size in sizes if size.isdecimal()), default=None)
        if memory is None:
            raise Failure(f"no GPU answers: start it on a machine that has one, or: sbatch scripts/{self.name}.sh")
        total, state = mib(needs["memory_bytes"]), mib(needs["state_bytes"])
        if total + CUDA_MIB > memory:
            advice = f"lower BATCH (now {self.batch})"
            if state + CUDA_MIB > memory:
                advice = f"{state:.1f} MiB of it whatever BATCH is, so it takes larger GPUs"
            raise Failure(f"needs {total:.1f} MiB a GPU and {CUDA_MIB} for CUDA, the smallest GPU has {memory}: "
                          f"{advice}")

    def check_data(self, steps):
        if not any(Path(self.data).glob("train_*.bin")):
            files = (steps * STEP_SEQUENCES - 1) // DOCUMENTS_A_FILE + 1
            raise Failure(f"no shards in {self.data}: scripts/fetch_data.py c4 --files {files} --out {self.data} "
                          "(a new document for each sequence)")

    def train(self):
        with scheduler.requeued():
            sweep.sweep(*sweep.parse(["--norms", " ".join(self.norms), "--seeds", text("SEEDS", "1"), "--ranks",
                                      str(self.gpus), "--out", text("OUT", f"runs/{self.name}"), "--", *self.flags]))


def main(name, flags, own):
    parser = Parser(f"{name}.sh", __doc__)
    parser.add_argument("--print", action="store_true", help="only say what it takes")
    only_print = parser.parse_args(own).print
    os.chdir(scheduler.ROOT)
    # A login node has nvcc and no GPU: its plan is the GPU's all the same.
    if shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"):
        os.environ["DEVICE"] = text("DEVICE", "cuda")
    run = PaperRun(name, flags)
    plan = run.plan()
    if only_print:
        return
    run.check_gpus(max(plan, key=lambda needs: needs["memory_bytes"]))
    run.check_data(plan[0]["steps"])
    run.train()


def alone():
    Parser("paper_run.py", __doc__).parse_args()
    raise Failure("called by scripts/table1_*.sh and scripts/pretrain_7b.sh: start one of those", 2)


if __name__ == "__main__":
    if "--" in sys.argv[2:]:
        _, name, *words = sys.argv
        end = words.index("--")  # behind it is what the user said
        run_script(name, lambda: main(name, words[:end], words[end + 1:]))
    else:
        run_script("paper_run", alone)
