"""The verbs that do something with a trained model.

Rooms are imported when a verb is called, so that `pretrain --help` answers at once.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.errors import UserError
from pretrain.prompt_file import partial_of, read_prompts, write_rows
from pretrain.verbs.arguments import AsJson, Overrides, RunArgument, find_run, refuse_output, say


def generate(
    run: RunArgument,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; without one a text begins.", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='Many at once: a text file with one a line, or a .jsonl of {"prompt": ...}.', show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --prompts: a new file for the JSON lines.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --prompts: so many side by side.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among this many tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1.0, help="Choose among the likeliest tokens that reach this probability.", show_default=False),
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed writes the same text.")] = 0,
) -> None:
    """Let the newest checkpoint of a run continue a text, to the end-of-text token; or each of many, as JSON lines in their order.

    Example: pretrain generate runs/demo --prompt "def read_file(path):" --temperature 0.6
    """
    folder = find_run(run)
    if prompts is not None and prompt is not None:
        raise UserError("--prompt and --prompts were both given; a single text or a file of them.")
    if output is not None and prompts is None:
        raise UserError("--output is for --prompts FILE; redirect a single text with > FILE.")
    if not math.isfinite(temperature):
        raise UserError(f"--temperature is {temperature}; wanted 0 (the most likely token) or more.")
    if output is not None:
        refuse_output(output)
    rows = [] if prompts is None else read_prompts(prompts)
    from pretrain.write import Choice, SaidProgress, load_newest, write_text, write_texts

    if prompts is not None:
        choice = Choice(max_tokens, temperature, top_k, top_p, seed)
        finished = _counted(write_texts(load_newest(folder, say), rows, choice, batch_size), len(rows), SaidProgress(say))
        if output is None:
            for row in finished:
                typer.echo(json.dumps(row, ensure_ascii=False))
            return
        try:
            write_rows(finished, output)
        except KeyboardInterrupt:
            say(f"the texts that were finished are in {partial_of(output)}")
            raise
        return
    for piece in write_text(
        folder, prompt or "", say=say, max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ):
        typer.echo(piece, nl=False)
    typer.echo()


def _counted(rows: Iterator[dict[str, Any]], total: int, tell: Callable[[int, int, str], object]) -> Iterator[dict[str, Any]]:
    for done, row in enumerate(rows, 1):
        yield row
        tell(done, total, "prompts")


def evaluate(
    run: RunArgument,
    tasks: Annotated[list[Path], typer.Option(help="A task file of lm-evaluation-harness (YAML, local data), or a folder of them.")],
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many documents of each task.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that are read at once.")] = 16,
    output: Annotated[Path | None, typer.Option(help="A new file for the scores, as JSON.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the newest checkpoint of a run on tasks of lm-evaluation-harness. Nothing is fetched.

    Example: pretrain evaluate runs/demo --tasks configs/tasks/brackets.yaml --tasks configs/tasks/arithmetic.yaml
    """
    folder = find_run(run)
    if output is not None:
        refuse_output(output)
    from configs.durable import write_file
    from pretrain.evaluate_tasks import evaluate_run
    from pretrain.page import open_page

    found = evaluate_run(folder, tasks, limit=limit, batch_size=batch_size, say=say)
    if output is not None:
        write_file(output, (json.dumps(found, indent=1) + "\n").encode())
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [
        [
            score["task"],
            score["metric"] + ("" if score["filter"] == "none" else f" ({score['filter']})"),
            f"{score['value']:.4f}",
            "" if score["standard_error"] is None else f"{score['standard_error']:.4f}",
            "" if score["num_documents"] is None else f"{score['num_documents']:,}",
        ]
        for score in found["scores"]
    ]
    open_page().table(["task", "metric", "value", "standard error", "documents"], rows)


def export_model(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.", show_default=False)],
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="What weights are rounded to.")] = "bf16",
) -> None:
    """Write the newest checkpoint of a run as a Hugging Face folder: Llama, Mistral, Qwen3, OLMo-2 or GPT-2 by its form.

    The folder is loaded with transformers and compared with our own model: every weight, logits, a greedy continuation, token ids. If
    anything differs it is not left there, and the exit status is 2. Models larger than the memory are compared layer by layer.

    Example: pretrain export runs/demo exported/demo
    """
    folder = find_run(run)
    import torch

    from pretrain.hugging_face import export_run

    export_run(folder, out, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, say=say)


def import_model(
    source: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A local Hugging Face folder with safetensors.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.", show_default=False)],
) -> None:
    """Write a Hugging Face model as initial weights, with a model.yaml to include in a run file.

    Llama, Mistral, Qwen3, OLMo-2 and GPT-2; nothing is fetched, no pickle is opened and no code of the folder is run. Our model is
    compared with what transformers computes before OUT is there; if they differ, the exit status is 2.

    Example: pretrain import models/Llama-3.2-1B imported/llama-1b
    """
    from pretrain import hugging_face

    hugging_face.import_model(source, out, say=say)


def inspect(
    run: RunArgument,
    overrides: Overrides = None,
    text: Annotated[
        str | None, typer.Option(help="Show what the run's newest checkpoint does with this text instead.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --text: the picture, .png, .pdf or .svg; else inspect-NAME.png here.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="With --text: layers in the picture, such as 0,5 or 2-4; else all, of many 8.", show_default=False)
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="With --text: heads in the picture, such as 0,5 or 2-4; else all, of many 8.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="With --text: so many likeliest next tokens at each place.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show the model of a run as a table: each operation with shapes, parameters, FLOPs and bytes.

    A file of configs/models will do, too. With --text: what a trained model expects behind each token of it, and a picture of where
    each head reads. --json prints both as numbers, and draws only with --picture.

    Example: pretrain inspect configs/models/llama-3-8b.yaml training.sequence_length=4096

    Example: pretrain inspect runs/demo --text "def read_file(path):"
    """
    from configs.loader import load_config
    from pretrain.inspect_view import describe_model, load_described, tell_model
    from pretrain.page import open_page
    from pretrain.run.folder import RunFolder

    if text is None and (picture, layers, heads) != (None, None, None):
        raise UserError("--picture, --layers and --heads go with --text; give a text, such as --text 'def read_file(path):'.")
    if Path(run).suffix in (".yaml", ".yml"):
        config, assumed = load_described(Path(run), overrides or [])
        folder = RunFolder.of(config)
    else:
        folder, assumed = find_run(run), None
        config = load_config(folder.config_file, overrides or [])
    if assumed is not None:
        say(assumed)
    found: dict[str, Any] = {"model": describe_model(config)} if text is None or as_json else {}
    if text is None:
        if as_json:
            typer.echo(json.dumps(found))
        else:
            tell_model(found["model"], open_page())
        return
    from pretrain.attention_picture import check_picture, draw_attention
    from pretrain.inspect_text import read_text, tell_text

    folder = RunFolder.existing(folder.path)
    if not as_json or picture is not None:
        picture = picture or Path(f"inspect-{folder.path.name}.png")
        check_picture(picture)
    found["text"] = read_text(folder, config, text, say=say, top=top, layers=layers, heads=heads)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        tell_text(found["text"], open_page())
    if picture is not None:
        say(draw_attention(found["text"], picture))
