"""What every section of a run file is made of: frozen, strict about types, no unknown keys. No torch, no ray."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

# What becomes of a key that differs when a run folder is started again; `configs/changes.py` compares. A section's mark is that of its
# keys without one of their own; a key without any is refused: it decided the steps so far, or what they mean.
FREE: JsonDict = {"at_resume": "free"}
"""Taken without a word: where things stand, what is logged, saved and shown. No number that is computed depends on it."""
APPLIED: JsonDict = {"at_resume": "applied", "when": "from step {step} on"}
"""Taken, said and recorded: another value is computed or measured from here on, and nothing that is past becomes untrue."""
IN_NEW_DATA: JsonDict = {"at_resume": "applied", "when": "where data is built anew; what was seen is held by its hash"}
"""The same, for what says how a dataset is built."""
REFUSED: JsonDict = {"at_resume": "refused"}
"""For a key inside a section that carries another mark."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FUNCTION_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _import_path(path: str) -> str:
    if not FUNCTION_PATTERN.fullmatch(path):
        raise ValueError("wanted package.module:name, of a class or function of your own")
    return path


ImportPath = Annotated[str, AfterValidator(_import_path)]
"""`package.module:name`: a class or function of the user's own; see `configs/functions.py`."""


class Section(BaseModel):
    """A section of a run file: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)
