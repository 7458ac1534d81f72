"""Where a job runs: ``InProcess`` or ``Remote`` (a jobserver).  Both have the same five methods.

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
            self._pending[job.checksum] = (future, job)
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
        self._closed = False
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
            elif isinstance(error, ServiceError) and not again and not self._closed:
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
            client, self._client, self._closed = self._client, None, True
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
