"""Where a job runs: ``InProcess`` or ``Remote`` (a jobserver or daskserver).  Both have the same five methods.

    run(job, log_fd=None) -> Outcome       run it now and wait; the calling thread may do the work
    submit(job) -> Future[Outcome]         run it some time soon
    help(checksum)                         a waiting thread offers itself: run that job here if nobody began it
    cancel(checksum)                       kill it
    close()                                give back threads and connections

An outcome is never an exception: what the user's code raised is data in it.
"""
import queue
import threading
import time
import typing as _t
from concurrent.futures import Future

from .checksum import Checksum
from .errors import JobCancelledError, SeamlessError, ServiceError
from .queuewatch import QueueWatch
from .transformation import Job, Outcome


#: Jobs that are running when the program ends are cancelled, and get so long to end.
END_S = 3.0


def done(outcome: Outcome) -> Future:
    """A future that has ``outcome`` already."""
    future: Future = Future()
    future.set_result(outcome)
    return future


class InProcess:
    """Runs jobs in this process: in the calling thread, or in one of ``threads`` threads.

    A thread that waits for a job which nobody has begun takes it and runs it itself (``help``).
    So jobs that wait for other jobs cannot use up the threads, to any depth.  The threads are daemons, not
    those of a ThreadPoolExecutor, for which a program that ends (by Ctrl-C, say) would wait for ever.
    """

    def __init__(self, stores, threads: int):
        self._stores = stores
        self._limit = threads
        self._threads: _t.List[threading.Thread] = []
        self._queue: "queue.SimpleQueue[_t.Optional[Checksum]]" = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: _t.Dict[Checksum, _t.List[_t.Tuple[Future, Job]]] = {}     # several: one may be to be written only
        self._cancels: _t.Dict[Checksum, threading.Event] = {}

    def run(self, job: Job, log_fd: _t.Optional[int] = None) -> Outcome:
        from .worker import run_job         # the code that runs user code is loaded when there is some to run
        cancelled = threading.Event()
        with self._lock:
            self._cancels[job.checksum] = cancelled
        try:
            return run_job(job, self._stores, log_fd=log_fd, cancelled=cancelled)
        finally:
            with self._lock:
                self._cancels.pop(job.checksum, None)

    def unended(self) -> _t.Tuple[_t.List[Job], _t.List[Checksum]]:
        """The jobs that nobody has begun, and the names of those that run."""
        with self._lock:
            return [job for pending in self._pending.values() for _, job in pending], list(self._cancels)

    def submit(self, job: Job) -> Future:
        future: Future = Future()
        with self._lock:
            self._pending.setdefault(job.checksum, []).append((future, job))
            self._queue.put(job.checksum)
            if len(self._threads) < self._limit:
                self._threads.append(threading.Thread(target=self._work, name="seamless-job", daemon=True))
                self._threads[-1].start()
        return future

    def _work(self) -> None:
        for checksum in iter(self._queue.get, None):
            self.help(checksum)

    def help(self, checksum: Checksum) -> None:
        with self._lock:
            pending = self._pending.pop(checksum, ())
        for future, job in pending:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self.run(job))
            except BaseException as exc:    # whoever waits must hear of it, whatever it is
                future.set_exception(exc)
                if not isinstance(exc, Exception):
                    raise

    def cancel(self, checksum: Checksum) -> None:
        with self._lock:
            pending = self._pending.pop(checksum, ())
            event = self._cancels.get(checksum)
        for future, _ in pending:
            future.set_result(Outcome.failure(JobCancelledError("job %s was cancelled before it began" % checksum)))
        if event is not None:
            event.set()

    def close(self) -> None:
        with self._lock:
            waiting = list(self._pending)
            running = list(self._cancels)
        for checksum in waiting + running:
            self.cancel(checksum)
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + END_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))


