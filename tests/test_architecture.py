"""The house rules, held: who may import whom, names, docstrings, and that the README speaks of what exists.

The rules are the tables at the top; imports are read from the sources, also those inside functions.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "data_pipeline", "pretrain", "launch")

# What training reads of the pipeline: its files, never its stages.
CONTRACT = (
    *("data_pipeline.shards", "data_pipeline.manifest", "data_pipeline.records", "data_pipeline.tokenizer"),
    *("data_pipeline.arriving", "data_pipeline.checksums", "data_pipeline.packing"),
)
WINGS = ("pretrain.model", "pretrain.data", "pretrain.engine", "pretrain.checkpoint", "pretrain.run", "pretrain.watch")

# Module or package -> what of ours it may import, besides itself. The longest name that fits a module counts.
# `pretrain.state` (the integers a run is at) is the ground that every wing stands on.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "configs": (),
    "data_pipeline": ("configs",),
    "pretrain": ("configs", *CONTRACT),
    "pretrain.state": ("configs",),
    "pretrain.model": ("configs", "pretrain.state", *CONTRACT),
    "pretrain.data": ("configs", "pretrain.state", *CONTRACT),
    "pretrain.engine": ("configs", "pretrain.state", "pretrain.model", *CONTRACT),
    "pretrain.checkpoint": ("configs", "pretrain.state", "pretrain.engine", "pretrain.data", "pretrain.run.signals", *CONTRACT),
    "pretrain.watch": (
        *("configs", "pretrain.state", "pretrain.page", "pretrain.engine", "pretrain.data", "pretrain.run.heartbeat"),
        *("pretrain.model.operations", "pretrain.model.decoder", "pretrain.model.generate", *CONTRACT),
    ),
    "pretrain.run": ("configs", "pretrain.state"),
    # The two pages that bring the wings together: one learns, one writes text.
    "pretrain.train": ("configs", "pretrain.state", "pretrain.start", "pretrain.evaluate_tasks", *WINGS, *CONTRACT),
    "pretrain.start": ("configs", "pretrain.state", *WINGS, *CONTRACT),
    "pretrain.write": ("configs", "pretrain.state", *WINGS, *CONTRACT),
    "pretrain.evaluate_tasks": ("configs", "pretrain.state", "pretrain.write", *WINGS, *CONTRACT),
    # Hugging Face out and in, and the proof that what is there is the same model.
    "pretrain.proof": ("configs", "pretrain.model"),
    "pretrain.hugging_face": ("configs", "pretrain.state", "pretrain.write", "pretrain.proof", *WINGS, *CONTRACT),
    # The conductors.
    "pretrain.cli": PACKAGES,
    "pretrain.verbs": PACKAGES,
    "pretrain.demo": PACKAGES,
    "pretrain.torture": PACKAGES,
    "pretrain.build": PACKAGES,
    "pretrain.data_view": PACKAGES,
    "pretrain.mixture_view": PACKAGES,
    "pretrain.report_view": PACKAGES,
    "pretrain.checkpoint_view": PACKAGES,
    "pretrain.checkpoint_matrix": PACKAGES,
    "pretrain.inspect_view": PACKAGES,
    "pretrain.inspect_text": PACKAGES,
    "pretrain.trace": PACKAGES,
    "launch": ("configs",),
}

# Library -> the only places that import it.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "ray": ("data_pipeline", "launch.ray_job", "launch.ray_train"),
    "wandb": ("pretrain.watch",),
    "wandb_workspaces": ("pretrain.watch.dashboard",),
    "deepspeed": ("pretrain.engine", "pretrain.checkpoint", "pretrain.start", "pretrain.train"),
    "jinja2": ("pretrain.watch",),
    "torch": ("pretrain", "launch.preflight"),
}

# What the command may not load before a verb is called: `pretrain --help` answers at once.
HEAVY = ("torch", "ray", "deepspeed", "wandb", "wandb_workspaces", "datasets", "pyarrow")

FORBIDDEN_NAMES = {"util", "utils", "common", "helper", "helpers", "manager", "managers", "misc"}

# What runs code that stands in data, and the only places where it is right. `shell=True` and `trust_remote_code=True` are nowhere.
RUNS_FOREIGN_CODE = (
    *("eval", "exec", "os.system", "os.popen", "pty.spawn", "tarfile.open", "shutil.unpack_archive", "logging.config.dictConfig"),
    *("torch.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
)
FOREIGN_OBJECTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
RIGHT_PLACES: dict[str, tuple[str, ...]] = {
    "configs.loader": ("yaml.load",),  # with a SafeLoader that makes what JSON has
    "data_pipeline.cleaning": ("eval",),  # of an annotation, of a function of the user's own
    "pretrain.checkpoint.deepspeed_files": ("pickle", "torch.load"),  # DeepSpeed's own files, imported where a person asks for it
    "pretrain.checkpoint.deepspeed_export": ("torch.load",),  # what was just written, to compare it
}

# Pages whose paths and commands have to exist. The folders are made by commands that the pages show.
PAGES = ("README.md", "CONTRIBUTING.md")
MADE_BY_COMMANDS = {"runs", "datasets", ".venv"}


# --- reading the sources -----------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    """`pretrain/run/folder.py` -> `pretrain.run.folder`; a package's `__init__.py` -> the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
NAMED = [*SOURCES, *(f"tests.{path.stem}" for path in (ROOT / "tests").rglob("*.py"))]


