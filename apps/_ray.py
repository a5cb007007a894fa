"""`analyze --ray`: the work list through Ray, one model a worker, rows written by the driver alone.

Clips and the bundle must have the same paths on every machine of the cluster.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crab_edge_apps._crew import CrewProducer, News

from crab_edge.batch import LocalProducer, Request
from crab_edge.errors import BundleError, CrabError, DependencyError, EngineError
from crab_edge.rows import Row

LOCAL = "local"
_THREADS = 4
"""A worker's, unless told; small models gain nothing from more."""
_OBJECTS_BYTES = 100_000_000
_FIRST_WORKER_S = 300.0
_KNOCK_S = 10.0


def connect(
    address: str,
    *,
    bundle: Path | None,
    engine: str,
    threads: int | None,
    workers: int | None = None,
    request: Request | None = None,
) -> CrewProducer:
    """A producer on the cluster at `address` ("local": one on this machine), its first worker ready.

    threads: of each worker; workers: default as many as the cluster's CPUs hold; request: what is going to be
    asked, which the workers make ready. DependencyError without
    Ray, EngineError for a cluster that can't be reached or holds no worker, and whatever a worker raises that
    can't open the bundle.
    """
    try:
        import ray
    except ImportError as error:
        raise DependencyError(
            f"--ray needs Ray, which can't be imported ({error}); run `pip install 'crab-edge[ray]'`"
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        # No reports to Ray's makers, no dashboard: nothing leaves this machine.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = threads or max(1, min(_THREADS, cpus // (workers or 1)))
        options |= {
            "num_cpus": max(cpus, (workers or 1) * threads),
            "include_dashboard": False,
            "object_store_memory": _OBJECTS_BYTES,
        }
    else:
        options["address"] = address
        _knock(address)
    if ray.is_initialized():
        raise EngineError(
            "this process is connected to a Ray cluster already; run analyze in its own process"
        )
    # On a busy machine a local cluster may not come up within the time that Ray gives itself.
    for tries_left in (1, 0) if address == LOCAL else (0,):
        try:
            ray.init(**options)
            break
        except Exception as error:
            ray.shutdown()
            if not tries_left:
                raise _unreachable(address, error) from error
    crew = RayCrew(bundle, engine, threads, request)
    try:
        size = workers or crew.room()
        if not size:
            raise EngineError(
                f"--ray {address}: no machine of the cluster has {crew.threads} free CPUs; lower --threads"
            )
        first = [crew.start() for _ in range(size)]
        news = crew.first()
        producer = CrewProducer(crew, crew.bundle, crew.engine, size)
        producer.idle.update(one.worker for one in news if one.worker in first)
    except BaseException:
        crew.close()
        raise
    return producer


def _knock(address: str) -> None:
    """EngineError where nobody listens: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto" and the like, which Ray resolves
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> EngineError:
    return EngineError(
        f"--ray {address}: no Ray cluster can be reached ({_one_line(error)}); "
        "start one with `ray start --head`, or use --ray local"
    )


class Worker:
    """Lives in a process of its own, on any machine."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._producer: LocalProducer | None = None

    def load(
        self, bundle: Path | None, engine: str, threads: int, request: Request | None
    ) -> tuple[str, dict[str, Any], str, int]:
        """Opens the bundle: its identity, what the engine says of itself, this machine, this process."""
        import crab_edge

        model = crab_edge.load(bundle, engine, threads=threads)
        if request is not None:
            request.prepare(model)
        self._producer = LocalProducer(model)
        return self._producer.bundle, self._producer.engine, socket.gethostname(), os.getpid()

    def answer(self, work: Sequence[tuple[Path, tuple[str, ...]]], request: Request) -> Iterator[list[Row]]:
        """The rows of each file, together."""
        assert self._producer is not None
        wanted = {str(path): names for path, names in work}
        rows: list[Row] = []
        produced = self._producer.produce(
            [path for path, _ in work],
            request,
            lambda sha256, path, name: name not in wanted[path],
            self._stop,
        )
        for row, _ in produced:
            rows.append(row)
            if len(rows) == len(wanted[row.media[0]]):
                yield rows
                rows = []

    def halt(self) -> None:
        """After the file at hand, no further one is begun."""
        self._stop.set()


class RayCrew:
    """`Crew` of Ray actors."""

    def __init__(
        self, bundle: Path | None, engine: str, threads: int | None, request: Request | None
    ) -> None:
        import ray

        self._ray = ray
        self.threads = threads or _default_threads(ray)
        where = None if bundle is None else Path(bundle).absolute()
        self._load = (where, engine, self.threads, request)
        # Two calls at a time: an answer, and `halt` meanwhile.
        actors: Any = ray.remote
        self._class = actors(num_cpus=self.threads, max_restarts=0, max_concurrency=2)(Worker)
        self._actors: dict[str, Any] = {}
        self._loading: dict[Any, str] = {}
        self._answering: dict[Any, str] = {}
        self._number = 0
        self.bundle = ""
        self.engine: dict[str, Any] = {}
        self.pids: dict[str, tuple[str, int]] = {}
        """Machine and process of each worker."""

    def room(self) -> int:
        """How many workers the cluster's CPUs hold."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        return sum(int(node["Resources"].get("CPU", 0)) // self.threads for node in nodes)

    def start(self) -> Hashable:
        """See `Crew`."""
        self._number += 1
        name = f"worker {self._number}"
        actor = self._actors[name] = self._class.remote()
        self._loading[actor.load.remote(*self._load)] = name
        return name

    def first(self) -> list[News]:
        """Waits until a worker is ready. Raises what kept it from opening the bundle."""
        ready, _ = self._ray.wait(list(self._loading), timeout=_FIRST_WORKER_S)
        if not ready:
            raise EngineError(
                f"no worker came up in {_FIRST_WORKER_S:.0f} s: are {self.threads} CPUs free on any machine? "
                "lower --threads"
            )
        news = [self._loaded(reference) for reference in ready]
        if all(one.kind == "dead" for one in news):
            raise EngineError(f"a worker died while it opened the bundle: {news[0].reason}")
        return news

    def give(self, worker: Hashable, work: Sequence[tuple[Path, tuple[str, ...]]], request: Request) -> None:
        """See `Crew`."""
        name = str(worker)
        answers = self._actors[name].answer.options(num_returns="streaming").remote(list(work), request)
        self._answering[answers] = name

    def wait(self, timeout_s: float) -> Iterable[News]:
        """See `Crew`."""
        waiting = [*self._loading, *self._answering]
        if not waiting:
            threading.Event().wait(timeout_s)
            return []
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=timeout_s)
        return [self._loaded(one) if one in self._loading else self._answered(one) for one in ready]

    def _loaded(self, reference: Any) -> News:
        name = self._loading.pop(reference)
        try:
            bundle, engine, host, pid = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, CrabError) else EngineError(_one_line(error)) from error
        except self._ray.exceptions.RayError as error:
            return self._dead(name, error)
        self.bundle, self.engine = self.bundle or bundle, self.engine or engine
        if bundle != self.bundle:
            raise BundleError(
                f"{host} has the bundle {bundle}, expected {self.bundle}; copy the same one to every machine"
            )
        self.pids[name] = (host, pid)
        return News(name, "ready")

    def _answered(self, answers: Any) -> News:
        name = self._answering[answers]
        try:
            rows = self._ray.get(next(answers))
            return News(name, "rows", rows)
        except StopIteration:
            del self._answering[answers]
            return News(name, "done")
        except self._ray.exceptions.RayError as error:
            del self._answering[answers]
            return self._dead(name, error)

    def _dead(self, name: str, error: Exception) -> News:
        actor = self._actors.pop(name)
        host, _ = self.pids.pop(name, ("?", 0))
        # It may live on after an error; its place is given to another one.
        self._ray.kill(actor)
        return News(name, "dead", reason=f"{name} on {host}: {_one_line(error)}")

    def halt(self) -> None:
        """See `Crew`."""
        for actor in self._actors.values():
            actor.halt.remote()

    def close(self) -> None:
        """Ends the workers and leaves the cluster (a local one ends)."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._ray.shutdown()


def _default_threads(ray: Any) -> int:
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min([_THREADS, *(count for count in cpus if count)]))


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-1:])[:300] or type(error).__name__
