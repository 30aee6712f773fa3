"""The Dockerfile agrees with what stands elsewhere: the user, the extras, what is let into the context. (No image is built here.)"""

import re
import sys
from pathlib import Path

from configs.cluster import KubernetesSection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pods_run_as_the_user_of_the_image() -> None:
    number = KubernetesSection(image="any").user_id
    assert f"USER {number}:{number}\n" in DOCKERFILE
    assert f"useradd --uid {number} " in DOCKERFILE


def test_the_image_has_every_pinned_extra() -> None:
    extras = re.search(r"ARG EXTRAS=(\S+)", DOCKERFILE)
    assert extras is not None
    others = {"development", "remote", "huggingface"}  # for developers; not pinned; a part of eval
    assert set(extras[1].split(",")) | others == set(PROJECT["project"]["optional-dependencies"])


def test_the_context_holds_the_packages_and_what_they_are_built_from() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = re.search(r"^COPY (pyproject.*) \./$", DOCKERFILE, re.MULTILINE)
    assert copied is not None
    assert let_in == packages | set(copied[1].split())
    assert all((ROOT / name).exists() for name in let_in)
