"""What the scripts have in common as commands: arguments, failures of one line, a folder for one at a time."""

import argparse
import contextlib
import fcntl
import sys


class Failure(Exception):
    """Ends the script with one line: what is wrong, where, and what to do."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def run_script(name, main):
    """Calls main, and turns a failure into a line on stderr and an exit status."""
    try:
        main()
    except (Failure, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def locked(folder, name, shared=False):
    """Keeps another script of that name out of the folder, unless both share it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"{folder}: another {name} is at work there") from None
        yield


def positive(text):
    """A type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found '{text}'")
    return int(text)
