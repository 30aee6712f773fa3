"""The quality rules of data_pipeline.filters beside datatrove's: verdicts, changed texts, and documents per second and core.

Run: .venv/bin/python benchmarks/data_filters.py [--quick] [--json]

datatrove 0.10.1 lives in an environment of its own, made at the first run below the cache folder ($XDG_CACHE_HOME or
~/.cache)/pretrain/peers/datatrove (pip install from the configured index, some 500 MB); --peer-python takes a Python that
has it. Documents are cut, at paragraphs, from the text, Markdown, reStructuredText, POD and HTML files and Python
docstrings below --folder (by default /usr/share and this Python's library): about 3 kB each, all different. Four in five
are made of paragraphs of prose, unwrapped to one line each as on a web page; the fifth is the file as it is, code and all.

The speed is that of FineWeb's set in FineWeb's order: Gopher repetition, Gopher quality, C4 without its rule of terminal
punctuation, FineWeb's own. Both sides run in one process each, on one thread, in turns, and every round has documents
that neither has seen. Time is processor time; making the documents and the pipeline around the filters are left out on
both sides. Then every filter alone judges every whole document, and what differs is shown.
"""

import argparse
import ast
import gzip
import html.parser
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

PEER = ("datatrove[processing,io]==0.10.1", "spacy>=3.8", "nltk")
ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".txt", ".md", ".rst", ".pod", ".html", ".htm", ".py", ".gz")
DOCUMENT_CHARACTERS = 3000
LARGEST_FILE_BYTES = 2_000_000
TARGET = 3.0
# Our rule (and settings), datatrove's filter; the first four are FineWeb's, in its order.
CHAIN = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")
RULES = (*CHAIN, "c4_paragraphs")
# datatrove's reason -> ours.
REASONS = {
    "empty": "empty",
    "dup_para_frac": "duplicate_paragraphs",
    "dup_para_char_frac": "duplicate_paragraph_characters",
    "dup_line_frac": "duplicate_lines",
    "dup_line_char_frac": "duplicate_line_characters",
    **{f"top_{n}_gram": f"top_{n}_gram" for n in range(2, 5)},
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}_grams" for n in range(5, 11)},
    "gopher_short_doc": "too_few_words",
    "gopher_long_doc": "too_many_words",
    "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words",
    "gopher_too_many_hashes": "number_signs",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines",
    "gopher_below_alpha_threshold": "few_letters",
    "gopher_enough_stop_words": "few_stop_words",
    "lorem_ipsum": "lorem_ipsum",
    "curly_bracket": "curly_bracket",
    "too_few_sentences": "too_few_sentences",
    "< 3 paragraphs": "too_few_paragraphs",
    "line_punct_ratio": "few_lines_with_end",
    "short_line_ratio": "short_lines",
    "char_dup_ratio": "duplicate_lines",
    "list_ratio": "many_newlines",
}
Judge = Callable[[str, str], tuple[str, str]]
"""(rule, text) -> (reason or "", text afterwards)."""


def main() -> None:
    """Collect documents, run both sides, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="600 documents instead of 6,000")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each result")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side (default 6)")
    parser.add_argument("--folder", action="append", help="where documents are cut from (may be given several times)")
    parser.add_argument("--peer-python", help="a Python that has datatrove 0.10.1 and spaCy")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(judge_as_ours() if arguments.side == "ours" else judge_as_peer())
        return
    folders = arguments.folder or ["/usr/share", sysconfig.get_paths()["stdlib"]]
    texts = collect_texts([Path(folder) for folder in folders], 600 if arguments.quick else 6000)
    peer_python = arguments.peer_python or make_peer_environment()
    print(f"[filters] {len(texts)} documents, {sum(map(len, texts)) / len(texts):.0f} characters on average", file=sys.stderr)
    report(*compare(texts, peer_python, arguments.rounds), arguments.json)


def collect_texts(folders: list[Path], wanted: int) -> list[str]:
    """So many different documents, spread evenly over what the folders hold; fewer if they hold fewer."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    prose: dict[str, None] = {}
    plain: dict[str, None] = {}
    seen: set[str] = set()
    step = 61  # neighbours in a folder are alike, so files are taken from everywhere
    for path in (path for start in range(step) for path in paths[start::step]):
        paragraphs = re.split(r"\n\s*\n", read_prose(path))
        if len(plain) < wanted // 5:
            plain.update(dict.fromkeys(islice(cut_documents(paragraphs, "\n\n"), 2)))
        fresh = [line for line in (" ".join(paragraph.split()) for paragraph in paragraphs) if is_prose(line) and line not in seen]
        seen.update(fresh)  # licences and the like stand in many files
        prose.update(dict.fromkeys(cut_documents(fresh, "\n")))
        if len(prose) + len(plain) >= wanted and len(plain) >= wanted // 5:
            break
    mixed = [*list(prose)[: wanted - len(plain)], *plain]
    random.Random(1).shuffle(mixed)
    return mixed


