"""``DaskPool``: a pool (see ``WorkerPool``) whose slots are those of the workers of a Dask cluster.

    submit -> outbox -> one client.map for all that was there -> scheduler -> ``dasktask.run_task`` on some worker
    -> futures that have finished -> one gather for all of them -> done(outcome, log)

A job's Dask task is named by the job's id, so that a job which several ask for at the same time is one task.  Its result
(outcome and output) is fetched at once and the future dropped: the cluster keeps nothing.  What is
asked of running jobs (output, cancel) is asked of the workers, by functions that are run there.
"""
import asyncio
import collections
import concurrent.futures
import contextlib
import json
import logging
import os
import threading
import time
import typing as _t

from distributed import CancelledError, KilledWorker

from . import dasktask
from .errors import JobCancelledError, SeamlessError, ServiceError, WorkerDiedError, error_to_dict

_STUCK_S = 1.0              # a result that was lost is made again, which takes long: the others are not kept waiting
_AGAIN = 3                  # so often a job is submitted again that somebody else cancelled, or Dask forgot
_PAUSE_S = 0.2              # before that
_MANY = 4                   # if so many are to come, results are collected for so long
_COLLECT_S = 0.02
_BATCH = 500
_PATIENCE_S = 30.0
_TOGETHER_S = 0.5           # what died with the same Dask worker is heard of within that time
log = logging.getLogger(__name__)


class _Task:
    """A job from ``submit`` to ``done``.  ``token`` tells this submission from others of the same job; ``suspect``: Dask gave
    it up as its workers died, but it may have been another job's doing."""
    __slots__ = ("id", "payload", "done", "timeout_s", "chain", "token", "future", "cancelled", "tries", "suspect")

    def __init__(self, id, payload, done, timeout_s, chain):
        self.id, self.payload, self.done, self.timeout_s, self.chain = id, payload, done, timeout_s, chain
        self.token = os.urandom(8).hex()
        self.future = None
        self.cancelled = self.suspect = False
        self.tries = 0


