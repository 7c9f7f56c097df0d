#!/usr/bin/env python3
"""Compares training runs: compare.py RUN RUN ...

A RUN is a run folder, or a .json file made by --export. Runs that differ in the seed alone are one group; the first
group is the baseline (--baseline names another). Prints a table and writes pictures and one self-contained page,
report.html, to --out. A difference that is smaller than the spread over seeds says nothing.

  compare.py runs/A runs/B                  the table, runs/compared/report.html and its pictures
  compare.py --watch runs/*                 again and again while the runs go on
  compare.py --diff runs/A runs/B           where two runs' losses first differ
  compare.py --export few.json runs/*       what the pictures need, small enough to keep

What is no run is left out, with a line that says so. Exits 1 with one line when a log is missing or damaged, a run has
failed or not ended, or runs are not comparable (--force compares anyway).
"""

import base64
import html
import io
import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import run_log
from command_line import Parser, not_negative, printable, run_script, warn, write_atomically
from run_log import LogError

COLUMNS = ["variant", "lr", "seeds", "val loss", "± seeds", "ppl", "difference", "95 % interval", "tokens to baseline",
           "spikes", "tokens/s", "ended"]
TASK_COLUMNS = ["task", "variant", "questions", "score", "± error", "difference", "± error", "which is"]


# ---------------------------------------------------------------------------------------------------------------------
# The table

def count(tokens):
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def reach(group, baseline):
    """Tokens to the baseline's final loss, and how many times faster that is than the baseline."""
    if group is baseline or not math.isfinite(baseline.mean()):
        return ""
    tokens = run_log.tokens_to_reach(group, baseline.mean())
    if tokens is None:
        return "not reached"
    return f"{count(tokens)} ({baseline.first.trained_tokens / tokens:.2f}x)" if tokens else "0"


def row(group, baseline):
    loss, spread, speed = group.mean(), group.spread(), group.first.speed()
    spikes = [run.spikes() for run in group.runs]
    endings = Counter(printable(run.ending)[:60] for run in group.runs)
    change, interval = run_log.difference(group, baseline) if group is not baseline else (None, None)
    return [
        group.label,
        f"{group.first.lr:g}",
        ",".join(str(run.seed) for run in group.runs),
        f"{loss:.4f}" if math.isfinite(loss) else "diverged",
        "" if spread is None else f"{spread:.4f}",
        f"{math.exp(loss):.2f}" if loss < 50 else "",
        "" if change is None else f"{change:+.4f}",
        "" if interval is None else f"[{change - interval:+.4f}, {change + interval:+.4f}]",
        reach(group, baseline),
        "" if None in spikes else ",".join(map(str, spikes)),
        "" if speed is None else f"{speed:.0f}",
        ", ".join(f"{runs} {ending}" if len(endings) > 1 else ending for ending, runs in endings.items()),
    ]


HIGHER_IS_BETTER = {"acc": True, "acc_norm": True, "acc_bytes": True, "acc_tokens": True, "bits_per_byte": False, "ppl": False}


def verdict(change, error, score):
    """What a difference says: within its standard error, nothing."""
    if change is None or error is None:
        return ""
    if abs(change) <= error:
        return "within the error"
    return "gain" if (change > 0) == HIGHER_IS_BETTER[score] else "loss"


def task_rows(groups, baseline):
    """A row a task, score and variant of the runs' last evaluations; nothing where none was evaluated."""
    rows = []
    for task in sorted({task for group in groups for run in group.runs for task in run.final_tasks()}):
        for score in run_log.SCORES:
            for group in groups:
                value, error = run_log.task_score(group, task, score)
                if value is None:
                    continue
                asked = {str(run.final_tasks()[task].get("n", "?")) for run in group.runs}
                change, change_error = (run_log.task_difference(group, baseline, task, score)
                                        if group is not baseline else (None, None))
                rows.append([f"{printable(task)}, {score}", group.label, "/".join(sorted(asked)), f"{value:.4f}",
                             "" if error is None else f"{error:.4f}",
                             "" if change is None else f"{change:+.4f}",
                             "" if change_error is None else f"{change_error:.4f}",
                             verdict(change, change_error, score)])
    return [TASK_COLUMNS] + rows if rows else []


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        padded = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        print("  ".join(padded).rstrip())


