"""The runs of an evaluation on an existing Ray cluster (the extra ``[ray]``).

A task is a batch with all the runs that are due on it. It streams each run back when it is made, so the driver writes
the same units as a local evaluation would, in the same folder: either goes on from the other. A worker that is lost
costs the run it was at. Models and data go into the object store once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import socket
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from msa_eval._version import __version__
from msa_eval.auditing.state_guard import StateGuard
from msa_eval.data import Samples
from msa_eval.defense.micro_batches import MicroBatched, parts_of
from msa_eval.engine.batch_runner import BatchRunner
from msa_eval.engine.collector import Collector, Tick
from msa_eval.engine.messages import BatchJob, BatchResult, EvaluationState
from msa_eval.engine.serialization import pack, unpack
from msa_eval.evidence.provenance import place
from msa_eval.numerics import full_precision
from msa_eval.progress import ticking

INSTALL = "pip install 'msa-eval[ray]'"

AHEAD = 2
"""So many tasks are asked for at a time, for each that the cluster has room for."""

PATIENCE = 10.0
"""Seconds in which the cluster's address has to answer."""


@dataclass
class _Flight:
    """A job on its way."""

    place: int
    collector: Collector
    job: BatchJob


class RayEngine:
    """Makes the runs as tasks on an existing Ray cluster.

    Args:
        address: ``auto`` for the cluster that this machine is part of, or ``host:port`` of its head. A connection that
            the caller has made is used as it is.
        cpus: CPUs of a worker, and threads of every pass, here and there, since the number of threads decides how sums
            are rounded; by default as many as torch takes here.
        gpus: GPUs of a worker.
        retries: how often a batch whose worker was lost is given to another, before its runs count as failed.

    Raises:
        ValueError: when CPUs, GPUs or retries are no such numbers.
    """

    def __init__(
        self, address: str = "auto", *, cpus: int | None = None, gpus: float = 0, retries: int = 3
    ) -> None:  # fmt: skip
        if cpus is not None and cpus < 1:
            raise ValueError(f"expected at least 1 CPU a worker, but got {cpus}")
        if not 0 <= gpus < math.inf or retries < 0:
            raise ValueError(f"expected GPUs and retries of at least 0, but got {gpus} and {retries}")
        self._address, self._gpus, self._retries = address, gpus, retries
        self.cpus = torch.get_num_threads() if cpus is None else cpus
        self._device = "cpu"
        self._leave = contextlib.ExitStack()

    def check(self, device: str) -> None:
        """Check that workers can compute on a device.

        Raises:
            ValueError: when they can't.
        """
        if device.startswith("cuda") and (device != "cuda" or not self._gpus):
            raise ValueError("on a Ray cluster, request a GPU with device=cuda and gpus=1")
        self._device = device

    def __enter__(self) -> RayEngine:
        with contextlib.ExitStack() as stack:
            ray = _import_ray()
            if not ray.is_initialized():
                _connect(ray, self._address)
                stack.callback(ray.shutdown)
            self._check_room(ray)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.cpus)
            self._leave = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave.close()

    def make(self, collectors: Sequence[Collector], evaluation: EvaluationState) -> None:
        """Make every job that is due, with one progress bar; a job whose worker is lost is given to another.

        Raises:
            ValueError: when the workers can't load the target, or have another release of msa-eval.
        """
        import ray

        runner = _put(ray, [collector.runner for collector in collectors])
        flying: dict[Any, _Flight] = {}
        lost: dict[tuple[int, int], int] = {}
        with ticking(evaluation.progress, sum(collector.total for collector in collectors), "runs on a batch") as tick:
            due = (
                _Flight(at, collector, job) for at, collector in enumerate(collectors) for job in collector.jobs(tick)
            )
            try:
                while True:
                    while len(flying) < AHEAD * self._room(ray) and (flight := next(due, None)) is not None:
                        flying[self._start(ray, runner, flight)] = flight
                    if not flying:
                        return
                    ready: Any = ray.wait(list(flying), num_returns=1)[0]
                    for stream in ready:
                        flight = flying[stream]
                        try:
                            over = self._take(ray.get(next(stream)), flight, evaluation, tick)
                        except ray.exceptions.RayTaskError as error:
                            raise _original_error(error) from error
                        except (ray.exceptions.RayError, StopIteration) as error:
                            del flying[stream]
                            key = flight.place, flight.job.number
                            lost[key] = lost.get(key, 0) + 1
                            if (again := self._again(flight, error, lost[key], evaluation, tick)) is not None:
                                flying[self._start(ray, runner, again)] = again
                            continue
                        if over:
                            del flying[stream]
            finally:
                for stream in flying:
                    ray.cancel(stream, force=True)

    def _start(self, ray: ModuleType, runner: Any, flight: _Flight) -> Any:
        task = ray.remote(_search).options(
            num_cpus=self.cpus, num_gpus=self._gpus, max_retries=0, num_returns="streaming", name="msa-eval"
        )
        held = {run: b"".join(pack(made)) for run, made in flight.job.held.items()}
        deterministic = torch.are_deterministic_algorithms_enabled()
        return task.remote(
            [runner], flight.place, flight.job.number, flight.job.keep, (flight.job.every, flight.job.best), held,
            self._device, self.cpus, deterministic,
        )  # fmt: skip

    def _take(self, message: Any, flight: _Flight, evaluation: EvaluationState, tick: Tick) -> bool:
        """Note what a worker sent; whether that was the last of its batch."""
        if isinstance(message, dict):
            if message["packages"]["msa-eval"] != (own := __version__):
                raise ValueError(
                    f"a worker has msa-eval {message['packages']['msa-eval']}, but {own} runs here; install the same "
                    f"release on every node"
                )
            evaluation.store.made_at(message, place(self._device))
            return False
        size, content = message
        made = unpack(content, device=self._device)
        defense = flight.collector.runner.plan.defense
        if isinstance(defense, MicroBatched):
            defense.keep_to(size)
        flight.collector.take(flight.job.number, made, tick)
        return isinstance(made, BatchResult)

    def _again(
        self, flight: _Flight, error: Exception, count: int, evaluation: EvaluationState, tick: Tick
    ) -> _Flight | None:
        """What is left of a job whose worker was lost; nothing where that happened too often, and its runs failed."""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason_lost = f"a worker was lost ({type(error).__name__}: {reason})"
        job = flight.collector.job(flight.job.number)
        if count <= self._retries:
            evaluation.store.notify(
                f"{reason_lost}: what it had not finished of batch {job.number}, {flight.collector.runner.title}, "
                f"is made again"
            )
            return _Flight(flight.place, flight.collector, job)
        given_up = dataclasses.replace(job, lost=f"{reason_lost}, for the {count}th time")
        for made in flight.collector.runner.search(given_up):
            flight.collector.take(job.number, made, tick)
        return None

    def _room(self, ray: ModuleType) -> int:
        """How many tasks the cluster has room for at once."""
        return max(1, sum(self._fits(node) for node in _nodes(ray)))

    def _fits(self, node: dict[str, float]) -> int:
        of_gpus = node.get("GPU", 0) / self._gpus if self._gpus else math.inf
        return int(min(node.get("CPU", 0) / self.cpus, of_gpus))

    def _check_room(self, ray: ModuleType) -> None:
        if not any(self._fits(node) for node in _nodes(ray)):
            has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in _nodes(ray))
            raise ValueError(
                f"no node of the cluster has room for a worker of {self.cpus} CPUs and {self._gpus:g} GPUs (there are "
                f"{has or 'no nodes'}); ask for less with cpus=N and gpus=N, or add a node"
            )


