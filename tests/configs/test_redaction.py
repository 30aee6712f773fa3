"""Secrets: known by where they stand, replaced in every form, refused in run files, read from files that are one's own."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from configs import redaction
from configs.errors import UserError
from configs.loader import load_config
from configs.redaction import is_secret_name, read_secret_files, redact, redact_output, secret_in

CANARY = 'Canary-7f"3\\é/1 x'
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if redaction._VARIABLE.search(name) or name in ("NETRC", "HF_HOME")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    redaction._stored_logins.cache_clear()


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "mysql_pwd", "BASIC_AUTH", "GCP_CREDENTIALS"]
)
@pytest.mark.parametrize("write", [str, json.dumps, repr, lambda text: quote(text, safe="")])
def test_a_secret_of_the_environment_is_replaced_however_it_is_written(name: str, write: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Canary" in redact(f"before {CANARY} after")
    monkeypatch.setenv(name, CANARY)
    text = redact(f"before {write(CANARY)} after")  # type: ignore[operator]
    assert "Canary" not in text
    assert text.startswith("before ") and text.endswith(" after") and f"[{name}]" in text


@pytest.mark.parametrize(("name", "value"), [("PWD", "a longer word"), ("GIT_AUTHOR_NAME", "a longer word"), ("HOST", "a longer word"),
                                             ("TOKENIZERS_PARALLELISM", "false"), ("SSH_AUTH_SOCK", str(ROOT))])  # fmt: skip
def test_what_is_no_secret_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"it is {value}.") == f"it is {value}."


def test_the_lines_of_a_long_secret_and_one_within_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "first-line-of-it\nsecond-line-of-it")
    monkeypatch.setenv("B_KEY", "line-of-it")
    assert redact("found second-line-of-it") == "found [A_KEY]"
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hidden-word@proxy:3128")
    assert redact("no route to http://me:hidden-word@proxy:3128") == "no route to http://me:[the password in HTTPS_PROXY]@proxy:3128"


def test_logins_that_are_stored_are_known(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password netrc-canary\n")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("stored-canary\n")
    redaction._stored_logins.cache_clear()
    assert "canary" not in redact("netrc-canary stored-canary").replace(str(tmp_path), "")


def test_all_that_a_process_writes_passes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("MY_KEY", CANARY)
    redact_output()
    print("a", CANARY, "b")
    out.flush()
    assert out.buffer.getvalue() == b"a [MY_KEY] b\n"  # type: ignore[attr-defined]


def test_an_uncaught_traceback_a_log_and_a_warning_hold_no_secret() -> None:
    code = (
        "import logging, os, sys, threading, warnings; from configs.redaction import redact_output; redact_output()\n"
        "secret = os.environ['MY_TOKEN']\n"
        "logging.error('log %s', secret); warnings.warn('warning ' + secret); sys.stderr.writelines(['lines ' + secret + '\\n'])\n"
        "thread = threading.Thread(target=lambda: 1 / int('thread ' + secret)); thread.start(); thread.join()\n"
        "raise ValueError('last ' + secret)"
    )
    environment = {**os.environ, "MY_TOKEN": CANARY, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Canary" not in done.stderr
    assert done.stderr.count("[MY_TOKEN]") == 5, done.stderr


# --- run files ---------------------------------------------------------------------------------------------

LIKE_SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 12,
    "an AWS access key": "AKIA" + "A1" * 8,
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "a Weights & Biases key": "0123456789abcdef" * 2 + "01234567",
    "a URL with a password": "https://me:word@host/path",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----",
    "a GitLab token": "glpat-" + "x1" * 10,
    "a key of a model service": "sk-" + "x1" * 16,
}


@pytest.mark.parametrize("kind", LIKE_SECRETS)
@pytest.mark.parametrize("place", ["file", "override", "include", "bare override"])
def test_a_run_file_with_a_secret_is_refused_and_the_value_is_not_told(kind: str, place: str, tmp_path: Path) -> None:
    secret = LIKE_SECRETS[kind]
    assert secret_in(secret) == kind
    text = json.dumps({"watch": {"wandb_project": secret}})
    (tmp_path / "inner.yaml").write_text(text)
    (tmp_path / "run.yaml").write_text({"file": text, "include": "include: inner.yaml"}.get(place, ""))
    overrides = {"override": [f"watch.wandb_project={secret!r}"], "bare override": [secret]}.get(place, [])
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "run.yaml", overrides)
    assert "looks like" in str(refused.value) and "WANDB_API_KEY" in str(refused.value)
    assert secret not in str(refused.value)


def test_a_known_secret_and_a_key_that_says_so_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", CANARY)
    path = tmp_path / "run.yaml"
    for text in (
        json.dumps({"watch": {"wandb_entity": CANARY}}),
        "optimizer: {settings: {hf_token: abc}}",
        "deepspeed: {x: [{password: abc}]}",
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"looks like the value of MY_TOKEN|is called a secret") as refused:
            load_config(path)
        assert "abc" not in str(refused.value) and "Canary" not in str(refused.value)


@pytest.mark.parametrize("key", ["prefix_token", "until_tokens", "num_key_heads", "key", "monkey", "masked_tokens", "author"])
def test_names_that_only_sound_alike_are_taken(key: str) -> None:
    assert not is_secret_name(key)


def test_a_commit_of_the_hub_is_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{sources: [{{name: a, path: x/y, format: hub, settings: {{revision: {'0a' * 20}}}}}]}}")
    assert load_config(path).data.sources[0].settings == {"revision": "0a" * 20}


# --- a key in a file ---------------------------------------------------------------------------------------


def test_a_key_is_read_from_a_file_of_ones_own_and_then_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("k" * 40 + "\n")
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(file))
    monkeypatch.setenv("WANDB_API_KEY", "given-in-the-environment")
    file.chmod(0o600)
    read_secret_files()
    assert os.environ["WANDB_API_KEY"] == "given-in-the-environment"
    monkeypatch.setenv("WANDB_API_KEY", "")
    read_secret_files()
    assert os.environ["WANDB_API_KEY"] == "k" * 40
    assert redact("k" * 40) == "[WANDB_API_KEY]"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o644])
def test_a_file_that_others_can_open_is_refused(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("hidden-canary")
    file.chmod(mode)
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(file))
    with pytest.raises(UserError, match="chmod 600") as refused:
        read_secret_files()
    assert "hidden-canary" not in str(refused.value)
    assert "WANDB_API_KEY" not in os.environ


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty", "two lines", "binary", "device"])
def test_what_is_no_key_file_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    contents = {"empty": b"", "two lines": b"one\ntwo", "binary": b"\xff\xfe"}
    if kind in contents:
        file.write_bytes(contents[kind])
        file.chmod(0o600)
    elif kind == "folder":
        file.mkdir(mode=0o700)
    elif kind == "pipe":
        os.mkfifo(file, 0o600)
    elif kind == "device":
        file = Path("/dev/zero")
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(file))
    with pytest.raises(UserError, match=r"^WANDB_API_KEY_FILE: "):
        read_secret_files()
