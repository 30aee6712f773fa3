"""The texts that a tokenizer is trained on: spread evenly, the same whoever reads them, and no danger to the build."""

import json
import random

import numpy as np
import pytest

from configs.data_section import RuleSection, SourceSection, TokenizerSection
from configs.errors import UserError
from data_pipeline.build import build_dataset
from data_pipeline.execution import open_here, open_ray
from data_pipeline.sampling import SAMPLED_UNITS, Sample, sample_texts
from data_pipeline.sources import WorkUnit, plan_units
from data_pipeline.tokenizer import train_tokenizer
from tests.data_pipeline.conftest import WORDS

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


def test_a_sample_is_spread_over_the_units():
    asked: list[int] = []
    told: list[tuple[int, int]] = []

    def take(unit: WorkUnit, share_bytes: int) -> Sample:
        asked.append(unit.index)
        text = f"{unit.index:04d}".ljust(20)[:share_bytes]
        return Sample((text,), len(text))

    for num_units in (0, 1, 10, SAMPLED_UNITS, 10_000):
        asked.clear()
        told.clear()
        units = tuple(WorkUnit(number, ()) for number in range(num_units))
        texts = list(sample_texts(units, 2600, take, lambda done, size: told.append((done, size))))
        assert len(asked) == len(set(asked)) == min(num_units, SAMPLED_UNITS) == len(told)
        assert sum(map(len, texts)) == min(2600, 20 * len(asked)) == (told[-1][1] if told else 0)
        if num_units == 10_000:
            assert asked[0] == 0 and asked[-1] > 9900 and max(np.diff(asked)) < 41


@pytest.mark.parametrize("training_bytes", [3, 500, 7_001, 30_000, 10**6])
@pytest.mark.parametrize("engine", [open_here, open_ray])
def test_the_tokenizer_is_that_of_the_texts_read_one_after_the_other(tmp_path, data_for, two_workers, engine, training_bytes, seed):
    """Units of very different sizes, texts with characters of several bytes, and a share that ends within them."""
    chosen = random.Random(seed)
    texts: list[list[str]] = []
    for number in range(6):
        texts.append([" ".join(chosen.choices(WORDS, k=chosen.choice((1, 5, 300)))) for _ in range(chosen.choice((1, 3, 12)))])
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / "rows" / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[-1]))
    settings = TokenizerSection(vocabulary_size=300, training_bytes=training_bytes)
    sources = tuple(SourceSection(name=f"s{number}", path=str(tmp_path / "rows" / f"{number}.jsonl")) for number in range(6))
    data = data_for(tmp_path, sources=sources, tokenizer=settings, work_unit_bytes=10**9)
    assert len(plan_units(data).units) == 6

    left, sample = training_bytes, list[str]()
    for number, unit in enumerate(texts):
        share = left // (6 - number)
        for text in unit:
            content = text.encode()[:share]
            share, left = share - len(content), left - len(content)
            sample.append(content.decode("utf-8", "ignore"))
    folder = build_dataset(data, lambda _: None, engine).folder
    wanted = train_tokenizer(sample, settings.vocabulary_size, settings.end_of_text).to_str()
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == wanted


def test_a_rule_that_kills_its_process_kills_no_build(corpus, data_for, build, two_workers):
    """Not this process, which is the build's driver; and behind its mending the build goes on."""
    poisoned = corpus / "even" / "text-00.txt"
    whole = poisoned.read_bytes()
    poisoned.write_bytes(b"a text that is POISON to the rule")
    deadly = (RuleSection(rule="tests.data_pipeline.rules:die_of_poison"),)
    with pytest.raises(UserError) as caught:
        build_dataset(data_for(corpus, clean=deadly), lambda _: None)
    said = str(caught.value)
    assert said.startswith(f"the tokenizer's sample of work unit 0: {poisoned}") and "its worker died 4 times. Mend that" in said
    poisoned.write_bytes(whole)
    assert build(data_for(corpus, clean=deadly)).outcome == "built"


def test_a_rule_that_fails_on_one_document_spoils_no_sample(corpus, data_for, build):
    """The document is passed over here, and named by the unit that meets it again."""
    (corpus / "even" / "text-00.txt").write_bytes(b"a text that is POISON to the rule")
    failing = (RuleSection(rule="tests.data_pipeline.rules:fail_on_poison"),)
    with pytest.raises(UserError, match=r"(?s)1 of \d+ work units could not be made.*fail_on_poison failed on .*even/text-00.txt"):
        build(data_for(corpus, clean=failing))
    assert (corpus.parent / "dataset" / "tokenizer.json").exists()