def is_prose(paragraph: str) -> bool:
    """At least two lines long, nearly all letters and spaces."""
    return len(paragraph) >= 160 and sum(character.isalpha() or character == " " for character in paragraph) >= 0.93 * len(paragraph)


def read_prose(path: Path) -> str:
    """The text of a file: without tags, or a Python file's docstrings; empty if it cannot be read."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            return ""
        content = path.read_bytes()
        suffixes = path.suffixes
        if suffixes[-1] == ".gz":
            content, suffixes = gzip.decompress(content), suffixes[:-1]
        text = content.decode("utf-8")
        if suffixes and suffixes[-1] in (".html", ".htm"):
            tags = TagStripper()
            tags.feed(text)
            return "".join(tags.parts)
        if suffixes and suffixes[-1] == ".py":
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            return "\n\n".join(filter(None, (ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))))
        return text
    except (OSError, EOFError, zlib.error, ValueError, SyntaxError, RecursionError, AssertionError):
        return ""


class TagStripper(html.parser.HTMLParser):
    """Keeps what stands between tags, but for scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.is_hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A script or style begins, or text goes on."""
        self.is_hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        """Whatever was hidden has ended."""
        self.is_hidden = False

    def handle_data(self, data: str) -> None:
        """Text."""
        if not self.is_hidden:
            self.parts.append(data)


def cut_documents(paragraphs: list[str], separator: str) -> Iterator[str]:
    """Runs of whole paragraphs of about 3,000 characters; a run with one huge paragraph is left out."""
    document: list[str] = []
    size = 0
    for paragraph in paragraphs:
        document.append(paragraph)
        size += len(paragraph) + len(separator)
        if size >= DOCUMENT_CHARACTERS:
            if size <= 2 * DOCUMENT_CHARACTERS:
                yield separator.join(document)
            document, size = [], 0


def make_peer_environment() -> str:
    """The Python of datatrove's environment, which is made if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "pretrain" / "peers" / "datatrove"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"[filters] making {folder} and installing {' '.join(PEER)}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PEER], check=True)
        (folder / "complete").touch()
    return str(python)


def judge_as_ours() -> Judge:
    """Our rules, with FineWeb's setting of C4's."""
    sys.path.insert(0, str(ROOT))
    from data_pipeline import filters
    from data_pipeline.documents import Document

    settings = {"c4_quality": {"terminal_punctuation": False}}

    def judge(rule: str, text: str) -> tuple[str, str]:
        outcome = filters.RULES[rule](Document("benchmark", "file", 0, text), **settings.get(rule, {}))
        return (outcome, text) if isinstance(outcome, str) else ("", outcome.text)

    return judge


def judge_as_peer() -> Judge:
    """datatrove's filters, with FineWeb's setting of C4's."""
    from datatrove.data import Document  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.filters import (  # pyright: ignore[reportMissingImports]
        C4ParagraphFilter,
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    filters = {
        "gopher_repetition": GopherRepetitionFilter(),
        "gopher_quality": GopherQualityFilter(),
        "c4_quality": C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb_quality": FineWebQualityFilter(),
        "c4_paragraphs": C4ParagraphFilter(),
    }

    def judge(rule: str, text: str) -> tuple[str, str]:
        document = Document(text=text, id="0")
        outcome = filters[rule].filter(document)
        return ("", document.text) if outcome is True else (REASONS[outcome[1]], text)

    return judge


def serve(judge: Judge) -> None:
    """Answer requests on stdin, one JSON line each: {"rules", "texts", "chained"} -> {"seconds", "verdicts"}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        run = judge_chain if request["chained"] else judge_alone
        started = time.process_time()
        verdicts = [run(judge, request["rules"], text) for text in request["texts"]]
        seconds = time.process_time() - started
        print(json.dumps({"seconds": seconds, "verdicts": verdicts}), file=answers, flush=True)


def judge_chain(judge: Judge, rules: list[str], text: str) -> list[tuple[str, str, str]]:
    """One verdict (rule, reason, text): of the first rule that drops the text, or that it stays."""
    for rule in rules:
        reason, text = judge(rule, text)
        if reason:
            return [(rule, reason, "")]
    return [("", "", text)]


def judge_alone(judge: Judge, rules: list[str], text: str) -> list[tuple[str, str, str]]:
    """Each rule's verdict of the whole text."""
    return [(rule, *judge(rule, text)) for rule in rules]


def compare(texts: list[str], peer_python: str, num_rounds: int) -> tuple[list[dict[str, Any]], list[str], dict[str, int]]:
    """Results, differences in words, and how many documents each rule dropped."""
    with tempfile.TemporaryDirectory() as elsewhere:  # a foreign Python finds none of our modules in the current folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        sides = {
            side: subprocess.Popen(
                [python, str(Path(__file__).resolve()), "--side", side],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=elsewhere,
            )
            for side, python in (("ours", sys.executable), ("peer", peer_python))
        }
        try:
            for process in sides.values():  # what is loaded at the first document is not timed
                ask(process, list(CHAIN), ["A first sentence. " * 60], True)
            return take_turns(texts, sides, num_rounds)
        finally:
            for process in sides.values():
                process.kill()
                process.wait()


