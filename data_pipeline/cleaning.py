"""The rules that a run file asks for, found and bound to their settings, and what they make of a document.

In: `data.clean`. Out: a `Rule` for each entry, with what identifies it (its settings, the hashes of the files it reads, of
a user's own source), and for each document either what is kept of it or which rule dropped it, and why.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from configs.data_section import RuleSection
from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.functions import load_function
from data_pipeline import decontaminate, filters, language, normalize
from data_pipeline.documents import Document, Dropped, Rule

RULES: dict[str, Callable[..., Document | str]] = {**normalize.RULES, **filters.RULES, **language.RULES, **decontaminate.RULES}
FILE_SETTINGS = ("path", "paths")  # what a rule reads under these names is part of what it does
SHOWN_CHARACTERS = 80


class RuleError(RuntimeError):
    """A rule raised, or gave back what no rule may."""


@dataclass(frozen=True)
class RuleIdentity:
    """All that decides what a rule does, besides this program's version."""

    rule: str
    settings: str
    """As JSON, with the sources that it is for; without the paths of files, which are known by their content."""
    files: tuple[tuple[str, str], ...] = ()
    """Each file that it reads, with its SHA-256."""
    source_sha256: str = ""
    """Of the file that defines a user's own function."""

    def facts(self) -> list[Any]:
        """What decides what the rule does: where a file lies does not."""
        return [self.rule, self.settings, [digest for _, digest in self.files], self.source_sha256]


def identify_rules(sections: Sequence[RuleSection]) -> tuple[RuleIdentity, ...]:
    """What `data.clean` comes to.

    Raises UserError: an unknown rule or setting, a setting of the wrong type or out of its range, a missing file, an unusable
    function.
    """
    identities: list[RuleIdentity] = []
    for number, section in enumerate(sections):
        function, source_sha256 = _find(section.rule)
        place = _name_section(number, section)
        _read_settings(place, function, section.settings)
        files = tuple((path, _hash(place, path)) for path in _files(place, section.settings))
        identities.append(RuleIdentity(section.rule, _spell_settings(section), files, source_sha256))
    return tuple(identities)


def bind_rules(sections: Sequence[RuleSection], source: str) -> list[tuple[str, Rule]]:
    """The rules for a source's documents, ready to be applied, by name. Raises UserError as `identify_rules` does.

    A setting reaches its rule as the function's annotation says: a list as a tuple, or a text as a path, where that is what it
    takes; without an annotation as the run file has it.
    """
    bound: list[tuple[str, Rule]] = []
    for number, section in enumerate(sections):
        if section.sources is None or source in section.sources:
            function, _ = _find(section.rule)
            settings = _read_settings(_name_section(number, section), function, section.settings)
            bound.append((section.rule, partial(function, **settings)))
    return bound


def apply_rules(rules: Sequence[tuple[str, Rule]], document: Document) -> Document | Dropped:
    """What is left of a document. Raises RuleError naming rule and document when a rule does not do its part."""
    for name, rule in rules:
        try:
            verdict = rule(document)
        except UserError:
            raise
        except Exception as error:
            raise RuleError(f"the rule {name} failed on {_place(document)}: {type(error).__name__}: {error}") from error
        if isinstance(verdict, str):
            return Dropped(document, verdict)
        if not isinstance(cast(object, verdict), Document):
            raise RuleError(
                f"the rule {name} gave a {type(verdict).__name__} for {_place(document)}; wanted the document, or a reason as a string"
            )
        document = verdict
    return document if document.text else Dropped(document, "nothing_left")


