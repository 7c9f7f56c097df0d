"""Reads what training runs wrote: run folders (log.jsonl) and JSON files of exported runs; for compare.py and its kin."""

import json
import math
import os
import statistics
import sys
from pathlib import Path

from command_line import Failure, printable, warn, write_atomically

LOG_VERSION = 1

# What tells one setting from another in the start event; the seed is not among them.
SETTING = ("norm", "model", "family", "layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "init", "lr", "warmup",
           "schedule", "weight_decay", "steps", "total_batch_size", "seq_len", "precision", "doc_mask", "pack")
# What two runs must have in common for their losses to be comparable at all.
DATA = ("vocab", "seq_len", "train_tokens", "val_tokens", "doc_mask", "pack")
# Of the settings, those that the first trainers had no choice of and did not log.
DEFAULTS = {"doc_mask": False, "pack": "stream"}


class LogError(Failure):
    """One line that names the log."""


# What the fields are, whatever the event; others are not looked at.
TEXT = {"task", "norm", "model", "family", "init", "schedule", "precision", "pack", "reason"}
WHOLE = {"step", "tokens", "layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "steps", "total_batch_size", "seq_len",
         "warmup", "train_tokens", "val_tokens", "seed", "log_version", "spikes"}
NUMBER = {"weight_decay", "median_tokens_per_s"}
SCORES = ("acc", "acc_norm", "acc_bytes", "acc_tokens", "bits_per_byte", "ppl")  # of a task, each with its _stderr
MEASURED = {"loss", "lr", "tokens_per_s", "effective_depth"}  # null where they are not finite
LISTS = {"variance", "variance_first", "variance_largest", "prune_loss", "prune_last_loss", "grad_norm_weights",
         "grad_norm_stream", "attention_ratio", "mlp_ratio", "jacobian", "lens_kl", "lens_top"}
KEPT = {"event", "step", "tokens", "loss", "lr", "tokens_per_s", "skipped"}  # of a train event: logs can be long


def is_finite(value):
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def is_measured(value):
    return value is None or isinstance(value, float) or is_finite(value)


def is_whole(value):
    return type(value) is int and 0 <= value < 1 << 64


def is_list(value):
    return isinstance(value, list) and all(map(is_measured, value))


def is_matrix(value):
    return isinstance(value, list) and all(is_list(row) and len(row) == len(value) for row in value)


KINDS = {**dict.fromkeys(TEXT, (lambda value: isinstance(value, str), "a text")),
         **dict.fromkeys(WHOLE, (is_whole, "a whole number")),
         **dict.fromkeys(NUMBER, (is_finite, "a number")),
         **dict.fromkeys(MEASURED, (is_measured, "a number or null")),
         **dict.fromkeys(LISTS, (is_list, "a list of numbers")),
         **dict.fromkeys(("angular", "prune_effect"), (is_matrix, "as many rows of numbers as columns"))}


def check_fields(event):
    """Throws where a field is of another kind than the readers take it for."""
    kind = event.get("event")
    if kind not in ("start", "train", "val", "probe", "eval", "end"):
        return
    wrong = [field for field in event if field in KINDS and not KINDS[field][0](event[field])]
    if kind == "start" and not is_finite(event.get("lr", 0.0)):
        wrong.append("lr")
    if kind in ("train", "val", "probe", "eval") and "step" not in event:
        wrong.append("step")
    if kind == "eval":
        wrong += ["task"] if "task" not in event else []
        wrong += [f for name in SCORES for f in (name, name + "_stderr") if not is_measured(event.get(f))]
    for field in wrong:
        found = json.dumps(event[field])[:40] if field in event else "nothing"
        expected = KINDS[field][1] if field in KINDS else KINDS["loss"][1]
        raise ValueError(f"{field} of {kind}: expected {expected}, found {found}")


