"""A dataset beside the plan of its corpus, line by line.

In: a built dataset, and `planted.json` with `documents.parquet` beside it. Out: a table of what was planted and what was found,
and whether all is equal. How many near duplicates the texts have by themselves nobody knows beforehand: these are counted
apart, and a sample is compared word by word.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from benchmarks.mixed.documents import KEPT, MAIL_HOST, MAIL_PLACEHOLDERS, SOURCES, hash_text, jaccard, split_shingles
from configs.loader import load_config
from data_pipeline.cleaning import bind_rules
from data_pipeline.documents import Document, place_document
from data_pipeline.manifest import SPLITS, UNITS, Manifest, load_manifest
from data_pipeline.minhash import hash_shingles, hash_words
from data_pipeline.shards import Shard, read_spans
from data_pipeline.sources import plan_units, read_unit
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.verify import verify_dataset


@dataclass(frozen=True)
class Line:
    """A line of the comparison."""

    source: str
    what: str
    planted: str
    found: str
    is_equal: bool


@dataclass(frozen=True)
class Stored:
    """A document of the dataset."""

    split: str
    shard: str
    number: int
    name: str | None
    metadata: str | None


class Comparison:
    """A dataset beside the plan of its corpus."""

    def __init__(self, dataset: Path, planted: Path) -> None:
        self.dataset, self.folder = dataset, planted.parent
        self.plan: dict[str, Any] = json.loads(planted.read_bytes())
        self.manifest: Manifest = load_manifest(dataset)
        self.report: dict[str, Any] = json.loads((dataset / "report.json").read_bytes())
        rows = pyarrow.parquet.read_table(planted.parent / "documents.parquet").to_pylist()
        self.planned: dict[str, dict[str, Any]] = {row["document_id"]: row for row in rows}
        self.twice = 0
        self.stored = self._read_sidecars()
        self.missing = {identity for identity, row in self.planned.items() if row["stage"] == KEPT and identity not in self.stored}
        """Documents that nothing of the plan speaks against, and that are not there: near duplicates, or lost."""
        self.own_near = self.missing - {pair["later"] for pair in self.plan["near"]}

    def _read_sidecars(self) -> dict[str, Stored]:
        stored: dict[str, Stored] = {}
        for split in SPLITS:
            for shard in self.manifest.shards(split):
                table = read_spans(self.dataset / shard.name)
                for number, row in enumerate(table.select(["document_id", "name", "metadata"]).to_pylist()):
                    self.twice += row["document_id"] in stored
                    stored[row["document_id"]] = Stored(split, shard.name, number, row["name"], row["metadata"])
        return stored

    def lines(self, num_sampled: int) -> Iterator[Line]:
        """The whole comparison."""
        for source in SOURCES:
            yield from self.compare_counts(source.name)
        yield from self.compare_documents()
        yield from self.compare_near()
        yield from self.compare_texts(num_sampled)
        yield from self.compare_report()

    def compare_counts(self, source: str) -> Iterator[Line]:
        """What the manifest says of a source."""
        wanted, found = self.plan["sources"][source], self.manifest.sources[source]
        yield equal(source, "read", wanted["read"], found.read)
        for stage, counts in (("quarantined", found.quarantined), ("dropped", found.dropped)):
            for reason in sorted(wanted[stage].keys() | counts.keys() - {"near_duplicate"}):
                yield equal(source, f"{stage}: {reason}", wanted[stage].get(reason, 0), counts.get(reason, 0))
        pairs = [pair for pair in self.plan["near"] if pair["source"] == source]
        gone = sum(pair["later"] in self.missing for pair in pairs)
        own = sum(self.planned[identity]["source"] == source for identity in self.own_near)
        num_near = found.dropped.get("near_duplicate", 0)
        yield Line(source, "dropped: near_duplicate", str(len(pairs)), f"{gone} and {own} of its own", num_near == gone + own)
        left = wanted["read"] - sum(sum(wanted[stage].values()) for stage in ("dropped", "quarantined")) - num_near
        yield equal(source, "kept", left, found.kept)

    def compare_documents(self) -> Iterator[Line]:
        """Not only as many, but the same ones."""
        must_stay = {identity for identity, row in self.planned.items() if row["stage"] == KEPT}
        yield equal("all", "documents that were to go and are stored", 0, len(self.stored.keys() - must_stay))
        yield equal("all", "documents that are stored twice, or in both splits", 0, self.twice)
        held_out = {identity for identity, document in self.stored.items() if document.split == "held_out"}
        fraction = self.manifest.configuration["held_out_fraction"]
        yield equal("all", "held-out documents", sum(place_document(identity) < fraction for identity in self.stored), len(held_out))
        wanted = Counter(name_row(row) for row in self.planned.values() if row["stage"] == "quarantined")
        found = Counter(name_row(row) for row in self.read_examples("quarantine.jsonl"))
        yield equal("all", "documents of quarantine by name and reason", wanted.total(), (wanted & found).total())
        yield equal("all", "other documents in quarantine", 0, (found - wanted).total())
        wrong = shown = 0
        for row in self.read_examples("dropped.jsonl"):
            known, reason = self.planned.get(row["document_id"], {}), row["reason"]
            shown += 1
            wrong += row["document_id"] not in self.missing if reason == "near_duplicate" else known.get("reason") != reason
        yield equal("all", f"of {shown} examples of dropped documents, wrong ones", 0, wrong)

    def compare_near(self) -> Iterator[Line]:
        """Planted pairs, and documents that only resemble an evaluation."""
        later = [pair["later"] for pair in self.plan["near"]]
        gone = sum(identity in self.missing for identity in later)
        yield Line("all", "planted near duplicates that are gone, 99 % at least", str(len(later)), str(gone), gone >= 0.99 * len(later))
        controls = [identity for identity in self.plan["controls"] if identity not in self.missing]
        yield equal("all", "documents with 12 words of an evaluation", len(controls), sum(one in self.stored for one in controls))
        counts = self.report["deduplication"]
        exact = sum(row["reason"] == "exact_duplicate" for row in self.planned.values())
        yield equal("all", "exact duplicates that deduplication counted", exact, counts["num_exact_duplicates"])
        yield equal("all", "near duplicates that deduplication counted", len(self.missing), counts["num_near_duplicates"])

    def compare_texts(self, num_sampled: int) -> Iterator[Line]:
        """Decoded tokens beside the texts after cleaning, names and metadata beside what was written."""
        sample = random.Random(1).sample(sorted(self.stored), min(num_sampled, len(self.stored)))
        known = [identity for identity in sample if identity in self.planned]
        mails = {identity: number for identity, number in self.plan["addresses"].items() if identity in self.stored}
        texts = self.decode([*known, *mails])
        same = sum(hash_text(texts[identity]).hex() == self.planned[identity]["digest"] for identity in known)
        yield equal("all", "texts that decode to what cleaning left", len(sample), same)
        same = sum(self.has_fields(identity) for identity in known)
        yield equal("all", "their names and metadata", len(sample), same)
        placeholders = {identity: sum(map(texts[identity].count, MAIL_PLACEHOLDERS)) for identity in mails}
        yield equal("all", f"placeholders in {len(mails)} documents with addresses", sum(mails.values()), sum(placeholders.values()))
        yield equal("all", "such documents with another number of them", 0, sum(mails[one] != placeholders[one] for one in mails))
        yield equal("all", "addresses that are still there", 0, sum(texts[identity].count(MAIL_HOST) for identity in mails))

    def compare_report(self) -> Iterator[Line]:
        """The report beside the manifest, and the manifest beside the files."""
        yield equal("all", "problems that the dataset's own verification finds", 0, len(verify_dataset(self.dataset)))
        yield Line("all", "report and manifest agree", "", "", self.report["documents"] == self.manifest.documents.model_dump())
        for source in SOURCES:
            shards = [
                shard.sources[source.name] for split in SPLITS for shard in self.manifest.shards(split) if source.name in shard.sources
            ]
            wanted = {"num_documents": sum(one.num_documents for one in shards), "num_tokens": sum(one.num_tokens for one in shards)}
            found = {key: self.report["sources"][source.name][key] for key in wanted}
            if wanted != found:
                yield Line(source.name, "report and manifest agree", str(wanted), str(found), False)

    @property
    def run_file(self) -> Path:
        """Where the run file lies."""
        return self.folder / self.plan["run_file"]

    def read_examples(self, name: str) -> Iterator[dict[str, Any]]:
        """The lines that every unit has of a kind."""
        for path in sorted((self.dataset / UNITS).glob(f"*/{name}")):
            yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())

    def has_fields(self, identity: str) -> bool:
        """Whether a document's name and metadata are those that were written."""
        stored, planned = self.stored[identity], self.planned[identity]
        return stored.name == planned["name"] and json.loads(stored.metadata or "{}") == json.loads(planned["metadata"])

    def decode(self, identities: Iterable[str]) -> dict[str, str]:
        """The texts of stored documents, from their tokens."""
        tokenizer = load_tokenizer(self.dataset / "tokenizer.json", self.manifest.end_of_text)
        texts: dict[str, str] = {}
        for identity in sorted(set(identities), key=lambda one: self.stored[one].shard):
            place = self.stored[identity]
            ids = Shard(self.dataset / place.shard).document(place.number).tolist()
            assert ids[-1] == self.manifest.end_of_text_id, "a document has no end"
            texts[identity] = tokenizer.decode(ids[:-1], skip_special_tokens=False)
        return texts

    # --- near duplicates that nobody planted ---

    def compare_own_near(self, num_sampled: int) -> Iterator[Line]:
        """A sample of them, word by word with the document that each resembles most."""
        sample = random.Random(2).sample(sorted(self.own_near), min(num_sampled, len(self.own_near)))
        if not sample:
            return
        similar = self.find_similar(sample)
        settings = load_config(self.run_file).data.deduplicate
        assert settings is not None and settings.near is not None
        wanted = settings.near.similarity
        error = (wanted * (1 - wanted) / settings.near.num_permutations) ** 0.5
        least = wanted - 4 * error
        kept = sorted(similar[identity][True] for identity in sample)
        found = [max(similar[identity].values()) for identity in sample]
        print(f"\nThe text's own near duplicates: {len(self.own_near)}. Of {len(sample)}, the exact similarity to the document that stays")
        print(
            f"and is most alike: {kept[0]:.3f} at least, {kept[len(kept) // 2]:.3f} in the middle, {sum(one >= wanted for one in kept)} at"
        )
        print(f"{wanted} or above, {sum(one < least for one in kept)} below {least:.3f}. To any document, also of those that were")
        print(f"dropped beside it: {min(found):.3f} at least, {sum(one >= wanted for one in found)} at {wanted} or above.\n")
        alike = sum(one >= least for one in found)
        yield equal("all", f"own near duplicates with one at {wanted} less 4 standard errors", len(sample), alike)

    def find_similar(self, sample: Sequence[str]) -> dict[str, dict[bool, float]]:
        """The greatest exact similarity of each document to one that stays (True), and to one that was dropped (False).

        The pipeline's hashes of shingles only choose what is compared.
        """
        texts = dict(self.read_cleaned(set(sample)))
        shingles = {identity: split_shingles(text) for identity, text in texts.items()}
        hashes = np.unique(np.concatenate([hash_all(text) for text in texts.values()]))
        best = {identity: {True: 0.0, False: 0.0} for identity in sample}
        for identity, text in self.read_cleaned(self.stored.keys() | self.missing):
            own = hash_all(text)
            places = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
            if np.count_nonzero(hashes[places] == own) < 0.3 * len(own):
                continue
            others = split_shingles(text)
            for one in sample:
                if one != identity:
                    stays = identity in self.stored
                    best[one][stays] = max(best[one][stays], jaccard(shingles[one], others))
        return best

    def read_cleaned(self, identities: Set[str]) -> Iterator[tuple[str, str]]:
        """Documents of the corpus, and their texts after cleaning."""
        data = load_config(self.run_file).data
        mending = bind_rules([section for section in data.clean if section.rule.startswith(("repair", "normalize", "redact"))], "")
        for unit in plan_units(data).units:
            for document in read_unit(unit, data.largest_document_bytes):
                if isinstance(document, Document) and document.document_id in identities:
                    for _, rule in mending:
                        mended = rule(document)
                        assert isinstance(mended, Document)
                        document = mended
                    yield document.document_id, document.text