def describe_rules() -> dict[str, dict[str, Any]]:
    """Every rule of ours by name, ready for JSON: its `summary`, and its `settings`, which are by name too.

    A setting has its `type` (as JSON Schema) and its `default`; one that has to be given has none.
    """
    return {
        name: {
            "summary": (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "),
            "settings": {key: _describe_setting(parameter) for key, parameter in _settings_of(function).items()},
        }
        for name, function in RULES.items()
    }


def _describe_setting(parameter: inspect.Parameter) -> dict[str, Any]:
    described: dict[str, Any] = {"type": TypeAdapter(parameter.annotation).json_schema()}
    return described if parameter.default is parameter.empty else {**described, "default": parameter.default}


def _name_section(number: int, section: RuleSection) -> str:
    return f"data.clean[{number}] ({section.rule})"


def _place(document: Document) -> str:
    return f"the document at position {document.position} of {document.file} (source {document.source})"


@lru_cache(maxsize=256)
def _find(name: str) -> tuple[Callable[..., Document | str], str]:
    if ":" in name:
        return load_function(name)
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, 1)
        raise UserError(
            f"data.clean: there is no rule {name!r}; {f'did you mean {near[0]!r}?' if near else 'there are: ' + ', '.join(RULES)} "
            "(your own: package.module:function; `pretrain data rules` lists all)."
        )
    return RULES[name], ""


def _settings_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters behind the document, by name."""
    return dict(list(inspect.signature(function).parameters.items())[1:])


def _read_settings(place: str, function: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as the function's annotations say. Raises UserError: one that it has not, or lacks, or cannot take."""
    known = _settings_of(function)
    rest = next((known.pop(name) for name in list(known) if known[name].kind is inspect.Parameter.VAR_KEYWORD), None)
    read: dict[str, Any] = {}
    for key, value in settings.items():
        parameter = known.get(key, rest)
        if parameter is None:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(f"{place}: no setting {key!r}; {f'did you mean {near[0]!r}?' if near else f'it has: {list(known)}'}")
        read[key] = _read_value(f"{place}: setting {key!r}", value, _annotation(function, parameter))
    missing = [name for name, parameter in known.items() if parameter.default is parameter.empty and name not in settings]
    if missing:
        raise UserError(f"{place}: needs settings: {{{', '.join(f'{name}: ...' for name in missing)}}}.")
    return read


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """What a parameter's values have to be; Any where the function does not say, or only to those who check types."""
    annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except Exception:  # whatever it names is there only for those who check types
        return Any


def _read_value(place: str, value: Any, annotation: Any) -> Any:
    """A value of a run file as the annotation has it. Raises UserError beginning with `place` if it is none of these."""
    try:
        written = json.dumps(value)  # what does not fit as it is may fit as what JSON has for it: a list, a text
    except (TypeError, ValueError):
        raise UserError(f"{place}: found {value!r}, wanted numbers, texts, true, false, null, or lists and sections of them.") from None
    try:
        adapter = TypeAdapter[Any](annotation)
        with suppress(ValidationError):
            return _keep(adapter.validate_python(value, strict=True))
        return _keep(adapter.validate_json(written, strict=True))
    except PydanticUserError:  # a type of the user's own, of which nobody here knows what may stand for it
        return value
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(_wanted(problem) for problem in error.errors()))
        found = json.dumps(value, ensure_ascii=False)
        shown = found if len(found) <= SHOWN_CHARACTERS else f"{found[:SHOWN_CHARACTERS]}..."
        raise UserError(f"{place}: found {shown}, wanted {wanted}; correct it.") from None


def _keep(read: Any) -> Any:
    """What pydantic made of an Iterable can be read only once, which would be for the first document."""
    return tuple(read) if isinstance(read, Iterator) else read


def _wanted(problem: Any) -> str:
    place = "".join(f"[{part}]" for part in problem["loc"] if isinstance(part, int))
    return problem["msg"].removeprefix("Input should be ").removeprefix("Value should have ") + (f" at {place}" if place else "")


def _spell_settings(section: RuleSection) -> str:
    settings = {key: value for key, value in section.settings.items() if key not in FILE_SETTINGS}
    return json.dumps({"settings": settings, "sources": section.sources}, sort_keys=True)


def _files(place: str, settings: dict[str, Any]) -> list[str]:
    """The files that a rule reads, which are known by content. Raises UserError for what is not the name of any."""
    found: list[str] = []
    for key in FILE_SETTINGS:
        value = _read_value(f"{place}: setting {key!r}", settings.get(key), filters.Paths | None)
        found += filters.as_tuple(value or ())
    return found


def _hash(place: str, path: str) -> str:
    try:
        return sha256_of_file(Path(path))
    except OSError as error:
        raise UserError(f"{place}: {path} cannot be read ({error.strerror}); correct its settings.") from None
