"""Texts of this machine, by kind: Python sources, manuals, headers, stubs, pages, and what Debian packages hold.

In: folders, and packages that are unpacked. Out: for each kind an iterator of all texts that the machine has, in an order that
a seed decides; files are read when they are asked for. Where `apt-get` is, the Debian packages linux-doc, perl-doc and dict-wn
are downloaded and unpacked into a temporary folder; headers and documentation that are installed stand in for them elsewhere.
"""

import gzip
import os
import random
import re
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from benchmarks.data_filters import is_prose, read_prose

PACKAGES = ("linux-doc", "perl-doc", "dict-wn")
SMALLEST_CHARACTERS, LARGEST_CHARACTERS = 400, 100_000  # of a document
GROUP_CHARACTERS = 3000  # entries of a dictionary that are a document
LAST_RESORTS = ("headers", "stubs", "manuals", "kernel", "python")  # pools for a source whose own is used up


def open_pools(folders: Sequence[str], packages: Mapping[str, Path], chooser: random.Random) -> dict[str, Iterator[str]]:
    """Texts by kind, each in an order of its own; they are read when they are asked for."""
    kernel = [str(path) for name, path in packages.items() if name == "linux-doc"]
    others = [str(path) for name, path in packages.items() if name != "linux-doc"]
    return {
        "python": read_texts(find_files(folders, (".py",), chooser)),
        "manuals": read_texts(find_files([*others, *folders], (".pod", ".txt", ".md", ".rst"), chooser)),
        "kernel": read_texts(find_files(kernel, (".txt", ".rst.gz", ".yaml.gz"), chooser)),
        "wordnet": read_dictionary(find_files(others, (".dict.dz",), chooser)),
        "headers": read_texts(find_files(folders, (".h", ".hpp", ".cuh"), chooser)),
        "stubs": read_texts(find_files(folders, (".pyi",), chooser)),
        "web": read_pages([*find_files(kernel, (".html",), chooser), *find_files(folders, (".html", ".py"), chooser)]),
    }


def draw(pools: Mapping[str, Iterator[str]], first: str) -> Iterator[str]:
    """Texts of one pool, and when that is used up, of others."""
    return chain(*(pools[name] for name in (first, *LAST_RESORTS)))


def find_files(folders: Sequence[str], suffixes: tuple[str, ...], chooser: random.Random) -> list[Path]:
    """Files below the folders, shuffled; installed packages only where their folder is named itself."""
    found: dict[Path, None] = {}
    for folder in folders:
        installed = {"site-packages", "dist-packages"} if folder == sysconfig.get_path("stdlib") else set[str]()
        for parent, below, names in os.walk(folder):
            below[:] = sorted(name for name in below if name not in installed and not name.startswith("."))
            found |= dict.fromkeys(Path(parent, name) for name in names if name.endswith(suffixes))
    paths = sorted(path for path in found if not path.is_symlink())
    chooser.shuffle(paths)
    return paths


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    """The files' texts; what is no UTF-8, or no text, is left out."""
    for path in paths:
        try:
            if path.stat().st_size > 4 * LARGEST_CHARACTERS:
                continue
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        if "\0" not in text:
            yield text


def read_pages(paths: Iterable[Path]) -> Iterator[str]:
    """What is to be read on HTML pages and in the docstrings of Python files: paragraphs of prose, of every fifth file all."""
    for number, path in enumerate(paths):
        paragraphs = re.split(r"\n\s*\n", read_prose(path))
        if number % 5:
            yield "\n".join(filter(is_prose, (" ".join(paragraph.split()) for paragraph in paragraphs)))
        else:
            yield "\n\n".join(paragraphs).strip()


def read_dictionary(paths: Iterable[Path]) -> Iterator[str]:
    """Entries of a dictionary (dictd's form), as many together as make a document."""
    for path in paths:
        gathered, size = list[str](), 0
        for entry in re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", "replace")):
            gathered.append(entry)
            size += len(entry) + 1
            if size >= GROUP_CHARACTERS:
                yield "\n".join(gathered)
                gathered, size = [], 0


def fetch_packages(folder: Path) -> dict[str, Path]:
    """Debian packages, unpacked below a folder; what cannot be had is said."""
    packages: dict[str, Path] = {}
    for name in PACKAGES:
        below = folder / name
        below.mkdir()
        try:
            run(below, "apt-get", "download", *resolve_package(name))
            for archive in sorted(below.glob("*.deb")):
                run(below, "dpkg", "-x", str(archive), str(below / "unpacked"))
            packages[name] = below / "unpacked"
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            print(f"the package {name} cannot be had ({reason.strip().splitlines()[-1]}); installed files stand in for it")
    return packages


def resolve_package(name: str) -> list[str]:
    """A package and what of its own name it depends on: linux-doc is empty, linux-doc-6.1 is not."""
    depends = run(Path.cwd(), "apt-cache", "depends", "--important", name)
    return [name, *sorted(set(re.findall(rf"Depends: ({re.escape(name)}-[\w.]+)", depends)))]


def run(folder: Path, *command: str) -> str:
    """A command's standard output. Raises OSError, SubprocessError."""
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300).stdout
