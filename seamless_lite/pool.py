"""``WorkerPool``: runs jobs in worker processes, one job at a time in each.

    submit -> queue -> a free slot -> a worker process -> done(outcome)

There are ``workers`` slots.  A job holds one while it runs; while it waits for another job (``wait_for``)
it gives it back, keeps its process, and takes a slot again before anything new is begun.  Jobs that others
wait for go before jobs that nobody waits for, deepest first, so that any depth works with one slot and few
processes.  Each worker process belongs to one thread of ours, which starts it when there is a job for it,
sends job after job, and notices its death, the time limit and cancellation; killing a job is killing
its process with all that it started, so that it costs exactly that job.

A job and an outcome are JSON here; what they mean is not the pool's business.
"""
import collections
import json
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing as _t
from queue import SimpleQueue

from . import leftovers
from .errors import DeadlineError, JobCancelledError, SeamlessError, ServiceError, WorkerDiedError, error_to_dict
from .joblog import read_log, remove_file, tail
from .processes import MARK, describe_exit, kill_family, package_root, receive_message, send_message

LOG_BYTES = 1 << 30         # the output of a running job is begun anew on disk when it is bigger than this
# Not "python -m": that loads the module a second time under its own name, and puts the working folder on the path.
_BOOT = ("import sys; sys.path[:1] = [] if sys.argv[1] in sys.path[1:] else sys.argv[1:2]; import importlib; "
         "importlib.import_module(sys.argv[2]).main(sys.argv[3:])")
_LOOK_S = 1.0               # a forked child may hold a dead worker's connection open, so its process is looked at too
log = logging.getLogger(__name__)


class _Task:
    """One job.  ``state``: queued, running, waiting (for another), resuming (wants a slot again), done, or elsewhere."""
    __slots__ = ("id", "payload", "done", "timeout_s", "depth", "state", "deaths", "worker", "cancelled", "log",
                 "waits", "parents")

    def __init__(self, id, payload, done, timeout_s):
        self.id, self.payload, self.done, self.timeout_s = id, payload, done, timeout_s
        self.depth, self.deaths, self.state = 0, 0, "queued"
        self.cancelled: _t.Optional[SeamlessError] = None
        self.worker: _t.Optional[_Worker] = None
        self.log: _t.Optional[str] = None
        self.waits: _t.Optional[_t.Set[_Task]] = None       # the jobs that this one waits for, if any
        self.parents: _t.Optional[_t.Set[_Task]] = None     # the jobs that wait for this one, if any


class _Child(_t.NamedTuple):
    """A worker process, our end of its connection, and the mark that it and all that it starts carry."""
    process: subprocess.Popen
    socket: socket.socket
    mark: str

    def kill(self) -> None:
        """Kill it and all that it started."""
        if not kill_family(self.process.pid, self.mark):
            log.error("a process of worker %d could not be killed", self.process.pid)


class _Worker:
    """A thread of ours and its process, which is None until it is needed.

    ``inbox``: a job to run, True to start the process already, None to end.  ``log``: the file that the
    process writes to; jobs that print nothing share one.  ``killed``: the process gets no other job.
    """

    def __init__(self):
        self.inbox: "SimpleQueue[_t.Union[_Task, bool, None]]" = SimpleQueue()
        self.child: _t.Optional[_Child] = None
        self.log: _t.Optional[str] = None
        self.killed = False
        self.thread: _t.Any = None