class DaskPool:
    """``client`` is a ``distributed.Client`` of its own, which it closes.  If the cluster is of this process: its
    ``scheduler``, and ``managed``, who looks after it (see ``daskqueue.Managed``).  ``prepare`` makes the workers ours; it
    is called before the first job, unless it was before.  Safe from several threads.
    """

    def __init__(self, client, scheduler=None, managed=None, prepare: _t.Callable[[], None] = lambda: None):
        self._client, self._scheduler, self._managed, self._prepare = client, scheduler, managed, prepare
        self._limits = managed.limits if managed is not None else None      # task name -> seconds
        if managed is not None:
            managed.on_failure = self._fail
        self._changed = threading.Condition()       # its lock guards everything below
        self._tasks: _t.Dict[str, _Task] = {}
        self._outbox: "collections.deque[_Task]" = collections.deque()
        self._cancels: _t.List[_Task] = []
        self._finished: _t.List[_t.Tuple[_Task, _t.Any]] = []       # with their futures
        self._dead: _t.Dict[str, _t.List[_Task]] = {}       # address of a Dask worker -> the jobs that Dask gave up with it
        self._suspects: "collections.deque[_Task]" = collections.deque()    # they run one at a time
        self._on_trial: _t.Optional[_Task] = None           # which one now
        self._collecting = False
        self._fetching: _t.Set[asyncio.Future] = set()
        self._closed = False
        self._sender = threading.Thread(target=self._send, name="seamless-dask", daemon=True)
        self._sender.start()

    def prepare(self) -> None:
        """Make the workers ours now."""
        self._prepare()
        self._prepare = lambda: None        # only now: what failed is tried again

    @property
    def workers(self) -> int:
        """How many jobs the cluster runs at a time, now."""
        return len(self._scheduler.workers) * self._managed.slots if self._managed is not None else 1

    # --- asked from outside ---------------------------------------------------------------------------

    def submit(self, id: str, payload: bytes, done: _t.Callable[[dict, _t.Any], None], timeout_s: _t.Optional[float] = None,
               parent: _t.Optional[str] = None, chain: _t.Sequence[str] = ()) -> None:
        """Have a job run somewhere.  ``chain``: the jobs that wait for it, from the first to the one that asks.

        ``done(outcome, log)`` is called once, from another thread, when it has ended; it must not block.
        """
        task = _Task(id, payload, done, timeout_s, tuple(chain))
        with self._changed:
            if self._closed:
                raise ServiceError("job %s was refused: the Dask cluster is stopping" % id)
            self._tasks[id] = task
            self._outbox.append(task)
            self._changed.notify_all()

    def wait_for(self, id: str, parent: str) -> None:
        """Jobs that wait for others are on a Dask worker, and its business."""

    def resumed(self, id: str, timeout_s: float) -> bool:
        """As ``wait_for``."""
        return True

    def cancel(self, id: str) -> bool:
        """Kill a job, wherever it is, or take it out of the queue; False if it is not here.  Returns before it is dead."""
        with self._changed:
            task = self._tasks.get(id)
            if task is None:
                return False
            task.cancelled = True
            self._cancels.append(task)
            self._changed.notify_all()
        return True

    def state(self, id: str) -> _t.Optional[str]:
        """queued, running or waiting; None if the job is not known."""
        known = id in self._tasks
        task = self._scheduler.tasks.get(dasktask.name_of(id)) if self._scheduler is not None else None
        worker = task.processing_on if task is not None else None
        if worker is not None:
            return "waiting" if task in worker.long_running else "running"
        if self._scheduler is None or task is not None and task.state in ("memory", "erred"):
            return "running" if known else None         # it has ended, and is not fetched yet
        return "queued" if known or task is not None else None

    def log_path(self, id: str):
        """What ``read_log`` takes for the output of a running job; None if it runs nowhere."""
        with self._asking():
            name = dasktask.name_of(id)
            address = (dasktask.processing_on(name, dask_scheduler=self._scheduler) if self._scheduler is not None
                       else self._client.run_on_scheduler(dasktask.processing_on, name))
            return None if address is None else (address, id)
        return None

    def read_log(self, log, offset: int) -> _t.Tuple[int, bytes, int]:
        """(new offset, data from ``offset`` on, size) of ``log``: None, all of it, or (worker, id)."""
        if isinstance(log, bytes):
            return max(offset, len(log)), log[offset:], len(log)
        if log is not None:
            with self._asking():
                return next(iter(self._client.run(dasktask.read_output, log[1], offset, workers=[log[0]]).values()))
        return offset, b"", 0

    def remove_log(self, log) -> None:
        """A worker forgets by itself."""

    def end_circle(self, workers: _t.List[str]) -> None:
        """If jobs on these workers wait for each other in a circle, end one of them.  Raises what Dask raises."""
        answers = self._client.run(dasktask.waits, workers=workers, on_error="return")
        place = {id: worker for worker, pairs in answers.items() if not isinstance(pairs, BaseException) for id, _ in pairs}
        graph: _t.Dict[str, _t.List[str]] = {}
        for worker in set(place.values()):
            for id, other in answers[worker]:
                graph.setdefault(id, []).append(other)
        circle = find_circle(graph)
        if circle is not None:
            log.warning("jobs wait for each other: %s", " ".join(circle))
            self._client.run(dasktask.refuse, circle[0], circle[1], workers=[place[circle[0]]])

    def close(self) -> None:
        """Drop all jobs (their outcome is ``ServiceError``) and the client; whoever owns the cluster ends it."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            lost = list(self._tasks.values())
            self._changed.notify_all()
        for task in lost:
            self._end(task, ServiceError("job %s did not end: the Dask cluster was stopped" % task.id))
        self._sender.join(10)
        try:
            self._client.close(timeout=5)
        except Exception as exc:            # the scheduler may be gone, in any way
            log.warning("the Dask client did not close in order: %s: %s", type(exc).__name__, exc)

    @contextlib.contextmanager
    def _asking(self):
        """A worker that is asked may be gone, or busy with dying: then there is no answer, whatever it is that it raises."""
        try:
            yield
        except Exception as exc:
            log.info("a Dask worker did not answer: %s: %s", type(exc).__name__, exc)

    # --- the sending thread -----------------------------------------------------------------------------

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outbox or self._cancels or self._closed)
                if self._closed:
                    return
            self._settle()
            with self._changed:
                batch = [self._outbox.popleft() for _ in range(min(_BATCH, len(self._outbox)))]
                cancels, self._cancels = self._cancels, []
            try:
                self._submit_all(batch)
            except Exception as exc:        # a defect of ours, or a client that is closed: who waits for these jobs must hear of it
                log.exception("%d jobs could not be submitted to Dask", len(batch))
                for task in batch:
                    self._end(task, ServiceError("job %s could not be submitted to Dask: %s: %s" % (task.id, type(exc).__name__, exc)))
            if cancels:                     # in a thread of its own: a worker that hangs shall not keep us from submitting
                threading.Thread(target=self._kill, args=(cancels,), name="seamless-cancel", daemon=True).start()

    def _submit_all(self, batch: _t.List[_Task]) -> None:
        """Submit these jobs, grouped by depth."""
        groups: _t.Dict[int, _t.List[_Task]] = {}
        for task in batch:
            never = self._managed.refuses(task.timeout_s) if self._managed is not None else None
            if task.cancelled:
                self._end(task, JobCancelledError("job %s was cancelled before it began" % task.id))
            elif never is not None:
                self._end(task, SeamlessError("job %s cannot run: %s" % (task.id, never)))
            else:
                groups.setdefault(len(task.chain), []).append(task)
        for depth, group in groups.items():
            self._map(group, depth)

    def _settle(self) -> None:
        """Let the client's loop do what was asked of it: a future that was dropped must be gone before there is another
        with its name.  Meanwhile more jobs come, so that they are sent together."""
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._client.loop.asyncio_loop).result(_PATIENCE_S)
        except (RuntimeError, concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            log.warning("the Dask client is busy, or closed")

    def _map(self, group: _t.List[_Task], depth: int) -> None:
        """Submit jobs; the deeper ones go first, so that those that wait are few."""
        names = [dasktask.name_of(task.id) for task in group]
        if self._limits is not None:
            self._limits.update((name, task.timeout_s) for name, task in zip(names, group) if task.timeout_s is not None)
        self.prepare()
        futures = self._client.map(dasktask.run_task, [_message(task) for task in group], key=names, pure=False, priority=depth)
        for task, future in zip(group, futures):
            task.future = future
            future.add_done_callback(lambda future, task=task: self._has_finished(task, future))

    def _kill(self, tasks: _t.List[_Task]) -> None:
        """Have the workers kill what they run; what they do not have is taken back from the scheduler."""
        tasks = [task for task in tasks if self._tasks.get(task.id) is task]
        found: _t.Set[str] = set()
        with self._asking():
            answers = self._client.run(dasktask.cancel_jobs, {task.id: task.token for task in tasks}, on_error="return")
            found = {id for ids in answers.values() if not isinstance(ids, BaseException) for id in ids}
        for task in tasks:
            if task.id not in found:
                self._end(task, JobCancelledError("job %s was cancelled before it began" % task.id))

    # --- what has finished ------------------------------------------------------------------------------

    def _has_finished(self, task: _Task, future) -> None:
        """Called by Dask, in a thread of its own."""
        with self._changed:
            self._finished.append((task, future))
            if self._collecting or self._closed:
                return
            self._collecting = True
        self._client.loop.add_callback(self._collect)

    async def _collect(self) -> None:
        """Fetch results as long as there are any; in the client's event loop."""
        while True:
            with self._changed:
                batch, self._finished = self._finished, []
                self._collecting = bool(batch)
            if not batch:
                return
            if len(self._tasks) > _MANY + len(batch):
                await asyncio.sleep(_COLLECT_S)     # rather fewer requests than each at once
                with self._changed:
                    batch += self._finished
                    self._finished = []
            fetch = asyncio.ensure_future(self._fetch(batch))
            self._fetching.add(fetch)       # or it might be collected as garbage
            fetch.add_done_callback(self._fetching.discard)
            await asyncio.wait([fetch], timeout=_STUCK_S)

    async def _fetch(self, batch: _t.List[_t.Tuple[_Task, _t.Any]]) -> None:
        good = [(task, future) for task, future in batch if future.status == "finished"]
        try:
            for (task, _), result in zip(good, await self._gather([future for _, future in good])):
                self._arrived(task, *result)
            bad = [pair for pair in batch if pair[1].status != "finished"]
        except (Exception, asyncio.CancelledError):     # of some of them the result is not there any more, or is an error now
            log.info("results could not be fetched together", exc_info=True)
            bad = batch
        for task, future in bad:
            if self._tasks.get(task.id) is task:
                try:
                    self._arrived(task, *(await self._gather([future]))[0])
                except (Exception, asyncio.CancelledError) as exc:
                    self._failed(task, exc)

    def _gather(self, futures):
        return self._client.gather(futures, asynchronous=True, direct=True)

    def _arrived(self, task: _Task, data: bytes, output) -> None:
        outcome = json.loads(data)
        ran = outcome.pop("ran", {})
        if not task.cancelled and (outcome.get("error", {}).get("kind") == "JobCancelledError" or _is_anothers(task, outcome, ran)) \
                and self._again(task):
            return                          # it was somebody else who cancelled, or wanted something else
        self._end(task, None, outcome, output)

    def _failed(self, task: _Task, exc: BaseException) -> None:
        """Dask could not run the task."""
        if self._closed:
            return
        if isinstance(exc, KilledWorker):
            threading.Thread(target=self._bury, args=(task, exc), daemon=True).start()      # it may have to ask and wait
        elif isinstance(exc, (CancelledError, asyncio.CancelledError)):
            if task.cancelled:
                self._end(task, JobCancelledError("job %s was cancelled" % task.id))
            elif not self._again(task):
                self._end(task, ServiceError("job %s was dropped by Dask; ask for it again" % task.id))
        else:
            log.warning("job %s failed in Dask: %s: %s", task.id, type(exc).__name__, exc)
            error = exc if isinstance(exc, SeamlessError) else SeamlessError(
                "job %s could not be run by Dask: %s: %s" % (task.id, type(exc).__name__, exc))
            self._end(task, error)

    def _bury(self, task: _Task, exc: KilledWorker) -> None:
        """Dask gave up a job because its workers died.  If others died with it, they are innocent, all but one: each is tried
        once more, one at a time."""
        worker = exc.last_worker
        with self._changed:
            together = self._dead.setdefault(worker.address, [])
            together.append(task)
        time.sleep(_TOGETHER_S)
        with self._changed:
            self._dead.pop(worker.address, None)
            if self._tasks.get(task.id) is not task or self._closed:
                return
            if not task.suspect and (len(together) > 1 or self._on_trial is not None):
                log.warning("job %s may not be what its Dask worker died of, and is tried again", task.id)
                task.suspect = True
                future, task.future = task.future, None
                future.release()
                self._suspects.append(task)
                self._try_next()
                return
        how = self._managed and (self._managed.epitaph(str(worker.name)) or self._managed.epitaph(worker.address))
        self._end(task, WorkerDiedError("job %s was tried %d times, and each time the Dask worker that ran it died%s" % (
            task.id, (exc.allowed_failures + 1) * (2 if task.suspect else 1), ": the last one (%s) %s" % (worker.address, how) if how else
            "; the last one was %s" % worker.address)))

    def _try_next(self) -> None:
        """Have the next suspect run, unless one does.  The lock is held."""
        while self._on_trial is None and self._suspects:
            task = self._suspects.popleft()
            if self._tasks.get(task.id) is task:
                self._on_trial = task
                self._put(task)

    def _fail(self, sentence: str) -> None:
        """There will be no workers: what no worker has begun ends."""
        for task in list(self._tasks.values()):
            if self.state(task.id) == "queued":
                self._end(task, SeamlessError("job %s did not run: %s" % (task.id, sentence)))

    def _again(self, task: _Task) -> bool:
        """Submit a job once more, under its name; False if that was done too often."""
        task.tries += 1
        if task.tries > _AGAIN:
            return False
        future, task.future = task.future, None
        if future is not None:
            future.release()
        self._client.loop.call_later(_PAUSE_S * task.tries, self._put, task)
        return True

    def _put(self, task: _Task) -> None:
        with self._changed:
            if self._tasks.get(task.id) is task:
                self._outbox.append(task)
                self._changed.notify_all()

    def _end(self, task: _Task, error: _t.Optional[SeamlessError], outcome: _t.Optional[dict] = None, output=None) -> None:
        """Tell the outcome, once, and let Dask forget the task."""
        with self._changed:
            if self._tasks.get(task.id) is not task:
                return
            del self._tasks[task.id]
            future, task.future = task.future, None
            if task is self._on_trial:
                self._on_trial = None
                self._try_next()
        if self._limits is not None:
            self._limits.pop(dasktask.name_of(task.id), None)
        if future is not None:
            future.release()
        task.done(outcome if error is None else {"error": error_to_dict(error)}, output)


