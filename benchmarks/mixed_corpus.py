"""A mixed corpus in which everything that a build has to find is planted and counted, and a check that its report is exact.

Run, in the project's folder:

    python benchmarks/mixed_corpus.py make [FOLDER] [--megabytes 200]
    pretrain data build configs/data/mixed.yaml
    python benchmarks/mixed_corpus.py check [DATASET] [--planted FOLDER/planted.json]

`make` takes texts of this machine, Debian packages that it downloads among them (no root is needed; what cannot be had is
said), and makes them distinct by their content after cleaning. Then duplicates, broken and foreign content, and documents for
every rule are planted among them, seeded. `benchmarks/mixed/make.py` says what lies in FOLDER then; for another FOLDER than
the default, `mixed.yaml` in it is the run file to build.

`check` compares a built dataset with that, line by line, and ends with status 1 where they differ.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from data_pipeline.documents import Document

ROOT = Path(__file__).resolve().parent.parent


def drop_marked(document: Document, *, marker: str) -> Document | str:
    """Drop a document that holds a marker. Reason: planted."""
    return "planted" if marker in document.text else document


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # started as a file, its neighbours are not to be found otherwise
    from benchmarks.mixed.check import check_dataset
    from benchmarks.mixed.documents import DATASET, FOLDER
    from benchmarks.mixed.make import make_corpus

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="make the corpus")
    make.add_argument("folder", nargs="?", type=Path, default=Path(FOLDER))
    make.add_argument("--megabytes", type=float, default=200.0, help="of text, before anything is planted")
    make.add_argument("--from-folder", action="append", help="take texts from here instead of from all over the machine; may be repeated")
    make.add_argument("--no-packages", action="store_true", help="download nothing")
    make.add_argument("--seed", type=int, default=1)
    check = verbs.add_parser("check", help="compare a built dataset with what was planted")
    check.add_argument("dataset", nargs="?", type=Path, default=Path(DATASET))
    check.add_argument("--planted", type=Path, default=Path(FOLDER) / "planted.json")
    check.add_argument("--sample", type=int, default=500, help="documents that are decoded")
    options = parser.parse_args(arguments)
    if options.verb == "check":
        try:
            return 0 if check_dataset(options.dataset, options.planted, options.sample) else 1
        except UserError as error:
            parser.exit(2, f"{error}\n")
    run_file = make_corpus(options.folder, options.megabytes, options.from_folder, not options.no_packages, options.seed)
    plan = json.loads((options.folder / "planted.json").read_bytes())
    total = sum(source["read"] for source in plan["sources"].values())
    print(f"{options.folder}: {total} documents, {plan['bytes'] / 1e6:.1f} MB on disk; planted:")
    for way, number in plan["planted"].items():
        print(f"  {number:>6} {way}")
    print(f"build it with: pretrain data build {os.path.relpath(run_file)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
