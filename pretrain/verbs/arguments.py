"""What the verbs of the command have in common: arguments, exit status, how a run or a dataset is found, how something is said."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import EXIT_MISTAKE, UserError

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from pretrain.run.folder import RunFolder

EXIT_DIFFERENT = 1

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="A run file, such as configs/runs/demo.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Dotted overrides, such as optimizer.peak_lr=3e-4.", show_default=False)
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a name below runs/, or a run file.", show_default=False)]
DataArgument = Annotated[Path, typer.Argument(metavar="DATA", help="A folder of built shards, or a run file.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def find_run(text: str) -> "RunFolder":
    from pretrain.run.folder import RunFolder

    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        from configs.loader import load_config

        return RunFolder.existing(RunFolder.of(load_config(path)).path)
    return RunFolder.existing(path if path.exists() or len(path.parts) > 1 else Path("runs") / text)


def find_data(path: Path) -> Path:
    if path.suffix in (".yaml", ".yml"):
        from configs.loader import load_config
        from pretrain.data.remote import refuse_remote

        config: RunConfig = load_config(path)
        refuse_remote(config.data, "this command")
        return Path(config.data.folder())
    return path


def report_problems(what: str, problems: list[str], as_json: bool, advice: str) -> None:
    if as_json:
        typer.echo(json.dumps({"verified": what, "problems": problems}))
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{what}: {len(problems)} found to be wrong. {advice}" if problems else f"{what}: every byte is as it was written")
    if problems:
        raise typer.Exit(EXIT_MISTAKE)


def refuse_output(path: Path) -> None:
    """Before any work: raises UserError for a file that could not be written, and for one that would be lost."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; make it, or give another --output.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it as --output.")
    if path.is_file():
        raise UserError(f"{path} is there already; give another --output, or remove it.")


def say(text: str) -> None:
    with suppress(OSError):  # nobody listens any more: no reason to stop
        typer.echo(text, err=True)
