"""Weighted keys in the place of all keys, against a definition that forms every contribution."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from peft_hificl.ops.matching import match_attention

SCALING = 0.3


def contributions(query: Tensor, key: Tensor, value: Tensor, first: int = 0) -> Tensor:
    """What each key adds to denominator and numerator of each query's attention, (m * (1 + e), T), of one head."""
    outputs = []
    for q in query:
        seen = [torch.exp(SCALING * torch.dot(q, k)) for k in key[first:]]
        outputs.append(sum(e * v for e, v in zip(seen, value[first:], strict=True)) / sum(seen))
    unit = torch.stack(outputs).norm(dim=1).square().mean().sqrt()
    columns = []
    for j in range(first, len(key)):
        rows = []
        for q in query:
            total = sum(torch.exp(SCALING * torch.dot(q, k)) for k in key)
            share = torch.exp(SCALING * torch.dot(q, key[j])) / total
            rows.append(share * torch.cat([unit[None], value[j]]))
        columns.append(torch.cat(rows))
    return torch.stack(columns, dim=1)


def tensors(heads: int = 3, queries: int = 5, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (heads, queries, 4), (heads, size, 4), (heads, size, 6)
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, 3 * value + 1


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_greedy_choice_and_weights_are_the_definitions(n: int, first: int) -> None:
    query, key, value = tensors()
    found = match_attention(query, key, value, SCALING, n, first)
    for head in range(3):
        atoms = contributions(query[head], key[head], value[head], first)
        target, left, chosen = atoms.sum(1), atoms.sum(1), []
        for _ in range(n):
            match = atoms.T @ left / atoms.norm(dim=0)
            match[chosen] = -torch.inf
            chosen.append(int(match.argmax()))
            weights, residual = nnls(atoms[:, chosen].numpy(), target.numpy())
            left = target - atoms[:, chosen] @ torch.tensor(weights)
        assert found.places[head].tolist() == [place + first for place in chosen]
        want = torch.tensor(weights).clamp_min(1e-4)
        torch.testing.assert_close(found.log_weights[head].exp(), want, rtol=1e-3, atol=1e-3)
        assert float(found.error[head]) == pytest.approx(residual / float(target.norm()), rel=1e-3, abs=1e-4)


def test_given_places_keep_weights_of_one_and_their_order() -> None:
    query, key, value = tensors()
    found = match_attention(query, key, value, SCALING, torch.tensor([5, 2]))
    assert found.places.tolist() == [[5, 2]] * 3 and not found.log_weights.any()
    for head in range(3):
        atoms = contributions(query[head], key[head], value[head])
        left = atoms.sum(1) - atoms[:, [5, 2]].sum(1)
        assert float(found.error[head]) == pytest.approx(float(left.norm() / atoms.sum(1).norm()), rel=1e-6)


def test_all_keys_are_matched_with_weights_of_one() -> None:
    found = match_attention(*tensors(), SCALING, 7)
    torch.testing.assert_close(found.log_weights, torch.zeros(3, 7, dtype=torch.float64), rtol=0, atol=1e-3)
    assert found.places.sort().values.tolist() == [list(range(7))] * 3 and found.error.max() < 1e-3


def test_a_sink_is_chosen_for_its_attention_though_its_value_is_nothing() -> None:
    query, key, value = tensors(heads=1, size=20)
    query[..., 0], key[:, :1] = 4.0, 0.0
    key[:, 0, 0], value[:, 0] = 10.0, 0.0
    assert match_attention(query, key, value, SCALING, 2).places[0, 0] == 0


def test_values_of_nothing_and_a_first_key_that_takes_all_leave_numbers() -> None:
    query, key, value = tensors()
    for found in (
        match_attention(query, key, torch.zeros_like(value), SCALING, 3),
        match_attention(1e4 * torch.ones_like(query), torch.eye(7, 4)[None].double().repeat(3, 1, 1), value, 1.0, 3, 1),
    ):
        assert found.log_weights.isfinite().all() and found.error.isfinite().all()
