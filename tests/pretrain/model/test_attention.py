"""Attention against the formula written out in float64, and who sees whom against a triple loop."""

import itertools
import math

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from pretrain.model.attention import Sight, Visible, causal_attention, make_visible, takes_blocks
from tests.pretrain.model.forms import draw_documents
from tests.pretrain.model.formulas import plain_attention


def one_document_at_a_time(documents_BT: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """`plain_attention` of each document by itself, put together again."""
    rows = []
    for row, documents_T in enumerate(documents_BT):
        alone = (plain_attention(*(tensor[row, None, documents_T == number] for tensor in inputs)) for number in documents_T.unique())
        rows.append(torch.cat(list(alone), dim=1))
    return torch.cat(rows)


def draw(seed: int, num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, num_queries, num_heads, 8), (2, num_keys, num_kv_heads, 8), (2, num_keys, num_kv_heads, 8)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (17, 17), (1, 17), (5, 17), (16, 17)])
def test_agrees_with_the_formula(seed: int, num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int) -> None:
    query, key, value = draw(seed, num_queries, num_keys, num_heads, num_kv_heads)
    expected = plain_attention(query, key, value)
    torch.testing.assert_close(causal_attention(query, key, value).double(), expected, rtol=1e-5, atol=1e-5)
    in_bf16 = causal_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.double(), expected, rtol=0.05, atol=0.05)


# 700 places: the first keys that a fused kernel reads at once may all be hidden from a late query.
@pytest.mark.parametrize("num_tokens", [6, 40, 700])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2)])
def test_inside_documents_it_agrees_with_the_formula(seed: int, num_tokens: int, num_heads: int, num_kv_heads: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in draw(seed, num_tokens, num_tokens, num_heads, num_kv_heads)]
    documents = draw_documents(seed, 2, num_tokens)
    expected = one_document_at_a_time(documents, *inputs)
    found = causal_attention(*inputs, visible=inside(documents))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed + 1))
    gradients = (torch.autograd.grad((one * weights).sum(), inputs) for one in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def inside(documents: torch.Tensor, by_blocks: bool = False) -> Visible | None:
    batch_size, num_tokens = documents.shape
    return make_visible(Sight(documents), batch_size, num_tokens, num_tokens, documents.device, by_blocks=by_blocks)


def run_flex(documents: torch.Tensor, *inputs: torch.Tensor) -> tuple[BlockMask, torch.Tensor]:
    """FlexAttention where there is no compiler: its own plain form."""
    with torch.compiler.set_stance("force_eager"):
        mask = inside(documents, by_blocks=True)
        assert isinstance(mask, BlockMask)
        return mask, causal_attention(*inputs, visible=mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("num_tokens", [40, 256, 700])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_a_mask_of_blocks_is_the_boolean_mask(seed: int, num_tokens: int, num_heads: int, num_kv_heads: int) -> None:
    inputs, documents = draw(seed, num_tokens, num_tokens, num_heads, num_kv_heads), draw_documents(seed, 2, num_tokens)
    visible = inside(documents)
    assert isinstance(visible, torch.Tensor)
    mask, found = run_flex(documents, *inputs)
    torch.testing.assert_close(found, causal_attention(*inputs, visible=visible), rtol=1e-5, atol=1e-6)
    # Blocks in which nothing is seen are left out, the others are not.
    edge = -num_tokens % 128
    blocks_B1QK = torch.nn.functional.pad(visible, (0, edge, 0, edge)).unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).any(5).any(3)
    assert torch.equal(mask.to_dense().bool(), blocks_B1QK)


def test_dropout_with_a_mask_of_blocks_is_refused(seed: int) -> None:
    with torch.compiler.set_stance("force_eager"):
        mask = inside(draw_documents(seed, 2, 17), by_blocks=True)
    with pytest.raises(ValueError, match="knows no dropout"):
        causal_attention(*draw(seed, 17, 17, 2, 2), visible=mask, dropout=0.1)


def test_blocks_are_for_what_flex_attention_can() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    asked = [(cuda, 16, 0.0), (cuda, 16, 0.1), (cuda, 8, 0.0), (cpu, 16, 0.0)]
    assert [takes_blocks(*one) for one in asked] == [True, False, False, False]


# Gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (1, 5), (3, 5)])
def test_the_formula_is_its_own_finite_difference(seed: int, num_queries: int, num_keys: int, softcap: float | None) -> None:
    """What the next test compares with; and attention without a cap, which keeps float64, is measured itself."""
    inputs = [tensor[:, :, :, :3].double().requires_grad_() for tensor in draw(seed, num_queries, num_keys, 2, 1)]
    visible = seen_by_loop(Sight(window=3, prefix_BS=torch.arange(num_keys).expand(2, -1) < 2), 2, num_queries, num_keys)
    for mask in (None, visible):
        assert torch.autograd.gradcheck(lambda *given: plain_attention(*given, visible=mask, softcap=softcap), inputs)  # noqa: B023
        if softcap is None:
            assert torch.autograd.gradcheck(lambda *given: causal_attention(*given, visible=mask), inputs)  # noqa: B023


@pytest.mark.parametrize("softcap", [None, 0.7, 50.0])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_agree_with_the_formula(
    seed: int, masked: bool, num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int, softcap: float | None
) -> None:
    inputs = [(3 * tensor).requires_grad_() for tensor in draw(seed, num_queries, num_keys, num_heads, num_kv_heads)]
    visible = seen_by_loop(Sight(draw_documents(seed, 2, num_keys), window=4), 2, num_queries, num_keys) if masked else None
    found, expected = (attend(*inputs, visible=visible, dropout=0.0, softcap=softcap) for attend in (causal_attention, plain_attention))
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed + 1))
    gradients = (torch.autograd.grad((one * weights).sum(), inputs) for one in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.abs().max())))
    in_bf16 = causal_attention(*(tensor.bfloat16() for tensor in inputs), visible=visible, softcap=softcap)
    assert in_bf16.dtype == torch.bfloat16
    assert (in_bf16 - expected).norm() < 0.05 * expected.norm()


