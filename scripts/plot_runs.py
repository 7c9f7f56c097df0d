#!/usr/bin/env python3
"""Draws the losses of runs into one picture: plot_runs.py runs/A runs/B ... --out runs/demo.png [--labels A B ...]

Left: training loss (thin: each step; thick: smoothed) and validation loss (points), over tokens. Right: the same losses
less those of the first run at the same number of tokens; below zero is better. With a single run: its gradient norm.
"""

import argparse
import bisect
import itertools
import os
import sys
from pathlib import Path

from run_log import LogError, Run

try:
    import matplotlib
except ImportError:
    # Debian's matplotlib belongs to Debian's Python, and another one may come first on PATH.
    system_python = "/usr/bin/python3"
    if os.environ.get("PLOT_RUNS_PYTHON") or not os.access(system_python, os.X_OK):
        sys.exit("plot_runs: no Python here has matplotlib: run scripts/setup, or pip install matplotlib")
    os.environ["PLOT_RUNS_PYTHON"] = system_python  # once is enough
    os.execv(system_python, [system_python, *sys.argv])

matplotlib.use("Agg")  # draws into a file, needs no display
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, which the colour-blind tell apart too; the markers do so in print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"


def smooth(values, reach):
    """The mean of each value and its neighbours up to `reach` steps to either side, so that it does not lag behind."""
    sums = list(itertools.accumulate(values, initial=0.0))
    ranges = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in ranges]


def interpolate(x, xs, ys):
    """The line through (xs, ys) at x, or None outside it."""
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    high = bisect.bisect_left(xs, x)
    if xs[high] == x:
        return ys[high]
    part = (x - xs[high - 1]) / (xs[high] - xs[high - 1])
    return ys[high - 1] + part * (ys[high] - ys[high - 1])


class Curves:
    """What is drawn of a run: each a pair (tokens, values)."""

    def __init__(self, run, label):
        steps, losses = run.series("train", "loss")
        if not steps:
            raise LogError(f"{run.path}: no training step")
        norm, lr = run.start.get("norm", "?"), run.peak_lr()
        self.label = label or (f"{norm}, lr {lr:g}" if lr is not None else norm)
        tokens = [run.train[step]["tokens"] for step in steps]
        self.loss = tokens, losses
        self.smooth = tokens, smooth(losses, len(losses) // 50)
        # Validation stands at a step; step 0 is before any token.
        steps, losses = run.series("val", "loss")
        per_step = tokens[-1] / max(run.train)
        self.val = [run.train[s]["tokens"] if s in run.train else s * per_step for s in steps], losses
        steps, norms = run.series("train", "grad_norm")
        self.grad_norm = [run.train[s]["tokens"] for s in steps], norms

    def minus(self, other, name):
        (xs, ys), (other_xs, other_ys) = getattr(self, name), getattr(other, name)
        pairs = [(x, y, interpolate(x, other_xs, other_ys)) for x, y in zip(xs, ys)]
        return [x for x, _, o in pairs if o is not None], [y - o for _, y, o in pairs if o is not None]


def token_unit(largest):
    for size, name in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if largest >= 3 * size:
            return size, f"{name}tokens"
    return 1, "tokens"


def draw(curves, out):
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "0.92", "legend.frameon": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    unit, unit_name = token_unit(max(max(c.loss[0]) for c in curves))

    def plot(axes, series, *style, **more):
        axes.plot([x / unit for x in series[0]], series[1], *style, **more)

    for i, c in enumerate(curves):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        points = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 5.5, "markeredgecolor": "white"}
        final = f", final val {c.val[1][-1]:.3f}" if c.val[1] else ""
        plot(left, c.loss, color=colour, alpha=0.18, linewidth=0.8)
        plot(left, c.smooth, color=colour, linewidth=1.8)
        plot(left, c.val, **points)
        left.plot([], [], color=colour, marker=marker, markeredgecolor="white", label=c.label + final)
        if len(curves) == 1:
            plot(right, c.grad_norm, color=colour, linewidth=0.8)
        else:
            plot(right, c.minus(curves[0], "smooth"), color=colour, linewidth=1.8, label=c.label)
            plot(right, c.minus(curves[0], "val"), **points)

    # The steep fall from ln(vocabulary) at the beginning would flatten all that follows.
    late = [y for c in curves for series in (c.smooth, c.val) for x, y in zip(*series) if x >= 0.08 * c.loss[0][-1]]
    margin = 0.06 * (max(late) - min(late)) + 0.01
    left.set_ylim(min(late) - margin, max(late) + margin)
    left.set(xlabel=unit_name, ylabel="loss (nats per token)", title="Training (line) and validation (points) loss")
    left.legend()
    if len(curves) == 1:
        right.set(xlabel=unit_name, ylabel="gradient norm", title="Gradient norm before clipping", yscale="log")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("{x:g}")
    else:
        right.set(xlabel=unit_name, ylabel="loss difference (nats per token)",
                  title=f"Difference to {curves[0].label} (lower is better)")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, default=Path("runs/plot.png"), metavar="FILE", help="[runs/plot.png]")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one a run [its norm and learning rate]")
    arguments = parser.parse_args()
    labels = arguments.labels or [None] * len(arguments.runs)
    if len(labels) != len(arguments.runs):
        parser.error(f"{len(arguments.runs)} runs need as many labels, not {len(labels)}")
    try:
        draw([Curves(Run(folder), label) for folder, label in zip(arguments.runs, labels)], arguments.out)
    except (LogError, OSError, ValueError) as error:
        sys.exit(f"plot_runs: {error}")
    print(arguments.out)


if __name__ == "__main__":
    main()
