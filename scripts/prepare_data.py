#!/usr/bin/env python3
"""Makes the sample corpus for `make data`: plain English prose in data/corpus/, one document a file.

The text is PostgreSQL's documentation from the Debian package `postgresql-doc` (2 MB to download; Ubuntu has it too):
4 MB of sentences on one subject by careful authors. A small model learns to write like it within minutes, and it argues
for nothing. Headings and whole sentences are taken, code, tables and lists of names are not. Being a package, it comes
from the mirror the machine uses already, checked against the archive's signature.

Where there is no apt: TinyStories' validation set or, failing that, Tiny Shakespeare from their public addresses.

--large adds the documentation of Linux, Python, SQLite and Git (62 MB to download, 33 MB of text), for runs that shall see
no token twice.

Needs no root, installs nothing, and does nothing when the corpus is there.
"""

import html.parser
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from command_line import Failure, Parser, printable, run_script

SAMPLE = ["postgresql-doc"]  # depends on the one of a version, as most of them do
LARGE = SAMPLE + ["linux-doc", "python3-doc", "sqlite3-doc", "git-doc"]
# Pages of links, sources, announcements and indices.
NO_PROSE = {"alinks", "arlinks", "biblio", "new", "genindex", "genindex-all", "contents", "bookindex", "search"}

TINY_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-valid.txt"
TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def run(*command):
    """The last line that the command says on its way to failure, or None when it succeeds."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if done.returncode == 0:
        return None
    return (done.stderr.strip() or f"{command[0]} failed").splitlines()[-1]


class Prose(html.parser.HTMLParser):
    """Collects the documents of a page: one for each heading of level 1 or 2, a list of headings and sentences each."""

    BLOCKS = {"p", "h1", "h2", "h3", "h4", "blockquote", "li", "ul", "ol", "div", "tr", "td", "th", "hr", "body"}
    HEADINGS = {"h1", "h2", "h3", "h4"}
    SILENT = {"head", "script", "style", "pre", "table"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.documents = [[]]
        self.words = []
        self.silent = 0

    def handle_starttag(self, tag, attributes):
        if tag in self.BLOCKS:
            self.end_paragraph()
        if tag in ("h1", "h2"):
            self.documents.append([])
        if tag == "br":
            self.words.append(" ")
        self.silent += tag in self.SILENT

    def handle_endtag(self, tag):
        if tag in self.BLOCKS:
            self.end_paragraph(heading=tag in self.HEADINGS)
        self.silent -= tag in self.SILENT

    def handle_data(self, data):
        if not self.silent:
            self.words.append(data)

    def end_paragraph(self, heading=False):
        paragraph = " ".join("".join(self.words).split())
        self.words = []
        is_sentence = paragraph.rstrip(")\"'”’").endswith((".", ":", "?", "!"))
        if any(c.isalpha() for c in paragraph) and (is_sentence or heading):
            self.documents[-1].append(paragraph)


def documents_of(page):
    prose = Prose()
    prose.feed(page)
    prose.close()
    prose.end_paragraph()
    documents = ["\n\n".join(paragraphs) + "\n" for paragraphs in prose.documents]
    # What is shorter is a table of contents, a menu, or a heading alone.
    return [document for document in documents if len(document) >= 1000]


def fetch_package(package, work):
    """Unpacks a package below work / package, and what a package of no content depends on. Returns why not, or None."""
    deb, root = work / "deb" / package, work / "root" / package
    deb.mkdir(parents=True)
    root.parent.mkdir(exist_ok=True)
    # apt-get download writes to the current directory. The sandbox user may not write there, so do without it.
    apt = ("env", "-C", str(deb), "apt-get", "-qq", "-o", "APT::Sandbox::User=root")
    if run(*apt, "download", package):
        # A fresh container has no package lists; fetching private ones needs no root.
        lists = ("-o", f"Dir::State::Lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}")
        (work / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (work / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        problem = run(*apt, *lists, "update") or run(*apt, *lists, "download", package)
        if problem:
            return problem
    file = str(next(deb.glob("*.deb")))
    problem = run("dpkg-deb", "-x", file, str(root))
    if problem or list(root.rglob("*.html")):
        return problem
    depends = subprocess.run(["dpkg-deb", "--field", file, "Depends"], capture_output=True, text=True).stdout
    versioned = re.match(re.escape(package).replace("python3", "python3[.0-9]*").replace("doc", "doc[-.0-9]*"), depends)
    if not versioned or versioned[0] == package:
        return f"the package {package} holds no HTML any more"
    return fetch_package(versioned[0], work)


def from_packages(packages, work, corpus):
    """Returns why they could not be fetched, or None."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "no apt here"
    for package in packages:
        problem = fetch_package(package, work)
        if problem:
            return problem
    root = work / "root"
    for page in sorted({page.resolve() for page in root.rglob("*.html")}):  # packages link pages to several places
        if page.stem in NO_PROSE or not page.is_file():
            continue
        name = "-".join(page.relative_to(root.resolve()).with_suffix("").parts[-3:])
        for number, document in enumerate(documents_of(page.read_text(encoding="utf-8", errors="replace"))):
            (corpus / f"{name}-{number:02}.txt").write_text(document, encoding="utf-8")
    return None if any(corpus.iterdir()) else "the packages hold no HTML any more"


