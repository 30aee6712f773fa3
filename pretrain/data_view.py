"""The verbs `data show`, `sample`, `diff`, `rules` and `verify` as a person sees them.

In: what `data_pipeline/show.py`, `compare.py` and `cleaning.py` found, or a dataset to verify. Out: text: tables and colours in
a terminal, plain lines elsewhere.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from configs.errors import UserError
from data_pipeline.manifest import MANIFEST, TOKENIZER, load_manifest
from data_pipeline.show import ShownDocument
from data_pipeline.verify import dataset_bytes, verify_dataset
from pretrain.page import LINE_SECONDS, Page, make_visible, spell_duration, spell_megabytes, spell_rate

SHOWN_ROWS = 12
TEXT_WIDTH = 110
TOKEN_STYLES = ("black on color(152)", "black on color(223)")
END_STYLE = "bold white on color(88)"

PACKING_HEADERS = ("documents", "cut", "% cut", "% padding")

Rows = list[list[str]]


def tell_dataset(found: dict[str, Any], page: Page) -> None:
    """What `show_dataset` found."""
    tokenizer, inputs = found["tokenizer"], found["inputs"]
    page.say(f"{found['folder']}, format {found['format_version']}, manifest {found['sha256'][:16]}")
    page.say(
        f"tokenizer  {tokenizer['vocabulary_size']:,} entries as {tokenizer['dtype']}, end of text {tokenizer['end_of_text']} = "
        f"{tokenizer['end_of_text_id']}, SHA-256 {tokenizer['sha256'][:16]}"
    )
    page.say(f"inputs     {inputs['num_files']:,} files, {spell_megabytes(inputs['num_bytes'])} MB")
    page.say("libraries  " + ", ".join(f"{name} {version}" for name, version in found["libraries"].items()))
    rules = [f"{number}. {_describe_rule(rule)}" for number, rule in enumerate(found["rules"], 1)]
    page.say("rules      " + ("\n           ".join(rules) or "none"))
    page.say("")
    splits: Rows = []
    for name, one in found["splits"].items():
        shards, documents, tokens = (f"{one[key]:,}" for key in ("num_shards", "num_documents", "num_tokens"))
        splits.append([name, shards, documents, spell_megabytes(one["num_bytes"]), tokens, str(one["bytes_per_token"] or "-")])
    page.table(("split", "shards", "documents", "MB", "tokens", "bytes per token"), splits)
    page.say("")
    page.table(*tabulate_sources(found["sources"], found["mixture"]))
    if packings := found["packings"]:
        page.say("")
        rows = [
            [f"{int(length):,}", packing, f"{one['num_samples']:,}", *spell_packing(one)]
            for length, of_length in packings.items()
            for packing, one in of_length.items()
        ]
        page.table(("length", "packing", "samples", *PACKING_HEADERS), rows)
    if reasons := tabulate_reasons(Path(found["folder"]), found["documents"]["dropped"], found["documents"]["quarantined"]):
        page.say("")
        page.table(("reason", "documents", "became", f"examples, below {found['folder']}"), reasons)
    for example in found["examples"]:
        page.say(f"\n{make_visible(_place(example))}, {example['num_tokens']:,} tokens")
        page.say("  " + make_visible(example["text"]).replace("␊", "␊\n  "))


def tell_document(document: ShownDocument, page: Page) -> None:
    """A document with its tokens told apart: by colours, or by `|` where there are none."""
    page.say(f"document  {document.document_id}, number {document.number} of {document.shard} ({document.split})")
    page.say(make_visible(f"source    {document.source}, file {document.file}, position {document.position}"))
    if document.name is not None:
        page.say(make_visible(f"name      {document.name}"))
    if document.metadata is not None:
        page.say(make_visible(f"metadata  {json.dumps(document.metadata, ensure_ascii=False)}"))
    page.say(f"tokens    {document.num_tokens:,} for {document.num_bytes:,} bytes of text")
    left_out = document.num_tokens - len(document.ids)
    pieces = [make_visible(piece).replace("␊", "␊\n") for piece in document.pieces]
    ending = f" ... {left_out - 1:,} more tokens ... " if left_out > 1 else ""
    last = [document.last_piece] if left_out else []
    if page.has_colours:
        text = Text()
        whole = pieces if left_out else pieces[:-1]
        for number, piece in enumerate(whole):
            text.append(piece, TOKEN_STYLES[number % len(TOKEN_STYLES)])
        text.append(ending).append(make_visible(document.last_piece), END_STYLE)
        page.console.print(text, soft_wrap=True)
    else:
        page.say("|".join([*pieces, *filter(None, [ending]), *map(make_visible, last)]))


def tell_differences(found: dict[str, Any], page: Page) -> None:
    """What `compare_datasets` found, but for what is equal."""
    for letter, folder, digest in zip("AB", found["folders"], found["sha256"], strict=True):
        page.say(f"{letter}  {folder}, manifest {digest[:16]}")
    if found["equal"]:
        page.say("equal: their manifests are the same byte for byte, and so is what these promise")
        return
    for title in ("configuration", "tokenizer", "libraries"):
        pairs = dict(one for name, pair in found[title].items() for one in _spread(name, *pair))
        _tell_pairs(title, {name: [_short_value(value) for value in pair] for name, pair in pairs.items()}, page)
    _tell_rules_and_inputs(found, page)
    counts: dict[str, list[str]] = {}
    for name, pair in found["sources"].items():
        for key in ("read", "kept", "num_tokens", "num_bytes"):
            left, right = (one[key] if one else 0 for one in pair)
            if left != right:
                counts[f"{name} {key.removeprefix('num_')}"] = [f"{left:,}", f"{right:,}"]
    _tell_pairs("source", counts, page)
    for key in ("dropped", "quarantined"):
        _tell_pairs(key, {reason: [f"{count or 0:,}" for count in pair] for reason, pair in found[key].items()}, page)
    shards, documents = found["shards"], found["documents"]
    page.say(f"\nshards     {shards['equal']:,} equal by SHA-256, {shards['only_in_a']:,} only in A, {shards['only_in_b']:,} only in B")
    page.say(
        f"documents  {documents['in_both']:,} in both by id ({documents['with_other_num_tokens_or_num_bytes']:,} of them with another "
        f"number of tokens or bytes, {documents['in_other_split']:,} in the other split), {documents['only_in_a']:,} only in A, "
        f"{documents['only_in_b']:,} only in B"
    )


def _spread(name: str, left: Any, right: Any) -> Iterator[tuple[str, list[Any]]]:
    """A section that only one of two datasets has, key by key as far as it says anything; other pairs as they are."""
    section = left if right is None else right
    if isinstance(section, dict) and None in (left, right):
        for key, value in section.items():
            yield from _spread(f"{name}.{key}", *((value, None) if right is None else (None, value)))
    elif left != right:
        yield name, [left, right]


def _tell_pairs(title: str, pairs: dict[str, list[str]], page: Page) -> None:
    if pairs:
        page.say("")
        page.table((title, "A", "B"), [[make_visible(text) for text in (name, *pair)] for name, pair in pairs.items()])


def _tell_rules_and_inputs(found: dict[str, Any], page: Page) -> None:
    rules, inputs = found["rules"], found["inputs"]
    lines = [f"only in {side}: {_describe_rule(rule)}" for side in "AB" for rule in rules[f"only_in_{side.lower()}"]]
    if rules["in_other_order"]:
        lines.append("the same rules in another order")
    if lines:
        page.say("\nrules      " + "\n           ".join(lines))
    named = {"only in A": "only_in_a", "only in B": "only_in_b", "changed": "changed"}
    named["of equal size, cut into other parts"] = "of_equal_size_in_other_parts"
    if any(inputs[key] for key in named.values()):
        page.say(f"\ninputs     {inputs['num_equal']:,} equal, " + ", ".join(f"{len(inputs[key]):,} {text}" for text, key in named.items()))
        for text, key in named.items():
            shown = inputs[key][:SHOWN_ROWS]
            more = [f"           ... and {len(inputs[key]) - len(shown):,} more"] if len(inputs[key]) > len(shown) else []
            for line in [*(f"           {text}: {make_visible(name)}" for name in shown), *more]:
                page.say(line)


def tell_rules(rules: dict[str, dict[str, Any]], page: Page) -> None:
    """Every rule with its settings and their defaults, and below it what it does."""
    for name, rule in rules.items():
        settings = [f"{key}={one['default']!r}" if "default" in one else key for key, one in rule["settings"].items()]
        page.say(fill(f"{name}({', '.join(settings)})", TEXT_WIDTH, subsequent_indent="        ", break_long_words=False))
        page.say(fill(rule["summary"], TEXT_WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False))


def verify_with_progress(folder: Path, say: Callable[[str], Any]) -> list[str]:
    """What is wrong with a dataset, a sentence per problem, telling how far it is. Raises UserError when there is none."""
    try:
        total = dataset_bytes(load_manifest(folder)) + sum(path.stat().st_size for path in folder.glob(TOKENIZER))
    except UserError as error:
        if not (folder / MANIFEST).exists():
            raise
        return [str(error)]  # a damaged manifest is one of the things to be found
    page = Page(Console(stderr=True), say)
    if page.is_plain:
        return verify_dataset(folder, _LineVerification(say, total))
    columns = TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=page.console) as bar:
        task = bar.add_task("verifying", total=total)
        return verify_dataset(folder, lambda num_bytes: bar.advance(task, num_bytes))


class _LineVerification:
    """A line every `LINE_SECONDS` at most."""

    def __init__(self, say: Callable[[str], Any], total: int) -> None:
        self._say, self._total, self._done = say, total, 0
        self._began = self._told = time.monotonic()

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS:
            self._told = now
            speed = self._done / (now - self._began)
            left = spell_duration(max(0, self._total - self._done) / speed)
            done, total = spell_megabytes(self._done), spell_megabytes(self._total)
            self._say(f"verifying: {done} of {total} MB, {spell_rate(speed / 1e6)} MB/s, {left} left")


def tabulate_sources(sources: dict[str, dict[str, Any]], mixture: dict[str, float] | None = None) -> tuple[list[str], Rows]:
    """Documents, text and tokens of each source, and of all; with `mixture`, each one's share of the training tokens."""
    headers = ["source", "read", "kept", "dropped", "quarantined", "MB", "tokens"]
    rows = [
        [
            name,
            *(f"{value:,}" for value in (one["read"], one["kept"], sum(one["dropped"].values()), sum(one["quarantined"].values()))),
            spell_megabytes(one["num_bytes"]),
            f"{one['num_tokens']:,}",
        ]
        for name, one in sources.items()
    ]
    if mixture is not None:
        headers.append("% of train")
        rows = [[*row, f"{100 * mixture.get(row[0], 0):.2f}"] for row in rows]
    if len(rows) > 1:
        sums = [sum(one[key] for one in sources.values()) for key in ("read", "kept", "num_bytes", "num_tokens")]
        left_out = [sum(sum(one[key].values()) for one in sources.values()) for key in ("dropped", "quarantined")]
        total = ["all", *(f"{value:,}" for value in (*sums[:2], *left_out)), spell_megabytes(sums[2]), f"{sums[3]:,}"]
        rows.append([*total, *([] if mixture is None else ["100.00"])])
    return headers, rows


