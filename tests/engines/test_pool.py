"""Orders spread over Ray's workers: each once, whatever dies."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.engines.orders import Notes, broken, dying, mistaken
from vprune import VPruneError
from vprune.eval.engines.pool import Pool, spread

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
ORDERS = [str(i) for i in range(12)]


def two(retries: int = 3) -> Pool:
    return Pool(workers=2, gpus=0, threads=1, retries=retries)


def test_every_order_once_out_of_order_and_loaded_once_a_worker(tmp_path: Path) -> None:
    results = list(spread(two(), partial(Notes, tmp_path), ORDERS))
    assert sorted(place for place, _ in results) == list(range(12))
    assert all(result[0] == ORDERS[place].upper() for place, result in results)
    assert results[0][0] != 0  # the slow first one was overtaken
    workers = {result[1] for _, result in results}
    assert len(workers) == 2
    assert {f"loaded-{pid}" for pid in workers} == {path.name for path in tmp_path.glob("loaded-*")}


def test_a_killed_worker_is_replaced_and_its_order_done_again(tmp_path: Path) -> None:
    results = list(spread(two(), partial(Notes, tmp_path, "5", 1), ORDERS))
    assert sorted(place for place, _ in results) == list(range(12))
    assert len((tmp_path / "begun-5").read_text().split()) == 2
    assert all(len((tmp_path / f"begun-{order}").read_text().split()) == 1 for order in ORDERS if order != "5")


def test_an_order_that_kills_every_worker_is_named(tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match="the worker died 2 times at 5: memory"):
        list(spread(two(retries=1), partial(Notes, tmp_path, "5", 99), ORDERS))
    assert len((tmp_path / "begun-5").read_text().split()) == 2


def test_a_worker_that_cannot_load_tells_why() -> None:
    with pytest.raises(VPruneError, match="the model is not there"):
        list(spread(two(), mistaken, ORDERS))


def test_workers_that_die_while_loading_are_not_started_for_ever() -> None:
    with pytest.raises(VPruneError, match=r"died while they were loading|Ray gave up after 0 of 12"):
        list(spread(two(retries=1), dying, ORDERS))


def test_a_failure_in_a_worker_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a Ray worker failed:.*orders\.py.*ZeroDivisionError"):
        list(spread(two(), broken, ORDERS))


def test_no_orders_need_no_cluster() -> None:
    assert list(spread(two(), mistaken, [])) == []


def test_more_gpus_than_there_are_is_told_at_once() -> None:
    with pytest.raises(VPruneError, match=r"engine\.workers=2 engine\.gpus=400 need 800 GPUs and Ray sees"):
        list(spread(Pool(workers=2, gpus=400), mistaken, ORDERS))