def findings(groups):
    """What the last probes say of depth, a line each; nothing of runs that were not probed, or whose numbers overflowed."""
    def line(text, of_probe, words):
        means = [(group.label, group.probe_mean(lambda probe: finite(of_probe(probe)))) for group in groups]
        said = [f"{label} {words(mean)}" for label, mean in means if mean]
        return [f"{text}: {'; '.join(said)}."] if said else []

    def finite(values):
        return values if values and all(map(run_log.is_finite, values)) else None

    def pruning(probe):
        losses, whole = finite(probe.get("prune_loss")), probe.get("loss")
        return losses and run_log.is_finite(whole) and [loss - whole for loss in losses]

    def turns(probe):
        return [row[block + 1] for block, row in enumerate(probe.get("angular", [])[:-1])]

    def growth(variance):
        times = f", {variance[-1] / variance[1]:.3g} times" if len(variance) > 1 and variance[1] > 0 else ""
        return f"{variance[min(1, len(variance) - 1)]:.3g} to {variance[-1]:.3g}{times}"

    def deeper_half(average):
        return lambda values: f"{average(values[len(values) // 2:]):.2g}"

    return (line("Variance of the residual stream, after the first block and after the last",
                 lambda probe: probe.get("variance"), growth) +
            line("Removing one block of the deeper half raises the loss, at the median, by (nats per token)",
                 pruning, deeper_half(statistics.median)) +
            line("A block of the deeper half turns the stream, on average, by (angular distance, 1 = opposite)",
                 turns, deeper_half(statistics.fmean)))


