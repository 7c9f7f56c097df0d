"""Draws groups of runs (run_log.Group): each function makes one figure of one thing, or None where the logs lack it."""

import itertools
import math
import os
import statistics
import sys
import warnings

from command_line import Failure

try:
    import matplotlib
    import numpy as np
except ImportError:
    # Debian's matplotlib belongs to Debian's Python, and another one may come first on PATH.
    system_python = "/usr/bin/python3"
    if os.environ.get("RUN_PLOTS_PYTHON") or not os.access(system_python, os.X_OK):
        raise Failure("no Python here has matplotlib: run scripts/setup.sh, or python3 -m pip install matplotlib") from None
    os.environ["RUN_PLOTS_PYTHON"] = system_python  # once is enough
    os.execv(system_python, [system_python, "-E", *sys.argv])  # -E: PYTHONPATH and the like are the other one's

warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is drawn as boxes
matplotlib.use("Agg")  # draws into a file, needs no display
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, which the colour-blind tell apart too; the markers do so in print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
NORM_ORDER = ["PRE", "LNS", "POST", "DEEPNORM", "MIX", "PERI", "LNS_INIT", "RES_SQRT", "PRORES", "KEEL", "REORDERED"]

plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.color": "0.92", "axes.titlesize": 12, "legend.frameon": False, "savefig.dpi": 120,
                     "text.parse_math": False})  # a name from a log is no formula


def style(i):
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5,
            "markeredgecolor": "white", "markeredgewidth": 0.6, "linewidth": 1.6}


def figure_of(columns, width=6.5, height=4.6):
    return plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)


