"""What may differ when a run goes on: the class of every key, and what two configurations differ in.

In: the schema; the configuration of a run folder and the one that is asked for. Out: a table of all keys; the changes, each with
its class: free (taken without a word), applied (taken, said, recorded), refused.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

from pydantic import BaseModel
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from configs.schema import RunConfig
from configs.section import REFUSED

AtResume = Literal["free", "applied", "refused"]


class Key(NamedTuple):
    """A key of the schema."""

    name: str
    """Dotted, as in an override."""
    at_resume: AtResume
    default: Any
    description: str


class Change(NamedTuple):
    """A key that two configurations differ in."""

    key: str
    old: Any
    new: Any
    """Both as a run file has them, plain values."""
    at_resume: AtResume
    when: str
    """From when on a change that is applied holds, with a place for {step}."""


def all_keys() -> list[Key]:
    """Every key of a run file, in the schema's order. The keys of a list's items, and of a section that may be null, are part of it."""
    return list(_keys(RunConfig, "", REFUSED))


def _keys(section: type[BaseModel], prefix: str, mark: JsonDict) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        own = _mark_of(field, mark)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.", own)
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            yield Key(prefix + name, _class_of(own), as_written(default), field.description or "")


def changes_between(before: RunConfig, now: RunConfig) -> list[Change]:
    """Every key in which `now` differs from `before`, in the schema's order."""
    return list(_changes(before, now, "", REFUSED))


def _changes(one: BaseModel, two: BaseModel, prefix: str, mark: JsonDict) -> Iterator[Change]:
    for name, field in type(one).model_fields.items():
        old, new, own = getattr(one, name), getattr(two, name), _mark_of(field, mark)
        if isinstance(old, BaseModel) and type(old) is type(new):
            yield from _changes(old, cast(BaseModel, new), f"{prefix}{name}.", own)
        elif old != new:
            yield Change(prefix + name, as_written(old), as_written(new), _class_of(own), str(own.get("when", "")))


def differing_keys(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys that differ and may not, when `now` goes on with the run of `before`: dotted key -> (old, new), plain values."""
    return {change.key: (change.old, change.new) for change in changes_between(before, now) if change.at_resume == "refused"}


def as_written(value: Any) -> Any:
    """A value as a run file has it: sections and lists of them are plain."""
    if isinstance(value, tuple):
        return [as_written(item) for item in cast("tuple[Any, ...]", value)]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _mark_of(field: FieldInfo, inherited: JsonDict) -> JsonDict:
    own = field.json_schema_extra
    return own if isinstance(own, dict) and "at_resume" in own else inherited


def _class_of(mark: JsonDict) -> AtResume:
    return cast(AtResume, mark["at_resume"])
