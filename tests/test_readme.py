"""The README says what is there: its table of DeepSpeed's keys is the code's."""

from pathlib import Path

from configs.deepspeed_keys import OWNED_KEYS

README = Path(__file__).parent.parent / "README.md"


def test_the_table_of_owned_keys_is_the_codes() -> None:
    section = README.read_text().partition("## DeepSpeed's keys")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert {key.strip("`"): instead for key, instead in rows} == OWNED_KEYS
