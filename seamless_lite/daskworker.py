"""What a Dask worker has of ours: worker processes, the stores, and the function that hands them a job.

    Dask task ``run_task`` -> local ``WorkerPool`` -> worker process -> ``Recorder`` (result, then row) -> the task's result

A job that asks for other jobs does so here, as on a jobserver: the routes are the same, but the pool behind them
(``_Spread``) gives those jobs to the whole cluster through Dask.  While a job waits, it holds neither a slot of
the local pool nor one of the Dask worker.  A job knows the chain of jobs that wait for it, so that
one that would wait for itself is refused.

``Plugin`` is what the daskserver registers; Dask finds it by its name on each worker.
"""
import asyncio
import collections
import json
import logging
import os
import threading
import time
import typing as _t

from distributed import Client, Reschedule
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.worker_state_machine import SecedeEvent

from . import dasktask
from .daskjob import is_too_late, refusal
from .daskpool import DaskPool
from .daskstores import on_node
from .errors import SeamlessError, ServiceError
from .joblog import TAIL_BYTES, read_log, remove_file
from .jobs import REMEMBER_S
from .jobserver import JobService, Workers
from .recorder import Ended, Recorder
from .stores import open_stores

NESTED = "seamless-nested"      # the names of our own clients begin with this
CIRCLE = "job %s cannot wait for job %s, which waits for it; call it with other arguments"
_AWAY = "elsewhere "
_CONNECT_S = 20.0
_REFUSE_S = 30.0            # a task that was cancelled before it came is refused for so long
log = logging.getLogger(__name__)


class _Running:
    """A job that this Dask worker runs.  ``scratch``, ``keep``, ``fresh`` and ``again`` are for the recorder."""
    __slots__ = ("id", "token", "chain", "scratch", "keep", "fresh", "again", "recording", "ran", "result", "seceded", "began_s")

    def __init__(self, id: str, token: str, chain: _t.List[str], meta: dict, result: asyncio.Future):
        self.id, self.token, self.chain, self.result = id, token, chain, result
        self.scratch, self.fresh = bool(meta.get("scratch")), bool(meta.get("fresh"))
        self.keep, self.again = not self.scratch, bool(meta.get("again"))
        self.recording = self.seceded = False
        self.ran = {name: meta[name] for name in dasktask.KINDS if meta.get(name)}
        self.began_s = time.time()


