"""The campaign of hostile input: nothing foreign is run, nothing outside is touched, and no secret leaves the environment.

    python -m tests.faults.hostile [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

`yaml`: run files that would run code, grow without bound or mean something else. `run_names`: names that lead elsewhere or hold a
command. `commits`: checkpoints made by an enemy (`hostile_commits.py`). `secrets`: whole trainings with twenty planted secrets, one of
which ends, one of which fails with all of them in its exception. Out: a line (or an object of JSON) for each kind.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.loader import dump_config, load_config
from pretrain.run.folder import RunFolder
from tests.faults import canaries, hostile_commits
from tests.faults.campaign import Case, Kind, Outcome, run_campaign

SECONDS = 10
"""One run file is refused in milliseconds; the machine may be busy."""
MOST_WORDS = 2000
"""Characters of a message: what is refused is not printed whole."""


def prepare_nothing(folder: Path, chosen: random.Random) -> None:
    """Every case stands alone."""


# --- run files ----------------------------------------------------------------------------------------------

RUNS_CODE = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.check_output [[touch, '{canary}']]",
    "!!python/object/new:os.system ['touch {canary}']",
    '!!python/object/apply:eval [\'open("{canary}", "w")\']',
    '!!python/object/new:type {{args: [x, !!python/tuple [], {{extend: !!python/name:exec }}], listitems: \'open("{canary}", "w")\'}}',
    "!!python/module:os",
    "!!python/name:os.system",
    "!!python/tuple [1]",
    "{{_target_: os.system, command: 'touch {canary}'}}",
    "!include {canary}",
    "!!js/function 'touch {canary}'",
)
WITHOUT_BOUND = (
    "[" * 100_000,
    "{a: " * 50_000,
    "x: &a [" + "*a, " * 10 + "]",
    "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]),
    "seed: 0x" + "f" * 200_000,
    "seed: " + "9" * 200_000,
    "seed: " + "1_" * 100_000 + "1",
    "? " + "k" * 200_000 + "\n: 1",
    "\n".join(f"key_{number}: 1" for number in range(8000)),
    "a" * 3_000_000,
    "include: [run.yaml]",
    "include: [a.yaml, a.yaml, a.yaml, a.yaml]",
    "seed: 1" + " " * 200_000 + "# " + "x" * 20_000,
)
MEANS_SOMETHING_ELSE = (
    "run: {seed: 1}\nrun: {seed: 2}",
    "run: {seed: !!binary MQ==}",
    "run: {seed: !!timestamp 2024-01-01}",
    "run: {seed: !!set {1}}",
    "optimizer: {settings: {a: !!set {b}}}",
    "optimizer: {settings: {a: !!binary aGVsbG8=}}",
    "optimizer: {settings: {a: !!timestamp 2024-01-01}}",
    "run: {seed: 1:30}",
    "run: {seed: 0o17}",
    "run: {seed: 1e3}",
    'run: {root: "a\\0b"}',
    'run: {root: "\\ud800"}',
    "run: {<<: {seed: 3}}",
    "- run",
    "~: 1",
    "include: /dev/zero",
    "include: /etc/hostname",
    "include: ../../../../../../etc/passwd",
    "deepspeed: {a: .nan}",
    "model: {implementation: 'os:system'}\nrun: {seed: x}",
    "watch: {wandb_project: ['a']}",
)
YAML = (*(f"run: {{seed: {text}}}" for text in RUNS_CODE), *RUNS_CODE, *WITHOUT_BOUND, *MEANS_SOMETHING_ELSE)


def read_yaml(case: Case) -> Outcome:
    """As a run file, or its value as an override's: refused in words, soon, and nothing else happened."""
    canary = case.folder / "executed"
    text = YAML[case.number].replace("{canary}", str(canary)).replace("{{", "{").replace("}}", "}")
    path, inner = case.folder / "run.yaml", case.folder
    for number, name in enumerate("abcdefghijklmnop"):  # each includes the next four times: 4 to the power of 16
        below = "abcdefghijklmnop"[number + 1 : number + 2]
        (inner / f"{name}.yaml").write_text(f"include: [{', '.join([f'{below}.yaml'] * 4)}]" if below else "")
    path.write_text(text)
    began, problems = time.monotonic(), list[str]()
    ways = [(path, [])] if len(text) > 10_000 else [(path, []), (None, [f"run.seed={text}"])]
    for file, overrides in ways:
        try:
            empty = case.folder / "empty.yaml"
            empty.write_text("")
            load_config(file or empty, overrides)
            problems.append(f"{text[:100]!r} was taken as a {'run file' if file else 'value'}")
        except UserError as error:
            if len(str(error)) > MOST_WORDS:
                problems.append(f"{text[:100]!r} is refused in {len(str(error))} characters")
        except BaseException as error:
            problems.append(f"{text[:100]!r} gives {type(error).__name__}: {str(error)[:200]}")
    if canary.exists():
        problems.append(f"{text[:100]!r} was executed")
    if (seconds := time.monotonic() - began) > SECONDS:
        problems.append(f"{text[:100]!r} took {seconds:.1f} s")
    return Outcome(1, problems)


# --- names --------------------------------------------------------------------------------------------------

NAMES = (
    *("..", ".", "../x", "../../etc/cron.d/x", "/x", "/etc/x", "a/b", "a/../../b", "./x", "~/x", "~root", "x/", "\\..\\x", "..\\x"),
    *("$(touch executed)", "`touch executed`", "x; touch executed", "x && touch executed", "x | touch executed", "x\ntouch executed"),
    *("x\n", "\nx", "x\r", "x\0", "\0", " x", "x ", "x y", "", "-rf", "--help", "-", ".hidden", "_x", "x" * 65, "x" * 10_000),
    *(
        "x\u202eyx",
        "x\u200b",
        "\uff0e\uff0e",
        "\u2024\u2024",
        "\u2215x",
        "caf\u00e9",
        "x:y",
        "x*",
        "x?",
        "x'",
        'x"',
        "%2e%2e",
        "x%00",
        "CON:",
    ),
)


def name_run(case: Case) -> Outcome:
    """By file and by override: refused, or a folder right below the root; and written out, the same name comes back."""
    name, problems = NAMES[case.number], list[str]()
    path = case.folder / "run.yaml"
    as_file = f"run: {{root: {case.folder}/runs, name: {json.dumps(name)}}}"
    for text, overrides in ((as_file, []), (f"run: {{root: {case.folder}/runs}}", [f"run.name={json.dumps(name)}"])):
        path.write_text(text)
        try:
            config = load_config(path, overrides)
        except UserError:
            continue
        folder = RunFolder.of(config).path
        if folder.parent != (case.folder / "runs").resolve():
            problems.append(f"the name {name!r} leads to {folder}")
        path.write_text(dump_config(config))
        if load_config(path).run.name != name:
            problems.append(f"the name {name!r} comes back as {load_config(path).run.name!r}")
        if not name.isascii() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            problems.append(f"the name {name!r} was taken")
    return Outcome(1, problems)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("yaml", len(YAML), 1, prepare_nothing, read_yaml),
        Kind("run_names", len(NAMES), 1, prepare_nothing, name_run),
        Kind("commits", hostile_commits.NUM_CASES, 1, hostile_commits.prepare_nothing, hostile_commits.check_commit),
        Kind("secrets", len(canaries.RUNS), canaries.NUM_SECRETS, canaries.prepare, canaries.train_with_secrets),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    return run_campaign("hostile", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
