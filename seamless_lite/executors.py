"""Where a job runs: ``InProcess`` or ``Remote`` (a jobserver).  Both have the same five methods.

    run(job, log_fd=None) -> Outcome       run it now and wait; the calling thread may do the work
    submit(job) -> Future[Outcome]         run it some time soon
    help(checksum)                         a waiting thread offers itself: run that job here if nobody began it
    cancel(checksum)                       kill it
    close()                                give back threads and connections

An outcome is never an exception: what the user's code raised is data in it.
"""
import threading
import typing as _t
from concurrent.futures import Future, ThreadPoolExecutor

from .checksum import Checksum
from .errors import JobCancelledError, SeamlessError, ServiceError
from .transformation import Job, Outcome


def done(outcome: Outcome) -> Future:
    """A future that has ``outcome`` already."""
    future: Future = Future()
    future.set_result(outcome)
    return future


class InProcess:
    """Runs jobs in this process: in the calling thread, or in one of ``threads`` threads.

    A thread that waits for a job which nobody has begun takes it and runs it itself (``help``).
    So jobs that wait for other jobs cannot use up the threads, to any depth.
    """

    def __init__(self, stores, threads: int):
        self._stores = stores
        self._threads = threads
        self._pool: _t.Optional[ThreadPoolExecutor] = None
        self._lock = threading.Lock()
        self._pending: _t.Dict[Checksum, _t.Tuple[Future, Job]] = {}
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

    def submit(self, job: Job) -> Future:
        future: Future = Future()
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="seamless-job")
            self._pending[job.checksum] = (future, job)
        self._pool.submit(self.help, job.checksum)
        return future

    def help(self, checksum: Checksum) -> None:
        with self._lock:
            future, job = self._pending.pop(checksum, (None, None))
        if future is None or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self.run(job))
        except BaseException as exc:        # whoever waits must hear of it, whatever it is
            future.set_exception(exc)
            if not isinstance(exc, Exception):
                raise

    def cancel(self, checksum: Checksum) -> None:
        with self._lock:
            future, _ = self._pending.pop(checksum, (None, None))
            event = self._cancels.get(checksum)
        if future is not None:
            future.set_result(Outcome.failure(JobCancelledError("job %s was cancelled before it began" % checksum)))
        if event is not None:
            event.set()

    def close(self) -> None:
        with self._lock:
            waiting = list(self._pending)
        for checksum in waiting:
            self.cancel(checksum)
        if self._pool is not None:
            self._pool.shutdown(wait=False)


class Remote:
    """Runs jobs on a jobserver.  ``connect(again)`` gives a ``JobserverClient``.

    A jobserver that is gone (idle exit, killed) is started again once per job: a job's id is its
    checksum, so that sending it twice is harmless.
    """

    def __init__(self, connect: _t.Callable[[bool], object], parent: _t.Optional[Checksum] = None,
                 close: _t.Callable[[], None] = lambda: None):
        self._connect = connect
        self._parent = parent
        self._close = close
        self._lock = threading.Lock()
        self._client = None
        self._submitted: _t.Dict[Checksum, Job] = {}

    def after_fork(self) -> None:
        """In a forked child: a client of its own, to the same jobserver."""
        self._lock = threading.Lock()
        self._client = None
        self._submitted = {}

    def _get(self, broken=None):
        with self._lock:
            if self._client is None or self._client is broken:
                self._client = None             # also if this fails
                self._client = self._connect(broken is not None)
            client = self._client
        if broken is not None:
            broken.close()                      # without the lock: it hands its jobs back, and they come here
        return client

    def run(self, job: Job, log_fd: _t.Optional[int] = None) -> Outcome:
        client = self._get()
        try:
            return client.run(job, parent=self._parent, on_log=_writer(log_fd))
        except ServiceError:
            return self._get(broken=client).run(job, parent=self._parent, on_log=_writer(log_fd))

    def submit(self, job: Job) -> Future:
        future: Future = Future()
        client = self._get()
        if self._parent is not None:
            self._submitted[job.checksum] = job

        def finished(outcome, error=None):
            if error is None:
                self._submitted.pop(job.checksum, None)
                future.set_result(outcome)
            elif isinstance(error, ServiceError) and not again:
                again.append(True)
                try:
                    self._get(broken=client).submit(job, finished, parent=self._parent)
                except SeamlessError as exc:
                    future.set_exception(exc)
            else:
                future.set_exception(error)
        again: _t.List[bool] = []
        client.submit(job, finished, parent=self._parent)
        return future

    def help(self, checksum: Checksum) -> None:
        """In a worker: wait for that job in a way that gives this worker's own slot back meanwhile."""
        job = self._submitted.get(checksum) if self._parent is not None else None
        if job is not None:
            # as another client: the outcome must still reach the one that submitted the job
            self._connect(False).run(job, parent=self._parent)

    def cancel(self, checksum: Checksum) -> None:
        if self._client is not None:
            self._client.cancel([checksum])

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
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