class Remote:
    """Runs jobs on a jobserver or daskserver.  ``connect(again)`` gives a ``JobserverClient``; ``who`` begins lines
    that say what the jobs wait for; ``bring(job, outcome)`` adds to an outcome what did not come with it.

    The client mends lost connections itself.  What fails nevertheless (a server here that exited or was killed, one
    that was stopped) is connected to anew, and the jobs are sent again: a job's id is its checksum, so
    that sending it twice is harmless.  That ends with an error that says it is final, or after ``DROPS``
    without one outcome in between.
    """
    DROPS = 5

    def __init__(self, connect: _t.Callable[[bool], object], parent: _t.Optional[Checksum] = None,
                 close: _t.Callable[[], None] = lambda: None, who: _t.Optional[str] = None,
                 bring: _t.Optional[_t.Callable[[Job, Outcome], Outcome]] = None):
        self._connect = connect
        self._parent = parent
        self._close = close
        self._who = who
        self._bring = bring or (lambda job, outcome: outcome)
        self._client = None
        self._closed = False
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: a client of its own, to the same jobserver."""
        self._lock = threading.Lock()
        self._client = None
        self._drops = 0
        self._submitted: _t.Dict[Checksum, Job] = {}
        self._queue = QueueWatch(lambda: self._client, self._who)

    def _get(self, broken=None, error: _t.Optional[SeamlessError] = None):
        """The client; ``broken``: another one than this, which failed with ``error``."""
        with self._lock:
            if broken is not None and self._client in (broken, None):
                self._drops += 1
                if self._closed or self._drops > self.DROPS or getattr(error, "final", False):
                    raise error
            replaced = broken is not None and self._client is broken
            if self._client is None or replaced:
                self._client = None             # also if this fails
                self._client = self._connect(broken is not None)
            client = self._client
        if replaced:                            # once: it hands all its jobs back, and they come here
            broken.close()                      # type: ignore[union-attr]  # without the lock
        return client

    def run(self, job: Job, log_fd: _t.Optional[int] = None) -> Outcome:
        client, writer = self._get(), _writer(log_fd)
        with self._queue:
            while True:
                try:
                    outcome = self._bring(job, client.run(job, parent=self._parent, on_log=writer))
                    self._drops = 0
                    return outcome
                except ServiceError as exc:
                    client = self._get(client, exc)

    def submit(self, job: Job) -> Future:
        future: Future = Future()
        clients = [self._get()]
        self._queue.begin()
        if self._parent is not None:
            self._submitted[job.checksum] = job

        def finished(outcome, error=None):
            try:
                outcome = self._bring(job, outcome) if error is None else None
            except Exception as exc:        # whatever it is: who waits for this job must hear of it
                error = exc
            if isinstance(error, ServiceError):
                try:
                    clients.append(self._get(clients[-1], error))
                    clients[-1].submit(job, finished, parent=self._parent)
                    return
                except SeamlessError as exc:
                    error = exc
            self._submitted.pop(job.checksum, None)
            self._queue.end()
            if error is None:
                self._drops = 0
                future.set_result(outcome)
            else:
                future.set_exception(error)
        clients[0].submit(job, finished, parent=self._parent)
        return future

    def help(self, checksum: Checksum) -> None:
        """In a worker: wait for that job in a way that gives this worker's own slot back meanwhile."""
        job = self._submitted.get(checksum) if self._parent is not None else None
        if job is not None:
            # as another client: the outcome must still reach the one that submitted the job
            self._connect(False).run(job, parent=self._parent)

    def cancel(self, checksum: Checksum) -> None:
        client = self._client
        if client is not None:
            client.cancel([checksum])

    def close(self) -> None:
        self._closed = True
        held = self._lock.acquire(timeout=END_S)        # not for ever: another thread may be waiting for a host that is gone
        client, self._client = self._client, None
        if held:
            self._lock.release()
        self._queue.close()
        if client is not None:
            client.close()
        self._close()


def _writer(log_fd):
    """A function that writes what the job prints to ``log_fd``, or None."""
    if log_fd is None:
        return None
    import os

    def write(data: bytes) -> None:
        while data:
            data = data[os.write(log_fd, data):]
    return write
