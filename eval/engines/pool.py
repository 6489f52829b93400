"""Work spread over Ray Data's actor pool: what is loaded once a worker, every order done exactly once.

    for place, masks in spread(pool, partial(make_segmenter, config), paths):
        ...

`spread` knows nothing of models: `start` is called once in every worker and returns what does the work there, so any
command that maps a list of orders to results can use it. Results come as they are ready and carry their order's place.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vprune.errors import VPruneError

Order = TypeVar("Order")
Result = TypeVar("Result")

_WITHOUT_GPUS = 2  # workers, where nobody says how many
_OBJECT_STORE_BYTES = 2**29  # orders and results are small; Ray would set a third of the memory aside
_REMEDY = (
    "memory is what is short as a rule; use fewer workers or a smaller batch_size. "
    "What is finished is kept, and the same command goes on from there"
)


@dataclass(frozen=True)
class Pool:
    """How many workers there are, and what each of them gets; conf/engine/ray.yaml says it field by field.

    Raises VPruneError for a value out of range, and where Ray is not installed.
    """

    workers: int | None = None
    gpus: float | None = None
    cpus: float = 1
    threads: int | None = None
    retries: int = 3
    address: str | None = None

    def __post_init__(self) -> None:
        for key, least, optional, whole in (
            ("workers", 1, True, True),
            ("gpus", 0, True, False),
            ("cpus", 0, False, False),
            ("threads", 1, True, True),
            ("retries", 0, False, True),
        ):
            value = getattr(self, key)
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if (optional and value is None) or (number and value >= least):
                continue
            expected = f"{'an integer' if whole else 'a number'} >= {least}{' or null' if optional else ''}"
            raise VPruneError(f"engine.{key}={value}: expected {expected}")
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise VPruneError(f"engine.gpus={self.gpus}: a part of a GPU (0.5), or whole ones")
        _ray()


def spread(
    pool: Pool, start: Callable[[], Callable[[Order], Result]], orders: Sequence[Order]
) -> Generator[tuple[int, Result]]:
    """The place and the result of every order, each exactly once, in the order in which they are ready.

    `start`, the orders and the results travel by pickle. A worker that dies is started again, and the order that it was
    at is given out again, `pool.retries` times at most.

    Raises VPruneError where a worker does, where an order's worker dies each time (naming the order), and where Ray
    cannot be reached; RuntimeError with the worker's own traceback for any other failure.
    """
    if not orders:
        return
    ray = _connected(pool)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    workers, gpus = _shares(ray, pool)
    ledger = ray.remote(num_cpus=0)(_Ledger).remote()
    placed = [{"place": place, "order": pickle.dumps(order)} for place, order in enumerate(orders)]
    done: set[int] = set()
    try:
        # A block an order: the finest that can be given out again, and results come one by one.
        results = ray.data.from_items(placed, override_num_blocks=len(placed)).map_batches(
            _Worker,
            fn_constructor_args=(pickle.dumps(start), pool.threads or _threads_here(), pool.retries, workers, ledger),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=pool.cpus,
            num_gpus=gpus,
        )
        for row in results.iter_rows():
            place = int(row["place"])
            if place not in done:  # one that was given out twice may come back twice
                done.add(place)
                yield place, _opened(row["outcome"])
    except ray.exceptions.RayError as error:
        raise VPruneError(_lost(len(done), len(orders), error)) from error
    if len(done) < len(orders):
        raise VPruneError(f"{len(orders) - len(done)} of {len(orders)} orders never came back from Ray; run it again")


class _Ledger:
    """An actor that outlives the workers, and knows how often each order was begun.

    Ray itself retries without end: an order that kills every worker would go round for ever.
    """

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()
        self._starts = 0

    def begins(self, place: int) -> int:
        """How often the order at `place` has been begun, this time included."""
        self._starts = 0
        self._begun[place] += 1
        return self._begun[place]

    def starts(self) -> int:
        """How often a worker has begun to load, this time included, since an order was last begun."""
        self._starts += 1
        return self._starts


class _Worker:
    """One actor: makes what does the work, then does an order a call.

    Whatever goes wrong is told as a result: Ray would take an exception for a failure of its own.
    """

    def __init__(self, start: bytes, threads: int, retries: int, workers: int, ledger: Any) -> None:
        import torch

        torch.set_num_threads(threads)
        self._retries, self._ledger = retries, ledger
        self._work: Any = None
        self._failed: tuple[str, Any] | None = None
        try:
            deaths = _asked(ledger.starts.remote()) - workers
            if deaths > retries:
                raise VPruneError(f"{deaths} workers died while they were loading: {_REMEDY}")
            self._work = pickle.loads(start)()
        except Exception as error:  # noqa: BLE001 - told by the process that waits for results
            self._failed = _failure(error)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(block["place"], block["order"], strict=True)
        return {"place": block["place"], "outcome": [pickle.dumps(self._outcome(int(p), order)) for p, order in pairs]}

    def _outcome(self, place: int, order: bytes) -> tuple[str, Any]:
        if self._failed is not None:
            return self._failed
        try:
            content = pickle.loads(order)
            times = _asked(self._ledger.begins.remote(place))
            if times > self._retries + 1:
                raise VPruneError(f"the worker died {times - 1} times at {_shown(content)}: {_REMEDY}")
            return "result", self._work(content)
        except Exception as error:  # noqa: BLE001 - as above
            return _failure(error)


def _asked(reference: Any) -> int:
    import ray

    return int(ray.get(reference))


def _shown(order: Any) -> str:
    text = ", ".join(map(str, order)) if isinstance(order, list | tuple) else str(order)
    return f"{text[:200]} ..." if len(text) > 200 else text


def _failure(error: Exception) -> tuple[str, Any]:
    return ("mistake", str(error)) if isinstance(error, VPruneError) else ("failure", traceback.format_exc())


def _opened(outcome: bytes) -> Any:
    kind, content = pickle.loads(outcome)
    if kind == "mistake":
        raise VPruneError(content)
    if kind == "failure":
        raise RuntimeError(f"a Ray worker failed:\n{content}")
    return content


def _ray() -> Any:
    try:
        import ray
        import ray.data  # its own dependencies (pyarrow) are an extra of Ray's
    except ImportError as error:
        raise VPruneError(
            f"engine=ray needs Ray Data ({error}): pip install 'vprune[ray]', or use engine=local"
        ) from error
    return ray


def _connected(pool: Pool) -> Any:
    """Ray, connected to the cluster that is asked for; one of this process's own stays for the runs that follow."""
    ours = pool.address is None and "RAY_ADDRESS" not in os.environ
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing goes out on the network unasked
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it would tell of every worker that is started again
    ray = _ray()
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"address": pool.address}
    if ours:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = pool.workers or _WITHOUT_GPUS
        options = {
            "address": "local",
            # What Ray counts are shares, not threads: asked for more workers than cores, it would wait for cores.
            "num_cpus": max(cores, math.ceil(workers * pool.cpus)),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = pool.address or os.environ.get("RAY_ADDRESS") or "a cluster of its own"
        raise VPruneError(f"engine=ray cannot reach {where}: {' '.join(str(error).split())}") from error
    return ray


def _shares(ray: Any, pool: Pool) -> tuple[int, float]:
    """How many workers there will be, and how many GPUs each gets."""
    there = float(ray.cluster_resources().get("GPU", 0))
    gpus = pool.gpus if pool.gpus is not None else float(there >= 1)
    workers = pool.workers or (max(1, int(there / gpus)) if gpus else _WITHOUT_GPUS)
    if pool.address is None and workers * gpus > there:
        raise VPruneError(
            f"engine.workers={workers} engine.gpus={gpus:g} need {workers * gpus:g} GPUs and Ray sees {there:g}: "
            "use fewer workers, or engine.gpus=0 for the CPU"
        )
    return workers, gpus


def _threads_here() -> int:
    import torch

    return torch.get_num_threads()


def _lost(done: int, total: int, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    return f"Ray gave up after {done} of {total} ({reason}): {_REMEDY}"