class Run:
    """A run's events: the last start; train, val and probe by step; tasks of eval events, by step, by name; the end, or
    None while the run is unfinished."""

    def __init__(self, path, name, events):
        self.path, self.name = path, name  # the path is for messages
        self.start, self.train, self.val, self.probe, self.eval, self.end = {}, {}, {}, {}, {}, None
        self.step = 0  # of the last event
        for place, event in events:
            try:
                check_fields(event)
            except ValueError as error:
                raise LogError(f"{place}: {error}: was it written by this version's trainer?") from None
            self.add(event)
        if not self.start:
            raise LogError(f"{path}: no start event")
        version = self.start.get("log_version", LOG_VERSION)
        if version != LOG_VERSION:
            raise LogError(f"{path}: log version {version}, expected {LOG_VERSION}: use the scripts that came with the "
                           "trainer that wrote it")

    def add(self, event):
        kind = event.get("event")
        if kind == "start":
            self.start, self.end = {**DEFAULTS, **event}, None
            if "step" in event:  # what it goes on from
                self.forget_from(event["step"] + 1)
                self.step = event["step"]
        elif kind == "end":
            self.end = event
        elif kind in ("train", "val", "probe", "eval"):
            step = event["step"]
            if step < self.step or (step == self.step and kind == "train"):
                self.forget_from(step if kind == "train" else step + 1)
            self.step = step
            if kind == "eval":
                self.eval.setdefault(step, {})[event["task"]] = event
            else:
                getattr(self, kind)[step] = {f: event[f] for f in KEPT & event.keys()} if kind == "train" else event

    def forget_from(self, step):
        """A resumed run repeats the steps after its checkpoint: those of the run that was cut short do not count."""
        for kind in ("train", "val", "probe", "eval"):
            setattr(self, kind, {s: event for s, event in getattr(self, kind).items() if s < step})

    def series(self, kind, field):
        """The steps and the field's values, where they are finite numbers."""
        pairs = [(step, event.get(field)) for step, event in sorted(getattr(self, kind).items())]
        pairs = [(step, value) for step, value in pairs if is_finite(value)]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def tokens(self, step):
        """Tokens trained on up to a step."""
        if step in self.train and "tokens" in self.train[step]:
            return self.train[step]["tokens"]
        return step * self.start.get("total_batch_size", 1)

    def curve(self, kind):
        """Tokens and losses."""
        steps, losses = self.series(kind, "loss")
        return [self.tokens(step) for step in steps], losses

    @property
    def norm(self):
        return self.start.get("norm", "?")

    @property
    def seed(self):
        return self.start.get("seed", 0)

    @property
    def lr(self):
        """The peak learning rate the run was given; of a log without it, the highest it reached."""
        return self.start.get("lr", max(self.series("train", "lr")[1], default=math.nan))

    @property
    def trained_tokens(self):
        return self.tokens(max(self.train, default=0))

    @property
    def reason(self):
        """Why it ended; empty while it has not."""
        return self.end.get("reason", "for no reason logged") if self.end else ""

    @property
    def finished(self):
        return self.end is not None and not self.reason.startswith("stopped by")

    @property
    def diverged(self):
        """Its last loss is not finite, or the trainer gave up because too many were not."""
        return "not finite" in self.reason or bool(self.val) and not is_finite(self.val[max(self.val)].get("loss"))

    @property
    def ending(self):
        """How it ended, in words: done, diverged, stopped, still running, failed: why."""
        if self.diverged:
            return "diverged"
        if not self.end:
            return "still running"
        if not self.finished:
            return "stopped"
        return "done" if self.reason == "done" else f"failed: {self.reason}"

    @property
    def skipped(self):
        return sum(1 for event in self.train.values() if "skipped" in event)

    def spikes(self, window=1000, deviations=7):
        """Steps whose loss is over so many standard deviations above the mean of the last `window`; None of a shorter run.
        The measure of OLMo 2 (arXiv 2501.00656), without what falls."""
        losses = self.series("train", "loss")[1]
        if "spikes" in self.start or len(losses) <= window:
            return self.start.get("spikes")
        total, squares, found = sum(losses[:window]), sum(loss * loss for loss in losses[:window]), 0
        for first, loss in zip(losses, losses[window:]):
            average = total / window
            deviation = math.sqrt(max(squares / window - average * average, 0))
            found += loss > average + deviations * deviation
            total, squares = total + loss - first, squares + loss * loss - first * first
        return found

    def final_loss(self):
        """The last validation loss; of a run that diverged, infinity."""
        if self.diverged:
            return math.inf
        losses = self.series("val", "loss")[1]
        if not losses:
            raise LogError(f"{self.path}: no validation loss")
        return losses[-1]

    def final_probe(self):
        return self.probe[max(self.probe)] if self.probe else None

    def final_tasks(self):
        """The last evaluation, by task."""
        return self.eval[max(self.eval)] if self.eval else {}

    def speed(self):
        """Tokens a second: the median over the steps, or None."""
        speeds = self.series("train", "tokens_per_s")[1]
        return statistics.median(speeds) if speeds else self.start.get("median_tokens_per_s")