def spell_packing(one: dict[str, Any]) -> list[str]:
    """What a packing does to documents, under `PACKING_HEADERS`."""
    padding = f"{100 * one['share_of_padding']:.2f}"
    if not one["num_documents"]:
        return ["-", "-", "-", padding]
    return [f"{one['num_documents']:,}", f"{one['documents_cut']:,}", f"{100 * one['share_of_documents_cut']:.2f}", padding]


def tabulate_reasons(folder: Path, dropped: dict[str, int], quarantined: dict[str, int]) -> Rows:
    """How many documents each reason cost, and where to read about them."""
    rows: Rows = []
    for reason, count in dropped.items():
        name = f"dropped/{reason}.jsonl"  # a user's own reason may have letters that no file name has
        rows.append([make_visible(reason), f"{count:,}", "dropped", make_visible(name) if (folder / name).is_file() else "dropped/"])
    return rows + [[reason, f"{count:,}", "quarantined", "units/*/quarantine.jsonl"] for reason, count in quarantined.items()]


def _describe_rule(rule: dict[str, Any]) -> str:
    """A rule's name, the settings that were given, and where more than its name decides, what it was made of."""
    settings = json.loads(rule["settings"])["settings"]
    given = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items())
    read = [f"{path} {digest[:16]}" for path, digest in rule["files"]]
    own = [f"source {rule['source_sha256'][:16]}"] if rule["source_sha256"] else []
    return make_visible(f"{rule['rule']}({given})" + (f" [{', '.join([*read, *own])}]" if read or own else ""))


def _place(example: dict[str, Any]) -> str:
    return f"{example['document_id']}, source {example['source']}, file {example['file']}, position {example['position']}"


def _short_value(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
