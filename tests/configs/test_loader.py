"""The loader: defaults < include < run file < a.b=c, and errors that name file and key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import configs.loader
from configs.errors import UserError
from configs.loader import dump_config, load_config
from configs.schema import RunConfig

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(text: str, *overrides: str) -> RunConfig:
    return load_config(write("run.yaml", text), overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


# --- what is read ------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_defaults_named_after_itself() -> None:
    config = load_config(write("my first run!.yaml", "# nothing\n"))
    assert config.run.name == "my-first-run-"
    assert config == RunConfig.model_validate({"run": {"name": "my-first-run-"}})


@pytest.mark.parametrize(("stem", "name"), [("...", "run"), ("über", "ber"), ("a" * 100, "a" * 64), ("_x", "x")])
def test_a_file_name_becomes_a_valid_run_name(stem: str, name: str) -> None:
    assert load_config(write(f"{stem}.yaml", "")).run.name == name


def test_a_given_name_is_kept() -> None:
    assert load("run: {name: other}").run.name == "other"
    assert load("run: {name: other}", "run.name=third").run.name == "third"


def test_a_file_with_a_byte_order_mark_is_read() -> None:
    assert load("\ufeffrun: {seed: 3}").run.seed == 3


@pytest.mark.parametrize(
    ("text", "number"), [("3e-4", 3e-4), ("1e3", 1e3), ("2E+1", 20.0), (".5", 0.5), ("1.", 1.0), ("1", 1.0), ("010", 10.0)]
)
def test_numbers_are_those_of_yaml_1_2(text: str, number: float) -> None:
    assert load(f"optimizer: {{peak_lr: {text}}}").optimizer.peak_lr == number
    assert load("", f"optimizer.peak_lr={text}").optimizer.peak_lr == number


def test_large_numbers_may_have_underscores() -> None:
    assert load("training: {total_tokens: 1_000_000}").training.total_tokens == 1_000_000


@pytest.mark.parametrize("text", ["010", "1:30", "1e6", "2024-01-01", "'8'", "8.0", "true"])
def test_whole_numbers_are_written_as_such(text: str) -> None:
    """Base 8, base 60 and dates are YAML 1.1: what looks like them is no whole number here."""
    assert "run.yaml: model.num_layers: found" in refusal(f"model: {{num_layers: {text}}}")


@pytest.mark.parametrize("quoted", ["'3e-4'", '"3e-4"'])
def test_a_quoted_number_is_refused_in_file_and_override(quoted: str) -> None:
    words = "optimizer.peak_lr: found the text '3e-4', wanted a number. Write it without quotes."
    assert refusal(f"optimizer: {{peak_lr: {quoted}}}") == f"run.yaml: {words}"
    override = f"optimizer.peak_lr={quoted}"
    assert refusal("", override) == f"override {override!r}: {words}"


# --- wrong types and unknown keys --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {num_layers: two}", "model.num_layers: found the text 'two', wanted a whole number."),
        ("model: {num_layers: 2.5}", "model.num_layers: found 2.5, wanted a whole number."),
        ("model: {num_layers: 0}", "model.num_layers: found 0, wanted greater than 0."),
        ("model: {num_layers: [1]}", "model.num_layers: found a list, wanted a whole number."),
        ("model: {num_layers: }", "model.num_layers: found nothing (null), wanted a whole number."),
        ("model: {tied_head: 1}", "model.tied_head: found 1, wanted true or false."),
        ("run: {name: 7}", "run.name: found 7, wanted text."),
        ("model: 7", "model: found 7, wanted a section."),
        ("model:", "model: found nothing (null), wanted a section."),
        ("data: {sources: {name: a}}", "data.sources: found a section, wanted a list."),
        ("data: {sources: [7]}", "data.sources.0: found 7, wanted a section."),
        ("data: {sources: [{name: a}]}", "data.sources.0.path: found nothing, wanted a value for this key."),
        ("deepspeed: 7", "deepspeed: found 7, wanted a section."),
        ("precision: fp8", "precision: found the text 'fp8', wanted 'bf16', 'fp16' or 'fp32'."),
        ("optimizer: {weight_decay: .inf}", "optimizer.weight_decay: found inf, wanted a finite number."),
        ("optimizer: {peak_lr: .nan}", "optimizer.peak_lr: found nan, wanted a finite number."),
        ("parallel: {zero_stage: true}", "parallel.zero_stage: found True, wanted a whole number."),
        ("model: {qk_norm: true}", "model.qk_norm: found True, wanted 'head' or 'full'."),
        ("model: {sliding_window: 0}", "model.sliding_window: found 0, wanted greater than 0."),
        ("model: {attention_softcap: .inf}", "model.attention_softcap: found inf, wanted a finite number."),
        ("model: {block: parts}", "model.block: wanted package.module:name, of a class or function of your own."),
        ("model: {settings: 7}", "model.settings: found 7, wanted a section."),
        ("model: {rope_scaling: 7}", "model.rope_scaling: found 7, wanted a section."),
        (
            "model: {rope_scaling: {kind: yarn, factor: 2}}",
            "model.rope_scaling.original_context: found nothing, wanted a value for this key.",
        ),
        (
            "model: {rope_scaling: {kind: ntk, factor: 2, original_context: 9}}",
            "model.rope_scaling.kind: found the text 'ntk', wanted 'linear', 'llama3' or 'yarn'.",
        ),
        ("objective: {kind: prefx}", "found the text 'prefx', wanted 'next_token', 'continuation' or 'prefix'."),
        ("objective: {kind: prefx}", "wanted package.module:name, of a class or function of your own."),
        ("objective: {loss: 'a:b:c'}", "objective.loss: wanted package.module:name, of a class or function of your own."),
        ("objective: {masked_tokens: [7]}", "objective.masked_tokens.0: found 7, wanted text."),
        ("training: {fill_in_the_middle: true}", "training.fill_in_the_middle: found True, wanted a section."),
        ("7: {a: 1}", "a key has to be a word; put it in quotes."),
        ("[1, 2]", "run.yaml: found a list, wanted sections such as `model:` and `training:`."),
    ],
)
def test_a_wrong_type_says_what_was_found_and_wanted(text: str, words: str) -> None:
    said = refusal(text)
    assert said.startswith("run.yaml: ")
    assert said.endswith(words) or words in said


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("model: {num_layer: 2}", "model.num_layer", "model.num_layers"),
        ("optimiser: {peak_lr: 1}", "optimiser", "optimizer"),
        ("training: {peak_lr: 1}", "training.peak_lr", "optimizer.peak_lr"),
        ("peak_lr: 1", "peak_lr", "optimizer.peak_lr"),
        ("data: {sources: [{name: a, path: b, formt: text}]}", "data.sources.0.formt", "data.sources.format"),
        ("training: {sequence_lenght: 1}", "training.sequence_lenght", "training.sequence_length"),
        ("model: {soft_cap: 30}", "model.soft_cap", "model.logit_softcap"),
        ("model: {rope_scalling: {kind: yarn}}", "model.rope_scalling", "model.rope_scaling"),
        ("model: {window: 30}", "model.window", "model.sliding_window"),
        (
            "model: {rope_scaling: {kind: yarn, factr: 2, factor: 2, original_context: 9}}",
            "model.rope_scaling.factr",
            "model.rope_scaling.factor",
        ),
        ("objective: {zloss: 1}", "objective.zloss", "objective.z_loss"),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, key: str, nearest: str) -> None:
    assert refusal(text) == f"run.yaml: {key}: there is no such key. The nearest is {nearest}."


@pytest.mark.parametrize("key", ["'0'", "'17'", "''", "'a.b'", "qqqqqqqqqq", "'\\'"])
def test_any_unknown_key_is_an_error_in_words(key: str) -> None:
    assert "there is no such key." in refusal(f"{key}: 1")


def test_all_problems_are_told_at_once_up_to_five() -> None:
    said = refusal("model: {num_layers: a, width: b, num_heads: c, norm: d, biases: e, qk_norm: f, wdth: 1}").splitlines()
    assert len(said) == 6
    assert said[-1] == "... and 2 more"


def test_a_missing_file_names_the_nearest() -> None:
    write("demo.yaml", "")
    with pytest.raises(UserError, match=re.escape("dmo.yaml: no such file. The nearest name there is demo.yaml.")):
        load_config(Path("dmo.yaml"))
    with pytest.raises(UserError, match=r"cannot be read"):
        load_config(Path())


def test_a_file_that_is_not_text_is_refused() -> None:
    Path("run.yaml").write_bytes(b"run:\n  {name: \xff\xfe}")
    with pytest.raises(UserError, match=r"run.yaml: line 2 is not UTF-8"):
        load_config(Path("run.yaml"))


# --- hostile or broken YAML --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run:\n  seed: 1\n  seed: 2\n", "run.yaml, line 3: not valid YAML: the key 'seed' is given twice."),
        ("run: {seed: 1}\nmodel: {}\nrun: {seed: 2}\n", "run.yaml, line 3: not valid YAML: the key 'run' is given twice."),
        ("run: &a {seed: 1}\nmodel: *a\n", "line 2: not valid YAML: aliases (*name) are not read here; write the value out."),
        ("a: !!python/object/apply:os.system ['touch owned']", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("!!python/object:configs.schema.RunConfig {}", "could not determine a constructor for the tag"),
        ("a: !custom 1", "could not determine a constructor for the tag '!custom'"),
        ("model: {<<: {width: 1}}", "not valid YAML"),
        ("? [a, b]\n: 1\n", "line 1: not valid YAML: a key has to be a word."),
        ("? {a: b}\n: 1\n", "line 1: not valid YAML: a key has to be a word."),
        ("a: [1, 2", "not valid YAML"),
        ("a: \x07", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML: but found another document."),
        ("a: " + "1" * 5000, "not valid YAML: Exceeds the limit"),
        ("a: " + "[" * 5000, "not valid YAML: nested too deeply."),
        ("a: !!timestamp 2024-13-45", "could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'"),
        ("a: !!int x", "not valid YAML"),
        ("\ta: 1", "not valid YAML"),
        ("optimizer: {settings: {a: 0x" + "f" * 5000 + "}}", "not valid YAML: Exceeds the limit"),
        ("optimizer: {settings: {a: !!set {b}}}", "could not determine a constructor for the tag 'tag:yaml.org,2002:set'"),
        ("optimizer: {settings: {a: !!binary aGVsbG8=}}", "could not determine a constructor for the tag 'tag:yaml.org,2002:binary'"),
        ('run: {root: "a\\0b"}', "run.yaml: not valid YAML: a text holds a NUL or half a surrogate pair."),
        ("# " + "x" * 300_000, "run.yaml: has more than 262144 characters; wanted a run file."),
    ],
)
def test_broken_and_hostile_files_are_refused_in_words(text: str, words: str) -> None:
    said = refusal(text)
    assert said.startswith("run.yaml")
    assert words in said
    assert not Path("owned").exists()


def test_a_billion_laughs_are_not_laughed() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    assert "aliases" in refusal("\n".join(lines))


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for call in (lambda: load_config(path), lambda: load_config(Path("none.yaml"), [text]), lambda: override_only(path, text)):
        try:
            call()
        except UserError as error:
            assert str(error)


def override_only(path: Path, text: str) -> None:
    path.write_text("")
    load_config(path, [f"run.name={text}"])


# --- includes ----------------------------------------------------------------------------------------------


def test_later_includes_win_over_earlier_ones_and_the_file_over_both() -> None:
    write("one.yaml", "model: {num_layers: 1, width: 24, num_heads: 1}")
    write("two.yaml", "model: {num_layers: 2, num_heads: 2}")
    config = load("include: [one.yaml, two.yaml]\nmodel: {num_heads: 3}", "model.norm=layernorm")
    assert (config.model.width, config.model.num_layers, config.model.num_heads, config.model.norm) == (24, 2, 3, "layernorm")


def test_one_include_needs_no_list_and_includes_may_include() -> None:
    write("deep/inner.yaml", "run: {seed: 5}\nmodel: {num_layers: 9}")
    write("deep/outer.yaml", "include: inner.yaml\nmodel: {num_layers: 8}")
    config = load("include: deep/outer.yaml")
    assert (config.run.seed, config.model.num_layers) == (5, 8)


def test_the_same_file_may_be_included_by_two() -> None:
    write("base.yaml", "run: {seed: 5}")
    write("a.yaml", "include: base.yaml")
    write("b.yaml", "include: base.yaml")
    assert load("include: [a.yaml, b.yaml]").run.seed == 5


def test_an_include_is_found_beside_the_file_before_the_packaged_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    write("package/models/small.yaml", "model: {num_layers: 3}")
    monkeypatch.setattr(configs.loader, "PACKAGED", Path("package"))
    assert load("include: models/small.yaml").model.num_layers == 3
    write("models/small.yaml", "model: {num_layers: 4}")
    assert load("include: models/small.yaml").model.num_layers == 4


def test_a_list_replaces_a_list() -> None:
    write("base.yaml", "data: {sources: [{name: a, path: x}, {name: b, path: y}]}")
    assert [source.name for source in load("include: base.yaml\ndata: {sources: [{name: c, path: z}]}").data.sources] == ["c"]


@pytest.mark.parametrize("others", [{}, {"a.yaml": "include: run.yaml"}, {"a.yaml": "include: b.yaml", "b.yaml": "include: ./run.yaml"}])
def test_a_circle_of_includes_is_refused(others: dict[str, str]) -> None:
    for name, text in others.items():
        write(name, text)
    assert "includes itself, by way of" in refusal(f"include: {'a.yaml' if others else 'run.yaml'}")


@pytest.mark.parametrize("include", ["7", "[7]", "{a: b}", "null", "[[a.yaml]]"])
def test_an_include_is_a_name_or_a_list_of_names(include: str) -> None:
    assert "wanted a file name or a list of file names" in refusal(f"include: {include}")


def test_includes_that_grow_without_bound_are_refused() -> None:
    """Each includes the next twice: 2 to the power of 20 in all."""
    for number in range(20):
        write(f"{number}.yaml", f"include: [{number + 1}.yaml, {number + 1}.yaml]")
    write("20.yaml", "")
    assert "is file 101 of those that include one another; wanted 100 at most." in refusal("include: 0.yaml")


def test_what_is_refused_is_not_printed_whole() -> None:
    assert len(refusal("run: {seed: " + "x" * 100_000 + "}")) < 500
    assert len(refusal("k" * 1000 + ": 1")) < 800


def test_a_missing_include_names_the_including_file_and_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    write("package/models/gpt2.yaml", "")
    monkeypatch.setattr(configs.loader, "PACKAGED", Path("package"))
    said = refusal("include: models/gtp2.yaml")
    assert said == (
        "run.yaml: include: models/gtp2.yaml: no such file, neither beside this file nor among the packaged ones. "
        "The nearest name is models/gpt2.yaml."
    )
    assert "a text holds a NUL" in refusal('include: "a\\0b"')
    assert "no such file" in refusal("include: ''")


def test_an_error_names_the_file_the_value_came_from() -> None:
    write("base.yaml", "model: {num_layers: two}\ntraining: {total_tokens: x}")
    said = refusal("include: base.yaml\ntraining: {total_tokens: y}").splitlines()
    assert said[0].startswith("base.yaml: model.num_layers: ")
    assert said[1].startswith("run.yaml: training.total_tokens: ")


def test_an_error_in_an_override_names_the_override() -> None:
    assert refusal("model: {num_layers: 3}", "model.num_layers=x").startswith("override 'model.num_layers=x': model.num_layers: ")
    said = refusal("model: {num_layers: 3, width: 8}", "model={num_layers: x}")
    assert said.startswith("override 'model={num_layers: x}': model.num_layers: "), "the section was replaced whole"


# --- overrides ---------------------------------------------------------------------------------------------


def test_the_last_override_wins() -> None:
    assert load("run: {seed: 1}", "run.seed=2", "run.seed=3").run.seed == 3


def test_overrides_take_any_yaml_value() -> None:
    config = load(
        "",
        "data.sources=[{name: a, path: x}]",
        "checkpoint.every_steps=null",
        "evaluate.every_steps=",
        "deepspeed.zero_optimization.overlap_comm=true",
        "run.name=a=b".replace("a=b", "ab"),
        "data.tokenizer.end_of_text=<a=b>",
    )
    assert config.data.sources[0].path == "x"
    assert config.checkpoint.every_steps is None
    assert config.evaluate.every_steps is None
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}
    assert config.data.tokenizer.end_of_text == "<a=b>"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.peak_lr", "found no `=`; wanted an override such as optimizer.peak_lr=3e-4."),
        ("=3", "found no `=`"),
        ("optimizer.peak_rl=3", "optimizer.peak_rl: there is no such key. The nearest is optimizer.peak_lr."),
        ("data.sources.0.path=x", "item 0 of the list data.sources cannot be set alone; give the whole list."),
        ("run.seed.a=1", "run.seed is 1, not a section."),
        ("run.seed=[1", "not valid YAML"),
        ("run.seed=!!python/name:os.system", "not valid YAML"),
        ("include=other.yaml", "include: there is no such key."),
        ("a..b=1", "there is no such key."),
    ],
)
def test_a_wrong_override_is_named(override: str, words: str) -> None:
    said = refusal("run: {seed: 1}\ndata: {sources: [{name: a, path: b}]}", override)
    assert repr(override) in said
    assert words in said


# --- deepspeed section -------------------------------------------------------------------------------------


def test_deepspeed_lists_stay_lists() -> None:
    assert load("deepspeed: {a: [1, [2]], deepspeed: [3]}").deepspeed == {"a": [1, [2]], "deepspeed": [3]}


def test_an_owned_deepspeed_key_names_ours_and_the_file() -> None:
    assert refusal("deepspeed: {gradient_clipping: 1.0}") == (
        "run.yaml: deepspeed: deepspeed.gradient_clipping is not set here; use optimizer.clip_norm."
    )


# --- round trip --------------------------------------------------------------------------------------------

LIKE_NUMBERS = ["3e-4", "1e5", "08", "010", "1:30", "1_000", "0x10", "2024-01-01", ".inf", ".nan"]
LIKE_SYNTAX = ["yes", "null", "~", "true", "=", "<<", "- a", "a: b", "#", "*a"]
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(LETTERS, max_size=12) | st.sampled_from(LIKE_NUMBERS + LIKE_SYNTAX)
LIKE_NAMES = ["1e5", "3e-4", "08", "no", "null", "0x1", "1.5"]
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True) | st.sampled_from(LIKE_NAMES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(
    name=NAMES,
    sources=st.lists(st.tuples(TEXTS.filter(bool), TEXTS), max_size=3),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    seed=st.integers(0, 2**63 - 1),
    every=st.none() | st.integers(1, 10**9),
    deepspeed=st.dictionaries(TEXTS.map("x_{}".format), JSON, max_size=3),
    project=TEXTS,
)
def test_a_dumped_configuration_loads_equal(
    tmp_path_factory: pytest.TempPathFactory, name: str, sources: Any, lr: float, seed: int, every: int | None, deepspeed: Any, project: str
) -> None:
    config = RunConfig.model_validate(
        {
            "run": {"name": name, "seed": seed},
            "data": {"sources": tuple({"name": f"s{n}", "path": path, "pattern": pattern} for n, (path, pattern) in enumerate(sources))},
            "optimizer": {"peak_lr": lr},
            "checkpoint": {"every_steps": every},
            "watch": {"wandb_project": project},
            "deepspeed": deepspeed,
        }
    )
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    text = dump_config(config)
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == config
    assert dump_config(load_config(path)) == text


def test_a_model_and_an_objective_of_ones_own_are_dumped_and_loaded_equal() -> None:
    """Lists inside settings are tuples in a configuration, which is frozen, and lists again in its file."""
    config = load(
        "model: {block: 'parts:Block', sliding_window: 64, qk_norm: full, norm_placement: after, logit_softcap: 30, settings: "
        "{sizes: [1, {deep: [2.5, x]}], top: null}, rope_scaling: {kind: yarn, factor: 4, original_context: 2048, attention_factor: 1.5}}\n"
        "objective: {kind: 'goals:continue', loss: 'parts:loss', masked_tokens: ['<|a|>'], settings: {separator: x}}\n"
        "training: {fill_in_the_middle: {share: 0.25}}"
    )
    assert config.model.settings == {"sizes": (1, {"deep": (2.5, "x")}), "top": None}
    assert config.model.rope_scaling is not None
    assert (config.model.rope_scaling.factor, config.model.rope_scaling.attention_factor) == (4, 1.5)
    assert config.training.fill_in_the_middle is not None
    text = dump_config(config)
    assert load_config(write("again.yaml", text.replace("run.yaml", "again.yaml"))) == config
    assert dump_config(load_config(Path("again.yaml"))) == text


def test_parts_of_a_section_may_be_set_alone_by_an_override() -> None:
    stretched = "model: {rope_scaling: {kind: yarn, factor: 4, original_context: 2048}}"
    scaling = load(stretched, "model.rope_scaling.factor=8", "model.block=own:Block", "model.settings.deep.er=[1]").model
    assert scaling.rope_scaling is not None
    assert (scaling.rope_scaling.kind, scaling.rope_scaling.factor, scaling.settings) == ("yarn", 8, {"deep": {"er": (1,)}})
    assert load(stretched, "model.rope_scaling=null").model.rope_scaling is None


def test_a_dumped_configuration_holds_every_key() -> None:
    shown = yaml.safe_load(dump_config(RunConfig()))
    assert list(shown) == list(RunConfig.model_fields)


PACKAGED = sorted((ROOT / "configs").rglob("*.yaml"))
RUN_FILES = [path for path in PACKAGED if path.parent.name == "runs"]
PARTS = [path for path in PACKAGED if path.parent.name in ("models", "data")]


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_every_packaged_run_file_loads_and_round_trips(path: Path) -> None:
    config = load_config(path)
    assert load_config(write("again.yaml", dump_config(config))) == config


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_packaged_part_holds_valid_sections(path: Path) -> None:
    """A part is a section or two that run files include; whether they fit together is the run file's matter."""
    write(path.name, path.read_text())
    merged = configs.loader._tuples(configs.loader._read_yaml(Path(path.name)))
    merged.pop("include", None)
    assert merged
    for key, section in merged.items():
        kind = RunConfig.model_fields[key].annotation
        assert isinstance(kind, type)
        kind.model_validate(section)  # type: ignore[attr-defined]
