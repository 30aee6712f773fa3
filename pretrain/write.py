"""A run's newest intact checkpoint, as a model on one device that continues a text.

In: a run folder, a prompt. Out: the text, piece by piece. No process group: fragments of any stage and number of
ranks are read by ranges into one model.
"""

from collections.abc import Callable, Iterator

import torch

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size
from pretrain.checkpoint.fragments import FragmentIndex
from pretrain.checkpoint.verify import Commit, list_commits, read_commit, verify_commit
from pretrain.model.decoder import Decoder
from pretrain.model.generate import generate
from pretrain.run.folder import RunFolder


def newest_intact_commit(run: RunFolder, say: Callable[[str], None]) -> Commit:
    """The newest commit that verifies. A damaged one is said and left where it is: a reader moves nothing.

    Raises UserError when there is none.
    """
    for folder in list_commits(run.checkpoints):
        problems = verify_commit(folder)
        if not problems:
            return read_commit(folder)
        say(f"checkpoint {folder.name} is damaged and is not used: {problems[0]}")
    raise UserError(f"{run.path} has no checkpoint that verifies yet; train it first: pretrain train {run.config_file}")


def load_model(config: RunConfig, commit: Commit, device: torch.device) -> Decoder:
    """The model of a verified commit, fp32, whole, ready to evaluate."""
    with torch.device("meta"):
        model = Decoder(config.model)
    model.load_state_dict(FragmentIndex(commit.folder).weights(), assign=True)
    return model.to(device).eval()


def write_text(
    run: RunFolder,
    prompt: str,
    *,
    say: Callable[[str], None],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[str]:
    """The prompt, then what the model makes of it, in pieces of whole characters. Raises UserError for values out of range."""
    config = run.load_config()
    commit = newest_intact_commit(run, say)
    say(f"{commit.folder.name}, {commit.state.tokens_seen:,} tokens seen")
    tokenizer = load_tokenizer(run.tokenizer_file, config.data.tokenizer.end_of_text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(config, commit, device)
    end_of_text = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text.") from None
    tokens = [end_of_text, *tokenizer.encode(prompt).ids]
    try:
        new_tokens = generate(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            end_of_text=end_of_text,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed),
            num_tokens=vocabulary_size(tokenizer),
        )
    except ValueError as error:
        raise UserError(f"{error}.") from None
    yield prompt
    written, shown = [], ""
    for token in new_tokens:
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
            yield text[len(shown) :]
            shown = text