def test_a_cap_below_every_score_tells_keys_apart_by_sign_only(seed: int) -> None:
    """Scores of +-1000 under a cap of 2 are +-2."""
    query, key = torch.full((1, 4, 1, 1), 1000.0), torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 4, 1, 1)
    value = torch.arange(4.0).reshape(1, 4, 1, 1)
    high, low = math.exp(2), math.exp(-2)
    found = causal_attention(query, key, value, softcap=2.0).flatten()
    expected = [0.0, low / (high + low), 2 * high / (2 * high + low) + low / (2 * high + low), (2 * high + 4 * low) / (2 * high + 2 * low)]
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(causal_attention(query, key, value).flatten(), torch.tensor([0.0, 0.0, 1.0, 1.0]))


# Who sees whom -----------------------------------------------------------------------------------------


def seen_by_loop(sight: Sight, batch_size: int, num_queries: int, num_keys: int) -> torch.Tensor:
    """(B, 1, T, S): what `Sight` says in words, place by place."""
    seen = torch.zeros(batch_size, 1, num_queries, num_keys, dtype=torch.bool)
    for row, query, key in itertools.product(range(batch_size), range(num_queries), range(num_keys)):
        place = query + num_keys - num_queries
        if key == place:
            seen[row, 0, query, key] = True  # everybody sees himself
            continue
        if sight.padding_B is not None and key < sight.padding_B[row]:
            continue
        if sight.documents_BS is not None and sight.documents_BS[row, key] != sight.documents_BS[row, place]:
            continue
        together = sight.prefix_BS is not None and bool(sight.prefix_BS[row, key]) and bool(sight.prefix_BS[row, place])
        near = sight.window is None or place - key < sight.window
        seen[row, 0, query, key] = together or (key < place and near)
    return seen


def sights(num_keys: int) -> list[Sight]:
    """All combinations of what can narrow or widen a view, for two rows."""
    ends = num_keys // 2, num_keys // 3
    documents = torch.stack([(torch.arange(num_keys) >= end).long() + (torch.arange(num_keys) >= end + 2) for end in ends])
    # In each row a prefix of the first document, and one of the last; in the second row also one that two documents touch in.
    prefix = torch.stack(
        [
            torch.isin(torch.arange(num_keys), torch.tensor([0, 1, end + 2, end + 3, *more]))
            for end, more in zip(ends, ([], [ends[1] - 1, ends[1]]), strict=True)
        ]
    )
    windows = (None, 1, 3, max(num_keys - 1, 1), num_keys, num_keys + 1)
    paddings = (None, torch.tensor([0, 3]), torch.tensor([num_keys, 1]))
    return [Sight(*one) for one in itertools.product((None, documents), (None, prefix), windows, paddings)]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 9), (1, 9), (4, 9), (1, 1)])
