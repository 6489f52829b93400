"""What `vprune bench kernels` times: every operation at the sizes of 7B models, its torch expressions, its check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vprune import kernels
from vprune.kernels import reference

Inputs = tuple[Any, ...]
Expression = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    `sets`: inputs of the same shapes, to take turns; `run`: the operation; `expressions`: the same in plain torch, by
    name; `wanted`: what its result must equal, up to `tolerance` of its norm (0: to the bit). `size`: the bytes that
    have to be read and written at least; `work`: floating-point operations that cannot be avoided, 0 = next to none.
    """

    op: str
    shape: str
    sets: list[Inputs]
    run: Expression
    expressions: dict[str, Expression]
    wanted: Expression
    tolerance: float
    size: int
    work: int = 0

    def problem(self) -> str | None:
        """What is wrong with the operation's result, None if it is right."""
        mine, wanted = (_flat(one(*self.sets[0])) for one in (self.run, self.wanted))
        for number, (one, other) in enumerate(zip(mine, wanted, strict=True)):
            if one.shape != other.shape or one.dtype != other.dtype:
                return f"result {number} is {list(one.shape)} {one.dtype}, not {list(other.shape)} {other.dtype}"
            if self.tolerance == 0:
                if not torch.equal(one, other):
                    return f"result {number} differs from the reference in {int((one != other).sum())} numbers"
                continue
            error = float((one.double() - other.double()).norm() / other.double().norm())
            if not error <= self.tolerance:
                return f"result {number} is off by {error:.2e} of its norm, allowed are {self.tolerance:.0e}"
        return None


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [one for part in result if part is not None for one in _flat(part)]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are: batch, visual tokens, width, cells a sample, tokens of the long video, layers."""

    batch: int
    tokens: int
    width: int
    cells: int
    video: int
    layers: int
    head: int

    @property
    def kept(self) -> int:
        """A tenth of the tokens."""
        return self.tokens // 10


SIZES = {"full": Sizes(64, 7290, 3584, 64, 29160, 28, 128), "tiny": Sizes(2, 576, 64, 16, 2880, 3, 32)}
HEADS, GROUPS = 28, 4


class Maker:
    """Makes the cases of every operation, with inputs drawn anew for each set."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, backend: str) -> None:
        self.sizes, self.device, self.dtype, self.backend = sizes, device, dtype, backend
        self._generator = torch.Generator(device).manual_seed(0)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def _index(self, batch: int, length: int, count: int) -> Tensor:
        scores = torch.rand(batch, length, generator=self._generator, device=self.device)
        return scores.topk(count).indices.sort(-1).values

    def compact(self) -> Iterator[Case]:
        """Embeddings of a batch, a tenth kept."""
        one, backend = self.sizes, self.backend
        sets = [
            (self._draw(one.batch, one.tokens, one.width), self._index(one.batch, one.tokens, one.kept)) for _ in "ab"
        ]
        yield Case(
            "compact",
            f"{one.batch} x {one.tokens} x {one.width} -> {one.kept}",
            sets,
            lambda tokens, index: kernels.compact(tokens, index, backend=backend),
            {"index_select": _flat_index_select, "gather": reference.compact},
            reference.compact,
            0.0,
            2 * one.batch * one.kept * one.width * sets[0][0].element_size(),
        )

    def compact_batch(self) -> Iterator[Case]:
        """The same with M-RoPE position ids and a mask."""
        one, backend = self.sizes, self.backend
        sets = []
        for _ in "ab":
            positions = torch.arange(one.tokens, device=self.device).expand(3, one.batch, -1).contiguous()
            masks = torch.rand(one.batch, one.tokens, generator=self._generator, device=self.device) > 0.5
            index = self._index(one.batch, one.tokens, one.kept)
            sets.append((self._draw(one.batch, one.tokens, one.width), index, positions, masks))

        def selected(tokens: Tensor, index: Tensor, positions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            places = positions.gather(2, index.expand(3, -1, -1))
            return _flat_index_select(tokens, index), places, masks.gather(1, index)

        yield Case(
            "compact_batch",
            f"{one.batch} x {one.tokens} x {one.width} -> {one.kept}, 3 position rows, 1 mask",
            sets,
            lambda *inputs: kernels.compact_batch(*inputs, backend=backend),
            {"index_select and gather": selected, "gather": reference.compact_batch},
            reference.compact_batch,
            0.0,
            2 * one.batch * one.kept * (one.width * sets[0][0].element_size() + 3 * 8 + 1),
        )

    def compact_kv(self) -> Iterator[Case]:
        """The cache of a long video after a middle stage, a tenth kept."""
        one, backend = self.sizes, self.backend
        kept = one.video // 10
        sets: list[Inputs] = []
        for _ in "ab":
            layers = [[self._draw(1, GROUPS, one.video, one.head) for _ in range(one.layers)] for _ in "kv"]
            sets.append((layers[0], layers[1], self._index(1, one.video, kept)))

        def selected(keys: list[Tensor], values: list[Tensor], index: Tensor) -> Any:
            return [key.index_select(2, index[0]) for key in keys], [
                value.index_select(2, index[0]) for value in values
            ]

        yield Case(
            "compact_kv",
            f"2 x {one.layers} layers x 1 x {GROUPS} x {one.video} x {one.head} -> {kept}",
            sets,
            lambda *inputs: kernels.compact_kv(*inputs, backend=backend),
            {"index_select": selected, "gather": reference.compact_kv},
            reference.compact_kv,
            0.0,
            2 * 2 * one.layers * GROUPS * kept * one.head * self.dtype.itemsize,
        )

    def modulate(self) -> Iterator[Case]:
        """The norm of a scorer's convolution, of one image and of a batch."""
        one, backend = self.sizes, self.backend
        height, width, channels = 24, 24, 64

        def exact(*inputs: Tensor) -> Tensor:
            return reference.modulate(*(part.float() for part in inputs)).to(self.dtype)

        for batch, number in ((1, 64), (one.batch, 8)):
            sets: list[Inputs] = [
                (self._draw(batch, height, width, channels), self._draw(batch, channels), self._draw(batch, channels))
                for _ in range(number)
            ]
            yield Case(
                "modulate",
                f"{batch} x {height} x {width} x {channels}",
                sets,
                lambda *inputs: kernels.modulate(*inputs, backend=backend),
                {"layer norm, addcmul and SiLU": reference.modulate},
                exact,
                5e-3,
                2 * sets[0][0].nbytes,
            )

    def recycle(self) -> Iterator[Case]:
        """The nine tenths that are pruned, merged into cells."""
        one, backend = self.sizes, self.backend
        pruned = one.tokens - one.kept
        groups = one.batch * one.cells
        sets = []
        for _ in "ab":
            tokens = self._draw(one.batch * one.tokens, one.width)
            rows = self._index(one.batch, one.tokens, pruned)
            cell = torch.randint(0, one.cells, rows.shape, generator=self._generator, device=self.device)
            cell[:, : one.cells] = torch.arange(one.cells, device=self.device)  # none is empty
            first = torch.arange(one.batch, device=self.device)[:, None]
            group, order = (cell + first * one.cells).flatten().sort(stable=True)
            source = (rows + first * one.tokens).flatten()[order]
            lengths = torch.bincount(group, minlength=groups)
            weights = (1.0 / lengths)[group]
            matrix = torch.zeros(one.batch, one.cells, one.tokens, device=self.device, dtype=self.dtype)
            matrix.view(groups, one.tokens)[group, source % one.tokens] = weights.to(self.dtype)
            sets.append((tokens, source, lengths, weights, group, matrix))

        def added(tokens: Tensor, source: Tensor, lengths: Tensor, weights: Tensor, group: Tensor, _: Tensor) -> Tensor:
            out = torch.zeros(groups, tokens.shape[1], device=tokens.device)
            return out.index_add_(0, group, tokens[source].float() * weights[:, None]).to(tokens.dtype)

        def multiplied(tokens: Tensor, *rest: Tensor) -> Tensor:
            return torch.bmm(rest[-1], tokens.view(one.batch, one.tokens, -1)).flatten(0, 1)

        def by_sample(tokens: Tensor, source: Tensor, lengths: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
            # In float64, sample by sample: the whole batch would not fit beside the tokens.
            parts = zip(*(part.view(one.batch, -1) for part in (source, lengths, weights)), strict=True)
            return torch.cat(
                [
                    reference.recycle(
                        tokens[rows].double(), torch.arange(pruned, device=rows.device), many, share.double()
                    )
                    for rows, many, share in parts
                ]
            ).to(tokens.dtype)

        size = (one.batch * pruned + groups) * one.width * sets[0][0].element_size()
        yield Case(
            "recycle",
            f"{one.batch} x {pruned} of {one.tokens} x {one.width} -> {one.cells}",
            sets,
            lambda *inputs: kernels.recycle(*inputs[:4], backend=backend),
            {"index_add": added, "bmm with the weights laid out before": multiplied},
            by_sample,
            5e-3,
            size,
        )

    def column_mass(self) -> Iterator[Case]:
        """Attention of an instruction's rows to a long video; of one row alone, for a batch."""
        one, backend = self.sizes, self.backend
        for batch, count, number in ((1, 64, 8), (8, 1, 2)):
            rows = torch.arange(one.video - count, one.video, device=self.device).expand(batch, -1)
            scale = one.head**-0.5
            sets: list[Inputs] = [
                (self._draw(batch, HEADS, count, one.head), self._draw(batch, GROUPS, one.video, one.head), rows)
                for _ in range(number)
            ]

            def attended(query: Tensor, key: Tensor, rows: Tensor, scale: float = scale) -> Tensor:
                grouped = query.reshape(query.shape[0], GROUPS, -1, query.shape[3])
                logits = (grouped @ key.mT).view(*query.shape[:3], key.shape[2]).float() * scale
                seen = torch.arange(key.shape[2], device=key.device) <= rows[:, None, :, None]
                return logits.masked_fill(~seen, -torch.inf).softmax(-1).mean((1, 2))

            def run(query: Tensor, key: Tensor, rows: Tensor, scale: float = scale) -> Tensor:
                return kernels.column_mass(query, key, scale=scale, rows=rows, backend=backend)

            def wanted(query: Tensor, key: Tensor, rows: Tensor, scale: float = scale) -> Tensor:
                return reference.column_mass(query, key, scale=scale, rows=rows)

            yield Case(
                "column_mass",
                f"{batch} x {HEADS} heads ({GROUPS} of keys) x {count} rows x {one.video} keys x {one.head}",
                sets,
                run,
                {"matmul and softmax": attended},
                wanted,
                1e-3,
                sets[0][1].numel() * sets[0][1].element_size(),
                2 * batch * HEADS * count * one.video * one.head,
            )

    def rotate(self) -> Iterator[Case]:
        """Keys of a long video behind their projection: scaled row by row, shifted, rotated."""
        one, backend = self.sizes, self.backend
        sets: list[Inputs] = [
            (
                self._draw(1, one.video, GROUPS * one.head),
                self._draw(1, one.video, one.head),
                self._draw(1, one.video, one.head),
                torch.rand(1, one.video, 1, generator=self._generator, device=self.device),
                self._draw(GROUPS * one.head),
            )
            for _ in range(8)
        ]

        def run(*inputs: Tensor) -> Tensor:
            return kernels.rotate(*inputs[:3], factor=inputs[3], bias=inputs[4], backend=backend)

        def wanted(*inputs: Tensor) -> Tensor:
            return reference.rotate(*inputs[:3], factor=inputs[3], bias=inputs[4])

        yield Case(
            "rotate",
            f"1 x {one.video} x {GROUPS} heads x {one.head}",
            sets,
            run,
            {"as models write it": wanted},
            wanted,
            5e-3,
            2 * sum(part.nbytes for part in sets[0][:2]) + sets[0][3].nbytes,
        )

    def select(self) -> Iterator[Case]:
        """The tenth of the highest scores, of a batch and of a long video."""
        one, backend = self.sizes, self.backend
        for batch, length in ((one.batch, one.tokens), (1, one.video)):
            count = length // 10
            sets: list[Inputs] = [
                (torch.randn(batch, length, generator=self._generator, device=self.device),) for _ in range(4)
            ]
            yield Case(
                "select",
                f"{batch} x {length} -> {count}",
                sets,
                lambda scores, count=count: kernels.select(scores, count, backend=backend),
                {
                    "topk and sort": lambda scores, count=count: scores.topk(count).indices.sort(-1).values,
                    "stable sort": lambda scores, count=count: reference.select(scores, count),
                },
                lambda scores, count=count: reference.select(scores, count),
                0.0,
                batch * (length * 4 + count * 8),
            )

    def cases(self, op: str) -> Iterator[Case]:
        """The cases of an operation."""
        cases: Iterator[Case] = getattr(self, op)()
        return cases


def _flat_index_select(tokens: Tensor, index: Tensor) -> Tensor:
    """As if nothing were padding."""
    first = torch.arange(index.shape[0], device=index.device)[:, None] * tokens.shape[1]
    return tokens.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, -1)
