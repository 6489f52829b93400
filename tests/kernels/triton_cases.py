"""Every Triton kernel against its reference: in the interpreter (test_interpreted.py), compiled (test_gpu.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from vprune import VPruneError, kernels
from vprune.kernels import reference, triton_column_mass, triton_launch

DEVICE = "cpu" if triton_launch.INTERPRETED or not torch.cuda.is_available() else "cuda"
SIZES = [1, 63, 576, 2880]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(DEVICE, dtype)


def shuffled(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with gaps between them, among not-a-numbers."""
    fill: Any = True if tensor.dtype == torch.bool else float("nan") if tensor.is_floating_point() else -7
    wide = torch.full((*tensor.shape, 2), fill, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1] = tensor
    return wide[..., 1]


@contextmanager
def poison() -> Iterator[None]:
    """What a kernel leaves unwritten comes out as not-a-number, or as no sensible integer."""
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = plain(*args, **kwargs)
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made.fill_(True if made.dtype == torch.bool else -99)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def triton(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with poison():
        return operation(*args, **kwargs, backend="triton")


def index_of(batch: int, length: int, padding: int = 0) -> Tensor:
    """Ascending columns, every further row with more padding on its left."""
    count = max(1, length // 10)
    rows = [shuffled(length, seed)[:count].sort().values for seed in range(batch)]
    for number, row in enumerate(rows):
        row[: min(count, number * padding)] = -1
    return torch.stack(rows)


def attention_inputs(
    length: int, dtype: torch.dtype, count: int, width: int = 40
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Two samples with grouped queries, transposed as models hold them, padding, biases and rows that do not count."""
    query = draw(2, count, 4, width, dtype=dtype).transpose(1, 2)
    key = draw(2, length, 2, width, seed=1, dtype=dtype).transpose(1, 2)
    rows = torch.arange(length - count, length, device=DEVICE).expand(2, -1)
    row_valid = torch.ones(2, count, dtype=torch.bool, device=DEVICE)
    row_valid[1, 1:] = False
    key_valid = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    key_valid[1, : length // 3] = False
    bias = draw(2, length, seed=2)
    bias[:, length // 2 : length // 2 + length // 7] = -torch.inf
    return (
        query,
        key,
        {"rows": rows, "row_valid": row_valid, "key_valid": strided(key_valid), "key_bias": strided(bias)},
    )


def check_mass(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """The kernel against the reference in float64 on the same inputs."""
    mass: Tensor = triton(kernels.column_mass, query, key, scale=0.3, **options)
    wanted = reference.column_mass(query.double(), key.double(), scale=0.3, **options)
    torch.testing.assert_close(mass.double(), wanted, rtol=1e-4, atol=1e-7)
    return mass


@pytest.mark.parametrize(("length", "width"), list(zip(SIZES, (128, 6, 80, 16), strict=True)))
@pytest.mark.parametrize("dtype", FLOATS)
def test_rotate(length: int, dtype: torch.dtype, width: int) -> None:
    """To the bit without a factor; with one, sums of float32 may be rounded once or twice."""
    close = 4 * torch.finfo(dtype).eps
    rows = draw(2, length, 3 * width, dtype=dtype)
    cos, sin = (draw(1, length, width, seed=seed, dtype=dtype) for seed in (1, 2))
    factor, bias = draw(2, length, 1, seed=3).abs() + 0.5, draw(3 * width, seed=4, dtype=dtype)
    mine = triton(kernels.rotate, rows, cos, sin)
    wanted = reference.rotate(rows, cos, sin)
    assert mine.shape == (2, 3, length, width) and mine.stride() == wanted.stride()
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # (the interpreter cuts bfloat16 off in place of rounding it)
        torch.testing.assert_close(mine, wanted, rtol=close, atol=close)
    else:
        assert torch.equal(mine, wanted)
    assert torch.equal(mine, triton(kernels.rotate, strided(rows), strided(cos), sin.expand(2, -1, -1)))
    for given in ({"factor": factor}, {"bias": bias}, {"factor": strided(factor), "bias": strided(bias)}):
        mine, wanted = (one(rows, cos, sin, **given) for one in (partial(triton, kernels.rotate), reference.rotate))
        torch.testing.assert_close(mine, wanted, rtol=close, atol=8 * close)


def test_rotate_needs_one_dtype() -> None:
    rows, turn = draw(1, 5, 8), draw(1, 5, 4)
    with pytest.raises(VPruneError, match="one dtype"):
        kernels.rotate(rows.bfloat16(), turn, turn, backend="triton")
    with pytest.raises(VPruneError, match=r"float64, the kernel computes in float32"):
        kernels.rotate(rows.double(), turn.double(), turn.double(), backend="triton")
    for backend, width in (("triton", 3), ("torch", 6), ("auto", 1)):
        with pytest.raises(VPruneError, match=f"8 numbers are no whole heads of {width}"):
            kernels.rotate(rows, turn[..., :1].expand(-1, -1, width), turn, backend=backend)
    assert kernels.rotate(rows[:0], turn[:0], turn[:0], backend="triton").shape == (0, 2, 5, 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 7, 9, 5), (3, 1, 1, 1), (2, 24, 24, 64), (2, 45, 47, 3)])
def test_modulate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Means far from zero, which sums of squares would not survive; gains of each frame or of all."""
    x = draw(*shape, dtype=dtype) + 30 * draw(shape[0], 1, 1, 1, seed=1, dtype=dtype)
    gain, offset = (draw(shape[0], shape[-1], seed=seed, dtype=dtype) for seed in (2, 3))
    close = 8 * torch.finfo(dtype).eps
    for frames, given in ((x, (gain, offset)), (strided(x), (strided(gain), offset[:1])), (x, (gain[:1], offset))):
        mine = triton(kernels.modulate, frames, *given)
        wanted = reference.modulate(x.double(), *(one.double() for one in given))
        assert mine.shape == x.shape and mine.dtype == dtype and mine.is_contiguous()
        torch.testing.assert_close(mine.double(), wanted, rtol=close, atol=max(close, 2e-5))
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(
        triton(kernels.modulate, channels_first, gain, offset), triton(kernels.modulate, x, gain, offset)
    )


def test_modulate_refuses_what_does_not_fit() -> None:
    x = draw(3, 4, 4, 8)
    for backend in ("torch", "triton"):
        with pytest.raises(VPruneError, match=r"gain \(2, 8\) does not fit 3 frames of 8 channels"):
            kernels.modulate(x, draw(2, 8), draw(3, 8), backend=backend)
        with pytest.raises(VPruneError, match=r"offset \(3, 7\) does not fit 3 frames of 8 channels"):
            kernels.modulate(x, draw(3, 8), draw(3, 7), backend=backend)
        assert kernels.modulate(x[:0], draw(1, 8), draw(1, 8), backend=backend).shape == (0, 4, 4, 8)
    with pytest.raises(VPruneError, match=r"float64, the kernel computes in float32"):
        kernels.modulate(x.double(), draw(1, 8).double(), draw(1, 8).double(), backend="triton")
    with pytest.raises(VPruneError, match="gradients"):
        kernels.modulate(x.requires_grad_(), draw(1, 8), draw(1, 8), backend="triton")


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize(
    ("dtype", "pool"),
    [(torch.float32, "mean"), (torch.float32, "max"), (torch.float16, "mean"), (torch.bfloat16, "max")],
)
def test_column_mass(length: int, dtype: torch.dtype, pool: str) -> None:
    query, key, options = attention_inputs(length, dtype, min(length, 7))
    check_mass(query, key, pool=pool, **options)


def test_column_mass_of_a_long_video() -> None:
    query, key = draw(1, 1, 3, 16), draw(1, 1, 29160, 16, seed=1)
    check_mass(query, key, rows=torch.tensor([[29159, 29000, 9]], device=DEVICE))


@pytest.mark.parametrize(
    ("width", "window", "count"), [(72, None, 17), (72, 20, 40), (128, None, 40), (128, 20, 17), (256, 20, 40)]
)
def test_column_mass_of_many_lines(width: int, window: int | None, count: int) -> None:
    query, key, options = attention_inputs(200, torch.bfloat16, count, width)
    check_mass(query, key, window=window, **options)
    check_mass(query, key)


def test_column_mass_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, options = attention_inputs(200, torch.float32, 140)
    whole = check_mass(query, key, **options)
    monkeypatch.setattr(triton_column_mass, "_PARTIAL_BYTES", 0)
    torch.testing.assert_close(check_mass(query, key, **options), whole, rtol=1e-6, atol=1e-9)
    check_mass(query, key, pool="max", **options)


def test_column_mass_where_nothing_can_be_seen() -> None:
    query, key = draw(1, 1, 2, 8), draw(1, 1, 9, 8, seed=1)
    assert not check_mass(query, key, key_valid=torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)).any()
    check_mass(query, key, rows=torch.tensor([[-1, 3]], device=DEVICE))


def test_column_mass_of_ties_and_of_flat_rows() -> None:
    key = draw(1, 1, 1, 16).expand(1, 1, 63, 16)
    torch.testing.assert_close(check_mass(draw(1, 1, 5, 16, seed=1), key), torch.full((1, 63), 1 / 63, device=DEVICE))


def test_a_sample_has_the_same_bits_in_any_batch() -> None:
    query, key, options = attention_inputs(300, torch.bfloat16, 40)
    both = triton(kernels.column_mass, query, key, scale=0.3, **options)
    alone = {name: part[1:] for name, part in options.items()}
    assert torch.equal(both[1:], triton(kernels.column_mass, query[1:], key[1:], scale=0.3, **alone))
    assert torch.equal(both, triton(kernels.column_mass, query, key, scale=0.3, **options))


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("width", [5, 80])
def test_compact(width: int, dtype: torch.dtype, length: int) -> None:
    tokens = draw(2, length, width).mul(10).to(dtype)
    index = index_of(2, length, padding=length // 30)
    if tokens.is_floating_point() and length > 1:
        tokens[1, 0] = float("nan")  # padding must not read what it stands for
        index = torch.where(index == 0, 1, index)
    for held in (tokens, strided(tokens), tokens.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(triton(kernels.compact, held, strided(index)), reference.compact(tokens, index))


def test_compact_of_a_long_video_and_of_nothing() -> None:
    tokens, index = draw(1, 29160, 3), index_of(1, 29160)
    assert torch.equal(triton(kernels.compact, tokens, index), reference.compact(tokens, index))
    assert triton(kernels.compact, tokens, index[:, :0]).shape == (1, 0, 3)


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("coordinates", [None, 3])
@pytest.mark.parametrize("marks", [None, 1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_compact_batch(length: int, coordinates: int | None, marks: int | None, shared: bool) -> None:
    tokens, index = draw(3, length, 24, dtype=torch.bfloat16), index_of(3, length, padding=length // 40)
    rows = 1 if shared else 3
    shape = (rows, length) if coordinates is None else (coordinates, rows, length)
    positions = strided(draw(*shape).mul(1000).long())
    masks = None if marks is None else draw(*([marks] if marks > 1 else []), rows, length, seed=1) > 0
    short = triton(kernels.compact_batch, tokens, index, positions, masks)
    if bool((index >= 0).all()):
        known = reference.compact_batch(tokens, index, positions, masks, padded=False)
        assert all(one is other is None or torch.equal(one, other) for one, other in zip(short, known, strict=True))
    for mine, wanted in zip(short, reference.compact_batch(tokens, index, positions, masks), strict=True):
        assert mine is wanted is None or (torch.equal(mine, wanted) and mine.dtype == wanted.dtype)


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_compact_kv(dtype: torch.dtype, length: int) -> None:
    keys = [draw(2, 2, length, 24, seed=seed, dtype=dtype) for seed in range(3)]
    transposed = [key.transpose(1, 2).contiguous().transpose(1, 2) for key in keys]
    index = index_of(2, length, padding=length // 30)
    wider = [torch.cat([key, key], 2)[:, :, :length] for key in keys]  # a cache with room for more
    mixed = [keys[0], transposed[1], strided(keys[2])]
    for values in (mixed,) if length == SIZES[-1] else (transposed, wider, mixed):
        short = triton(kernels.compact_kv, keys, values, index)
        for mine, wanted in zip(short, reference.compact_kv(keys, values, index), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine, wanted, strict=True))
    assert triton(kernels.compact_kv, [], [], index) == ([], [])


def groups_of(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in random order, some of them twice, in a small, a large and a middling group."""
    source = torch.cat([shuffled(length, 3), shuffled(length, 4)[: length // 3]])
    total = source.numel()
    lengths = [1, total - 1 - total // 4, total // 4] if total > 7 else [total]
    weights = torch.rand(total, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return source, torch.tensor(lengths, device=DEVICE), weights


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_recycle(dtype: torch.dtype, length: int) -> None:
    tokens, (source, lengths, weights) = draw(length, 11, dtype=dtype), groups_of(length)
    wanted = reference.recycle(tokens.double(), source, lengths, weights.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    layouts = (tokens, strided(tokens), tokens.t().contiguous().t())
    for held in layouts if length < 2880 else layouts[:1]:
        rows = triton(kernels.recycle, held, strided(source), lengths, weights.double())
        assert rows.dtype == dtype
        torch.testing.assert_close(rows.double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_group_has_the_same_bits_whatever_the_others() -> None:
    tokens, (source, lengths, weights) = draw(90, 300, dtype=torch.bfloat16), groups_of(90)
    rows = triton(kernels.recycle, tokens, source, lengths, weights)
    start, end = 1, 1 + int(lengths[1])
    alone = triton(kernels.recycle, tokens, source[start:end], lengths[1:2], weights[start:end])
    assert torch.equal(rows[1], alone[0])
    many = 2 if DEVICE == "cpu" else 500  # so many that programs take more columns each
    repeated = (part.repeat(many) for part in (source, lengths, weights))
    assert torch.equal(triton(kernels.recycle, tokens, *repeated), rows.repeat(many, 1))


SCORES = {
    "distinct": lambda length: draw(3, length),
    "ties": lambda length: draw(3, length).mul(2).round(),  # zeros of both signs among them
    "flat": lambda length: torch.zeros(3, length, device=DEVICE),
    "blind": lambda length: draw(3, length).where(draw(3, length, seed=1) > 0.5, -torch.inf),
    "broken": lambda length: draw(3, length).where(draw(3, length, seed=1) > 0.5, torch.nan),
    "half": lambda length: draw(3, length, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind, length", [*product(SCORES, SIZES), ("ties", 29160), ("broken", 29160)])
def test_select(kind: str, length: int) -> None:
    scores, count = SCORES[kind](length), max(1, length // 10)
    ties = shuffled(length, 8)
    valid = draw(3, length, seed=9) > -1
    counts = torch.tensor([0, count, length], device=DEVICE)
    for options in (
        {"count": count},
        {"count": count, "ties": ties, "valid": strided(valid)},
        {"count": counts, "width": length, "ties": torch.stack([ties, ties.flip(0), ties])},
    ):
        index = triton(kernels.select, strided(scores), **options)
        assert torch.equal(index, reference.select(scores, **options))


def test_select_takes_the_highest_in_order() -> None:
    scores = torch.tensor([[0.5, torch.nan, 0.9, 0.5, -torch.inf, 0.7]], device=DEVICE)
    for backend in ("torch", "triton"):
        choose = partial(kernels.select, scores, backend=backend)
        assert choose(3).tolist() == [[0, 2, 5]]
        assert choose(3, ties=torch.tensor([5, 4, 3, 2, 1, 0], device=DEVICE)).tolist() == [[2, 3, 5]]
        assert choose(5, width=7).tolist() == [[-1, -1, 0, 1, 2, 3, 5]]
        assert choose(9).tolist() == [[-1, -1, -1, 0, 1, 2, 3, 4, 5]]
        with pytest.raises(VPruneError, match="width"):
            choose(torch.tensor([1], device=DEVICE))


@pytest.mark.parametrize("operation", ["compact", "compact_batch", "recycle"])
def test_gradients(operation: str) -> None:
    index, (source, lengths, weights) = index_of(2, 63, padding=2), groups_of(63)
    positions = torch.arange(63, device=DEVICE)[None]
    found = []
    for backend in ("torch", "triton"):
        tokens = (draw(2, 63, 8) if operation != "recycle" else draw(63, 8)).requires_grad_()
        shares = weights.clone().requires_grad_()
        if operation == "recycle":
            short = kernels.recycle(tokens, source, lengths, shares, backend=backend)
        elif operation == "compact":
            short = kernels.compact(tokens, index, backend=backend)
        else:
            short = kernels.compact_batch(tokens, index, positions, backend=backend)[0]
        (short * draw(*short.shape, seed=6)).sum().backward()
        found.append((tokens.grad, shares.grad))
    for mine, wanted in zip(*found, strict=True):
        assert mine is wanted is None or mine is not None
        if mine is not None:
            torch.testing.assert_close(mine, wanted)


def whole_path(tokens: Tensor, query: Tensor, key: Tensor, positions: Tensor, valid: Tensor, backend: str) -> Any:
    """Rotate, score, select, merge the first eight tokens into one, shorten embeddings and cache: one function."""
    turn = key[:, 0]
    key = kernels.rotate(key.transpose(1, 2).flatten(2), turn.cos(), turn.sin(), backend=backend)
    scores = kernels.column_mass(query, key, scale=0.3, key_valid=valid, backend=backend)
    index = kernels.select(scores, 9, valid=valid, backend=backend)
    source = torch.arange(8, device=tokens.device)
    lengths, weights = torch.full((2,), 4, device=tokens.device), torch.full((8,), 0.25, device=tokens.device)
    merged = kernels.recycle(tokens[0], source, lengths, weights, backend=backend)
    short, places, marks = kernels.compact_batch(tokens, index, positions, valid, backend=backend)
    cache = kernels.compact_kv([key, key], [key, -key], index, backend=backend)
    return kernels.compact(tokens, index, backend=backend), merged, short, places, marks, *cache[0], *cache[1]


def path_inputs() -> tuple[Tensor, ...]:
    valid = torch.ones(2, 63, dtype=torch.bool, device=DEVICE)
    valid[1, :20] = False
    positions = torch.arange(63, device=DEVICE).expand(3, 1, -1)
    return draw(2, 63, 24), draw(2, 4, 5, 16), draw(2, 2, 63, 16, seed=1), positions, valid


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", *(["inductor"] if DEVICE == "cuda" else [])])
def test_compilers_see_through(compiler: str) -> None:
    inputs = path_inputs()
    compiled = torch.compile(partial(whole_path, backend="triton"), fullgraph=True, backend=compiler)
    for mine, wanted in zip(compiled(*inputs), whole_path(*inputs, backend="torch"), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_the_library_knows_the_operations() -> None:
    import vprune.kernels.triton_ops  # noqa: F401 - whose import registers them

    tokens, query, key, _, valid = path_inputs()
    index, (source, lengths, weights) = index_of(2, 63), groups_of(63)
    positions = torch.arange(63, device=DEVICE).expand(1, 2, -1)
    marks = valid.view(torch.int8)
    ops = torch.ops.vprune
    for op, args in (
        (ops.compact, (tokens.requires_grad_(), index)),
        (ops.compact_batch, (tokens, index, positions, valid[None])),
        (ops.compact_kv, ([key, key], [key, key], index)),
        (ops.recycle, (draw(63, 8).requires_grad_(), source, lengths, weights)),
        (ops.column_mass, (query, key, 0.3, None, None, marks, None, None, "mean")),
        (ops.modulate, (draw(2, 5, 7, 8), draw(1, 8), draw(2, 8), 1e-5)),
        (ops.rotate, (draw(2, 63, 24), draw(2, 63, 8), draw(2, 63, 8), None, draw(24))),
        (ops.select, (draw(2, 63), None, 5, 5, None, None)),
    ):
        # Tensors that are given as attributes of a graph and dynamic shapes: what compilers do with an operation.
        torch.library.opcheck(op.default, args)


def test_what_has_no_kernel_is_refused_by_name_and_served_by_auto() -> None:
    query, key = draw(1, 1, 2, 8, dtype=torch.float64), draw(1, 1, 9, 8, dtype=torch.float64)
    with pytest.raises(VPruneError, match=r"backend='triton': queries are torch.float64"):
        kernels.column_mass(query, key, scale=1.0, backend="triton")
    assert kernels.column_mass(query, key, scale=1.0).dtype == torch.float64
    with pytest.raises(VPruneError, match="gradients"):
        kernels.column_mass(query.float().requires_grad_(), key.float(), scale=1.0, backend="triton")
    kernels.column_mass(query.float().requires_grad_(), key.float(), scale=1.0).sum().backward()
    with pytest.raises(VPruneError, match="300 wide"):
        kernels.column_mass(draw(1, 1, 2, 300), draw(1, 1, 9, 300), scale=1.0, backend="triton")
    with pytest.raises(VPruneError, match="the layers differ"):
        kernels.compact_kv([key], [key[:, :, 1:]], index_of(1, 9), backend="triton")
    with pytest.raises(VPruneError, match="int64 has no kernel"):
        kernels.recycle(index_of(2, 9), *groups_of(2), backend="triton")
    with pytest.raises(VPruneError, match="65537 scores"):
        kernels.select(torch.zeros(1, 65537, device=DEVICE), 1, backend="triton")
    with pytest.raises(VPruneError, match="16 bytes wide"):
        kernels.compact(torch.zeros(1, 2, 3, dtype=torch.complex128, device=DEVICE), index_of(1, 2), backend="triton")