def test_the_mask_is_what_the_words_say(num_queries: int, num_keys: int) -> None:
    for sight in sights(num_keys):
        found = make_visible(sight, 2, num_queries, num_keys, torch.device("cpu"), by_blocks=False)
        expected = seen_by_loop(sight, 2, num_queries, num_keys)
        if found is None:
            window = sight.window or num_keys
            assert (sight.documents_BS, sight.prefix_BS, sight.padding_B) == (None, None, None)
            assert window >= num_keys
            assert torch.equal(expected[0, 0], torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries))
            continue
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found.expand_as(expected), expected), sight


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 9), (4, 9), (300, 300)])
def test_the_mask_of_blocks_is_the_same_for_every_view(seed: int, num_queries: int, num_keys: int) -> None:
    """Place by place, in which blocks are skipped, and in what attention makes of it, capped or not."""
    query, key, value = draw(seed, num_queries, num_keys, 2, 1)
    every = sights(num_keys)
    for number, sight in enumerate(every if num_keys < 100 else every[7::9]):
        with torch.compiler.set_stance("force_eager"):
            blocks = make_visible(sight, 2, num_queries, num_keys, torch.device("cpu"), by_blocks=True)
        visible = make_visible(sight, 2, num_queries, num_keys, torch.device("cpu"), by_blocks=False)
        if visible is None:
            assert blocks is None
            continue
        assert isinstance(blocks, BlockMask)
        assert isinstance(visible, torch.Tensor)
        visible = visible.expand(2, -1, -1, -1)
        assert torch.equal(create_mask(blocks.mask_mod, 2, None, num_queries, num_keys, "cpu"), visible)
        padded = torch.nn.functional.pad(visible, (0, -num_keys % 128, 0, -num_queries % 128))
        assert torch.equal(blocks.to_dense().bool(), padded.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).any(5).any(3))
        if number % 5 == 0:
            for softcap in (None, 0.7):
                with torch.compiler.set_stance("force_eager"):
                    found = causal_attention(query, key, value, visible=blocks, softcap=softcap)
                torch.testing.assert_close(
                    found, causal_attention(query, key, value, visible=visible, softcap=softcap), rtol=1e-5, atol=1e-6
                )


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("num_queries", [17, 4, 1])
def test_a_window_is_attention_over_keys_cut_out(seed: int, num_queries: int, window: int, softcap: float | None) -> None:
    query, key, value = draw(seed, num_queries, 17, 4, 2)
    visible = make_visible(Sight(window=window), 2, num_queries, 17, torch.device("cpu"), by_blocks=False)
    found = causal_attention(query, key, value, visible=visible, softcap=softcap)
    for index in range(num_queries):
        end = 17 - num_queries + index + 1
        near = slice(max(0, end - window), end)
        alone = causal_attention(query[:, [index]], key[:, near], value[:, near], softcap=softcap)
        torch.testing.assert_close(found[:, [index]], alone, rtol=1e-5, atol=1e-6)


def test_nothing_seen_or_padded_makes_a_nan(seed: int) -> None:
    """A place of padding, a window of one, a document of one place: each sees itself at least. Values and gradients are finite."""
    for sight, (num_queries, softcap) in itertools.product(sights(9), ((9, None), (9, 0.7), (4, None), (4, 0.7), (1, 0.7))):
        inputs = [(100 * tensor).requires_grad_() for tensor in draw(seed, num_queries, 9, 2, 1)]
        visible = make_visible(sight, 2, num_queries, 9, torch.device("cpu"), by_blocks=False)
        found = causal_attention(*inputs, visible=visible, softcap=softcap)
        assert found.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.sum(), inputs))


# Heads, dropout -------------------------------------------------------------------------------------


def test_grouped_queries_are_repeated_heads(seed: int) -> None:
    query, key, value = draw(seed, 12, 12, 6, 2)
    repeated = causal_attention(query, key.repeat_interleave(3, 2), value.repeat_interleave(3, 2))
    torch.testing.assert_close(causal_attention(query, key, value), repeated, rtol=1e-6, atol=1e-6)


def test_dropout_drops_and_keeps_the_mean(seed: int) -> None:
    query, key, _ = draw(seed, 64, 64, 4, 4)
    torch.manual_seed(seed)
    dropped = causal_attention(query, key, torch.ones_like(key), dropout=0.3)
    assert dropped.std() > 0.01
    assert abs(dropped.mean() - 1.0) < 0.1


def test_fewer_keys_than_queries_are_refused(seed: int) -> None:
    query, key, value = draw(seed, 5, 4, 2, 2)
    with pytest.raises(ValueError, match="5 queries but only 4 keys"):
        causal_attention(query, key, value)