def take_turns(
    texts: list[str], sides: dict[str, "subprocess.Popen[str]"], num_rounds: int
) -> tuple[list[dict[str, Any]], list[str], dict[str, int]]:
    """As `compare`: timed rounds of the chain, then every rule alone."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    differences: list[str] = []
    dropped: dict[str, int] = dict.fromkeys((*CHAIN, "kept"), 0)
    portions = [texts[start::num_rounds] for start in range(num_rounds)]
    for number, portion in enumerate(portions):
        answers: dict[str, Any] = {}
        for side in sorted(sides, reverse=number % 2 == 1):
            answers[side] = ask(sides[side], list(CHAIN), portion, True)
            seconds[side].append(answers[side]["seconds"])
        differences += find_differences("all four", portion, answers)
        for ((rule, _, _),) in answers["ours"]["verdicts"]:
            dropped[rule or "kept"] += 1
        speeds = ", ".join(f"{side} {len(portion) / seconds[side][-1]:.0f}" for side in sides)
        print(f"[filters] round {number + 1}: {speeds} documents/s", file=sys.stderr)
    speed = {side: len(texts) / sum(seconds[side]) for side in sides}
    results = [result("FineWeb's filters", "documents/s per core", speed["ours"], speed["peer"], TARGET)]
    alone = {side: ask(process, list(RULES), texts, False) for side, process in sides.items()}
    differences += find_differences("alone", texts, alone)
    results.append({**result("differing verdicts or texts", "documents", len(differences), 0, None), "target": 0, "met": not differences})
    return results, differences, dropped


def ask(process: "subprocess.Popen[str]", rules: list[str], texts: list[str], chained: bool) -> dict[str, Any]:
    """One side's answer. Raises RuntimeError if it has ended."""
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps({"rules": rules, "texts": texts, "chained": chained}) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"{process.args}: ended with {process.wait()}; its last words are above")
    return json.loads(answer)


def find_differences(name: str, texts: list[str], answers: dict[str, Any]) -> list[str]:
    """Where the two sides' verdicts or texts are not equal."""
    both = zip(texts, answers["ours"]["verdicts"], answers["peer"]["verdicts"], strict=True)
    return [
        f"{name}: ours {one[:2]}, peer {other[:2]}{'' if one[:2] != other[:2] else ', texts differ'}: {text[:80]!r}"
        for text, ours, peer in both
        for one, other in zip(ours, peer, strict=True)
        if one != other
    ]


def result(name: str, unit: str, ours: float, peer: float, target: float | None) -> dict[str, Any]:
    """A row of the table."""
    ratio = ours / peer if peer else None
    met = None if target is None or ratio is None else ratio >= target
    return {"name": name, "unit": unit, "ours": ours, "peer": peer, "ratio": ratio, "target": target, "met": met}


def report(results: list[dict[str, Any]], differences: list[str], dropped: dict[str, int], as_json: bool) -> None:
    """Print the table, or JSON lines."""
    if as_json:
        for row in results:
            print(json.dumps(row))
        return
    print(f"{'':30} {'ours':>10} {'datatrove':>10} {'ratio':>7} {'target':>7}  unit")
    for row in results:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}"
        print(f"{row['name']:30} {row['ours']:10.1f} {row['peer']:10.1f} {ratio:>7} {row['target']:>7}  {row['unit']}")
    print("documents by the rule that dropped them: " + ", ".join(f"{rule} {count}" for rule, count in dropped.items()))
    for line in differences[:10]:
        print(line)


if __name__ == "__main__":
    main()
