"""A user's own function, named in a run file by import path: found, and known by the hash of its source.

In: `package.module:function`. Out: the function and the SHA-256 of the file that defines its module.
"""

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.schema import RunConfig


def code_of_the_user(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the source file of each class or function of the user's own that decides what is learnt, by its import path.

    Raises UserError as `load_function` does.
    """
    model, objective = config.model, config.objective
    paths = [model.implementation, model.block, objective.kind, objective.loss, config.optimizer.kind]
    return {path: load_function(path)[1] for path in paths if path is not None and ":" in path}


def load_function(path: str) -> tuple[Callable[..., Any], str]:
    """The function that `package.module:function` names, and the SHA-256 of its module's source file.

    Modules of the current folder are found too. Raises UserError: no such module or function, or one without a source file.
    """
    module_name, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # at the end: a user's folder may not stand in for an installed package
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(
            f"{path}: the module {module_name!r} cannot be imported ({type(error).__name__}: {error}); it is looked for in the "
            f"installed packages, PYTHONPATH and {here}."
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UserError(f"{path}: {module_name} has no function {name!r}; it has: {', '.join(there) or 'none'}.")
    source = getattr(module, "__file__", None)
    if source is None:
        raise UserError(f"{path}: {module_name} has no source file, so its content cannot be recorded.")
    return function, sha256_of_file(Path(source))


@contextlib.contextmanager
def calling(key: str, path: str, arguments: str) -> Generator[None]:
    """What a class of the user's own raises is its author's to mend; where it was raised is said."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{key}: {path}({arguments}) raised {type(error).__name__}: {error} (line {frame.lineno} of {frame.filename})."
        ) from error