def download(url, path):
    return run("curl", "--fail", "--silent", "--show-error", "--location", "--retry", "2", "--connect-timeout", "15",
               "--max-time", "600", "--output", str(path), url)


def from_web(work, corpus):
    """Returns why no text could be fetched, or None."""
    file = work / "download.txt"
    if not download(TINY_STORIES, file):
        stories = re.split(r"\s*<\|endoftext\|>\s*", file.read_text(encoding="utf-8", errors="replace"))
        with open(corpus / "tinystories.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": story.strip() + "\n"}) + "\n" for story in stories if story.strip())
        return None
    return download(TINY_SHAKESPEARE, corpus / "tinyshakespeare.txt")


def size_of(corpus):
    return sum(file.stat().st_size for file in corpus.iterdir() if file.suffix in (".txt", ".jsonl"))


def is_complete(corpus):
    """Whether the stamp is there and the files still have the bytes it counts."""
    try:
        return json.loads((corpus / ".complete").read_text())["bytes"] == size_of(corpus)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(data, packages):
    corpus = data / "corpus"
    if is_complete(corpus):
        return
    if corpus.exists() and not (corpus / ".complete").exists():
        raise Failure(f"{corpus} exists and is not the sample corpus: move it away, or use it: make data TEXT={corpus}")

    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=data) as name:
        work = Path(name)
        made = work / "corpus"
        made.mkdir()
        print(f"fetching the corpus (Debian packages: {', '.join(packages)})", flush=True)
        no_package = from_packages(packages, work, made)
        if no_package and packages != SAMPLE:
            raise Failure(f"no large corpus: {no_package}; check the network and the sources of apt")
        if no_package:
            print(f"that is not possible ({no_package}); fetching TinyStories (19 MB) instead", flush=True)
            no_web = from_web(work, made)
            if no_web:
                raise Failure(f"no sample text: package: {no_package}; web: {no_web}. "
                              'Check the network, or use your own text: make data TEXT="FILE..."')
        size = size_of(made)
        (made / ".complete").write_text(json.dumps({"bytes": size}) + "\n")
        # The corpus appears whole or not at all.
        if corpus.exists():
            corpus.rename(work / "old")
        made.rename(corpus)
    files = sum(file.name != ".complete" for file in corpus.iterdir())
    print(f"{printable(corpus)}: {size / 1e6:.1f} MB in {files} files")


def main():
    parser = Parser("prepare_data.py", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="folder to write to [data]")
    parser.add_argument("--large", action="store_true", help="tens of MB instead of 4")
    arguments = parser.parse_args()
    # Leave through the clean-up when stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    prepare(arguments.data, LARGE if arguments.large else SAMPLE)


if __name__ == "__main__":
    run_script("prepare_data", main)
