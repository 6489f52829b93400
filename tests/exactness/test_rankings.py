"""Orders of keeping, and plans of images alike: together as alone, ties and numbers that are none included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from tests.exactness.families import batch as family_batch
from tests.exactness.families import build
from tests.exactness.prompts import KINDS, batch
from vprune.amounts import RECYCLERS
from vprune.kernels.reference import scaled
from vprune.models.probe import _normed, gain_offset, layer_attention, projected
from vprune.records import Prefill, Selection
from vprune.recycling import Absorption, Recycler
from vprune.selection import Random, Stride, TopK, frame_by_frame, spread_order
from vprune.training.prompts import read_prompt

GRID = (2, 5, 7)
TOKENS = 70


def maps(count: int) -> Tensor:
    """Importances with ties, infinities and not-a-number."""
    draw = torch.Generator().manual_seed(0)
    made = torch.randint(0, 9, (count, TOKENS), generator=draw).float()
    made[:, ::11], made[0, 3], made[-1, 5] = torch.nan, torch.inf, -torch.inf
    return made


def by_definition(importance: Tensor) -> list[int]:
    place = {token: number for number, token in enumerate(spread_order(GRID).tolist())}
    worth = importance.nan_to_num(-torch.inf, torch.inf, -torch.inf).tolist()
    return sorted(range(TOKENS), key=lambda token: (-worth[token], place[token]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_ranking_is_a_stable_sort(count: int) -> None:
    ranking = TopK().rank(maps(count), GRID, 9, [0] * count)
    wanted = torch.tensor([by_definition(one) for one in maps(count)])
    assert torch.equal(ranking.order, wanted)
    assert torch.equal(ranking.ranks.gather(-1, wanted), torch.arange(TOKENS).expand(count, -1))
    some = torch.stack([torch.randperm(TOKENS)[:30].sort().values for _ in range(count)])
    among = torch.zeros(count, TOKENS, dtype=torch.bool).scatter(1, some, True)
    left = torch.stack([one[kept[one]] for one, kept in zip(wanted, among, strict=True)])
    assert torch.equal(some.gather(1, ranking.of_those(some).order), left)
    for budget in (1, 9, 30):
        assert torch.equal(ranking.first(budget), wanted[:, :budget].sort().values)
        assert torch.equal(ranking.first(budget, among), left[:, :budget].sort().values)


@pytest.mark.parametrize("selector", [TopK(), Random(3), Stride()], ids=["topk", "random", "stride"])
def test_images_alike_are_ranked_as_each_alone(selector: Any) -> None:
    given = maps(3) if isinstance(selector, TopK) else None
    prints = [5, 6, 5]
    ranking = selector.rank(given, GRID, 9, prints)
    assert ranking.shape == (3, TOKENS)
    framed = frame_by_frame(ranking.order, GRID)
    for number, one in enumerate(prints):
        alone = selector.rank(None if given is None else given[number][None], GRID, 9, [one])
        assert torch.equal(ranking.order[number], alone.order[0])
        assert torch.equal(framed[number], frame_by_frame(alone.order[0], GRID))


def standing(count: int) -> list[Selection]:
    draw = torch.Generator().manual_seed(1)
    kept = [torch.randperm(TOKENS, generator=draw)[:40].sort().values for _ in range(count)]
    sizes = torch.randint(1, 5, (TOKENS,), generator=draw)
    return [Selection.pure(one, TOKENS, sizes) for one in kept]


@pytest.mark.parametrize("stage", ["first", "later"])
@pytest.mark.parametrize("budget", [1, 2, 9, 40])
@pytest.mark.parametrize("kind", RECYCLERS)
def test_images_alike_are_planned_as_each_alone(kind: str, budget: int, stage: str) -> None:
    before, importance, tokens = standing(3), maps(3), TOKENS
    rows = torch.randn(3, TOKENS, 8, generator=torch.Generator().manual_seed(2)).double()
    ranking = TopK().rank(importance, GRID, budget, [0] * 3)
    held = None
    if stage == "later":
        held, tokens = Selection.stacked(before), 40
        ranking, rows, importance = ranking.of_those(held.kept), rows[:, :tokens], importance.gather(1, held.kept)
    recycler = Recycler(kind, cells=4, share=0.3)
    plan = recycler.plan(ranking, GRID, budget, importance, held)
    made = (plan.settled(rows) if isinstance(plan, Absorption) else plan).unbind()
    for number, mine in enumerate(made):
        earlier = before[number] if stage == "later" else None
        one = recycler.plan(ranking.order[number], GRID, budget, importance[number], earlier)
        alone = one.settled(rows[number]) if isinstance(one, Absorption) else one
        assert torch.equal(mine.kept, alone.kept) and torch.equal(mine.source, alone.source)
        assert torch.equal(mine.weights, alone.weights) and torch.equal(mine.sizes, alone.sizes)
        assert mine.kept.shape == (budget,) and bool((mine.kept.diff() > 0).all())
        if kind == "nearest" or (kind != "none" and budget > 1):
            assert int(mine.sizes.sum()) == (TOKENS if earlier is None else int(earlier.sizes.sum()))


def asked(prefill: Prefill, layer: int) -> None:
    rows, valid = prefill.instruction_on_device
    whole, some = layer_attention(prefill, layer), layer_attention(prefill, layer, rows)
    query = whole.query.gather(2, rows[:, None, :, None].expand(-1, whole.query.shape[1], -1, whole.query.shape[3]))
    counted = valid[:, None, :, None]
    torch.testing.assert_close(some.query * counted, query * counted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(some.key, whole.key, rtol=1e-10, atol=1e-12)
    assert some.scale == whole.scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_queries_of_some_rows_are_those_of_all(tiny_vlm: Any, tiny_processor: Any, layer: int, kind: str) -> None:
    model = tiny_vlm(dtype=torch.float64)
    attention = model.get_decoder().layers[layer].self_attn
    asked(read_prompt(model, batch(tiny_processor, kind, torch.float64)), layer)
    assert not attention.q_proj._forward_hooks and not attention.v_proj._forward_pre_hooks


class Doubled(Tensor):
    """A weight that is twice what its numbers say, to `linear` alone."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * made if function is torch.nn.functional.linear else made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [Qwen2RMSNorm, LlamaRMSNorm, Gemma3RMSNorm, Cohere2LayerNorm])