class Node:
    """All that is ours in one Dask worker.  ``slots``: worker processes."""

    def __init__(self, worker, slots: int, spec: dict, secret: _t.Optional[bytes]):
        self.worker = worker
        self._loop = worker.loop.asyncio_loop
        self.running: _t.Dict[str, _Running] = {}
        self._outputs: "collections.OrderedDict[str, _t.Tuple[str, float]]" = collections.OrderedDict()
        self._refused: _t.Dict[str, float] = {}     # tokens
        self._closing = False
        spec = on_node(spec)
        self._stores = open_stores(spec, secret)
        self._workers = Workers(slots, spec, secret)
        self.local = self._workers.pool
        self._recorder = Recorder(self._stores, "remote", "daskserver", self._tell, lambda: len(self.running) > slots + 1)
        self._spread = _Spread(self)
        self._service = JobService(self._spread, self._stores, None, None)
        self._workers.begin(self._service)

    async def run(self, message: bytes) -> _t.Tuple[bytes, _t.Union[bytes, _t.Tuple[str, str], None]]:
        """Run the job of a ``DaskPool``; returns the outcome as JSON and its output, or where that can be read."""
        head, _, payload = message.partition(b"\n")
        fields = json.loads(head)
        id = fields["id"]
        if self._refused.pop(fields["token"], None) is not None:
            return json.dumps({"error": {"kind": "JobCancelledError", "message": "job %s was cancelled before it began" % id}}).encode(), None
        task = self.running.get(id)
        if task is None:
            never = refusal(fields["timeout_s"])        # a job that asks for others does not know the queue
            if never is not None:
                return json.dumps({"error": {"kind": "SeamlessError", "message": "job %s cannot run: %s" % (id, never)}}).encode(), None
            if is_too_late(self.worker, fields["timeout_s"]):
                raise Reschedule()
            meta = json.loads(payload).get("meta") or {}
            task = self.running[id] = _Running(id, fields["token"], fields["chain"], meta, self._loop.create_future())
            try:
                self.local.submit(id, payload, lambda outcome, path: self._recorder.put(task, outcome, path),
                                  timeout_s=fields["timeout_s"], depth=len(task.chain))
            except ServiceError:
                del self.running[id]
                raise Reschedule() from None
        # else Dask let go of it, and wants it again: it never stopped
        outcome, output = await asyncio.shield(task.result)
        if self._closing and outcome.get("error", {}).get("kind") == "ServiceError":
            await asyncio.sleep(_REFUSE_S)  # that it was killed with us is no outcome; Dask sees our end, and counts it
            raise Reschedule()
        if task.ran:                        # others may have asked for it under the same name, who want something else
            outcome = {**outcome, "ran": task.ran}
        return json.dumps(outcome, separators=(",", ":")).encode(), output

    def _tell(self, ended: _t.List[Ended]) -> None:
        """What the recorder calls, in its thread."""
        told = [(task, outcome, self._keep_output(task.id, path)) for task, outcome, path in ended]
        for task, outcome, _ in told:
            self.running.pop(task.id, None)
            self._service.jobs.parent_ended(task.id, "error" in outcome)
        self._loop.call_soon_threadsafe(self._finish, told)

    @staticmethod
    def _finish(told) -> None:
        for task, outcome, output in told:
            if not task.result.done():
                task.result.set_result((outcome, output))

    # --- output

    def _keep_output(self, id: str, path: _t.Optional[str]):
        """What travels with the outcome: the output, or, if there is much, where it can be read for a while."""
        now = time.monotonic()
        while self._outputs and next(iter(self._outputs.values()))[1] < now - REMEMBER_S:
            remove_file(self._outputs.popitem(last=False)[1][0])
        if path is None:
            return None
        _, data, size = read_log(path, 0)
        if size <= TAIL_BYTES:
            remove_file(path)
            return data
        if id in self._outputs:             # of an earlier run
            remove_file(self._outputs.pop(id)[0])
        self._outputs[id] = path, now
        return self.worker.address, id

    def read_output(self, id: str, offset: int) -> _t.Tuple[int, bytes, int]:
        """As ``joblog.read_log``, for a job that runs or ran here."""
        path = self.local.log_path(id)
        return read_log(path or self._outputs.get(id, (None, 0))[0], offset)

    # --- cancel, secede, end

    def cancel(self, tokens: _t.Mapping[str, str]) -> _t.List[str]:
        """Kill those of these jobs (id -> token) that were begun by that submission; returns which."""
        now = time.monotonic()
        self._refused = {token: since for token, since in self._refused.items() if since > now - _REFUSE_S}
        found = []
        for id, token in tokens.items():
            task = self.running.get(id)
            if task is None or task.token != token:
                self._refused[token] = now
            elif self.local.cancel(id):
                found.append(id)
        return found

    def waits(self) -> _t.List[_t.Tuple[str, str]]:
        """(job that runs here, job that it waits for), all of them."""
        return [(id, other[len(_AWAY):]) for id, other in self.local.waits() if other.startswith(_AWAY)]

    def refuse(self, id: str, other: str) -> None:
        """Kill the job ``id``: it waits for ``other``, which waits for it."""
        self.local.cancel(id, SeamlessError(CIRCLE % (id, other)))

    def secede(self, id: str) -> None:
        """The Dask task of this job does not count any more; from any thread."""
        task = self.running.get(id)
        if task is not None and not task.seceded:
            task.seceded = True
            self._loop.call_soon_threadsafe(self._secede, task)

    def _secede(self, task: _Running) -> None:
        state = self.worker.state.tasks.get(dasktask.name_of(task.id))
        if state is not None and state.state == "executing" and not task.result.done():
            self.worker.handle_stimulus(SecedeEvent(key=state.key, compute_duration=time.time() - task.began_s,
                                                    stimulus_id="seamless-secede-%s" % time.time()))

    def close(self) -> None:
        """Kill all jobs.  Dask runs them elsewhere."""
        self._closing = True
        self.local.close()
        self._recorder.close()
        self._service.close()
        self._workers.stop()
        for path, _ in self._outputs.values():
            remove_file(path)


