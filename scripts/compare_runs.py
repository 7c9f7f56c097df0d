#!/usr/bin/env python3
"""Prints a table of finished runs: compare_runs.py runs/A runs/B ...

A loss is the validation loss in nats at the end of the run; the difference is to the first run. tokens/s is the median
over the steps. A difference smaller than that between seeds of one setting says nothing.
Exits 1 when a log is missing, or its run has not ended.
"""

import argparse
import math
import statistics
import sys

from run_log import LogError, Run

COLUMNS = ["run", "norm", "model", "lr", "seed", "steps", "val loss", "ppl", "difference", "tokens/s"]


def final_loss(run):
    if run.end is None:
        raise LogError(f"{run.path}: the run has not ended (go on with --resume)")
    steps, losses = run.series("val", "loss")
    if not steps or steps[-1] < max(run.train, default=0):
        raise LogError(f"{run.path}: no validation loss after the last step (it ended: {run.end.get('reason', '?')})")
    return losses[-1]


def perplexity(loss):
    return f"{math.exp(loss):.2f}" if loss < 50 else "inf"


def row(run, first_loss):
    loss = final_loss(run)
    speeds = run.series("train", "tokens_per_s")[1]
    return [
        str(run.folder),
        str(run.start.get("norm", "?")),
        str(run.start.get("model", "?")),
        "?" if run.peak_lr() is None else f"{run.peak_lr():g}",
        str(run.start.get("seed", "?")),
        str(max(run.train, default=0)),
        f"{loss:.4f}",
        perplexity(loss),
        f"{loss - first_loss:+.4f}",
        f"{statistics.median(speeds):.0f}" if speeds else "?",
    ]


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        # Words to the left, numbers to the right.
        padded = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        print("  ".join(padded).rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    arguments = parser.parse_args()
    try:
        runs = [Run(folder) for folder in arguments.runs]
        first_loss = final_loss(runs[0])
        rows = [row(run, first_loss) for run in runs]
    except LogError as error:
        sys.exit(f"compare_runs: {error}")
    print_table([COLUMNS] + rows)


if __name__ == "__main__":
    main()
