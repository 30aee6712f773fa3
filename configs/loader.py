"""Configuration in three sentences: defaults < include < run file < `a.b=c`.

In: the path of a run file, or of a cluster file, and dotted overrides. Out: a frozen `RunConfig`, or `ClusterConfig`, or a `UserError`
that names file, key, what was found, what was wanted, and the nearest key. Numbers are read as YAML 1.2 has them, so `3e-4` is a number
(PyYAML alone reads a string).
"""

import difflib
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.cluster import ClusterConfig
from configs.errors import UserError
from configs.redaction import is_secret_name, secret_in
from configs.schema import RunConfig
from configs.section import Section

PACKAGED = Path(__file__).parent
MOST_CHARACTERS = 1 << 18
MOST_FILES = 100
"""Of one run file with all its includes: two that include two that include two, and so on, would be read for days."""
SECRET_ADVICE = (
    "wanted none here: it would be copied to run.yaml and to Weights & Biases. Take it out and give it in the environment (as "
    "WANDB_API_KEY, HF_TOKEN, AWS_*) or in a file that only you can read (WANDB_API_KEY_FILE)."
)

Kind = TypeVar("Kind", bound=Section)


@dataclass(frozen=True)
class _FileKind(Generic[Kind]):
    """In what a run file and a cluster file differ for a reader."""

    model: type[Kind]
    called: str
    sections: str
    """Two of its sections, for who has none."""
    secret_advice: str
    references: tuple[str, ...] = ()
    """Keys that are called secrets and hold the name of one only."""