# ---------------------------------------------------------------------------------------------------------------------
# The page

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; color: #222; }}
img {{ width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: 0.9rem; }}
th, td {{ padding: 0.25rem 0.5rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
h2 {{ margin: 2rem 0 0.25rem; font-size: 1.2rem; }}
p, img {{ max-width: 60rem; }}
p {{ margin: 0.25rem 0 0.75rem; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def table_html(rows):
    def cells(tag, values):
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"
    return ('<div class="scroll"><table>' + cells("th", rows[0]) + "\n".join(cells("td", r) for r in rows[1:]) +
            "</table></div>")


def write_report(groups, baseline, rows, out, title):
    from run_plots import FIGURES, plt  # only here: the table and --diff need no matplotlib
    out.mkdir(parents=True, exist_ok=True)
    body = [table_html(rows), "<p>Losses are in nats per token; the difference is to the first row's variant. "
            "Spikes: steps of each seed whose training loss is over 7 standard deviations above the mean of the last 1000.</p>"]
    tasks = task_rows(groups, baseline)
    if tasks:
        body += ["<h2>Tasks</h2>", table_html(tasks),
                 "<p>The last evaluation of each run. An error is the standard error: of the questions asked, and with "
                 "several seeds of their spread. A difference within its error is no gain, and one beyond it by chance "
                 "is to be expected once among three.</p>"]
    body += [f"<p>{html.escape(line)}</p>" for line in findings(groups)]
    for name, heading, caption, draw in FIGURES:
        figure = draw(groups, baseline)
        if figure is None:
            (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier comparison
            continue
        png = io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        write_atomically(out / f"{name}.png", png.getvalue())
        image = base64.b64encode(png.getvalue()).decode()
        body.append(f'<h2>{html.escape(heading)}</h2><p>{html.escape(caption)}</p>'
                    f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{image}">')
    write_atomically(out / "report.html", PAGE.format(title=html.escape(printable(title)), body="\n".join(body)).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def load(paths, leave_out):
    """The runs of the folders and files. RUNS/* names more than runs; what is none is left out, in one line."""
    paths = [Path(path) for path in paths]
    runs, left_out = [], []
    for path in paths:
        folder, is_old, _ = path.name.rpartition(".old-")  # what the trainer moved aside for a later run
        if path in leave_out or is_old and path.with_name(folder) in paths:
            left_out.append(path)
        elif path.suffix != ".json" and path.exists() and not (path / "log.jsonl").exists():
            left_out.append(path)
        else:
            runs += run_log.read_runs(path)
    if left_out:
        warn("compare", f"left out, being no runs, moved aside or written here: {', '.join(map(str, left_out))}")
    if not runs:
        raise LogError("no runs among what is named")
    return runs


def with_validation(runs):
    """Those that have a validation loss; the others, which may just have begun, are named."""
    for run in runs:
        if not run.val:
            warn("compare", f"{run.path}: left out, no validation loss yet ({run.ending})")
    return [run for run in runs if run.val]


def chosen_baseline(groups, name):
    """The group of a run's path, else of a run's name, a label or a norm."""
    if name is None:
        return groups[0]
    for names in (lambda group: [Path(run.path).parent for run in group.runs],
                  lambda group: [Path(run.name) for run in group.runs] + [Path(group.label), Path(group.first.norm)]):
        for group in groups:
            if Path(name) in names(group):
                return group
    raise LogError(f"--baseline {name}: no such run or norm; there are {', '.join(g.label for g in groups)}")


def compare(arguments, force):
    runs = load(arguments.runs, [arguments.export, arguments.out])
    ended = all(run.finished for run in runs)
    if force:
        runs = with_validation(runs)
        if not runs:
            raise LogError("no validation loss in any of the runs")
    else:
        run_log.check_comparable(runs)
    groups = run_log.grouped(runs)
    baseline = chosen_baseline(groups, arguments.baseline)
    groups.sort(key=lambda group: group is not baseline)  # the baseline first, else as they are
    rows = [COLUMNS] + [row(group, baseline) for group in groups]
    print_table(rows)
    tasks = task_rows(groups, baseline)
    if tasks:
        print()
        print_table(tasks)
    if arguments.export:
        run_log.export(runs, arguments.export)
        print(printable(arguments.export))
    if not arguments.table:
        for line in findings(groups):
            print(line)
        write_report(groups, baseline, rows, arguments.out, arguments.title)
        print(printable(arguments.out / "report.html"))
    return ended


def watch(arguments):
    while True:
        print("\033[H\033[2J" if sys.stdout.isatty() else "", end="")
        try:
            if compare(arguments, force=True):
                return
        except LogError as error:  # a run that has only just begun
            warn("compare", error)
        sys.stdout.flush()
        time.sleep(arguments.every)


def first_difference(ours, theirs, tolerance):
    """The first step at which |ours - theirs| > tolerance; a number and what is none always differ."""
    for step in sorted(set(ours) & set(theirs)):
        a, b = ours[step].get("loss"), theirs[step].get("loss")
        if a == b or (a is None and b is None):
            continue
        if not (run_log.is_finite(a) and run_log.is_finite(b)) or abs(a - b) > tolerance:
            return step, a, b
    return None


def diff(runs, tolerance):
    if len(runs) != 2:
        raise LogError(f"--diff compares two runs, not {len(runs)}", 2)
    for kind, name in (("train", "training"), ("val", "validation")):
        ours, theirs = (getattr(run, kind) for run in runs)
        common = set(ours) & set(theirs)
        if not common:
            print(f"{name} loss: no step in common")
            continue
        exact = first_difference(ours, theirs, 0)
        if exact is None:
            print(f"{name} loss: the same in all {len(common)} common steps, up to step {max(common)}")
            continue
        step, a, b = exact
        print(f"{name} loss: first differs at step {step}: {a} and {b}")
        beyond = first_difference(ours, theirs, tolerance)
        print(f"{name} loss: differs by more than {tolerance:g} " +
              (f"first at step {beyond[0]}: {beyond[1]} and {beyond[2]}" if beyond else "at no step"))


def main():
    parser = Parser("compare.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a .json file of exported runs")
    parser.add_argument("--out", type=Path, default=Path("runs/compared"), metavar="DIR", help="[runs/compared]")
    parser.add_argument("--title", default="Runs compared", help="of the page")
    parser.add_argument("--baseline", metavar="NAME", help="a run or a norm [the first run's group]")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--export", type=Path, metavar="FILE.json", help="write what the pictures need of the runs")
    parser.add_argument("--diff", action="store_true", help="of two runs: the first step at which their losses differ")
    parser.add_argument("--tolerance", type=not_negative, metavar="NATS", default=1e-3, help="for --diff [0.001]")
    parser.add_argument("--watch", action="store_true", help="print and draw again until all runs have ended")
    parser.add_argument("--every", type=not_negative, default=30, metavar="SECONDS", help="for --watch [30]")
    parser.add_argument("--force", action="store_true", help="compare unfinished runs, and runs on other data")
    arguments = parser.parse_args()
    if not (arguments.diff or arguments.table):
        import run_plots  # noqa: F401  before anything is printed: it may start this again with another Python
    if arguments.diff:
        diff([run for path in arguments.runs for run in run_log.read_runs(path)], arguments.tolerance)
    elif arguments.watch:
        watch(arguments)
    else:
        compare(arguments, arguments.force)


if __name__ == "__main__":
    run_script("compare", main)