def equal(source: str, what: str, planted: int, found: int) -> Line:
    """A line of two numbers."""
    return Line(source, what, str(planted), str(found), planted == found)


def name_row(row: Mapping[str, Any]) -> tuple[str, str, int, str]:
    """Where a document stands, and what became of it."""
    return row["source"], row["file"], row["position"], row["reason"]


def hash_all(text: str) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """The hashes of a text's shingles."""
    return hash_shingles(*hash_words([text]), 5)[0]


def check_dataset(dataset: Path, planted: Path, num_sampled: int = 500, num_own: int = 50) -> bool:
    """Compare and print; whether all is equal."""
    comparison = Comparison(dataset, planted)
    print(f"{dataset} beside {planted} ({comparison.plan['bytes'] / 1e6:.1f} MB on disk, seed {comparison.plan['seed']})")
    print_stages(comparison.report)
    lines = [*comparison.lines(num_sampled), *comparison.compare_own_near(num_own)]
    print_lines(lines)
    different = [line for line in lines if not line.is_equal]
    print(f"\n{len(lines)} lines, {len(different)} differ")
    return not different


def print_lines(lines: Sequence[Line]) -> None:
    """A table."""
    cells = [("source", "what", "planted", "found", "equal")]
    cells += [(line.source, line.what, line.planted, line.found, "yes" if line.is_equal else "NO") for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for (above, *_), row in zip([cells[0], *cells[:-1]], cells, strict=True):
        if row[0] != above:
            print()
        source, what, *numbers, verdict = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(
            "  ".join(
                [source, what, *(number.strip().rjust(width) for number, width in zip(numbers, widths[2:], strict=False)), verdict.strip()]
            )
        )


def print_stages(report: Mapping[str, Any]) -> None:
    """What the build took, by its report."""
    print(f"\n{'stage':<10} {'seconds':>8} {'documents/s':>12} {'MB/s':>8} {'peak of a worker':>17}")
    for stage in report["stages"]:
        rate = stage["per_second"]
        print(
            f"{stage['stage']:<10} {stage['seconds']:>8.1f} {rate['documents']:>12.0f} {rate['megabytes']:>8.2f} "
            f"{stage['peak_worker_bytes'] / 1e6:>14.0f} MB"
        )
    print(f"workers: {report['workers']}; deduplication: {json.dumps(report['deduplication'])}")