def test_keys_behind_a_norm_are_projected_as_the_model_does(kind: Any, bias: bool) -> None:
    torch.manual_seed(0)
    norm, projection = kind(24, eps=1e-3).double(), torch.nn.Linear(24, 8, bias=bias).double()
    with torch.no_grad():
        norm.weight.normal_()
        hidden = 3 * torch.randn(2, 5, 24, dtype=torch.float64)
        assert gain_offset(kind) == {Gemma3RMSNorm: 1.0, Cohere2LayerNorm: None}.get(kind, 0.0)
        for dtype, close in ((torch.float64, 0), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0)):
            norm, projection, hidden = norm.to(dtype), projection.to(dtype), hidden.to(dtype)
            wanted = projection(norm(hidden))
            product, factor, shift = projected(norm, projection, hidden)
            torch.testing.assert_close(scaled(product, factor, shift), wanted, rtol=close, atol=close)
            some = _normed(norm, hidden[:, 2:], None if factor is None else factor[:, 2:])
            assert some.dtype == dtype
            torch.testing.assert_close(some, norm(hidden[:, 2:]), rtol=close, atol=close)
        watched = norm.register_forward_hook(lambda module, args, made: 2 * made)
        assert torch.equal(scaled(*projected(norm, projection, hidden)), projection(norm(hidden)))
        watched.remove()
        projection.weight = torch.nn.Parameter(projection.weight.as_subclass(Doubled))  # as quantised weights are
        assert torch.equal(scaled(*projected(norm, projection, hidden)), projection(norm(hidden)))
        assert float((projection(norm(hidden)) - wanted).abs().max()) > 0


def test_norms_that_are_not_understood_are_run() -> None:
    assert [gain_offset(kind) for kind in (torch.nn.LayerNorm, torch.nn.Identity, torch.nn.Module)] == [None] * 3


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "gemma3", "internvl", "smolvlm"])
def test_queries_of_some_rows_in_every_family(family: str) -> None:
    asked(read_prompt(build(family, torch.float64), family_batch(family, "mixed", torch.float64)), 0)
