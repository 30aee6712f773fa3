"""The verb `report`: one page about a run, or about several side by side; as a file, or live in a browser.

In: run folders. Out: an HTML file, whole or not at all; or a server on this machine's own address, until Ctrl-C.
"""

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import UserError
from pretrain.verbs.arguments import find_run, say

DEFAULT_FILE = "report.html"
HEAD_BYTES = 1024

RunArguments = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Run folders, names below runs/, or run files; several: compared.", show_default=False),
]


def report(
    runs: RunArguments,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file; else RUN/reports/report.html, of several runs ./report.html.", show_default=False),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Instead: show it in a browser on this machine, as the run stands.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve; 0: any that is free.")] = 0,
) -> None:
    """Write one page about a run: state, loss, speed, memory, where the time went, attempts, checkpoints, samples; or compare several.

    The file needs no network and no script: open it in a browser, print it, send it.

    Example: pretrain report runs/demo

    Live, for you alone: pretrain report runs/demo --serve
    """
    folders = list({folder.path: folder for folder in map(find_run, runs)}.values())
    if serve and output is not None:
        raise UserError("--serve and --output were both given; a live page, or a file.")
    if port and not serve:
        raise UserError("--port belongs to --serve; add it, or leave it out.")
    from pretrain.report_view import gather
    from pretrain.watch.report import make_page

    if serve:
        from pretrain.report_server import REFRESH_SECONDS, serve_page

        def make() -> str:
            facts = gather(folders, None)
            return make_page(facts, REFRESH_SECONDS if any(run.is_running for run in facts) else None)

        serve_page(make, port, say)
        return
    path = output or (folders[0].path / "reports" / DEFAULT_FILE if len(folders) == 1 else Path(DEFAULT_FILE))
    if output is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    _refuse(path)
    from configs.durable import write_file

    write_file(path, make_page(gather(folders, path.resolve().parent)).encode())
    typer.echo(str(path))


def _refuse(path: Path) -> None:
    """Before any work. Raises UserError where the page cannot be written, or would take the place of something else than a page."""
    from pretrain.watch.report_page import GENERATOR

    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; make it, or give another --output.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it as --output.")
    if path.exists():
        with path.open("rb") as file:
            if f'content="{GENERATOR}"'.encode() not in file.read(HEAD_BYTES):
                raise UserError(f"{path} is there already and no report; give another --output, or remove it.")