class _Spread:
    """The pool of the jobs that jobs of this worker ask for: the whole cluster, through Dask.

    In the local pool each stands as something that runs elsewhere, even if Dask should give it to us.
    """

    def __init__(self, node: Node):
        self._node, self._local = node, node.local
        self._lock = threading.Lock()
        self._dask: _t.Optional[DaskPool] = None

    def _pool(self) -> DaskPool:
        """Made when the first job asks for another.  Raises ``ServiceError``."""
        with self._lock:
            if self._dask is None:
                worker = self._node.worker
                try:
                    client = Client(worker.scheduler.address, loop=worker.loop, security=worker.security, set_as_default=False,
                                    timeout=_CONNECT_S, name=NESTED)
                    self._dask = DaskPool(client)
                except Exception as exc:    # of whatever kind (no more threads, a loop that ends): the job that asks must hear of it
                    raise ServiceError("the Dask scheduler cannot be reached: %s: %s" % (type(exc).__name__, exc)) from None
            return self._dask

    @property
    def workers(self) -> int:
        """Slots on this worker."""
        return self._local.workers

    def submit(self, id: str, payload: bytes, done, timeout_s: _t.Optional[float] = None, parent: _t.Optional[str] = None) -> None:
        """As ``WorkerPool``."""
        asker = self._node.running.get(parent or "")
        here = _away(id)

        def arrived(outcome, output):
            self._local.arrived(here)
            done(outcome, output)
        self._local.expect(here)
        try:
            self._pool().submit(id, payload, arrived, timeout_s, chain=[*asker.chain, asker.id] if asker is not None else [])
        except BaseException:
            self._local.arrived(here)
            raise

    def wait_for(self, id: str, parent: str) -> None:
        """As ``WorkerPool``."""
        asker = self._node.running.get(parent)
        if asker is not None and (id == parent or id in asker.chain):
            raise SeamlessError(CIRCLE % (parent, id))
        self._local.wait_for(_away(id), parent)
        if self._local.state(_away(id)) is not None:
            self._node.secede(parent)

    def resumed(self, id: str, timeout_s: float) -> bool:
        """As ``WorkerPool``."""
        return self._local.resumed(id, timeout_s)

    def cancel(self, id: str) -> bool:
        """As ``DaskPool``."""
        return self._dask is not None and self._dask.cancel(id)

    def state(self, id: str) -> _t.Optional[str]:
        """As ``DaskPool``; of the jobs that run here it is known too."""
        return "running" if id in self._node.running else self._dask.state(id) if self._dask is not None else None

    def log_path(self, id: str):
        """As ``DaskPool``."""
        return self._dask.log_path(id) if self._dask is not None else None

    def read_log(self, log, offset: int) -> _t.Tuple[int, bytes, int]:
        """As ``DaskPool``."""
        return self._dask.read_log(log, offset) if self._dask is not None else (offset, b"", 0)

    def remove_log(self, log) -> None:
        """As ``DaskPool``."""

    def close(self) -> None:
        """No more jobs elsewhere."""
        if self._dask is not None:
            self._dask.close()


def _away(id: str) -> str:
    """What the local pool calls a job that its jobs wait for and Dask runs."""
    return _AWAY + id


class Plugin(WorkerPlugin):
    """Makes a ``Node`` of a Dask worker.  ``spec`` and ``secret``: how the stores are opened there."""
    name = "seamless"

    def __init__(self, slots: int, spec: dict, secret: _t.Optional[bytes]):
        self._slots, self._spec, self._secret = slots, spec, secret

    def setup(self, worker) -> None:
        """Called by Dask when the worker is about to begin."""
        try:
            dasktask.node = Node(worker, self._slots, self._spec, self._secret)
        except Exception:
            if worker.periodic_callbacks["heartbeat"].is_running():
                raise                       # it was there before us, and whoever registers us is told
            # Dask would keep a worker that has just come, and give it tasks, all of which would fail.
            log.exception("this worker cannot do its work, and ends")
            logging.shutdown()
            os._exit(1)

    async def teardown(self, worker) -> None:
        """Called by Dask when the worker closes."""
        node, dasktask.node = dasktask.node, None
        if node is not None:
            await asyncio.get_running_loop().run_in_executor(None, node.close)
