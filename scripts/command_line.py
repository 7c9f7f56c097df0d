"""What the scripts have in common as commands: arguments, failures of one line, a folder for one at a time."""

import argparse
import contextlib
import fcntl
import math
import os
import sys


class Failure(Exception):
    """Ends the script with one line: what is wrong, where, and what to do."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def printable(text):
    """In one line, with escapes for what a terminal would obey and for the bytes of a path that are no UTF-8."""
    def shown(character):
        if character.isprintable():
            return character
        code = ord(character)
        return f"\\x{code - 0xdc00:02x}" if 0xdc80 <= code <= 0xdcff else ascii(character)[1:-1]
    return "".join(map(shown, str(text)))


def warn(name, message):
    print(f"{name}: {printable(message)}", file=sys.stderr, flush=True)


def run_script(name, main):
    """Calls main, and turns a failure into a line on stderr and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that has not all of Unicode
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Failure as failure:
        warn(name, failure)
        sys.exit(failure.status)
    except OSError as error:
        warn(name, f"{error.filename}: {error.strerror}" if error.filename is not None else error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Its help is the script's docstring; what is wrong is one line, exit 2."""

    def __init__(self, name, description, **options):
        super().__init__(prog=f"scripts/{name}", description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise Failure(f"{message}; see {self.prog} --help", 2)


def write_atomically(path, content):
    """So that no reader meets half a file, and a full disk leaves what was there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.rename(path)


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


# Types for argparse


def positive(text):
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 1 << 31:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found '{text}'")
    return value


def not_negative(text):
    """A number that is finite and not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, found '{text}'")
    return value
