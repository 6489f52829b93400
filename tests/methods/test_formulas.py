"""Each published method on an example small enough to be worked out by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import vprune
from tests.conftest import GRID
from tests.exactness.prompts import batch
from tests.methods.prefills import attentions, deep_vlm, prefill, rows_of
from vprune.baselines.attention import raters
from vprune.baselines.fitprune import FRACTIONS, FitPrune, concentration, measured
from vprune.baselines.hired import HiRED, quotas
from vprune.baselines.sparsevlm import SparseVLM, density_peaks
from vprune.baselines.staged import spent
from vprune.pruner import load_method
from vprune.records import Prefill, VisualTokens

TOKENS = GRID * GRID
IMAGE = 4


@pytest.fixture(scope="module")
def deep() -> Any:
    return deep_vlm()


def plan(method: str, given: Prefill, scores: list[float] | None, keep: int, **options: Any) -> Any:
    importance = None if scores is None else torch.tensor(scores)
    return load_method(method, keep=keep, **options).plan(given, [importance], keep)[0]


def visual_columns(inputs: Any) -> torch.Tensor:
    return (inputs["input_ids"][0] == IMAGE).nonzero().squeeze(-1)


# In the decoder -------------------------------------------------------------------------------------------------------


def test_fastv_keeps_what_the_last_token_attends_to(deep: Any, tiny_processor: Any) -> None:
    inputs = batch(tiny_processor, "single", torch.float64)
    # (2 * 1 + 6 * share) / 8 = 0.5, so share = 1/3: 12 of 36 tokens, from layer 2 on.
    with torch.no_grad(), vprune.prune(deep, "fastv", keep=0.5) as pruning:
        deep(**inputs)
    told = pruning.last
    assert told is not None and [(stage.layer, stage.tokens_after) for stage in told.stages] == [(2, 12)]
    columns = visual_columns(inputs)
    last = attentions(deep, inputs, 1)[0, :, -1].mean(0)[columns]  # K - 1 = 1
    torch.testing.assert_close(told.importance.flatten().double(), last, rtol=1e-5, atol=1e-9)
    assert told.kept.tolist() == last.topk(12).indices.sort().values.tolist()


def test_fastv_spends_no_more_than_the_budget() -> None:
    # R = 50% after 2 of 32 layers is 53.125% in the mean; 64 of 576 tokens leave (3.56 - 2) / 30 = 5.2% of them.
    assert load_method("fastv", keep=0.53125).fitted(32).schedule == ((2, 0.5),)
    ((layer, share),) = load_method("fastv", keep=64 / 576).fitted(32).schedule
    assert layer == 2 and share == pytest.approx((64 / 576 * 32 - 2) / 30)
    # 2 of 8 layers alone are a quarter: a tenth can only be met before the first.
    assert load_method("fastv", keep=0.1).fitted(8).schedule == ((0, 0.1),)
    assert load_method("fastv", keep=0.25).fitted(8).schedule == ((0, 0.25),)
    assert load_method("fastv", keep=64).fitted(32).schedule == ((0, 64),)
    with pytest.raises(vprune.VPruneError, match="layer=40: the decoder has layers 0 to 31"):
        load_method("fastv", layer=40).fitted(32)
    with pytest.raises(vprune.VPruneError, match="layer=0"):
        load_method("fastv", layer=0)


def test_pyramiddrop_halves_after_every_quarter(deep: Any, tiny_processor: Any) -> None:
    inputs = batch(tiny_processor, "single", torch.float64)
    with torch.no_grad(), vprune.prune(deep, "pyramiddrop", keep=0.46875) as pruning:
        deep(**inputs)
    told = pruning.last
    # 36, 18, 9, 4 of 36 in two layers each.
    assert told is not None and [(s.layer, s.tokens_after) for s in told.stages] == [(2, 18), (4, 9), (6, 4)]
    last = attentions(deep, inputs, 2)[0, :, -1].mean(0)[visual_columns(inputs)]  # the layer that comes next
    assert told.stages[0].kept.tolist() == last.topk(18).indices.sort().values.tolist()
    # Below the published mean the pyramid is scaled: x (1 + 1/2 + 1/4 + 1/8) / 4 = 0.1.
    scaled = load_method("pyramiddrop", keep=0.1).fitted(32).schedule
    assert [layer for layer, _ in scaled] == [0, 8, 16, 24]
    assert [share for _, share in scaled] == pytest.approx([0.1 / 0.46875 / 2**stage for stage in range(4)])
    # Above it the first stages keep all: (1 + 1 + x + x/2) / 4 = 0.8, x = 0.8.
    assert load_method("pyramiddrop", keep=0.8).fitted(32).schedule == (
        (16, pytest.approx(0.8)),
        (24, pytest.approx(0.4)),
    )


def test_sparsevlm_raters_are_the_words_above_the_mean() -> None:
    tokens, text = [[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 9.0], [1.0, 0.0]]
    # v.t = 2, 0, 1 for both tokens: softmax 0.665, 0.090, 0.245; only the first is above 1/3.
    assert raters(prefill(tokens, text)).tolist() == [[True, False, False]]
    # Words that no token tells apart rate together.
    assert raters(prefill([[0.0, 0.0]], text)).tolist() == [[True, True, True]]


def test_sparsevlm_score_is_the_raters_attention(deep: Any, tiny_processor: Any) -> None:
    inputs = batch(tiny_processor, "single", torch.float64)
    with torch.no_grad(), vprune.prune(deep, "sparsevlm", keep=0.5) as pruning:
        deep(**inputs)
        embedded = deep.get_input_embeddings()(inputs["input_ids"])[0]
        seen = torch.cat(list(deep.model.get_image_features(inputs["pixel_values"]).pooler_output))
    assert pruning.last is not None
    first = pruning.last.stages[0]
    columns = visual_columns(inputs)
    words = embedded[int(columns[-1]) + 1 :]
    relevance = (seen @ words.T).softmax(-1).mean(0)
    rating = (relevance > relevance.mean()).nonzero().squeeze(-1) + int(columns[-1]) + 1
    expected = attentions(deep, inputs, first.layer)[0][:, rating][..., columns].mean((0, 1))
    torch.testing.assert_close(first.importance.flatten().double(), expected, rtol=1e-5, atol=1e-9)


def test_sparsevlm_clusters_around_density_peaks() -> None:
    # On a line: 0, 1, 2 and 10, 11, with the 5 nearest = all. Mean squared distances: (0+1+4+100+121)/5 = 45.2,
    # (1+0+1+81+100)/5 = 36.6, (4+1+0+64+81)/5 = 30, (100+81+64+0+1)/5 = 49.2, (121+100+81+1+0)/5 = 60.6, so that the
    # densest is 2. Nearest denser: 0 -> 1 (1), 1 -> 2 (1), 10 -> 2 (8), 11 -> 10 (1), and 2 gets the largest, 11.
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    scale = 0.1  # densities e^-0.452, e^-0.366, e^-0.300, e^-0.492, e^-0.606; rho delta: 2 leads, then 10
    peaks, nearest = density_peaks(line * scale, 2)
    assert peaks.tolist() == [2, 3] and nearest.tolist() == [0, 0, 0, 1, 1]
    # 576 tokens, 66 stay: of the pruned ones 30% are clustered into n/10 + 1 rows, which are paid from the 66.
    method = SparseVLM(keep=0.1)
    recycled, clusters = method.clusters_of(576, 66)
    assert recycled == int(0.3 * (576 - 66 + clusters)) == 157 and clusters == 157 // 10 + 1
    assert method.clusters_of(576, 10)[1] == 5  # at most half


def test_sparsevlm_recycles_the_best_of_the_pruned() -> None:
    tokens = [[float(10 * (n % 2))] for n in range(12)]  # two clusters: even and odd ones
    scores = [12.0 - n for n in range(12)]
    made = plan("sparsevlm", prefill(tokens), scores, 4, recycled=0.5)
    # One cluster: 12 - 4 + 1 = 9 pruned, 4 recycled; 4 // 10 + 1 = 1 row. Pure 0, 1, 2; recycled 3, 4, 5, 6.
    assert [row for row, parts in rows_of(made).items() if len(parts) == 1] == [0, 1, 2]
    (merged,) = [parts for parts in rows_of(made).values() if len(parts) > 1]
    assert merged == {3: 0.25, 4: 0.25, 5: 0.25, 6: 0.25}
    assert made.sizes.sum() == 7 and (made.source < 0).nonzero().flatten().tolist() == [7, 8, 9, 10, 11]


def test_sparsevlm_stages_lie_at_2_6_15_of_32() -> None:
    stages = load_method("sparsevlm", keep=64 / 576).fitted(32).schedule
    # 2 + x (4 + 9/2 + 17/4) = 32 * 64/576, so x = 0.1220.
    assert [layer for layer, _ in stages] == [2, 6, 15]
    assert [share for _, share in stages] == pytest.approx([0.1220, 0.0610, 0.0305], abs=1e-4)
    assert [layer for layer, _ in load_method("sparsevlm", keep=0.1).fitted(8).schedule] == [0, 2, 4]


def test_vtw_leaves_at_the_layer_that_the_budget_pays_for(deep: Any, tiny_processor: Any) -> None:
    inputs = batch(tiny_processor, "single", torch.float64)
    with torch.no_grad(), vprune.prune(deep, "vtw", keep=0.5) as pruning:
        deep(**inputs)
    assert pruning.last is not None and [(s.layer, s.tokens_after) for s in pruning.last.stages] == [(4, 1)]
    # 0.3 of 8 layers are 2.4: three layers read 2.4 / 3 = 80% of the tokens, evenly spaced.
    with torch.no_grad(), vprune.prune(deep, "vtw", keep=0.3) as pruning:
        deep(**inputs)
    assert pruning.last is not None and [(s.layer, s.tokens_after) for s in pruning.last.stages] == [(0, 28), (3, 1)]


def test_fitprune_fits_one_loss_for_all_layers() -> None:
    # Layer 0 spreads its attention evenly (c(f) = f), layer 1 has 0.9 of it on a tenth of the tokens. At the loss alpha
    # layer 0 needs 1 - alpha. keep = 0.45: with alpha = 0.2, 0.8 and, for 0.8 of the attention, 0.05.
    sharp = [0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0]
    method = load_method("fitprune", keep=0.425, statistics=[list(FRACTIONS), sharp])
    assert method.fitted(2).schedule == ((0, pytest.approx(0.8)), (1, pytest.approx(0.05)))
    # Four layers take the two rows in halves, and what is gone is gone.
    assert [layer for layer, _ in method.fitted(4).schedule] == [0, 2]
    back = load_method("fitprune", keep=0.05, statistics=[sharp, list(FRACTIONS)]).fitted(2).schedule
    assert back == ((0, pytest.approx(0.05)),)
    for row in ([0.5], [0.5, 0.4, 0.9, 0.95, 0.98, 0.99, 1.0]):
        with pytest.raises(vprune.VPruneError, match="rising parts of the attention"):
            load_method("fitprune", statistics=[row])
    with pytest.raises(vprune.VPruneError, match="needs the statistics"):
        FitPrune()


def test_fitprune_score_and_statistics(deep: Any, tiny_processor: Any) -> None:
    inputs = batch(tiny_processor, "single", torch.float64)
    columns = visual_columns(inputs)
    kept = slice(int(columns[-1]) + 1, None)
    expected, curves = [], []
    for layer in range(8):
        seen = attentions(deep, inputs, layer)[0]
        cross, own = seen[:, kept][..., columns].mean((0, 1)), seen[:, columns][..., columns].mean((0, 1))
        expected.append(cross * own)
        held = torch.stack([one.sort(descending=True).values.cumsum(0) / one.sum() for one in (cross, own)]).amin(0)
        curves.append(held[17])  # half of 36 tokens
    with torch.no_grad(), vprune.prune(deep, "fitprune", keep=0.5, stages=[[3, 0.5]]) as pruning:
        deep(**inputs)
    assert pruning.last is not None
    torch.testing.assert_close(pruning.last.importance.flatten().double(), expected[3], rtol=1e-5, atol=1e-10)
    told = torch.tensor(measured(deep, [inputs]))
    assert told.shape == (8, len(FRACTIONS))
    torch.testing.assert_close(told[:, FRACTIONS.index(0.5)], torch.stack(curves).float(), rtol=1e-4, atol=1e-6)
    # 0.1 of 4 tokens is less than one: 0.4 of the largest.
    assert concentration(torch.tensor([1.0, 4.0, 3.0, 2.0]))[2].item() == pytest.approx(0.4 * 0.4)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "vtw", "dart", "fitprune", "vflowopt"])
@pytest.mark.parametrize("layers", [3, 8, 28, 32])
@pytest.mark.parametrize("keep", [0.02, 0.1, 0.3, 0.5, 0.77, 0.99])
def test_the_mean_over_the_layers_is_the_budget(name: str, layers: int, keep: float) -> None:
    schedule = list(load_method(name, keep=keep).fitted(layers).schedule)
    shares = [float(share) for _, share in schedule]
    assert all(0 < share <= 1 for share in shares) and sorted(shares, reverse=True) == shares
    assert spent([(layer, float(share)) for layer, share in schedule], layers) == pytest.approx(keep, abs=2e-5)


# Before the decoder ---------------------------------------------------------------------------------------------------


def test_divprune_is_greedy_max_min() -> None:
    # Directions in degrees; 1 - cos grows with the angle between them. Farthest from its nearest: 180 (90 from 90).
    # Then farthest from 180: 0; then from both: 90; then 10 (10 from 0) before 5.
    angles = torch.tensor([0.0, 5.0, 10.0, 90.0, 180.0]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], -1) * torch.tensor([[1.0], [7.0], [2.0], [3.0], [0.5]])
    given = prefill(tokens.tolist())
    assert plan("divprune", given, None, 1).kept.tolist() == [4]
    assert plan("divprune", given, None, 2).kept.tolist() == [0, 4]
    assert plan("divprune", given, None, 3).kept.tolist() == [0, 3, 4]
    assert plan("divprune", given, None, 4).kept.tolist() == [0, 2, 3, 4]


def test_cdpruner_maximises_the_determinant() -> None:
    # Unit tokens at 0, 30 and 90 degrees; relevances as scaled: (s - min) / (max - min) = 1, 0.9, 0.5, and a fourth at
    # 90 degrees with 0. det of pairs: r_i^2 r_j^2 (1 - cos^2): {0, 30}: 0.81 * 0.25 = 0.2025; {0, 90}: 0.25 * 1 = 0.25.
    angles = torch.tensor([0.0, 30.0, 90.0, 90.0]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], -1)
    assert plan("cdpruner", prefill(tokens.tolist()), [0.2, 0.18, 0.1, 0.0], 2).kept.tolist() == [0, 2]
    # With 0.9 -> 0.99: 0.98 * 0.25 = 0.245 < 0.25 still; with the third at 0.49: 0.2401 < 0.245, and 30 degrees win.
    assert plan("cdpruner", prefill(tokens.tolist()), [0.2, 0.198, 0.098, 0.0], 2).kept.tolist() == [0, 1]


def test_similarity_is_the_mean_cosine() -> None:
    tokens, text = [[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], [[5.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    # Mean of cosines to x, y, x: 2/3, 1/3 and 1/sqrt(2).
    wanted = torch.tensor([2 / 3, 1 / 3, 2**-0.5])
    for negated in (False, True):
        method = load_method("trim", negated=negated)
        assert method.scorer is not None
        (told,) = method.scorer(prefill(tokens, text))
        torch.testing.assert_close(told, (-wanted if negated else wanted).softmax(0))


def test_trim_appends_the_mean_of_the_rest() -> None:
    made = plan("trim", prefill([[1.0]] * 5), [0.1, 0.5, 0.2, 0.1, 0.1], 3)
    assert rows_of(made) == {1: {1: 1.0}, 2: {2: 1.0}, 3: {0: 1 / 3, 3: 1 / 3, 4: 1 / 3}} or rows_of(made) == {
        1: {1: 1.0}, 2: {2: 1.0}, 3: {0: 0.333333, 3: 0.333333, 4: 0.333333},
    }  # fmt: skip
    # Quartiles of 1, 1, 1, 1, 2, 2, 9, 9: Q1 = 1, Q3 = (2 + 9 at a quarter) = 3.75; 1.5 times 2.75 above it: 7.875.
    scores = [9.0, 1.0, 1.0, 2.0, 1.0, 9.0, 2.0, 1.0]
    made = plan("trim", prefill([[1.0]] * 8), scores, 6, adaptive=True)
    assert made.kept.numel() == 3 and {0, 5} < set(made.kept.tolist()) and int(made.sizes.sum()) == 8


def test_dart_keeps_what_duplicates_the_pivots_least() -> None:
    from vprune.baselines.dart import least_duplicated

    angles = torch.tensor([0.0, 10.0, 20.0, 80.0, 90.0, 170.0]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], -1)
    # Pivots: token 0 and a word at 90 degrees. Five are kept: 0, two for each pivot. Least like 0: 170 and 90 degrees;
    # least like the word of what is left: 10 (cos 80) and 20.
    text = torch.tensor([[0.0, 3.0]])
    assert least_duplicated(tokens, torch.tensor([0]), text, 5).tolist() == [0, 5, 4, 1, 2]
    # Four: two for the first pivot, one for the second.
    assert least_duplicated(tokens, torch.tensor([0]), text, 4).tolist() == [0, 5, 4, 1]


def test_dart_pivots_have_the_largest_keys(deep: Any, tiny_processor: Any) -> None:
    inputs = batch(tiny_processor, "single", torch.float64)
    met: list[torch.Tensor] = []
    handle = deep.get_decoder().layers[2].self_attn.k_proj.register_forward_hook(lambda _, args, out: met.append(out))
    with torch.no_grad():
        hidden = deep(**inputs, output_hidden_states=True).hidden_states[2][0]
        with vprune.prune(deep, "dart", keep=0.5) as pruning:
            deep(**inputs)
    handle.remove()
    assert pruning.last is not None and [(s.layer, s.tokens_after) for s in pruning.last.stages] == [(2, 12)]
    norms = met[0][0].abs().sum(-1)
    columns = visual_columns(inputs)
    words = torch.arange(int(columns[-1]) + 1, len(norms))
    seeds = norms[columns].topk(4).indices
    pivots = torch.cat([columns[seeds], words[norms[words].topk(4).indices]])
    rows = torch.nn.functional.normalize(hidden, dim=-1)
    kept = seeds.tolist()
    for pivot in pivots.tolist():  # 12 - 4 = 8 tokens for 8 pivots: one each
        likeness = (rows[columns] @ rows[pivot]).tolist()
        kept.append(min((n for n in range(TOKENS) if n not in kept), key=lambda n: likeness[n]))
    assert pruning.last.kept.tolist() == sorted(kept)


# With the vision tower's attention and keys ---------------------------------------------------------------------------


def test_visionzip_dominant_and_contextual() -> None:
    keys = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0], [1.0, 0.2], [0.2, 1.0], [0.0, 1.0], [1.0, 0.0]]
    scores = [0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    made = plan("visionzip", prefill([[1.0]] * 8, keys=keys), scores, 4, contextual=0.5)
    # Dominant 0 and 1; of the six others every third is a target: 2 and 5. 4 and 7 lie along 2's key, 3 and 6 along
    # 5's. A row: half the target, half the mean of the two that joined.
    assert rows_of(made) == {0: {0: 1.0}, 1: {1: 1.0}, 2: {2: 0.5, 4: 0.25, 7: 0.25}, 5: {3: 0.25, 5: 0.5, 6: 0.25}}
    assert made.sizes.tolist() == [1, 1, 3, 3]
    # 54 + 10 of 64; of a single row nothing is contextual.
    assert [load_method("visionzip").targets_of(budget) for budget in (64, 57, 1)] == [10, 9, 0]  # type: ignore[attr-defined]


def test_prumerge_enriches_by_the_nearest_keys() -> None:
    keys = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0]]
    scores = [0.5, 0.1, 0.4, 0.2, 0.0]
    made = plan("prumerge", prefill([[1.0]] * 5, keys=keys), scores, 2, neighbours=1)
    # Kept 0 and 2. Nearest of 0 is 1, nearest of 2 is 3; 4 is near neither. x_0 + 0.1 x_1 over 1.1, x_2 + 0.2 x_3 over
    # 1.2.
    assert rows_of(made) == {
        0: {0: pytest.approx(1 / 1.1, abs=1e-6), 1: pytest.approx(0.1 / 1.1, abs=1e-6)},
        2: {2: pytest.approx(1 / 1.2, abs=1e-6), 3: pytest.approx(0.2 / 1.2, abs=1e-6)},
    }
    assert made.source.tolist() == [0, 0, 1, 1, -1]


def test_prumerge_plus_spreads_the_rest_evenly() -> None:
    scores = [1.0] * 16
    scores[3] = 9.0  # the only one above Q3 + 1.5 (Q3 - Q1) = 1
    keys = [[1.0, float(n)] for n in range(16)]
    made = plan("prumerge_plus", prefill([[1.0]] * 16, keys=keys), scores, 4, neighbours=1)
    # Of the 15 others, three at (i + 1/2) 15 / 3 = 2.5, 7.5, 12.5: numbers 2, 7, 12 among them, tokens 2, 8, 13.
    assert made.kept.tolist() == [2, 3, 8, 13]
    # No more than stand out: one outlier, and three evenly spaced ones for it.
    assert plan("prumerge_plus", prefill([[1.0]] * 16, keys=keys), scores, 12, adaptive=True).kept.numel() == 4
    assert plan("prumerge", prefill([[1.0]] * 16, keys=keys), scores, 12, adaptive=True).kept.tolist() == [3]


def test_tome_merges_the_most_similar_pairs() -> None:
    keys = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.4, 1.0], [-1.0, 0.0], [-1.0, 0.5]]
    # A = 0, 2, 4 and B = 1, 3, 5. cos: 0-1 0.995, 2-3 0.928, 4-5 0.894. One goes: 0 into 1.
    made = plan("tome", prefill([[1.0]] * 6, keys=keys), [1.0] * 6, 5)
    assert rows_of(made) == {1: {0: 0.5, 1: 0.5}, 2: {2: 1.0}, 3: {3: 1.0}, 4: {4: 1.0}, 5: {5: 1.0}}
    # Two: both pairs. Four: three pairs in the first round, 1, 3, 5 are left with sizes 2 and keys (1, 0.05),
    # (0.2, 1), (-1, 0.25); A = 1, 5 and B = 3: cos 0.245 and 0.048, so 1 joins 3.
    made = plan("tome", prefill([[1.0]] * 6, keys=keys), [1.0] * 6, 2)
    assert rows_of(made) == {3: {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}, 5: {4: 0.5, 5: 0.5}}
    assert made.sizes.tolist() == [4, 2] and load_method("tome").size_aware


def test_hired_quotas_follow_the_content() -> None:
    # 10 rows for 3 : 1 : 0, one each at least: 7 left, 5.25 and 1.75 and 0 -> 6, 2 (the larger rest first), 1 + 0.
    assert quotas(10, [3.0, 1.0, 0.0], [16, 16, 16], 1) == [6, 3, 1]
    assert quotas(10, [9.0, 1.0], [4, 16], 1) == [4, 6]  # what a full crop cannot take
    assert quotas(6, [0.0, 0.0], [4, 4], 1) == [3, 3]
    tiles = [VisualTokens(0, n, torch.arange(4) + 4 * n, (1, 2, 2), picture=0) for n in range(2)]
    maps = [torch.tensor([0.3, 0.2, 0.1, 0.0]), torch.tensor([0.05, 0.15, 0.0, 0.0])]
    given = prefill([[1.0]] * 8)
    given.images = tiles
    # 4 rows for 0.6 : 0.2.
    first, second = HiRED(keep=0.5).plan(given, maps, 0.5)
    assert first.kept.tolist() == [0, 1, 2] and second.kept.tolist() == [1]
    # A picture of one crop: the best by class attention.
    assert plan("hired", prefill([[1.0]] * 4), [0.1, 0.4, 0.2, 0.3], 2).kept.tolist() == [1, 3]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_fastervlm_is_class_attention(tiny_vlm: Any, tiny_processor: Any, tower: str) -> None:
    inputs = batch(tiny_processor, "single")
    eager = tiny_vlm(tower=tower, attention="eager")
    with torch.no_grad():
        seen = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2][0]
        expected = seen[:, 0, 1:].mean(0) if tower == "clip" else seen.mean((0, 1))
        with vprune.prune(tiny_vlm(tower=tower), "fastervlm", keep=7) as pruning:
            tiny_vlm(tower=tower)(**inputs)
    assert pruning.last is not None
    assert pruning.last.kept.tolist() == expected.topk(7).indices.sort().values.tolist()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_keys_are_the_towers_own(tiny_vlm: Any, tiny_processor: Any, tower: str) -> None:
    """ToMe on a true model, against the keys that the layer's projection gives."""
    model, inputs = tiny_vlm(tower=tower), batch(tiny_processor, "single")
    met: list[torch.Tensor] = []
    layer = [m for name, m in model.model.vision_tower.named_modules() if name.endswith("k_proj")][-2]
    handle = layer.register_forward_hook(lambda _, args, out: met.append(out))
    try:
        with torch.no_grad(), vprune.prune(model, "tome", keep=TOKENS - 1) as pruning:
            model(**inputs)
    finally:
        handle.remove()
    keys = met[0][0, -TOKENS:].view(TOKENS, 4, -1).mean(1)
    likeness = torch.nn.functional.cosine_similarity(keys[::2, None], keys[None, 1::2], dim=-1)
    best = int(likeness.argmax())
    gone, into = 2 * (best // (TOKENS // 2)), 2 * (best % (TOKENS // 2)) + 1
    assert pruning.last is not None and gone not in pruning.last.kept.tolist()
    assert int(pruning.last.kept[pruning.last.source[gone]]) == into


def test_restore_counts_tokens_by_their_distance() -> None:
    # Two directions; anchors 0 and 1 (farthest apart). 0, 2, 3, 4 point along x, 1 and 5 along y.
    tokens = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.1], [1.0, 0.1], [0.1, 1.0]]
    made = plan("restore", prefill(tokens), None, 2, decay=1.0)
    # Medians of 0, 2, 3, 4 and of 1, 5: 2 and 1. Distances on a grid of 6 columns, in fifths.
    assert made.kept.tolist() == [1, 2] and made.source.tolist() == [1, 0, 1, 1, 1, 0]
    e = torch.tensor([-0.2, -0.4, -0.8]).exp()  # one, two and four fifths away
    assert made.mass is not None
    torch.testing.assert_close(made.mass, torch.stack([1 + e[2], 1 + e[1] + e[0] + e[1]]))
    even = plan("restore", prefill(tokens), None, 2, decay=0.0)
    assert even.mass.tolist() == [2.0, 4.0] == even.sizes.tolist()


def test_restore_reaches_the_attention(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(dtype=torch.float64), batch(tiny_processor, "single", torch.float64)
    logits = []
    for options in ({"decay": 0.0}, {"decay": 3.0}, {"size_aware": False}):
        with torch.no_grad(), vprune.prune(model, "restore", keep=6, **options):
            logits.append(model(**inputs).logits[0, -1])
    assert all(float((one - other).abs().max()) > 1e-3 for one, other in pairwise(logits))
