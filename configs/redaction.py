"""Secrets stay where they are: in the environment, or in a file that only its owner can read.

In: text that goes to a terminal or into a file. Out: the same text without the value of any secret this process knows: environment
variables whose names say so, passwords in URLs (of a proxy), and the logins that `~/.netrc` and the Hugging Face hub keep. A run file
that holds what looks like a secret is told apart by `secret_in` and `is_secret_name`; a key in a file is taken in by `read_secret_files`.
"""

import contextlib
import functools
import json
import netrc
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from configs.errors import UserError

SECRETS_IN_FILES = ("WANDB_API_KEY",)
"""Variables that may be given as a file: NAME_FILE names it, as container platforms have it."""
SHORTEST_SECRET = 8
"""Characters. A shorter value is a word that stands in many texts for other reasons."""

_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH(?!OR)|_PWD$", re.IGNORECASE)
_IN_URL = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
_KINDS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22})",
    "a GitLab token": r"\bglpat-[\w-]{20}",
    "a Slack token": r"\bxox[abeprs]-[\w-]{10}",
    "a key of a model service": r"\bsk-[\w-]{32}",
    "a Weights & Biases key": r"\bwandb_v\d_\w{40}|^(?:\w+-)?[0-9a-f]{40}$|^(?:\w+-)?\w{86}$",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a URL with a password": _IN_URL.pattern,
}
_NAME = re.compile(
    r"(.*_)?(api_?key|secret|password|passwd|passphrase|credentials?|(secret|private|access)_key|secret_access_key|access_key_id"
    r"|(auth|access|api|bearer|session|hf|wandb)_token)|token",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` with the name of a secret in place of its value, also where the value stands escaped (JSON, Python, URL)."""
    forms = {form: name for value, name in _known_secrets().items() for form in _written_forms(value)}
    if not forms:
        return text
    pattern = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))  # one secret may be a part of another
    return re.sub(pattern, lambda found: f"[{forms[found[0]]}]", text)


def redact_output() -> None:
    """From now on this process writes no secret to its standard output and error: prints, logs, warnings and tracebacks pass here."""
    for stream in (sys.stdout, sys.stderr):
        stream.write = functools.partial(_write_redacted, stream.write)


def _write_redacted(write: Callable[[str], object], text: str) -> int:
    write(redact(text))
    return len(text)


def secret_in(text: str) -> str | None:
    """What kind of secret a text holds, in words, or None. A bare number of 40 hexadecimal digits is one (an older W&B key)."""
    known = next((name for value, name in _known_secrets().items() if value in text), None)
    if known is not None:
        return f"the value of {known}"
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, text)), None)


def is_secret_name(key: str) -> bool:
    """Whether a key says that its value is a secret: `api_key`, `hf_token`, `password`; `prefix_token` does not."""
    return _NAME.fullmatch(key.replace("-", "_")) is not None


def read_secret_files() -> None:
    """Set WANDB_API_KEY from the file that WANDB_API_KEY_FILE names, unless it is set.

    Raises UserError for a file that is missing, that group or others can read, or that does not hold one line.
    """
    for name in SECRETS_IN_FILES:
        path = os.environ.get(f"{name}_FILE")
        if path and not os.environ.get(name):
            os.environ[name] = _read_secret_file(Path(path), f"{name}_FILE")


def _read_secret_file(path: Path, variable: str) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123 - a pipe is no file, and would hang
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{variable}: {path} is no file; wanted one that holds the key alone.")
            if found.st_mode & 0o077 or found.st_uid not in (os.geteuid(), 0):
                raise UserError(
                    f"{variable}: {path} can be read or written by others (its mode is {stat.S_IMODE(found.st_mode):04o}, its owner "
                    f"{found.st_uid}); wanted your own with mode 0600: `chmod 600` it, and make a new key if others had access."
                )
            text = file.read(4097).decode("ascii").strip()
    except OSError as error:
        raise UserError(f"{variable}: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{variable}: {path} is not a line of ASCII; wanted the key alone.") from None
    if len(text.split()) != 1 or len(text) > 4096:
        raise UserError(f"{variable}: {path} holds {len(text.split())} words; wanted the key alone, in one line.")
    return text


def _known_secrets() -> dict[str, str]:
    """Each secret this process knows -> where it stands."""
    found = dict(_stored_logins())
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and not os.path.exists(value):  # noqa: PTH110 - a path to a secret is none; Path raises for a long one
            found[value.strip()] = name
        found |= dict.fromkeys(_IN_URL.findall(value), f"the password in {name}")
    return {value: name for value, name in found.items() if len(value) >= SHORTEST_SECRET}


@functools.cache
def _stored_logins() -> dict[str, str]:
    """Secrets that logins have left in this user's home, as they are when the process first asks."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError, netrc.NetrcParseError):
        file = os.environ.get("NETRC") or str(Path.home() / ".netrc")
        found |= {login[2]: f"the password of {host} in {file}" for host, login in netrc.netrc(file).hosts.items() if login[2]}
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
        hub = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
        file = Path(os.environ.get("HF_TOKEN_PATH") or Path(hub) / "token")
        found[file.read_text().strip()] = f"the token in {file}"
    return found


def _written_forms(value: str) -> set[str]:
    """A value as it is, as JSON, Python and URLs write it, and the lines of a long one."""
    lines = [line.strip() for line in value.splitlines()]
    forms = {value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, safe=""), *lines}
    return {form for form in forms if len(form) >= SHORTEST_SECRET}