class PlainLogFormatter(matplotlib.ticker.LogFormatter):
    """100 where matplotlib has the formula $10^2$, which text.parse_math would leave as it is."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def label_logarithmic(axis):
    axis.set_major_formatter(PlainLogFormatter())
    axis.set_minor_formatter(PlainLogFormatter(minor_thresholds=(2, 0.5)))  # some within two decades, all in a half


def token_unit(largest):
    for size, name in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if largest >= 3 * size:
            return size, f"{name}tokens"
    return 1, "tokens"


def smooth(values, reach):
    """The mean of each value and its neighbours up to `reach` steps to either side, so that it does not lag behind."""
    sums = list(itertools.accumulate(values, initial=0.0))
    ranges = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in ranges]


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def seed_difference(group, baseline):
    """Tokens and the difference of validation losses to the baseline, a row a pair of runs of the same seed."""
    rows = []
    for seed, run in group.by_seed().items():
        other = baseline.by_seed().get(seed)
        if other is None or run.diverged or other.diverged:
            continue
        ours, theirs = (dict(zip(*r.curve("val"))) for r in (run, other))
        rows.append({t: ours[t] - theirs[t] for t in ours if t in theirs})
    common = sorted(set.intersection(*map(set, rows))) if rows else []
    return common, [[row[t] for t in common] for row in rows]


def band(axes, xs, rows, label, i):
    """The mean of the rows, and the range from their least to their largest."""
    if not rows:
        return
    axes.plot(xs, [statistics.fmean(column) for column in zip(*rows)], label=label, **style(i))
    if len(rows) > 1:
        axes.fill_between(xs, [min(c) for c in zip(*rows)], [max(c) for c in zip(*rows)], color=COLOURS[i % len(COLOURS)],
                          alpha=0.18, linewidth=0)


def draw_loss(groups, baseline):
    figure, [[left, right]] = figure_of(2)
    unit, unit_name = token_unit(max(run.trained_tokens for group in groups for run in group.runs))
    late = []
    for i, group in enumerate(groups):
        for run in group.runs:
            tokens, losses = run.curve("train")
            if losses:
                smoothed = smooth(losses, len(losses) // 50)
                left.plot([t / unit for t in tokens], smoothed, color=COLOURS[i % len(COLOURS)], alpha=0.35, linewidth=0.8)
                late += [y for t, y in zip(tokens, smoothed) if t >= 0.08 * tokens[-1]]
        curves = [dict(zip(*run.curve("val"))) for run in group.good_runs()]
        common = sorted(set.intersection(*map(set, curves))) if curves else []
        final = "" if math.isinf(group.mean()) else f", final {group.mean():.3f}"
        band(left, [t / unit for t in common], [[c[t] for t in common] for c in curves], group.label + final, i)
        late += [c[t] for c in curves for t in common if t >= 0.08 * common[-1]]
        if group is not baseline:
            tokens, rows = seed_difference(group, baseline)
            band(right, [t / unit for t in tokens], rows, group.label, i)
    if late:  # the steep fall from ln(vocabulary) at the beginning would flatten all that follows
        low, high = min(late), np.quantile(late, 0.98)
        left.set_ylim(low - 0.05 * (high - low) - 0.005, high + 0.1 * (high - low) + 0.005)
    left.set(xlabel=unit_name, ylabel="loss (nats per token)", title="Validation (points) and training (thin lines) loss")
    left.legend()
    right.axhline(0, color="0.6", linewidth=0.8)
    right.set(xlabel=unit_name, ylabel="difference of validation loss", title=f"Difference to {baseline.label}, below 0 is better")
    if right.get_legend_handles_labels()[1]:
        right.legend()
    return figure


def draw_by_setting(groups, key, xlabel, title, log=True):
    figure, [[axes]] = figure_of(1, 7.2)
    plot_by_setting(axes, groups, key, xlabel, title, log)
    return figure


def plot_by_setting(axes, groups, key, xlabel, title, log=True):
    """Final loss against one setting (learning rate, blocks ...), a line a norm: mean and range over seeds."""
    norms = sorted({g.first.norm for g in groups}, key=lambda n: NORM_ORDER.index(n) if n in NORM_ORDER else 99)
    highest = max((g.mean() for g in groups if math.isfinite(g.mean())), default=1)
    for i, norm in enumerate(norms):
        points = sorted(((group.first.lr if key == "lr" else group.first.start[key], group) for group in groups
                         if group.first.norm == norm), key=lambda point: point[0])
        good = [(x, group) for x, group in points if math.isfinite(group.mean())]
        seeds = [[g.mean() - min(g.losses()) for _, g in good], [max(g.losses()) - g.mean() for _, g in good]]
        axes.errorbar([x for x, _ in good], [g.mean() for _, g in good], yerr=seeds if any(map(any, seeds)) else None,
                      capsize=3, label=norm, **style(i))
        for x, group in points:
            if not math.isfinite(group.mean()):
                axes.annotate("✗", (x, highest), color=COLOURS[i % len(COLOURS)], ha="center")
    if log:
        axes.set_xscale("log", base=10 if key == "lr" else 2)
        values = sorted({group.first.lr if key == "lr" else group.first.start[key] for group in groups})
        axes.set_xticks(values, [f"{v:g}" for v in values])
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set(xlabel=xlabel, ylabel="final validation loss (nats per token)", title=title)
    axes.legend()


# ---------------------------------------------------------------------------------------------------------------------
# Depth: one line a group, over the blocks

def draw_by_depth(groups, panels):
    """panels: (title, ylabel, scale, get(probe) -> list, first block). None where no run has been probed."""
    figure, [axes] = figure_of(len(panels))
    if any([plot_by_depth(ax, groups, *panel) for ax, panel in zip(axes, panels)]):
        return figure
    plt.close(figure)
    return None


def plot_by_depth(axes, groups, title, ylabel, scale, get, first):
    """True where a run has been probed."""
    for i, group in enumerate(groups):
        rows = [get(run.final_probe()) for run in group.good_runs() if run.final_probe()]
        rows = [row for row in rows if row and all(v is not None for v in row)]
        if rows:
            band(axes, range(first, first + len(rows[0])), rows, group.label, i)
    if scale == "symlog":  # logarithmic, but for what is small or negative
        axes.set_yscale("symlog", linthresh=1e-3)
    elif scale:
        axes.set_yscale("log")
    if scale:
        label_logarithmic(axes.yaxis)
    axes.set(xlabel="k" if "last k" in title else "block", ylabel=ylabel, title=title)
    drawn = bool(axes.get_legend_handles_labels()[1])
    if drawn:
        axes.legend()
    return drawn


def field(name):
    return lambda probe: probe.get(name)


def rise(name):
    def get(probe):
        losses, whole = probe.get(name), probe.get("loss")
        return losses and [None if loss is None or whole is None else loss - whole for loss in losses]
    return get


VARIANCE = ("Variance of the residual stream after each block", "variance over channels", True, field("variance"), 0)


def draw_variance(groups, _):
    return draw_by_depth(groups, [VARIANCE])


def draw_pruning(groups, _):
    return draw_by_depth(groups, [
        ("One block removed", "rise of the loss (nats per token)", "symlog", rise("prune_loss"), 1),
        ("The last k blocks removed", "rise of the loss (nats per token)", "symlog", rise("prune_last_loss"), 1)])


def draw_gradient(groups, _):
    return draw_by_depth(groups, [
        ("Gradient norm of each block's weights", "norm", True, field("grad_norm_weights"), 1),
        ("Gradient norm of the residual stream", "norm", True, field("grad_norm_stream"), 0)])


def draw_identity(groups, _):
    def sublayers(probe):
        pairs = zip(probe.get("attention_ratio", []), probe.get("mlp_ratio", []))
        return [None if None in pair else max(pair) for pair in pairs]
    return draw_by_depth(groups, [
        ("What a block adds: the larger of |F|/|x|", "|F| / |x|", True, sublayers, 1),
        ("How far its Jacobian is from the identity", "|Jv - v| / |v|", True, field("jacobian"), 1)])


def draw_lens(groups, _):
    return draw_by_depth(groups, [
        ("What the head reads after each block", "KL(output || lens), nats per token", "symlog", field("lens_kl"), 0),
        ("Its likeliest token is the output's", "share of tokens", None, field("lens_top"), 0)])


# ---------------------------------------------------------------------------------------------------------------------
# Heat maps: a panel a group, one colour scale for all, raw values

def heat_maps(panels, draw_one, colour_label, log=False):
    """panels: (title, matrix, ...). draw_one(axes, panel, norm) returns the image."""
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns + 0.9, 4.1 * rows), layout="constrained",
                                squeeze=False)
    values = np.concatenate([np.asarray(panel[1], dtype=float).ravel() for panel in panels])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not values.size:
        plt.close(figure)
        return None
    scale = (matplotlib.colors.LogNorm if log else matplotlib.colors.Normalize)(values.min(), values.max())
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        axis.grid(False)
        if panel is None:
            axis.axis("off")
            continue
        image = draw_one(axis, panel, scale)
        axis.set_title(panel[0])
    bar = figure.colorbar(image, ax=axes, label=colour_label, shrink=0.85)
    if log:
        label_logarithmic(bar.ax.yaxis)
    return figure


def draw_variance_over_time(groups, _):
    panels = []
    for group in groups:
        run = next((run for run in group.good_runs() if len(run.probe) > 1), None)
        if run is None:
            continue
        steps = sorted(run.probe)
        rows = [run.probe[step].get("variance", []) for step in steps]
        if len(set(map(len, rows))) > 1 or not rows[0]:
            continue
        matrix = np.array(rows, dtype=float).T  # (L + 1, times)
        panels.append((group.label, matrix, [run.tokens(step) for step in steps]))
    if not panels:
        return None
    unit, unit_name = token_unit(max(panel[2][-1] for panel in panels))

    def draw_one(axes, panel, scale):
        _, matrix, tokens = panel
        # Each time is a cell that reaches half way to its neighbours.
        times = np.array(tokens) / unit
        middle = (times[1:] + times[:-1]) / 2
        edges = np.concatenate([[times[0]], middle, [times[-1]]])
        axes.set(xlabel=unit_name, ylabel="block")
        return axes.pcolormesh(edges, np.arange(matrix.shape[0] + 1) - 0.5, matrix, norm=scale, cmap="viridis")
    return heat_maps(panels, draw_one, "variance of the residual stream", log=True)


def final_matrices(groups, field):
    """(label, mean over seeds) of a square of the last probes, of the groups whose runs have one size of it."""
    for group in groups:
        matrices = [run.final_probe()[field] for run in group.good_runs()
                    if run.final_probe() and run.final_probe().get(field)]
        if matrices and len(set(map(len, matrices))) == 1:
            yield group.label, np.mean(np.array(matrices, dtype=float), axis=0)


def draw_angular(groups, _):
    panels = list(final_matrices(groups, "angular"))

    def draw_one(axes, panel, scale):
        """Block l across, n up: the distance between h_l and h_{l+n}."""
        matrix = panel[1]
        size = matrix.shape[0]
        shifted = np.full((size - 1, size), np.nan)
        for l, n in itertools.product(range(size), range(1, size)):
            if l + n < size:
                shifted[n - 1, l] = matrix[l, l + n]
        axes.set(xlabel="block l", ylabel="n blocks further")
        return axes.imshow(shifted, origin="lower", norm=scale, cmap="viridis", aspect="auto",
                           extent=(-0.5, size - 0.5, 0.5, size - 0.5))
    return heat_maps(panels, draw_one, "angular distance of blocks l and l + n (1 = opposite)")


def draw_effect(groups, _):
    panels = []
    for label, matrix in final_matrices(groups, "prune_effect"):
        matrix[np.tril_indices(len(matrix))] = np.nan  # blocks before the one removed do what they did
        panels.append((label, matrix.T))

    def draw_one(axes, panel, scale):
        size = len(panel[1])
        axes.set(xlabel="block removed", ylabel="block behind it")
        return axes.imshow(panel[1], origin="lower", norm=scale, cmap="viridis", aspect="auto",
                           extent=(0.5, size + 0.5, 0.5, size + 0.5))
    return heat_maps(panels, draw_one, "change of what the block does, relative")


# File name, heading, what the reader sees in it, the function.
FIGURES = [
    ("loss", "Loss", "Validation loss (points: mean over seeds, shaded: from the best to the worst seed) and, on the right, "
     "its difference to the baseline, run by run of the same seed.", draw_loss),
    ("variance", "Variance by depth", "Variance over the channels of the residual stream after each block (0: the "
     "embeddings), at the end of training. The curse: it grows with depth.", draw_variance),
    ("variance_over_time", "Variance by depth, over training", "The same at each probe, one run a panel, one colour scale.",
     draw_variance_over_time),
    ("angular", "Angular distance", "How much the blocks between two depths turn the residual stream: dark means that they "
     "do next to nothing. Raw values, one colour scale.", draw_angular),
    ("pruning", "Pruning", "What the loss rises by when a block, or the last k, are removed and nothing is retrained.",
     draw_pruning),
    ("effect", "Effect on later blocks", "How much what a block does to the stream changes when one before it is removed: 0 means that "
     "they do not build on each other.", draw_effect),
    ("lens", "Logit lens", "What the model would say if a block were its last: the stream after it, through the last norm and "
     "the head. Where it is near the output early, the blocks behind it do little.", draw_lens),
    ("gradient", "Gradients", "Norm of the mean loss's gradient on the probe batch.", draw_gradient),
    ("identity", "How near to the identity", "What a block does to its input.", draw_identity),
]
