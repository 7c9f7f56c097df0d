"""Reads the log.jsonl of a run folder; for compare_runs.py and plot_runs.py."""

import json
import math
from pathlib import Path


class LogError(Exception):
    """One line that names the log."""


class Run:
    """A run's events: the last start; train and val by step; the end, or None while the run is unfinished."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.path = self.folder / "log.jsonl"
        self.start, self.train, self.val, self.end = {}, {}, {}, None
        self.step = 0  # of the last event
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise LogError(f"{self.path}: {error.strerror}") from None
        for line in lines:
            # A killed run leaves a cut line behind; a resumed one may go on in the middle of it.
            try:
                event = json.loads(line[max(0, line.rfind('{"event"')):])
            except ValueError:
                continue
            if isinstance(event, dict):
                self.add(event)
        if not self.start:
            raise LogError(f"{self.path}: no start event")

    def add(self, event):
        kind = event.get("event")
        if kind == "start":
            self.start, self.end = event, None
        elif kind == "end":
            self.end = event
        elif kind in ("train", "val"):
            step = event["step"]
            if step < self.step or (step == self.step and kind == "train"):
                self.forget_from(step if kind == "train" else step + 1)
            self.step = step
            getattr(self, kind)[step] = event

    def forget_from(self, step):
        """A resumed run repeats the steps after its checkpoint: those of the run that was cut short do not count."""
        self.train = {s: event for s, event in self.train.items() if s < step}
        self.val = {s: event for s, event in self.val.items() if s < step}

    def series(self, kind, field):
        """The steps and the field's values, where they are finite numbers."""
        pairs = [(step, event.get(field)) for step, event in sorted(getattr(self, kind).items())]
        pairs = [(step, value) for step, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def peak_lr(self):
        """The learning rate the run was given; of a log without it, the highest it reached, or None."""
        return self.start.get("lr", max(self.series("train", "lr")[1], default=None))
