"""For tests of tasks: task files of every kind of request, and their data."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny import tiny_texts

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
task: {name}
"""
TASKS = {
    "choices": """
output_type: multiple_choice
num_fewshot: 2
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "letters": """
output_type: multiple_choice
doc_to_text: "{{question}} "
doc_to_choice: ["1", "2", "3", "4"]
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "last": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
metric_list:
- {metric: perplexity, aggregation: perplexity, higher_is_better: false}
- {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
- {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "writes": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [".", "us 1"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def write_tasks(folder: Path, names: Sequence[str], seed: int, num_documents: int = 11) -> list[Path]:
    """Tasks over texts of many lengths, some of them longer than the context. No question is a number: the harness would make it one."""
    chooser = random.Random(seed)
    for name in names:
        rows: list[dict[str, Any]] = []
        for number in range(num_documents):
            text = tiny_texts(1, seed=chooser.randrange(10**6))[0]
            question = text[: chooser.randrange(5, len(text) // (1 if number % 3 == 0 else 4))].rstrip()
            choices = [f" {chooser.randrange(60)}." for _ in range(3)] + [" plus"]
            rows.append({"question": question, "choices": choices, "answer": chooser.randrange(4), "text": text[:40], "number": number})
        if name == "whole":
            rows = [row | {"text": tiny_texts(1, seed=seed + number)[0]} for number, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name) + TASKS[name])
    return [folder / f"{name}.yaml" for name in names]
