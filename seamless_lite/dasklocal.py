"""A Dask cluster on this machine: one Dask worker process with as many slots as there are cores, looked after by
distributed's ``Nanny``.  Has what ``daskqueue.Managed`` has.
"""
import errno
import itertools
import logging
import os
import random
import re
import socket
import typing as _t

from .cpus import usable_cpus
from .errors import ServiceError
from .processes import describe_exit
from .queuescript import dotted, memory_bytes

#: So many tasks more than there are slots are at the Dask worker: their queue is its local pool.  Then messages
#: and commits are for several tasks at once, which doubles the rate of short ones.
ROOM = 14
_TRIES = 20
_IN_VAIN = 4                # so often workers are started before that is a failure
_DIED = re.compile(r"Worker process (\d+) (was killed by signal|exited with status) (\d+)")
log = logging.getLogger(__name__)


class Local:
    """``parameters`` are those of the status file, ``folder`` is private; the scheduler listens on ``host`` in ``ports``.

    Raises ``ConfigurationError`` or ``ServiceError``.
    """
    limits: _t.Optional[dict] = None        # a task may take as long as it likes

    def __init__(self, parameters: _t.Mapping, security, host: str, ports: _t.Optional[_t.Sequence[int]],
                 scheduler_options: _t.Mapping, folder: str):
        import dask                         # only a daskserver needs it
        from distributed import LocalCluster
        queue = parameters.get("queue") or {}
        for key in ("tmpdir", "conda", "job_script_prologue"):
            if queue.get(key):
                log.warning("'%s' of the queue %r has no effect: the Dask workers are on this machine, without a job", key, queue.get("name"))
        workers = queue.get("cores") or parameters.get("workers") or usable_cpus()
        self.on_failure: _t.Callable[[str], None] = log.error
        self._deaths, self._in_vain = _Deaths(), 0
        logging.getLogger("distributed.nanny").addHandler(self._deaths)
        processes = queue.get("processes") or (workers if parameters.get("pure") else 1)
        self._processes = processes
        self.slots = queue.get("worker_threads") or max(1, workers // processes)
        room = ROOM if processes == 1 and not parameters.get("pure") else 0
        memory = memory_bytes(queue.get("memory"), "the queue %r of cluster %r" % (queue.get("name"), parameters.get("cluster")))
        options = {"memory_limit": memory // processes} if memory else {}
        dask.config.set(dotted(queue.get("extra_dask_config") or {}))
        error: _t.Any = None
        for port in itertools.islice(free_ports(host, ports) if ports else (0,), _TRIES):
            try:
                self.cluster = LocalCluster(
                    n_workers=processes, threads_per_worker=self.slots + room,
                    processes=True, host=host, scheduler_port=port, security=security, protocol="tls://", silence_logs=False,
                    dashboard_address=scheduler_options["dashboard_address"], local_directory=folder, death_timeout=60,
                    scheduler_kwargs={"http_prefix": scheduler_options["http_prefix"]}, resources=queue.get("dask_resources"),
                    **options)
                return
            except (RuntimeError, OSError, ValueError) as exc:
                error = exc
                if "in use" not in str(exc):
                    break
        raise ServiceError("the Dask cluster could not be started: %s" % error)

    def describe(self) -> dict:
        """For GET /info."""
        scheduler = self.cluster.scheduler
        waiting = len(scheduler.queued) + len(scheduler.unrunnable) + sum(
            max(0, len(state.processing) - len(state.long_running) - self.slots) for state in list(scheduler.workers.values()))
        workers = len(scheduler.workers)
        slots = workers * self.slots
        sentence = "%d slot%s on %s" % (slots, "" if slots == 1 else "s", os.uname().nodename)
        if waiting:
            sentence += ", %d task%s waiting" % (waiting, "" if waiting == 1 else "s")
        return {"workers": workers, "pending_jobs": 0, "running_jobs": 0, "reason": None, "waiting_tasks": waiting,
                "sentence": sentence}

    def tend(self) -> None:
        """Put new Dask workers in the place of those whose nannies have ended: they do when their worker loses the scheduler."""
        cluster = self.cluster
        lost = [name for name, nanny in list(cluster.workers.items()) if nanny.status.name in ("closed", "failed")]
        for name in lost:
            cluster.loop.asyncio_loop.call_soon_threadsafe(cluster.workers.pop, name, None)
        if cluster.scheduler.workers:
            self._in_vain = 0
        if lost or len(cluster.workers) < self._processes:
            log.warning("Dask workers are gone; new ones are started")
            cluster.scale(self._processes)
            self._in_vain += 1
            if self._in_vain >= _IN_VAIN:   # and they are started again and again, but nobody has to wait for that
                self.on_failure("the Dask workers end as soon as they are started; the log of the daskserver says why")

    def refuses(self, limit_s: _t.Optional[float]) -> _t.Optional[str]:
        """No task is too long."""
        return None

    def epitaph(self, worker: str) -> _t.Optional[str]:
        """How the Dask worker that died last ended, as a clause."""
        return self._deaths.last

    def close(self) -> None:
        """End scheduler, nannies and workers.  May be called twice."""
        logging.getLogger("distributed.nanny").removeHandler(self._deaths)
        try:
            self.cluster.close(timeout=8)
        except Exception as exc:            # of whatever kind: the workers end when we do
            log.warning("the Dask cluster did not close in order: %s: %s", type(exc).__name__, exc)


class _Deaths(logging.Handler):
    """Hears what the nannies say about how their workers ended: there is no other way to know."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.last: _t.Optional[str] = None

    def emit(self, record: logging.LogRecord) -> None:
        """Called by ``logging``."""
        match = _DIED.search(record.getMessage())
        if match:
            self.last = describe_exit(-int(match[3]) if "signal" in match[2] else int(match[3]))


def free_ports(host: str, ports: _t.Sequence[int]) -> _t.Iterator[int]:
    """The ports from the first to the last of ``ports`` that are free now, in random order.  Raises ``ServiceError`` if none is."""
    candidates = list(range(ports[0], ports[1] + 1))
    random.shuffle(candidates)
    found = False
    for port in candidates:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as exc:
                if exc.errno == errno.EADDRNOTAVAIL:
                    raise ServiceError("'network_interface' is %s, which is no address of %s: give one that it has, or 0.0.0.0"
                                       % (host, os.uname().nodename)) from None
                continue
        found = True
        yield port
    if not found:
        raise ServiceError("no port from %d to %d is free on %s for the Dask scheduler: choose other ports, or stop what uses them"
                           % (ports[0], ports[1], host))