def _import_ray() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.exceptions
            import ray.util
    except ImportError as error:
        raise ValueError(f"engine=ray needs Ray, which can't be imported ({error}); {INSTALL}") from error
    module: ModuleType = ray
    return module


def _connect(ray: ModuleType, address: str) -> None:
    """Connect to a cluster that runs; the caller's own handling of SIGTERM stays in place.

    Raises:
        ValueError: when there is none, or it does not let this process in.
    """
    how = "start one with 'ray start --head', or name its head as address=HOST:PORT"
    if "://" in address:
        raise ValueError(f"address={address} goes through Ray's client, which can't stream; run this on a node of "
                         f"the cluster, for example by 'ray job submit', with address=auto")  # fmt: skip
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"address={address} is not auto or HOST:PORT; {how}")
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"nothing answers at address={address} ({error}); {how}") from error
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no Ray cluster can be reached at address={address} ({reason}); {how}") from error
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)


def _nodes(ray: ModuleType) -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return [node.get("Resources", {}) for node in ray.nodes() if node["Alive"]]


def _put(ray: ModuleType, runner: list[BatchRunner]) -> Any:
    """Put targets and data into the object store: code of the user's own by value, images for workers to share.

    Raises:
        ValueError: when the target can't be pickled.
    """
    with contextlib.ExitStack() as stack:
        for module in _not_installed():
            ray.cloudpickle.register_pickle_by_value(module)
            stack.callback(ray.cloudpickle.unregister_pickle_by_value, module)
        ray.util.register_serializer(Samples, serializer=_flat, deserializer=_shared)
        stack.callback(ray.util.deregister_serializer, Samples)
        try:
            return ray.put(runner)
        except (TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the target can't be sent to workers, for it can't be pickled: {reason}") from error


def _not_installed() -> list[ModuleType]:
    """Modules of files that are no installed package's, so that workers can't be expected to have them."""
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(module, ModuleType) or file is None or name.split(".")[0] in ("__main__", "msa_eval"):
            continue
        path = Path(file).resolve()
        if module.__name__ == name and not {"site-packages", "dist-packages"} & set(path.parts):
            found += [] if path.is_relative_to(standard) else [module]
    return found


_Flat = tuple[tuple[npt.NDArray[Any], ...], str, int | None]


def _flat(samples: Samples) -> _Flat:
    return tuple(part.numpy() for part in samples.parts()), samples.name, samples.levels


def _shared(flat: _Flat) -> Samples:
    """The samples again, on the store's own memory, which can't be written to; they have been checked before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [torch.from_numpy(np.asarray(part)) for part in flat[0]]
    return Samples.of_parts(parts, *flat[1:])


def _original_error(error: Any) -> BaseException:
    """What a task raised, as the caller would have met it here."""
    cause: BaseException = error.cause
    if isinstance(cause, ValueError | MemoryError | OSError):
        return cause
    return RuntimeError(f"a worker failed: {type(cause).__name__}: {cause}")


_HELD: dict[str, Sequence[BatchRunner]] = {}
_GUARDS: dict[str, StateGuard] = {}
"""In a worker, what it was sent last, and the guards over the targets since then."""


def _search(
    sent: list[Any],
    at: int,
    number: int,
    keep: bool,
    points: tuple[bool, bool],
    held: dict[str, bytes],
    device: str,
    threads: int,
    deterministic: bool,
) -> Iterator[dict[str, Any] | tuple[int | None, bytes]]:
    """In a worker: make the runs on a batch, and send where, and each when it is made, with the size of parts."""
    torch.set_num_threads(threads)
    yield place(device)
    with full_precision(deterministic=deterministic):
        one, guard = _received(sent[0], at)
        job = BatchJob(
            number, keep, {run: unpack(content, device=device) for run, content in held.items()},
            every=points[0], best=points[1],
        )  # fmt: skip
        for made in one.search(job, guard):
            yield parts_of(one.plan.defense), b"".join(pack(made))


def _received(sent: Any, at: int) -> tuple[BatchRunner, StateGuard]:
    """The series, and the guard over its target since it came here; fetched once in a process.

    Raises:
        ValueError: when it can't be loaded.
    """
    import ray

    if sent.hex() not in _HELD:
        _HELD.clear()
        _GUARDS.clear()
        try:
            _HELD[sent.hex()] = ray.get(sent)
        except Exception as error:
            reason = " ".join(str(error).split())[-300:]
            raise ValueError(
                f"a worker can't load the target ({reason}); install what it needs on every node"
            ) from error
    one = _HELD[sent.hex()][at]
    plan = one.plan
    if plan.name not in _GUARDS:
        _GUARDS[plan.name] = StateGuard(plan.defense, batch=next(iter(plan.clean)), seed=plan.seed)
    return one, _GUARDS[plan.name]
