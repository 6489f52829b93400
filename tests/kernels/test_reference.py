"""The reference operations against loops and full matrices."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vprune import VPruneError, kernels

BACKENDS = ["auto", "torch"]
LENGTHS = [1, 63, 576, 2880]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_column_mass_is_pooled_attention(length: int, pool: str, backend: str) -> None:
    count = min(length, 7)
    query, key = draw(2, 4, count, 8), draw(2, 2, length, 8, seed=1)
    rows = torch.arange(length - count, length).expand(2, -1)
    row_valid = torch.ones(2, count, dtype=torch.bool)
    row_valid[1, 1:] = False
    key_valid = torch.ones(2, length, dtype=torch.bool)
    key_valid[1, : length // 3] = False
    bias = draw(2, length, seed=2)
    mass = kernels.column_mass(
        query,
        key,
        scale=0.3,
        rows=rows,
        row_valid=row_valid,
        key_valid=key_valid,
        key_bias=bias,
        pool=pool,
        backend=backend,
    )
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3 + bias[:, None, None]
    allowed = (torch.arange(length) <= rows[..., None]) & key_valid[:, None]
    weights = logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    for row in range(2):
        own = weights[row][:, row_valid[row]].flatten(0, 1)
        torch.testing.assert_close(mass[row], own.mean(0) if pool == "mean" else own.amax(0), rtol=1e-12, atol=1e-12)


def test_column_mass_without_an_order_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = draw(1, 2, 63, 8), draw(1, 2, 63, 8, seed=1)
    whole = (query @ key.transpose(-1, -2)).softmax(-1).mean((1, 2))
    torch.testing.assert_close(kernels.column_mass(query, key, scale=1.0), whole)
    monkeypatch.setattr(kernels.reference, "_ROWS_AT_ONCE", 10)
    torch.testing.assert_close(kernels.column_mass(query, key, scale=1.0), whole)
    assert kernels.column_mass(query.bfloat16(), key.bfloat16(), scale=1.0).dtype == torch.float32


def test_column_mass_with_a_window_and_with_nothing_to_see() -> None:
    query, key = draw(1, 1, 1, 8), draw(1, 1, 9, 8, seed=1)
    rows = torch.tensor([[6]])
    mass = kernels.column_mass(query, key, scale=1.0, rows=rows, window=3)
    assert mass[0, 4:7].sum() == pytest.approx(1.0) and float(mass[0, :4].sum() + mass[0, 7:].sum()) == 0.0
    blind = kernels.column_mass(query, key, scale=1.0, key_valid=torch.zeros(1, 9, dtype=torch.bool))
    assert torch.equal(blind, torch.zeros(1, 9, dtype=torch.float64))


def test_column_mass_takes_infinite_biases_and_strides() -> None:
    query, key = draw(1, 5, 2, 8).transpose(1, 2), draw(1, 9, 2, 8, seed=1).transpose(1, 2)
    bias = torch.zeros(1, 9, dtype=torch.float64)
    bias[0, 3] = -torch.inf
    mass = kernels.column_mass(query, key, scale=1.0, key_bias=bias)
    assert float(mass[0, 3]) == 0.0 and float(mass.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compact_gathers_and_pads(dtype: torch.dtype, length: int, backend: str) -> None:
    tokens = draw(2, length, 5).to(dtype)
    tokens[:, 0] = float("nan") if length > 1 else 1.0  # padding must not read what it stands for
    count = max(1, length // 10)
    index = torch.stack(
        [torch.randperm(length, generator=torch.Generator().manual_seed(n))[:count].sort().values for n in (0, 1)]
    )
    index[1, : count // 2] = -1
    index = torch.where(index == 0, min(1, length - 1), index)
    short = kernels.compact(tokens, index, backend=backend)
    for row in range(2):
        for place, column in enumerate(index[row].tolist()):
            expected = tokens[row, column] if column >= 0 else torch.zeros(5, dtype=dtype)
            assert torch.equal(short[row, place], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_recycle_sums_groups(dtype: torch.dtype, length: int, backend: str) -> None:
    tokens, source = draw(length, 5).to(dtype), torch.randperm(length, generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([1, length - 1]) if length > 1 else torch.tensor([1])
    weights = torch.rand(length, dtype=torch.float64)
    rows = kernels.recycle(tokens, source, lengths, weights, backend=backend)
    assert rows.dtype == dtype
    for row, group in enumerate(source.split(lengths.tolist())):
        start = int(lengths[:row].sum())
        expected = (tokens[group].double() * weights[start : start + len(group), None]).sum(0)
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(
            rows[row].double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=tolerance
        )


def test_compact_batch_gathers_positions_and_masks() -> None:
    tokens, index = draw(2, 5, 3), torch.tensor([[-1, 0, 3], [1, 2, 4]])
    positions = torch.arange(10).view(2, 5)
    masks = positions % 2 == 0
    short, places, marks = kernels.compact_batch(tokens, index, positions, masks)
    assert torch.equal(short, kernels.compact(tokens, index))
    assert places.tolist() == [[0, 0, 3], [6, 7, 9]]
    assert marks is not None and marks.tolist() == [[False, True, False], [True, False, False]]
    rotations = kernels.compact_batch(tokens, index, torch.stack([positions, -positions]))[1]
    assert torch.equal(rotations, torch.stack([places, -places]))
    one_row = kernels.compact_batch(tokens, index, positions[:1])
    assert one_row[1].tolist() == [[0, 0, 3], [1, 2, 4]] and one_row[2] is None
    whole, known = (
        kernels.compact_batch(tokens[1:], index[1:], positions[1:], masks[1:], padded=padded)
        for padded in (True, False)
    )
    assert all(torch.equal(one, other) for one, other in zip(whole, known, strict=True))


def test_compact_kv_gathers_every_layer() -> None:
    keys, index = [draw(2, 3, 6, 4, seed=seed) for seed in (0, 1)], torch.tensor([[-1, 5], [0, 2]])
    short, values = kernels.compact_kv(keys, [-key for key in keys], index)
    for number, key in enumerate(keys):
        assert torch.equal(short[number][0, :, 1], key[0, :, 5]) and not short[number][0, :, 0].any()
        assert torch.equal(short[number][1], key[1, :, [0, 2]]) and torch.equal(values[number], -short[number])


@pytest.mark.parametrize("length", LENGTHS)
def test_select_is_an_ordered_top_k(length: int) -> None:
    scores = draw(2, length).round(decimals=1).float()
    ties = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    valid = draw(2, length, seed=3) > -1
    counts = torch.tensor([length // 3, length])
    index = kernels.select(scores, counts, width=length, ties=ties, valid=valid)
    for row in range(2):
        columns = [column for column in range(length) if valid[row, column]]
        columns.sort(key=lambda column: (-float(scores[row, column]), int(ties[row, column])))
        wanted = sorted(columns[: int(counts[row])])
        assert index[row].tolist() == [-1] * (length - len(wanted)) + wanted


def test_select_counts_not_a_number_as_the_least_and_needs_a_width() -> None:
    scores = torch.tensor([[torch.nan, -1.0, torch.inf]])
    assert kernels.select(scores, 2).tolist() == [[1, 2]]
    with pytest.raises(VPruneError, match="width, the most that any row takes"):
        kernels.select(scores, torch.tensor([1]))
    with pytest.raises(VPruneError, match="count=-1"):
        kernels.select(scores, -1)


def test_a_backend_named_never_falls_back() -> None:
    with pytest.raises(VPruneError, match=r"backend='triton': the tensors are on cpu|backend='triton': the package"):
        kernels.compact(draw(1, 2, 3), torch.zeros(1, 1, dtype=torch.long), backend="triton")
    with pytest.raises(VPruneError, match="choose one of auto, torch, triton"):
        kernels.backend_module("cuda")


def test_a_plain_cpu_never_loads_triton() -> None:
    code = (
        "import sys, torch; from vprune import kernels\n"
        "kernels.compact(torch.zeros(1, 2, 3), torch.zeros(1, 1, dtype=torch.long))\n"
        "assert 'triton' not in sys.modules and 'vprune.kernels.triton_ops' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rotate_turns_pairs_of_numbers(factor: bool, bias: bool, backend: str) -> None:
    """Numbers i and i + D / 2 of a head are a complex number, times e^(i angle)."""
    rows, angle = draw(2, 63, 3 * 8), draw(1, 63, 4, seed=1)
    cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    more = {"factor": draw(2, 63, 1, seed=2)} if factor else {}
    more |= {"bias": draw(3 * 8, seed=3)} if bias else {}
    found = kernels.rotate(rows, cos, sin, **more, backend=backend)
    x = (rows * more.get("factor", 1) + more.get("bias", 0)).view(2, 63, 3, 8).transpose(1, 2)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_without_an_order_is_the_ordered_one(seed: int) -> None:
    """Ties at the border, zeros of both signs, infinities and not-a-numbers among the scores."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 40, generator=draw)
    if seed % 2:
        scores = scores.round()
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    if seed % 3:
        scores[0, :5], scores[1, 7:17] = odd, odd.repeat_interleave(2)
    ties = torch.randperm(40, generator=draw)
    everything = torch.ones(3, 40, dtype=torch.bool)
    for count in (1, 2, 5, 13, 39, 40):
        ordered = kernels.select(scores, count, ties=ties, valid=everything, backend="torch")
        assert torch.equal(kernels.select(scores, count, ties=ties, backend="torch"), ordered)
