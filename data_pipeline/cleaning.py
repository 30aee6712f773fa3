"""The rules that a run file asks for, found and bound to their settings, and what they make of a document.

In: `data.clean`. Out: a `Rule` for each entry, with what identifies it (its settings, the hashes of the files it reads, of
a user's own source), and for each document either what is kept of it or which rule dropped it, and why.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.functions import load_function
from configs.schema import RuleSection
from data_pipeline import decontaminate, filters, language, normalize
from data_pipeline.documents import Document, Dropped, Rule

RULES: dict[str, Callable[..., Document | str]] = {**normalize.RULES, **filters.RULES, **language.RULES, **decontaminate.RULES}
FILE_SETTINGS = ("path", "paths")  # what a rule reads under these names is part of what it does


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
    """What `data.clean` comes to. Raises UserError: an unknown rule or setting, a missing file, an unusable function."""
    identities: list[RuleIdentity] = []
    for number, section in enumerate(sections):
        function, source_sha256 = _find(section.rule)
        place = f"data.clean[{number}] ({section.rule})"
        _check_settings(place, function, section.settings)
        files = tuple((path, _hash(place, path)) for path in _files(section.settings))
        identities.append(RuleIdentity(section.rule, _spell_settings(section), files, source_sha256))
    return tuple(identities)


def bind_rules(sections: Sequence[RuleSection], source: str) -> list[tuple[str, Rule]]:
    """The rules for a source's documents, ready to be applied, by name. Raises UserError as `identify_rules` does."""
    ours = [section for section in sections if section.sources is None or source in section.sources]
    return [(section.rule, partial(_find(section.rule)[0], **section.settings)) for section in ours]


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


def describe_rules() -> dict[str, str]:
    """Every rule of ours: its name with its settings and their values, and what it does."""
    described: dict[str, str] = {}
    for name, function in RULES.items():
        settings = [parameter for parameter in inspect.signature(function).parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
        shown = ", ".join(one.name if one.default is one.empty else f"{one.name}={one.default!r}" for one in settings)
        described[f"{name}({shown})"] = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
    return described


def _place(document: Document) -> str:
    return f"document {document.position} of {document.file} (source {document.source})"


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


def _check_settings(place: str, function: Callable[..., Any], settings: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name, parameter in list(parameters.items())[1:] if parameter.kind is not parameter.VAR_KEYWORD]
    for key in settings:
        if key not in known and not takes_any:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(f"{place}: no setting {key!r}; {f'did you mean {near[0]!r}?' if near else f'it has: {known}'}")
    missing = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in settings]
    if missing:
        raise UserError(f"{place}: needs settings: {{{', '.join(f'{name}: ...' for name in missing)}}}.")


def _spell_settings(section: RuleSection) -> str:
    settings = {key: value for key, value in section.settings.items() if key not in FILE_SETTINGS}
    return json.dumps({"settings": settings, "sources": section.sources}, sort_keys=True)


def _files(settings: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for key in FILE_SETTINGS:
        value = settings.get(key)
        found += [value] if isinstance(value, str) else list(value or ())
    return found


def _hash(place: str, path: str) -> str:
    try:
        return sha256_of_file(Path(path))
    except OSError as error:
        raise UserError(f"{place}: {path} cannot be read ({error.strerror}); correct its settings.") from None