def read_events(path):
    """(where, event) of each line; those that are none are warned of, in one line."""
    wrong, cut = [], None
    with open(path, encoding="utf-8", errors="replace", newline="\n") as log:
        for number, line in enumerate(log, 1):
            wrong += filter(None, [cut])
            cut, event = None, parse_event(line)
            if event:
                yield f"{path}:{number}", event
            elif line.strip():
                cut = number  # which a killed run leaves behind as its last line
    if wrong:
        warn(Path(sys.argv[0]).stem, f"{path}: passed over what is no event: {len(wrong)} lines, the first is line {wrong[0]}")


def parse_event(line):
    """The event, or None. A killed run leaves a cut line behind; a resumed one may go on in the middle of it."""
    try:
        event = json.loads(line[max(0, line.rfind('{"event"')):])
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def end_reason(folder):
    """Why the run ended, from the last line of its log alone; empty when it has not ended."""
    try:
        with open(folder / "log.jsonl", "rb") as log:
            log.seek(max(0, log.seek(0, 2) - 65536))  # far more than an end event takes
            lines = log.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    event = parse_event(lines[-1]) if lines else None
    return str(event.get("reason", "")) if event and event.get("event") == "end" else ""


def read_runs(path):
    """The runs of a folder (one), or of a JSON file that compare.py --export wrote (any number)."""
    path = Path(path)
    if path.suffix != ".json" or path.is_dir():
        log = path / "log.jsonl"
        return [Run(log, Path(os.path.abspath(path)).name, read_events(log))]
    try:
        exported = json.loads(path.read_text(encoding="utf-8"))
        runs = [(str(run["name"]), [dict(event) for event in run["events"]]) for run in exported["runs"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise LogError(f"{path}: not a file that scripts/compare.py --export wrote") from None
    return [Run(f"{path}:{name}", name, [(f"{path}:{name}", event) for event in events]) for name, events in runs]


# ---------------------------------------------------------------------------------------------------------------------
# Export: what the pictures need of a run, small enough to be committed


def rounded(value, digits=5):
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    if isinstance(value, dict):
        return {key: rounded(v, digits) for key, v in value.items()}
    return value


def exported(run, points=100, probe_fields=("variance",)):
    """All validation losses; the training loss in `points` means; the last probe whole, of the others these fields."""
    events = [dict(run.start)]
    if run.speed():
        events[0]["median_tokens_per_s"] = run.speed()
    if run.spikes() is not None:
        events[0]["spikes"] = run.spikes()
    timeline = []
    steps, losses = run.series("train", "loss")
    share = max(1, math.ceil(len(steps) / points))
    for i in range(0, len(steps), share):
        last = steps[min(i + share, len(steps)) - 1]
        timeline.append((last, 0, {"event": "train", "step": last, "tokens": run.tokens(last),
                                   "loss": rounded(statistics.fmean(losses[i:i + share]))}))
    timeline += [(step, 1, {"event": "val", "step": step, "loss": event["loss"] if is_finite(event.get("loss")) else None})
                 for step, event in run.val.items()]
    for step, event in run.probe.items():
        kept = event if event is run.final_probe() else {key: event[key] for key in ("event", "step", *probe_fields)
                                                         if key in event}
        matrices = {key: rounded(kept[key], 3) for key in ("angular", "prune_effect") if key in kept}
        timeline.append((step, 2, rounded({**kept, **matrices})))
    timeline += [(step, 3, rounded(event)) for step, tasks in run.eval.items() for event in tasks.values()]
    events += [event for _, _, event in sorted(timeline, key=lambda item: item[:2])]
    return {"name": run.name, "events": events + ([run.end] if run.end else [])}


def export(runs, path, more={}, **what):
    """One run a line, so that a change of one is a change of one line. Each gets `more` fields; what: as exported()'s."""
    lines = ",\n".join(json.dumps({**exported(run, **what), **more}, separators=(",", ":")) for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ('{"runs":[\n' + lines + "\n]}\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Groups: the runs of one setting that differ in nothing but the seed


class Group:
    def __init__(self, runs):
        self.runs = sorted(runs, key=lambda run: run.seed)
        self.first = self.runs[0]
        self.label = printable(self.first.norm)

    def by_seed(self):
        return {run.seed: run for run in self.runs}

    def losses(self):
        return [run.final_loss() for run in self.runs]

    def good_runs(self):
        return [run for run in self.runs if not run.diverged]

    def mean(self):
        return mean(self.losses())

    def spread(self):
        losses = self.losses()
        return statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None

    def val_curve(self):
        """Tokens and the mean loss over the seeds, where all have one."""
        curves = [dict(zip(*run.curve("val"))) for run in self.good_runs()]
        common = sorted(set.intersection(*map(set, curves))) if curves else []
        return common, [statistics.fmean(curve[t] for curve in curves) for t in common]

    def probe_mean(self, get):
        """The mean over seeds of get(final probe), a list of numbers; None where no run has been probed."""
        values = [get(run.final_probe()) for run in self.good_runs() if run.final_probe()]
        values = [v for v in values if v]
        return [statistics.fmean(column) for column in zip(*values)] if values else None


def mean(values):
    return statistics.fmean(values) if values and all(map(math.isfinite, values)) else math.inf


def grouped(runs):
    """The groups in the order in which their first runs were named; each label says what tells it from the others."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(str(run.start.get(key)) for key in SETTING), []).append(run)
    result = [Group(members) for members in groups.values()]
    for group in result:
        seeds = [run.seed for run in group.runs]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            paths = ", ".join(str(run.path) for run in group.runs if run.seed == twice)
            raise LogError(f"{paths}: the same setting and the same seed {twice}; name one of them")
    units = {"lr": "lr {:g}", "layers": "{} blocks", "hidden": "width {}", "steps": "{} steps"}
    for key in SETTING[1:]:
        if len({str(group.first.start.get(key)) for group in result}) > 1:
            for group in result:
                value = group.first.lr if key == "lr" else group.first.start.get(key, "?")
                group.label += ", " + units.get(key, key + " {}").format(printable(value) if key != "lr" else value)
    return result


def check_comparable(runs):
    """Throws where a difference between losses would say nothing about the variants."""
    for run in runs:
        if not run.finished:
            raise LogError(f"{run.path}: the run has not ended ({run.ending}); go on with --resume, or compare with "
                           "--force")
        if run.ending.startswith("failed"):
            raise LogError(f"{run.path}: the run {run.ending}; go on with --resume, or compare with --force")
        if not run.diverged and run.val and max(run.val) < max(run.train, default=0):
            raise LogError(f"{run.path}: no validation loss after the last step; compare with --force")
    first = runs[0]
    for run in runs[1:]:
        for key in DATA:
            if run.start.get(key) != first.start.get(key):
                raise LogError(f"{run.path}: {key} is {run.start.get(key)}, but {first.start.get(key)} in {first.path}: "
                               "other data; compare with --force")
        planned = [r.start.get("steps", 0) * r.start.get("total_batch_size", 1) for r in (run, first)]
        if planned[0] != planned[1]:
            raise LogError(f"{run.path}: trains on {planned[0]} tokens, {first.path} on {planned[1]}; compare with "
                           "--force")


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
               2.120, 2.110, 2.101, 2.093, 2.086)


def t_quantile(degrees):
    return T_QUANTILES[min(int(degrees), len(T_QUANTILES)) - 1]


def t_probability(t, degrees):
    """That Student's t of so many degrees of freedom is further from 0 than t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan2(abs(t), math.sqrt(degrees)), degrees % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def mean_interval(values):
    """The mean, the half width of its 95 % confidence interval and the t-test's p against 0; the last two, or all, may be
    None."""
    if not values or not all(map(math.isfinite, values)):
        return None, None, None
    center, degrees = statistics.fmean(values), len(values) - 1
    if not degrees:
        return center, None, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return center, t_quantile(degrees) * error, t_probability(center / error, degrees) if error else None


def paired_difference(group, baseline, value=Run.final_loss):
    """The mean difference of a value over the seeds that both groups have, the half width of its 95 % confidence interval,
    and the paired t-test's p; each may be None.

    A seed fixes the order of the data and the shape of the initialization: what the two runs share cancels.
    """
    ours, theirs = group.by_seed(), baseline.by_seed()
    return mean_interval([value(ours[seed]) - value(theirs[seed]) for seed in ours if seed in theirs])


def difference(group, baseline):
    """The mean difference of final losses and the half width of its 95 % confidence interval; either may be None. Of seeds
    that both groups have, the paired one; without such pairs it is Welch's interval.
    """
    if any(seed in baseline.by_seed() for seed in group.by_seed()):
        return paired_difference(group, baseline)[:2]
    a, b = group.losses(), baseline.losses()
    if not math.isfinite(mean(a)) or not math.isfinite(mean(b)):
        return None, None
    if len(a) < 2 or len(b) < 2:
        return mean(a) - mean(b), None
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    degrees = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1)) if va + vb > 0 else 1
    return mean(a) - mean(b), t_quantile(degrees) * math.sqrt(va + vb)


def task_score(group, task, score):
    """The mean over seeds of a score of the last evaluation, and its standard error; either may be None.

    Seeds are asked the same questions: that only so many were asked is an error that their mean keeps. To it comes what
    the seeds' spread says.
    """
    found = [run.final_tasks().get(task, {}) for run in group.runs]
    values, errors = [event.get(score) for event in found], [event.get(score + "_stderr") for event in found]
    if not all(map(is_finite, values)):
        return None, None
    if not all(map(is_finite, errors)):
        return statistics.fmean(values), None
    seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0
    return statistics.fmean(values), math.sqrt(statistics.fmean(errors) ** 2 + seeds)


def task_difference(group, baseline, task, score):
    """The difference of a score to the baseline's and its standard error; either may be None."""
    (ours, error), (theirs, their_error) = (task_score(each, task, score) for each in (group, baseline))
    if ours is None or theirs is None:
        return None, None
    return ours - theirs, None if error is None or their_error is None else math.hypot(error, their_error)


def tokens_to_reach(group, loss):
    """Tokens after which the group's mean validation loss first is at most `loss`, interpolated; None: never."""
    tokens, losses = group.val_curve()
    for i, (t, y) in enumerate(zip(tokens, losses)):
        if y > loss:
            continue
        if i == 0 or losses[i - 1] == y:
            return t
        part = (losses[i - 1] - loss) / (losses[i - 1] - y)
        return tokens[i - 1] + part * (t - tokens[i - 1])
    return None
