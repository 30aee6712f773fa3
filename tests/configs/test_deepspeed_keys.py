"""The ownership table of DeepSpeed's keys: every owned key is refused with the key to use, the rest passes."""

from typing import Any

import pytest
from pydantic import BaseModel

from configs.deepspeed_keys import OWNED_KEYS, check_deepspeed_section
from configs.schema import RunConfig


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("value", [1, None, {}, False], ids=repr)
@pytest.mark.parametrize("dotted", OWNED_KEYS)
def test_an_owned_key_is_refused_whatever_its_value(dotted: str, value: Any) -> None:
    with pytest.raises(ValueError, match="is not set here; use ") as refusal:
        check_deepspeed_section(nested(dotted, value))
    assert f"deepspeed.{dotted} " in str(refusal.value)
    assert OWNED_KEYS[dotted] in str(refusal.value)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"zero_optimization": None},
        {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5e8, "offload_optimizer": {"device": "cpu"}}},
        {"checkpoint": {"tag_validation": "Fail"}},
        {"checkpoint": "checkpoint.load_universal"},
        {"stage": 3, "load_universal": True},
        {"flops_profiler": {"enabled": True}, "a key nobody knows": [1, "two", None, True, 3.5]},
    ],
    ids=repr,
)
def test_everything_else_passes_untouched(section: dict[str, Any]) -> None:
    assert RunConfig.model_validate({"deepspeed": section}).deepspeed == section


@pytest.mark.parametrize("value", [float("inf"), float("nan"), b"bytes", {1, 2}], ids=repr)
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="holds what DeepSpeed's JSON cannot"):
        check_deepspeed_section({"key": [{"deep": value}]})


@pytest.mark.parametrize("dotted", OWNED_KEYS)
def test_the_key_to_use_instead_exists(dotted: str) -> None:
    """The advice begins with a key of the schema (`optimizer.*` for a whole section), or with why there is none."""
    advice = OWNED_KEYS[dotted].split()[0]
    if advice in ("nothing", "nothing:"):
        return
    section: Any = RunConfig
    for part in advice.removesuffix(".*").split("."):
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        assert part in section.model_fields, advice
        section = section.model_fields[part].annotation
