"""Attention against the formula written out in float64, inside documents too, and the cache it reads from."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from pretrain.model.attention import LayerCache, blocks_inside_documents, causal_attention, visible_inside_documents
from tests.pretrain.model.forms import draw_documents


def plain_attention(query_BTNH: torch.Tensor, key_BSKH: torch.Tensor, value_BSKH: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(H)) V in float64, one query head at a time, queries at the end of the keys."""
    (_, num_queries, num_heads, head_width), num_keys = query_BTNH.shape, key_BSKH.shape[1]
    later_TS = torch.arange(num_keys) > torch.arange(num_keys - num_queries, num_keys)[:, None]
    heads = []
    for head in range(num_heads):
        kv_head = head * key_BSKH.shape[2] // num_heads
        query_BTH, key_BSH, value_BSH = (t.double() for t in (query_BTNH[:, :, head], key_BSKH[:, :, kv_head], value_BSKH[:, :, kv_head]))
        scores_BTS = query_BTH @ key_BSH.transpose(1, 2) / math.sqrt(head_width)
        heads.append(scores_BTS.masked_fill(later_TS, -math.inf).softmax(-1) @ value_BSH)
    return torch.stack(heads, dim=2)


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
    found = causal_attention(*inputs, visible=visible_inside_documents(documents, 8, 0.0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed + 1))
    gradients = (torch.autograd.grad((one * weights).sum(), inputs) for one in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def run_flex(documents: torch.Tensor, *inputs: torch.Tensor) -> tuple[BlockMask, torch.Tensor]:
    """FlexAttention where there is no compiler: its own plain form."""
    with torch.compiler.set_stance("force_eager"):
        mask = blocks_inside_documents(documents)
        return mask, causal_attention(*inputs, visible=mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("num_tokens", [40, 256, 700])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_a_mask_of_blocks_is_the_boolean_mask(seed: int, num_tokens: int, num_heads: int, num_kv_heads: int) -> None:
    inputs, documents = draw(seed, num_tokens, num_tokens, num_heads, num_kv_heads), draw_documents(seed, 2, num_tokens)
    visible = visible_inside_documents(documents, 8, 0.0)
    assert isinstance(visible, torch.Tensor)
    mask, found = run_flex(documents, *inputs)
    torch.testing.assert_close(found, causal_attention(*inputs, visible=visible), rtol=1e-5, atol=1e-6)
    # Blocks in which nothing is seen are left out, the others are not.
    edge = -num_tokens % 128
    blocks_B1QK = torch.nn.functional.pad(visible, (0, edge, 0, edge)).unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).any(5).any(3)
    assert torch.equal(mask.to_dense().bool(), blocks_B1QK)


def test_dropout_with_a_mask_of_blocks_is_refused(seed: int) -> None:
    with torch.compiler.set_stance("force_eager"):
        mask = blocks_inside_documents(draw_documents(seed, 2, 17))
    with pytest.raises(ValueError, match="knows no dropout"):
        causal_attention(*draw(seed, 17, 17, 2, 2), visible=mask, dropout=0.1)


@pytest.mark.gpu
def test_blocks_are_for_what_flex_attention_can(seed: int) -> None:
    documents = draw_documents(seed, 2, 40).cuda()
    assert isinstance(visible_inside_documents(documents, 16, 0.0), BlockMask)
    for head_width, dropout in ((16, 0.1), (8, 0.0)):
        assert isinstance(visible_inside_documents(documents, head_width, dropout), torch.Tensor)


def test_gradients_agree_with_the_formula(seed: int) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in draw(seed, 9, 9, 4, 2)]
    weights = torch.randn(2, 9, 4, 8, generator=torch.Generator().manual_seed(seed + 1)).double()
    found = torch.autograd.grad((causal_attention(*inputs) * weights).sum(), inputs)
    expected = torch.autograd.grad((plain_attention(*inputs) * weights).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


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


def test_cache_returns_what_was_put_in(seed: int) -> None:
    _, key, value = draw(seed, 1, 7, 2, 2)
    cache = LayerCache(7)
    for start, end in ((0, 4), (4, 5), (5, 7)):
        keys, values = cache.extend(start, key[:, start:end], value[:, start:end])
        assert torch.equal(keys, key[:, :end])
        assert torch.equal(values, value[:, :end])
    with pytest.raises(ValueError, match="holds 7 positions, 8 are needed"):
        cache.extend(7, key[:, :1], value[:, :1])
