"""Documents whose middle is moved to their end, so that it is learnt from both sides (Bavarian et al. 2022).

In: rows of samples, their numbers. Out: the same rows, a share of their documents rearranged in place. Which documents, and where they
are cut, is a pure function of (seed, sample number, place in the sample): drawn anew in every epoch, the same on any rank, in any
micro-batch and after any resume. No shard is changed; what the pipeline and `pretrain data trace` show are the texts as they are.

A document's text is cut at two of its tokens into prefix, middle and suffix, which become, with marks of one token each,

    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle

PSM is the paper's section 3, SPM its second variant (appendix D), which shares its marks with PSM so that one helps the other. The
cuts are drawn uniformly among tokens (the paper's are among characters, which no tokenised shard can do): a prompt should end at the
end of a word. The three marks take the place of the last three tokens of the text, so that every sample keeps its length; what ends a
document stays its end of text, and a document that a sample cuts off is rearranged as far as the sample has it.

Shapes: n samples, T tokens of one, s segments (parts of documents within a sequence), L tokens of one segment.
"""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from configs.objective_section import FillInTheMiddleSection
from configs.schema import RunConfig
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer import end_of_text_id, entry_id, load_tokenizer
from pretrain.data.remote import described_in
from pretrain.data.samples import IGNORED_LABEL, Numbers, Rows

SHORTEST_TEXT = 10
"""Tokens; a shorter text stays as it is."""
NUM_MARKS = 3
WORDS_PER_PLACE = 4
"""Random words of 64 bits: whether, which form, and two cuts."""

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that mark the parts, and of the one that ends a document."""

    prefix: int
    middle: int
    suffix: int
    end_of_text: int


def open_fill_in_the_middle(config: RunConfig) -> "FillInTheMiddle | None":
    """What rearranges a run's documents; None where nothing does. Raises UserError for a mark that the dataset's tokenizer lacks."""
    section = config.training.fill_in_the_middle
    if section is None:
        return None
    end_of_text = config.data.tokenizer.end_of_text
    tokenizer = load_tokenizer(described_in(config.data) / TOKENIZER, end_of_text)
    names = ("prefix_token", "middle_token", "suffix_token")
    prefix, middle, suffix = (entry_id(tokenizer, getattr(section, name), f"training.fill_in_the_middle.{name}") for name in names)
    marks = Marks(prefix, middle, suffix, end_of_text_id(tokenizer, end_of_text))
    if len({prefix, middle, suffix, marks.end_of_text}) < 4:
        raise UserError(
            f"training.fill_in_the_middle: {', '.join(getattr(section, name) for name in names)} and the end of text have to be four "
            "different tokens."
        )
    return FillInTheMiddle(section, marks, config.run.seed)


class FillInTheMiddle:
    """Rearranges documents of samples."""

    def __init__(self, section: FillInTheMiddleSection, marks: Marks, seed: int) -> None:
        self._section, self._marks = section, marks
        self._key = int.from_bytes(sha256(f"fill in the middle {seed}".encode()).digest()[:16], "big")

    def __call__(self, rows: Rows, number_n: Numbers, sequence_length: int) -> None:
        """Rearrange in place, within sequences of `sequence_length` tokens; `number_n`: the samples' numbers in the run's order."""
        is_start_nT = rows.is_start_nT.copy()
        is_start_nT[:, ::sequence_length] = True
        for row, number in enumerate(number_n.tolist()):
            start_s = np.flatnonzero(is_start_nT[row])
            end_s = np.append(start_s[1:], is_start_nT.shape[1])
            self._rearrange_sample(rows.inputs_nT[row], rows.labels_nT[row], start_s, end_s, number)

    def _rearrange_sample(
        self, inputs_T: npt.NDArray[np.int32], labels_T: npt.NDArray[np.int32], start_s: Numbers, end_s: Numbers, number: int
    ) -> None:
        section = self._section
        num_text_s = end_s - start_s - (labels_T[end_s - 1] == self._marks.end_of_text)
        is_long_s = (num_text_s >= SHORTEST_TEXT) & (labels_T[start_s] != IGNORED_LABEL)  # no padding
        start_s, end_s, num_text_s = start_s[is_long_s], end_s[is_long_s], num_text_s[is_long_s]
        # Philox is a function of key and counter; numpy promises its words for ever (NEP 19). A sample has a part of the counter alone.
        random = np.random.Philox(key=self._key, counter=np.array([0, number, 0, 0], np.uint64))
        words_s4 = random.random_raw(WORDS_PER_PLACE * inputs_T.size).reshape(-1, WORDS_PER_PLACE)[start_s]
        is_chosen_s, suffix_first_s = _share(words_s4[:, 0]) < section.share, _share(words_s4[:, 1]) < section.suffix_first_share
        num_kept_s = num_text_s - NUM_MARKS
        cuts_s2 = np.sort(_below(num_kept_s[:, None] + 1, words_s4[:, 2:]), axis=1)
        for index in np.flatnonzero(is_chosen_s).tolist():
            start, end, (first, second) = int(start_s[index]), int(end_s[index]), cuts_s2[index].tolist()
            text_L = labels_T[start : start + int(num_kept_s[index])]
            parts = text_L[:first], text_L[first:second], text_L[second:]
            labels_T[start : start + int(num_text_s[index])] = rearrange(*parts, self._marks, suffix_first=bool(suffix_first_s[index]))
            inputs_T[start + 1 : end] = labels_T[start : end - 1]


def rearrange(
    prefix_L: npt.NDArray[np.int32],
    middle_L: npt.NDArray[np.int32],
    suffix_L: npt.NDArray[np.int32],
    marks: Marks,
    *,
    suffix_first: bool,
) -> npt.NDArray[np.int32]:
    """The three parts with their marks, as SPM or as PSM."""
    if suffix_first:
        return np.concatenate([[marks.prefix, marks.suffix], suffix_L, [marks.middle], prefix_L, middle_L]).astype(np.int32)
    return np.concatenate([[marks.prefix], prefix_L, [marks.suffix], suffix_L, [marks.middle], middle_L]).astype(np.int32)


def _share(words: Words) -> npt.NDArray[np.float64]:
    """Words as numbers of [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _below(sizes: Numbers, words: Words) -> Numbers:
    """For each word a number of [0, size), all but equally likely: sizes are far below 2^32."""
    return ((words >> np.uint64(32)) * sizes.astype(np.uint64) >> np.uint64(32)).astype(np.int64)