class WorkerPool:
    """``workers`` slots.  ``hello()`` gives the first message to each worker process (a dict).

    ``command`` is how a worker is started (the number of its socket is appended); ``folder`` is
    where the private folder for logs and temporary files is made.  It is made again should somebody remove it;
    ``look_after`` is called then and when, to do the same for what others keep in it.  Safe from several threads.
    """

    def __init__(self, workers: int, hello: _t.Callable[[], dict] = dict, command: _t.Optional[_t.Sequence[str]] = None,
                 folder: _t.Optional[str] = None, look_after: _t.Callable[[], None] = lambda: None):
        self.workers = workers
        self._hello, self._look_after = hello, look_after
        self._command = list(command or [sys.executable, "-c", _BOOT, package_root(), __package__ + ".worker"])
        leftovers.sweep(folder)
        self.folder = tempfile.mkdtemp(prefix="seamless-jobs-", dir=folder)
        self._hold = leftovers.hold(self.folder)
        self._changed = threading.Condition()       # its lock guards everything below
        self._tasks: _t.Dict[str, _Task] = {}
        self._queues: _t.Dict[int, "collections.deque[_Task]"] = {}
        self._resuming: "collections.deque[_Task]" = collections.deque()
        self._idle: _t.List[_Worker] = []
        self._all: _t.Set[_Worker] = set()
        self._running = 0
        self._serial = 0
        self._closed = False

    # --- asked from outside ---------------------------------------------------------------------------

    def submit(self, id: str, payload: bytes, done: _t.Callable[[dict, _t.Optional[str]], None],
               timeout_s: _t.Optional[float] = None, parent: _t.Optional[str] = None, depth: int = 0) -> None:
        """Queue a job, before all others if it comes from the job ``parent``; or before those with less ``depth``.

        ``done(outcome, log)`` is called once, from another thread, when it has ended; ``log`` is the path of
        its output, which is now the caller's to remove, or None if it printed nothing.
        """
        task = _Task(id, payload, done, timeout_s)
        with self._changed:
            if self._closed:
                raise ServiceError("job %s was refused: the jobserver is stopping" % id)
            if parent in self._tasks:
                depth = self._tasks[parent].depth + 1
            task.depth = depth
            self._tasks[id] = task
            self._enqueue(task)
            self._dispatch()

    def prestart(self) -> None:
        """Start one worker process now, so that the first job need not wait for it."""
        with self._changed:
            if not self._all and not self._closed:
                worker = self._new_worker()
                self._idle.append(worker)
                worker.inbox.put(True)

    def wait_for(self, id: str, parent: str) -> None:
        """The running job ``parent`` waits for job ``id`` from now on.

        Raises ``SeamlessError`` if ``id`` waits for ``parent`` already: neither would ever end.
        """
        with self._changed:
            task, waiting = self._tasks.get(id), self._tasks.get(parent)
            if task is None or waiting is None or waiting.state == "queued" or waiting in (task.parents or ()):
                return
            if _waits_for(task, waiting):
                raise SeamlessError("job %s cannot wait for job %s, which waits for it; call it with other arguments"
                                    % (parent, id))
            task.parents = task.parents or set()
            task.parents.add(waiting)
            waiting.waits = waiting.waits or set()
            waiting.waits.add(task)
            if task.depth <= waiting.depth:
                task.depth = waiting.depth + 1
                if task.state == "queued":
                    self._enqueue(task)
            if waiting.state == "running":
                self._running -= 1
            elif waiting.state == "resuming":
                self._resuming.remove(waiting)
            waiting.state = "waiting"
            self._dispatch()

    def expect(self, id: str) -> None:
        """From now on jobs may wait for ``id``, which runs elsewhere; until it has ``arrived``."""
        with self._changed:
            task = self._tasks[id] = _Task(id, b"", None, None)
            task.state = "elsewhere"

    def arrived(self, id: str) -> None:
        """What runs elsewhere has ended: the jobs that wait for it want their slots back."""
        with self._changed:
            task = self._tasks.get(id)
            if task is not None and task.state == "elsewhere":
                self._forget(task)
                self._dispatch()

    def resumed(self, id: str, timeout_s: float) -> bool:
        """Wait until job ``id``, if it wants its slot back, has it; False after ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or id not in self._tasks or self._tasks[id].state != "resuming", timeout_s)

    def waits(self) -> _t.List[_t.Tuple[str, str]]:
        """(job, the job that it waits for), all of them."""
        with self._changed:
            return [(task.id, other.id) for task in self._tasks.values() for other in task.waits or ()]

    def cancel(self, id: str, error: _t.Optional[SeamlessError] = None) -> bool:
        """Kill a job, or take it out of the queue; False if it is not here.  ``error``: what its outcome shall be."""
        with self._changed:
            task = self._tasks.get(id)
            if task is None:
                return False
            task.cancelled = error or JobCancelledError("job %s was cancelled" % id)
            worker, child = task.worker, None
            if worker is None:
                self._forget(task)
            else:
                worker.killed = True
                child = worker.child            # if there is none yet, its thread will see that it was killed
        if worker is None:
            task.done(_failure(JobCancelledError("job %s was cancelled before it began" % id)), None)
        elif child is not None:
            child.kill()
        return True

    def state(self, id: str) -> _t.Optional[str]:
        """queued, running or waiting; None if the job is not here."""
        task = self._tasks.get(id)
        return None if task is None else "waiting" if task.state == "resuming" else task.state

    def log_path(self, id: str) -> _t.Optional[str]:
        """The file with what a running job printed so far; None if it has none."""
        task = self._tasks.get(id)
        return task.log if task is not None else None

    read_log = staticmethod(read_log)
    remove_log = staticmethod(remove_file)

    def pids(self) -> _t.List[int]:
        """The worker processes."""
        children = [worker.child for worker in list(self._all)]
        return [child.process.pid for child in children if child is not None]

    def close(self) -> None:
        """Kill all jobs and workers, reap them, remove the folder.  The jobs' outcomes are ``ServiceError``."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            queued = [task for task in self._tasks.values() if task.worker is None and task.state != "elsewhere"]
            for task in queued:
                self._forget(task)
            workers = list(self._all)
            children = [worker.child for worker in workers]
            for worker in workers:
                worker.killed = True
                worker.inbox.put(None)
            self._changed.notify_all()
        for task in queued:
            task.done(_failure(ServiceError("job %s did not run: the jobserver was stopped" % task.id)), None)
        for child in children:
            if child is not None:
                child.kill()
        for worker in workers:
            worker.thread.join(10)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._hold)

    # --- the queue; the lock is held ------------------------------------------------------------------

    def _enqueue(self, task: _Task, first: bool = False) -> None:
        queue = self._queues.setdefault(task.depth, collections.deque())
        (queue.appendleft if first else queue.append)(task)

    def _next(self) -> _t.Optional[_Task]:
        """The job to begin next: the deepest, then the oldest."""
        for depth in sorted(self._queues, reverse=True):
            queue = self._queues[depth]
            while queue:
                task = queue.popleft()
                if task.state == "queued" and task.depth == depth:      # not cancelled, nor moved to another queue
                    return task
            del self._queues[depth]
        return None

    def _dispatch(self) -> None:
        """Give free slots to jobs."""
        while self._running < self.workers and not self._closed:
            if self._resuming:
                self._resuming.popleft().state = "running"
                self._changed.notify_all()
            else:
                task = self._next()
                if task is None:
                    break
                worker = self._idle.pop() if self._idle else self._new_worker()
                task.state, task.worker = "running", worker
                worker.inbox.put(task)
            self._running += 1

    def _new_worker(self) -> _Worker:
        worker = _Worker()
        self._all.add(worker)
        worker.thread = threading.Thread(target=self._serve, args=(worker,), daemon=True, name="seamless-worker")
        worker.thread.start()
        return worker

    def _forget(self, task: _Task) -> None:
        """The job has ended: nobody waits for it any more, and it waits for nobody."""
        self._tasks.pop(task.id, None)
        task.state, task.payload = "done", b""
        self._stop_waiting(task)
        for parent in task.parents or ():
            parent.waits.discard(task)
            if not parent.waits and parent.state == "waiting":
                parent.state = "resuming"
                self._resuming.append(parent)
        task.parents = None

    @staticmethod
    def _stop_waiting(task: _Task) -> None:
        for child in task.waits or ():
            child.parents.discard(task)
        task.waits = None

    # --- the thread of one worker ---------------------------------------------------------------------

    def _serve(self, worker: _Worker) -> None:
        while True:
            task = worker.inbox.get()
            if task is None:
                break
            try:
                if task is True:
                    if worker.child is None and not self._closed:
                        self._start(worker)
                    continue
                outcome = self._run(worker, task)
            except Exception as exc:        # a full disk, no more processes: the job must hear of it, and the pool go on
                log.exception("a worker could not be started, or spoke nonsense")
                self._end(worker)
                if task is True:
                    continue
                outcome = _failure(SeamlessError("job %s could not be run: %s: %s" % (task.id, type(exc).__name__, exc)))
            self._finish(worker, task, outcome)
        self._end(worker)
        if worker.log is not None:
            remove_file(worker.log)
        with self._changed:
            self._all.discard(worker)

    def _run(self, worker: _Worker, task: _Task) -> _t.Optional[dict]:
        """Run ``task`` in the process of ``worker``.  None: the process died, and the job may be tried again."""
        self._keep_folder()
        if worker.log is not None and not os.path.exists(worker.log):
            worker.log = None
        child = worker.child
        if child is not None and (task.deaths or child.process.poll() is not None):
            self._end(worker)
            child = None
        if child is None:
            child = self._start(worker)
        run_dir = self._new_path("run")
        os.mkdir(run_dir, 0o700)
        task.log = worker.log = worker.log or self._new_path("log")
        try:
            if worker.killed:
                raise EOFError
            return self._exchange(child, task, run_dir)
        except (EOFError, OSError):
            worker.killed = True
            return self._post_mortem(child, task)
        finally:
            try:
                os.rmdir(run_dir)
            except OSError:
                shutil.rmtree(run_dir, ignore_errors=True)

    def _exchange(self, child: _Child, task: _Task, run_dir: str) -> dict:
        """Send the job, wait for the outcome.  Raises ``EOFError`` or ``OSError`` if the process is gone."""
        send_message(child.socket, json.dumps({"id": task.id, "run_dir": run_dir, "log": task.log}).encode())
        send_message(child.socket, task.payload)
        deadline = None if task.timeout_s is None else time.monotonic() + task.timeout_s
        poll = select.poll()
        poll.register(child.socket, select.POLLIN)
        while True:
            wait = _LOOK_S if deadline is None else min(_LOOK_S, deadline - time.monotonic())
            if wait <= 0:
                child.kill()
                return {**_failure(DeadlineError("job %s was killed after %g s, its time limit"
                                                 % (task.id, task.timeout_s)), tail(task.log)), "retire": True}
            if poll.poll(wait * 1000):
                return json.loads(receive_message(child.socket))
            if child.process.poll() is not None:
                raise EOFError
            self._look_at(task)

    def _look_at(self, task: _Task) -> None:
        """While a job runs: what it and its successors need on disk, and that it does not fill the disk."""
        try:
            self._keep_folder()
            if _size(task.log) > LOG_BYTES:
                with open(task.log, "ab") as file:      # it and its children append too: they go on at the new end
                    file.truncate(0)
                    file.write(b"[more than %d MiB of output; what came before is lost]\n" % (LOG_BYTES >> 20))
        except (OSError, SeamlessError) as exc:         # the job itself may not need them
            log.warning("job %s: %s", task.id, exc)

    def _post_mortem(self, child: _Child, task: _Task) -> _t.Optional[dict]:
        """What a job whose worker died gets; None: another try."""
        try:
            how = describe_exit(child.process.wait(1))
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        child.kill()
        if task.cancelled:
            return _failure(task.cancelled, tail(task.log))
        if self._closed:
            return _failure(ServiceError("job %s was killed: the jobserver was stopped" % task.id), tail(task.log))
        task.deaths += 1
        log.warning("job %s: its worker process %s (%s)", task.id, how, "once" if task.deaths == 1 else "twice")
        if task.deaths < 2:
            return None
        return _failure(WorkerDiedError("job %s was tried twice, and both times its worker process died: it %s"
                                        % (task.id, how), logs=tail(task.log)), tail(task.log))

    def _finish(self, worker: _Worker, task: _Task, outcome: _t.Optional[dict]) -> None:
        """The worker is done with the task, for good or (``outcome`` is None) for now."""
        path = task.log if _size(task.log) else None
        if path is not None:
            worker.log = None               # the file now belongs to the job
        retire = outcome is not None and outcome.pop("retire", False)
        with self._changed:
            task.worker = None              # from now on nobody kills the process because of this task
            if task.cancelled and (outcome is None or "error" not in outcome):
                outcome = _failure(task.cancelled, tail(path))
            if task.state == "running":
                self._running -= 1
            elif task.state == "resuming":
                self._resuming.remove(task)
            if outcome is not None:
                self._forget(task)
            else:
                task.state, task.log = "queued", None
                self._stop_waiting(task)
                self._enqueue(task, first=True)
        if outcome is not None:
            task.done(outcome, path)
        elif path is not None:
            remove_file(path)
        if retire or worker.killed:
            self._end(worker)
        with self._changed:
            worker.killed = self._closed
            self._idle.append(worker)
            self._dispatch()
            while len(self._idle) > self.workers:       # one that stood in for a waiting job is soon needed again
                self._idle.pop(0).inbox.put(None)

    # --- processes ------------------------------------------------------------------------------------

    def _start(self, worker: _Worker) -> _Child:
        """Start the process of ``worker``.  Raises ``OSError``."""
        worker.log = worker.log or self._new_path("log")
        mark = "%d-%s" % (os.getpid(), os.urandom(8).hex())
        ours, theirs = socket.socketpair()
        fd = os.open(worker.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = subprocess.Popen(
                self._command + [str(theirs.fileno())], stdin=subprocess.DEVNULL, stdout=fd, stderr=fd,
                pass_fds=[theirs.fileno()], cwd="/", start_new_session=True, env={**os.environ, MARK: mark})
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(fd)
            theirs.close()
        ours.settimeout(60)                 # within a message; the wait for one is in _exchange
        child = worker.child = _Child(process, ours, mark)
        send_message(ours, json.dumps({"folder": self.folder, **self._hello()}).encode())
        return child

    def _keep_folder(self) -> None:
        """Make the folder again if somebody removed it.  Raises ``ServiceError`` if its name is taken, ``OSError``."""
        try:
            info = os.lstat(self.folder)
        except FileNotFoundError:
            log.warning("the folder %s was removed, and is made again", self.folder)
            os.makedirs(self.folder, 0o700, exist_ok=True)
            info = os.lstat(self.folder)
        if info.st_uid != os.geteuid():        # of a link: who made the link
            raise ServiceError("the jobserver's folder %s was removed, and its name belongs to somebody else now: "
                               "stop the jobserver" % self.folder)
        self._look_after()

    def _new_path(self, kind: str) -> str:
        with self._changed:
            self._serial += 1
            return os.path.join(self.folder, "%s-%d" % (kind, self._serial))

    @staticmethod
    def _end(worker: _Worker) -> None:
        """No process any more: killed if need be, and reaped."""
        child = worker.child
        if child is not None:
            child.kill()
            child.process.wait()
            child.socket.close()
            worker.child = None


def _waits_for(task: _Task, other: _Task) -> bool:
    """True if ``task`` is ``other``, or waits for it, directly or through others."""
    seen, todo = set(), [task]
    while todo:
        task = todo.pop()
        if task is other:
            return True
        if task not in seen:
            seen.add(task)
            todo.extend(task.waits or ())
    return False


def _size(path: _t.Optional[str]) -> int:
    try:
        return os.stat(path).st_size if path is not None else 0
    except OSError:
        return 0


def _failure(error: SeamlessError, logs: str = "") -> dict:
    """The JSON form of the outcome of a job that ended with ``error``."""
    outcome: _t.Dict[str, object] = {"error": error_to_dict(error)}
    if logs:
        outcome["logs"] = logs
    return outcome