def imports_of(module: str) -> set[str]:
    """Every module that a module imports, wherever in the file; `from a import b` is `a.b` where that is a module."""
    path = SOURCES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in SOURCES else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            found |= {
                argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            }
    return found


def is_within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def ours(modules: set[str]) -> set[str]:
    return {module for module in modules if module.split(".")[0] in PACKAGES}


# --- who may import whom -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = max((place for place in MAY_IMPORT if is_within(module, place)), key=len)
    allowed = (room, *MAY_IMPORT[room]) if room != "pretrain" else (module, *MAY_IMPORT[room])
    wrong = sorted(target for target in ours(imports_of(module)) if not any(is_within(target, place) for place in allowed))
    assert not wrong, (
        f"{SOURCES[module].relative_to(ROOT)} is in {room}, which may import {MAY_IMPORT[room] or 'nothing of ours'}; found {wrong}"
    )


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_rooms(library: str) -> None:
    users = [module for module in SOURCES if any(is_within(target, library) for target in imports_of(module))]
    wrong = [module for module in users if not any(is_within(module, place) for place in ONLY_IN[library])]
    assert not wrong, f"{library} stands in {ONLY_IN[library]}; found it in {wrong}"


def test_every_import_of_ours_exists() -> None:
    missing = {
        (module, target) for module in SOURCES for target in ours(imports_of(module)) if target not in SOURCES and not is_folder(target)
    }
    assert not missing


def is_folder(module: str) -> bool:
    return ROOT.joinpath(*module.split(".")).is_dir()


def test_there_are_no_circles() -> None:
    graph = {module: sorted(ours(imports_of(module)) & set(SOURCES) - {module}) for module in SOURCES}
    assert find_circle(graph) == []


def find_circle(graph: dict[str, list[str]]) -> list[str]:
    """The modules of one circle, in order, or nothing."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for target in graph[module]:
            if circle := visit(target, [*way, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in graph if (circle := visit(module, []))), [])


def test_a_circle_would_be_found() -> None:
    assert find_circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_the_table_of_rooms_has_no_circles() -> None:
    places = [place for place in MAY_IMPORT if place not in ("pretrain", "pretrain.cli", "pretrain.demo")]
    graph = {place: [target for target in MAY_IMPORT[place] if target in places] for place in places}
    assert find_circle(graph) == []


def test_the_command_starts_light() -> None:
    code = f"import sys, pretrain.cli; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# --- names and docstrings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(NAMED))
def test_a_module_is_named_after_what_it_holds(module: str) -> None:
    assert not set(module.split(".")) & FORBIDDEN_NAMES


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_says_what_it_is_for(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), "the module has no docstring"


# --- what runs code that stands in data --------------------------------------------------------------------


def find_dangers(tree: ast.AST) -> set[str]:
    """What a module calls or imports that may run code which a file, a name or a server holds."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {name.split(".")[0] for name in names} & FOREIGN_OBJECTS
            if isinstance(node, ast.ImportFrom):  # `from os import system`
                found |= {f"{node.module}.{alias.name}" for alias in node.names} & set(RUNS_FOREIGN_CODE)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in RUNS_FOREIGN_CODE:
                found.add(name)
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not is_false(keyword.value):
                    found.add(f"{keyword.arg}=")
        elif isinstance(node, ast.Dict):
            pairs = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)]
            found |= {f"{key}=" for key, value in pairs if key in ("shell", "trust_remote_code") and not is_false(value)}
    return found


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_runs_code_that_stands_in_data(module: str) -> None:
    found = find_dangers(ast.parse(SOURCES[module].read_text(encoding="utf-8")))
    assert found - set(RIGHT_PLACES.get(module, ())) == set()