_RUN_FILE = _FileKind(RunConfig, "a run file", "`model:` and `training:`", SECRET_ADVICE)
_CLUSTER_FILE = _FileKind(
    ClusterConfig,
    "a cluster file",
    "`job:` and `slurm:`",
    "wanted none here: it would be copied to plan.json and to scripts and manifests. Take it out, set it in the shell that launches and "
    "name it in job.pass_environment; on Kubernetes name the Secret that holds it in kubernetes.secrets.",
    references=("kubernetes.secrets.", "kubernetes.image_pull_secret"),
)


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1.2 floats; a key given twice is refused, and so are aliases (a file of 1 kB may hide gigabytes)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not read here; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key has to be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Raises ValueError for a number that Python would not write out (thousands of digits, in hexadecimal too)."""
        value = super().construct_yaml_int(node)
        str(value)
        return value

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Escapes may name what no path, no name and no UTF-8 file can hold."""
        value = str(super().construct_yaml_str(node))
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
            raise yaml.constructor.ConstructorError(None, None, "a text holds a NUL or half a surrogate pair", node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes every text `_Loader` would read as a number, and escapes what it would take for a line's end."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A text that is not plainly printable goes into double quotes, the one style with escapes."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


_FLOAT = re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_CHOICE = re.compile(r"(literal|function-after)\[")
"""How pydantic names the one of several types that a value was compared with."""
_INTEGER = re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")


def _read_numbers_as_yaml_1_2() -> None:
    """Numbers of YAML 1.2 (and 1_000): `3e-4` is one; `1:30`, `010` (base 60, base 8) and dates are not.

    PyYAML tries the resolvers of a first letter in their order, so integers stand before floats.
    """
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept = [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        _Loader.yaml_implicit_resolvers[letter] = kept
    for letter in "-+0123456789":
        _Loader.yaml_implicit_resolvers.setdefault(letter, []).append(("tag:yaml.org,2002:int", _INTEGER))
    for letter in "-+.0123456789":
        _Loader.yaml_implicit_resolvers.setdefault(letter, []).append(("tag:yaml.org,2002:float", _FLOAT))
    for letter, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items():
        _Dumper.yaml_implicit_resolvers[letter] = list(resolvers)
    for letter in "-+.0123456789":
        _Dumper.yaml_implicit_resolvers.setdefault(letter, []).append(("tag:yaml.org,2002:float", _FLOAT))


_PLAIN = {None, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))}
# What JSON has too: a run file is written out again, and sets, bytes and dates would come back as something else.
_Loader.yaml_constructors = {tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
_read_numbers_as_yaml_1_2()


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run file and its includes, apply `a.b=c` overrides, check everything.

    `run.name` is filled in from the file's own name. Raises UserError.
    """
    merged, origins = _read(path, overrides, _RUN_FILE)
    config = _validate(merged, origins, str(path), _RUN_FILE)
    if config.run.name is None:
        merged.setdefault("run", {})["name"] = _name_from(path)
        config = _validate(merged, origins, str(path), _RUN_FILE)
    return config


def load_cluster(name_or_path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ClusterConfig:
    """Read a cluster file as a run file is read: a path that ends in .yaml, or the name of a packaged one (`slurm-h100`).

    `name` is filled in from the file's own name. Raises UserError.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        packaged = sorted(file.stem for file in (PACKAGED / "clusters").glob("*.yaml"))
        if str(name_or_path) not in packaged:
            raise UserError(
                f"there is no cluster {str(name_or_path)!r}; there are {', '.join(packaged)}, or give the path of a cluster file (.yaml)."
            )
        path = PACKAGED / "clusters" / f"{name_or_path}.yaml"
    merged, origins = _read(path, overrides, _CLUSTER_FILE)
    merged.setdefault("name", _name_from(path))
    return _validate(merged, origins, str(path), _CLUSTER_FILE)


def _read(path: Path, overrides: list[str] | tuple[str, ...], kind: _FileKind[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What stands in a file with its includes and overrides, and where each key is from. Raises UserError, also for a secret."""
    merged, origins = _read_with_includes(path, (), [], kind)
    for override in overrides:
        _refuse_secret(override, "an override", kind.secret_advice)
        _apply_override(merged, origins, override)
    _refuse_secrets(merged, str(path), kind)
    return merged, origins


def dump_config(config: RunConfig | ClusterConfig) -> str:
    """The resolved configuration as YAML; loading it again gives an equal configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _name_from(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-")[:64] or "run"


def _read_yaml(path: Path, kind: _FileKind[Any] = _RUN_FILE) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [], 1)
        raise UserError(f"{path}: no such file." + (f" The nearest name there is {near[0]}." if near else "")) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8; save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; wanted {kind.called}.") from None
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{path}: has more than {MOST_CHARACTERS} characters; wanted {kind.called}.")
    if secret_in(text):
        for number, line in enumerate(text.splitlines(), 1):
            _refuse_secret(line, f"{path}, line {number}", kind.secret_advice)
    content = _parse(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {_kind(content)}, wanted sections such as {kind.sections}.")
    return cast("dict[str, Any]", content)


def _parse(text: str, place: str) -> Any:
    """The value a piece of YAML stands for. Raises UserError beginning with `place`."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes no Python objects
    except RecursionError:
        raise UserError(f"{place}: not valid YAML: nested too deeply.") from None
    except ValueError as error:  # such as a number of thousands of digits
        raise UserError(f"{place}: not valid YAML: {error}.") from None
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise UserError(f"{place}{line}: not valid YAML: {problem or error}.") from None


def _refuse_secret(text: str, place: str, advice: str) -> None:
    if secret := secret_in(text):
        raise UserError(f"{place}: found what looks like {secret}, {advice}")


def _refuse_secrets(value: Any, path: str, kind: _FileKind[Any], dotted: str = "", key: str = "") -> None:
    """Raises UserError, without the value, for a secret in what was read, or for a key that says it has one."""
    if isinstance(value, dict):
        for below, inner in cast("dict[Any, Any]", value).items():
            _refuse_secrets(inner, path, kind, f"{dotted}.{below}".lstrip("."), str(below))
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            _refuse_secrets(item, path, kind, dotted, key)
    elif isinstance(value, str) and is_secret_name(key) and not dotted.startswith(kind.references):
        raise UserError(f"{path}: {dotted}: found a key that is called a secret, {kind.secret_advice}")
    elif isinstance(value, str) and key != "revision":  # a commit of the hub has the form of an older W&B key
        _refuse_secret(value, f"{path}: {dotted}", kind.secret_advice)


def _read_with_includes(
    path: Path, above: tuple[Path, ...], read: list[Path], kind: _FileKind[Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping of a file laid over its includes, and which file each dotted key came from. read: every file so far."""
    read.append(path)
    if len(read) > MOST_FILES:
        raise UserError(f"{path}: is file {len(read)} of those that include one another; wanted {MOST_FILES} at most.")
    if path.resolve() in above:
        raise UserError(f"{path}: includes itself, by way of {' -> '.join(str(p) for p in above)}.")
    content = _read_yaml(path, kind)
    include = content.pop("include", [])
    items = [include] if isinstance(include, str) else cast("list[Any] | Any", include)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{path}: include: found {_kind(include)}, wanted a file name or a list of file names.")
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for item in cast("list[str]", items):
        below, below_origins = _read_with_includes(_find_include(path, item), (*above, path.resolve()), read, kind)
        _merge(merged, below, origins)
        origins |= below_origins
    _merge(merged, content, origins)
    origins |= {key: str(path) for key in _dotted(content)}
    return merged, origins


def _find_include(path: Path, item: str) -> Path:
    """The file an `include:` names: beside the including file first, then among the packaged ones. Raises UserError."""
    folders = (path.parent, PACKAGED)
    for folder in folders:
        if (folder / item).is_file():
            return folder / item
    places = [name for folder in folders for name in _yaml_names(folder, item)]
    near = difflib.get_close_matches(item, places, 1)
    hint = f" The nearest name is {near[0]}." if near else ""
    raise UserError(f"{path}: include: {item}: no such file, neither beside this file nor among the packaged ones.{hint}")


def _yaml_names(folder: Path, item: str) -> list[str]:
    """Names, written as `item` is, of the YAML files in the folder where `item` would stand."""
    prefix = item.rpartition("/")[0]
    return [f"{prefix}/{found.name}".lstrip("/") for found in (folder / prefix).glob("*.yaml")]


def _merge(base: dict[str, Any], over: dict[str, Any], origins: dict[str, str], prefix: str = "") -> None:
    """Lay `over` onto `base`, section by section; the origins of what is replaced are forgotten."""
    for key, value in over.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(cast("dict[str, Any]", below), cast("dict[str, Any]", value), origins, f"{prefix}{key}.")
        else:
            _forget(origins, f"{prefix}{key}")
            base[key] = value


def _forget(origins: dict[str, str], dotted: str) -> None:
    for key in [key for key in origins if key == dotted or key.startswith(f"{dotted}.")]:
        del origins[key]


def _dotted(content: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in content.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _dotted(cast("dict[str, Any]", value), f"{prefix}{key}.")
    return keys


def _apply_override(merged: dict[str, Any], origins: dict[str, str], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise UserError(f"{override!r}: found no `=`; wanted an override such as optimizer.peak_lr=3e-4.")
    value = _parse(text, f"override {override!r}")
    here = merged
    parts = dotted.strip().split(".")
    for depth, section in enumerate(parts[:-1], 1):
        above = ".".join(parts[:depth])
        if section not in here:
            here[section] = {}
            origins[above] = f"override {override!r}"
        below = here[section]
        if isinstance(below, list) and parts[depth].isdigit():
            raise UserError(f"{override!r}: item {parts[depth]} of the list {above} cannot be set alone; give the whole list.")
        if not isinstance(below, dict):
            raise UserError(f"{override!r}: {above} is {_kind(below)}, not a section.")
        here = cast("dict[str, Any]", below)
    here[parts[-1]] = value
    _forget(origins, ".".join(parts))
    origins[".".join(parts)] = f"override {override!r}"


def _validate(merged: dict[str, Any], origins: dict[str, str], path: str, kind: _FileKind[Kind]) -> Kind:
    try:
        return kind.model.model_validate(_tuples(merged))
    except ValidationError as error:
        problems = error.errors()
        shown = [_explain(problem, origins, path, kind.model) for problem in problems[:5]]
        raise UserError("\n".join([*shown, *([f"... and {len(problems) - 5} more"] if len(problems) > 5 else [])])) from None


def _tuples(value: Any) -> Any:
    """Lists as tuples: the strict schema holds frozen tuples where YAML has lists (not inside `deepspeed`)."""
    if isinstance(value, dict):
        return {key: below if key == "deepspeed" else _tuples(below) for key, below in cast("dict[str, Any]", value).items()}
    return tuple(_tuples(item) for item in cast("list[Any]", value)) if isinstance(value, list) else value


def _explain(problem: Any, origins: dict[str, str], path: str, model: type[Section]) -> str:
    location = [_shorten(str(part)) for part in problem["loc"] if not _CHOICE.match(str(part))]
    dotted = ".".join(location)
    place = next((origins[key] for n in range(len(location), 0, -1) if (key := ".".join(location[:n])) in origins), path)
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        near = _nearest([_shorten(part) for part in problem["loc"] if isinstance(part, str)], model)
        return f"{place}: {dotted}: there is no such key." + (f" The nearest is {near}." if near else "")
    if kind in ("value_error", "assertion_error"):
        message = str(problem["ctx"]["error"])
        return f"{place}: {dotted + ': ' if dotted else ''}{message}."
    if kind == "missing":
        return f"{place}: {dotted}: found nothing, wanted a value for this key."
    if kind == "invalid_key":
        return f"{place}: {'.'.join(location[:-1])}: a key has to be a word; put it in quotes."
    wanted = _wanted(problem)
    quoted = isinstance(found, str) and "number" in wanted and _FLOAT.match(found)
    hint = " Write it without quotes." if quoted else ""
    if wanted == "a whole number" and isinstance(found, float) and found.is_integer():
        hint = f" Write {int(found):_}."
    if wanted == "text" and isinstance(found, bool | int | float):
        hint = " Write it in quotes" + (f": '{dotted}=\"...\"'." if place.startswith("override") else ".")
    return f"{place}: {dotted}: found {_kind(found)}, wanted {wanted}.{hint}"


def _wanted(problem: Any) -> str:
    message: str = problem["msg"].removeprefix("Input should be ")
    if message.startswith("a valid dictionary"):
        return "a section"
    return {
        "a valid integer": "a whole number",
        "a valid number": "a number",
        "a valid boolean": "true or false",
        "a valid string": "text",
        "a valid tuple": "a list",
    }.get(message, message)


def _kind(value: Any) -> str:
    if isinstance(value, BaseModel | dict):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return f"the text {_shorten(value)!r}"
    return "nothing (null)" if value is None else _shorten(f"{value!r}")


def _shorten(text: str) -> str:
    """What fits into a sentence."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, field in section.model_fields.items():
        keys.append(prefix + key)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _all_keys(inner, f"{prefix}{key}.")
    return keys


def _nearest(parts: list[str], model: type[Section]) -> str | None:
    """The known dotted key that is nearest: a like word (or a part of one) beside it, then elsewhere, then a like path."""
    keys = _all_keys(model)
    beside = [key for key in keys if key.rpartition(".")[0] == ".".join(parts[:-1])]
    for candidates, cutoff in ((beside, 0.75), (keys, 0.75), (beside, 0.5)):
        words = {key.rpartition(".")[2]: key for key in reversed(candidates)}
        if near := difflib.get_close_matches(parts[-1], list(words), 1, cutoff):
            return words[near[0]]
        if part_of := [key for word, key in words.items() if parts[-1] in word.split("_")]:  # `lr` for `peak_lr`
            return min(part_of, key=len)
    return next(iter(difflib.get_close_matches(".".join(parts), keys, 1, 0.4)), None)
