"""Every key of the schema, and another value for each: what tests change one by one."""

import types
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from configs.schema import RunConfig


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and pydantic field of every value of the schema."""
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{key}.")
        else:
            yield prefix + key, field


LEAVES = dict(leaves())


def value_at(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = getattr(config, key)
    return config


def with_value(config: Any, dotted: str, value: Any) -> Any:
    """A copy with one value changed, unchecked: a mutation need not be sensible, only different."""
    key, _, rest = dotted.partition(".")
    return config.model_copy(update={key: with_value(getattr(config, key), rest, value) if rest else value})


def another(value: Any, annotation: Any) -> Any:
    """A value of the annotated type that is not `value`."""
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {"some_key": 1}
    if isinstance(value, tuple):
        return (*value, "one more")
    assert value is None, f"write a mutation for {annotation}"
    kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
    return "text" if str in kinds else 7