@pytest.mark.parametrize("module", RIGHT_PLACES)
def test_the_exceptions_are_still_needed(module: str) -> None:
    assert set(RIGHT_PLACES[module]) <= find_dangers(ast.parse(SOURCES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "code",
    (
        *("import pickle", "from pickle import loads", "import os, dill", "from os import system", "os.system(x)", "eval(x)", "exec(x)"),
        *("torch.load(x, weights_only=True)", "yaml.load(x, Loader=L)", "yaml.unsafe_load(x)", "np.load(x, allow_pickle=True)"),
        *("subprocess.run(x, shell=True)", "run(x, shell=wanted)", "f(trust_remote_code=True)", "f(**{'trust_remote_code': True})"),
    ),
)
def test_a_danger_would_be_found(code: str) -> None:
    assert find_dangers(ast.parse(code))


@pytest.mark.parametrize("code", ("np.load(x)", "run(x, shell=False)", "model.eval()", "f(**{'trust_remote_code': False})"))
def test_what_is_harmless_is_taken(code: str) -> None:
    assert not find_dangers(ast.parse(code))


# --- what is installed -------------------------------------------------------------------------------------


def test_the_installed_package_holds_ours_and_no_tests() -> None:
    from setuptools import find_namespace_packages

    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    packages = set(find_namespace_packages(str(ROOT), **settings["packages"]["find"]))
    assert {package.split(".")[0] for package in packages} <= set(PACKAGES)
    needed = {module if path.name == "__init__.py" else module.rpartition(".")[0] for module, path in SOURCES.items()}
    assert needed <= packages
    data = {path for pattern in settings["package-data"]["configs"] for path in (ROOT / "configs").glob(pattern)}
    assert data == {path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".jsonl")}


# --- the pages ---------------------------------------------------------------------------------------------


def page(name: str) -> str:
    path = ROOT / name
    assert path.exists(), f"there is no {name}"
    return path.read_text(encoding="utf-8")


def code_of(text: str) -> Iterator[str]:
    """The lines of a page's code blocks, and its inline code."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for block in blocks:
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_the_paths_on_a_page_exist(name: str) -> None:
    text = page(name)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    # In code, a path is a word with a folder of ours in front, or one of the files in the root.
    first = {path.name for path in ROOT.iterdir()} - MADE_BY_COMMANDS
    words = [word.strip(".,:;()'\"") for code in code_of(text) for word in code.split()]
    paths = [
        word.rstrip("/") for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word) and "/" in word and word.split("/")[0] in first
    ]
    missing = sorted({path for path in (*links, *paths) if not (ROOT / path).exists()})
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_on_a_page_exist(name: str) -> None:
    import typer

    from pretrain.cli import app

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong: list[str] = []
    for code in code_of(page(name)):
        for target in re.findall(r"(?:^|\$ |&& |; )make ([a-z-]+)", code):
            if target not in targets:
                wrong.append(f"make {target}")
        for arguments in re.findall(r"(?:^|\$ |&& |; |bin/)pretrain((?: [a-z-]+)+)", code):
            command = typer.main.get_command(app)
            for word in arguments.split():
                if not hasattr(command, "commands"):
                    break
                if word not in command.commands:
                    wrong.append(f"pretrain{arguments}")
                    break
                command = command.commands[word]
    assert not wrong