def find_circle(graph: _t.Mapping[str, _t.Sequence[str]]) -> _t.Optional[_t.List[str]]:
    """Nodes of a directed graph of which each leads to the next and the last to the first; None if there are none."""
    done: _t.Set[str] = set()
    for start in sorted(graph):
        path, todo = [start], [(start, iter(graph[start]))] if start not in done else []
        while todo:
            for node in todo[-1][1]:
                if node in path:
                    circle = path[path.index(node):]
                    return circle if len(circle) > 1 else circle * 2
                if node in graph and node not in done:
                    path.append(node)
                    todo.append((node, iter(graph[node])))
                    break
            else:
                done.add(todo.pop()[0])
                path.pop()
    return None


def _is_anothers(task: _Task, outcome: dict, ran: _t.Mapping) -> bool:
    """Whether what ran was a job of the same name that does not do: not recorded, or (not) written to a folder."""
    if not ran and ("result" not in outcome or b'"job_folder"' not in task.payload):
        return False
    mine = json.loads(task.payload).get("meta") or {}
    return (any(ran.get(name) and not mine.get(name) for name in ("fresh", "scratch"))
            or (ran.get("job_folder") or "") != (mine.get("job_folder") or ""))


def _message(task: _Task) -> bytes:
    """What travels: one value that Dask does not look into."""
    head = {"id": task.id, "token": task.token, "timeout_s": task.timeout_s, "chain": task.chain}
    return json.dumps(head).encode() + b"\n" + task.payload
