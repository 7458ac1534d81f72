"""``run_job``: the one way to run a job; and the worker process, which does so for a ``WorkerPool``.

The process is started with the number of its socket.  It gets a hello (where the stores are, how to reach
its jobserver), then for each job a control message and the job, and answers each with the outcome.
While a job runs, descriptors 1 and 2 are its log file: what Python, C code and children print ends up
there, where the jobserver can read it at once.  When the connection closes, the jobserver is gone: the
process kills what its job has started, removes the folder of the pool, and ends.  A job begins in its own empty
working folder, and in the state in which the process was before its first job (``Baseline``).
"""
import base64
import contextvars
import json
import os
import socket
import sys
import threading
import time
import typing as _t
from queue import SimpleQueue

from . import processes
from .baseline import Baseline
from .celltypes import DEEP
from .errors import CorruptBufferError, JobCancelledError, JobError, SeamlessError
from .execute import execute
from .folder import MemoryBuffers
from .record import cached_outcome, record_of
from .stores import Stores, open_stores
from .transformation import INLINE_BYTES, Job, Outcome

#: So much of the end of a job's output goes into its outcome.
TAIL_BYTES = 1 << 16
#: A worker process that is bigger than this when a job has ended is replaced.
RETIRE_BYTES = 1 << 30


class WorkerContext:
    """What a job that runs in a worker process must know to have other jobs run.

    ``address`` and ``secret`` of the jobserver, ``job_id`` (to be sent as ``parent``), and ``stores``.
    """

    def __init__(self, address: str, secret: _t.Optional[bytes], job_id: str, stores: Stores):
        self.address, self.secret, self.job_id, self.stores = address, secret, job_id, stores
        self.record = False                 # whether full records are wanted


_context: _t.Optional[WorkerContext] = None


def current() -> _t.Optional[WorkerContext]:
    """The context of the job that this process is running; None outside of a worker process."""
    return _context


# --- one job ------------------------------------------------------------------------------------------

def run_job(job: Job, stores: Stores, record: bool = True, log_fd: _t.Optional[int] = None,
            run_dir: _t.Optional[str] = None, cancelled: _t.Optional[threading.Event] = None) -> Outcome:
    """Look the job up; if need be, run it here and store its result.

    With ``record`` the row is written too, after the result.  What the job prints goes to ``log_fd``;
    ``run_dir`` is an empty folder that it may use; ``cancelled`` ends it when set.  What goes wrong is in
    the outcome, and is not recorded.  Only ``KeyboardInterrupt`` comes through.
    """
    try:
        if cancelled is not None and cancelled.is_set():
            raise JobCancelledError("job %s was cancelled before it began" % job.checksum)
        known = None if job.meta.fresh or stores.results is None else stores.results.get(job.checksum)
        outcome = None if known is None else cached_outcome(known, job.recipe.output[1], stores.buffers)
        if outcome is None:
            outcome = _execute(job, stores, log_fd, run_dir, cancelled)
            if record and stores.results is not None and not job.meta.fresh:
                stores.results.put(job.checksum, outcome.result,
                                   record_of(job.checksum, outcome.result, outcome.runtime, "process", None), known is not None)
        return outcome
    except SeamlessError as exc:
        return Outcome.failure(exc)
    except SystemExit as exc:
        return Outcome.failure(JobError("job %s called sys.exit(%r) instead of returning a result"
                                        % (job.checksum, exc.code)))
    except Exception as exc:                # a full disk, a bug of ours: whoever waits for the job must hear of it
        import traceback                    # rarely needed
        return Outcome.failure(SeamlessError("job %s could not be run: %s: %s\n%s" % (
            job.checksum, type(exc).__name__, exc, traceback.format_exc())))


def _execute(job: Job, stores: Stores, log_fd, run_dir, cancelled) -> Outcome:
    buffers = stores.buffers
    buffers.put_many([*job.buffers.values(), job.recipe.buffer])
    # The leaves of a deep result do not travel, so they are stored even then.
    scratch = job.meta.scratch and job.recipe.output[1] not in DEEP
    store = _ScratchStore(buffers) if scratch else buffers
    before, started_s = _usage(), time.time()
    result = execute(job.recipe, job.meta, store, log_fd=log_fd, run_dir=run_dir, cancelled=cancelled)
    runtime = _runtime(before, _usage())
    length = store.length(result)
    if length is None:
        raise CorruptBufferError("the result %s of job %s is not in the store that took it" % (result, job.checksum))
    if job.meta.record:
        runtime["record"] = _details(job, buffers, started_s, length)
    data = store.get(result) if scratch or length <= INLINE_BYTES else None
    return Outcome(result, buffer=data, runtime=runtime)


def _details(job: Job, buffers, started_s: float, length: int) -> _t.Optional[dict]:
    """What makes the record a full one; None, which leaves the minimal one, if that cannot be had: the result is there all the same."""
    try:
        from .buckets import details        # few want to know so much
        return details(job, buffers, started_s, length)
    except Exception as exc:                # a full disk, a strange machine
        import logging                      # hardly ever needed
        logging.getLogger(__name__).warning("the full record of job %s could not be made, so it gets a minimal one: %s: %s",
                                            job.checksum, type(exc).__name__, exc)
        return None


class _ScratchStore(MemoryBuffers):
    """Reads ``base``; what is put stays in memory."""

    def __init__(self, base):
        super().__init__()
        self._base = base

    def get(self, checksum):
        """The bytes, or None."""
        data = super().get(checksum)
        return self._base.get(checksum) if data is None else data

    def has(self, checksums):
        """Which of them are there."""
        checksums = list(checksums)
        return [a or b for a, b in zip(super().has(checksums), self._base.has(checksums))]

    def open(self, checksum):
        """A binary file, or None."""
        file = super().open(checksum)
        return self._base.open(checksum) if file is None else file

    def path(self, checksum):
        """A plain file with the content, or None."""
        return self._base.path(checksum)

    def length(self, checksum):
        """Bytes, or None."""
        length = super().length(checksum)
        return self._base.length(checksum) if length is None else length


def _usage() -> _t.Tuple[float, float, float, int, int]:
    """(wall time, user and system CPU time with children, peak memory of this process and of a child)."""
    times = os.times()
    try:
        import resource                     # not on every system
    except ImportError:
        return time.monotonic(), times.user + times.children_user, times.system + times.children_system, 0, 0
    unit = 1 if sys.platform == "darwin" else 1024
    own, child = (resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return time.monotonic(), times.user + times.children_user, times.system + times.children_system, own, child


def _runtime(before, after) -> _t.Dict[str, _t.Any]:
    # The system keeps one peak for all children: it is this job's if this job raised it.
    peak = max(after[3], after[4] if after[4] > before[4] else 0)
    wall, user, system = (round(max(0.0, b - a), 6) for a, b in zip(before[:3], after[:3]))
    return {"wall_time_seconds": wall, "cpu_time_user_seconds": user, "cpu_time_system_seconds": system,
            "memory_peak_bytes": peak}


# --- the worker process -------------------------------------------------------------------------------

class _Output:
    """Descriptors 1 and 2, and Python's streams on them, as the log file of one job after the other."""

    def __init__(self):
        self.fd = os.dup(1)
        self._path: _t.Optional[str] = None
        self._streams: _t.Tuple = ()

    def begin(self, path: str) -> None:
        """From now on what is printed goes to the file ``path``."""
        if path != self._path:
            os.close(self.fd)
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._path = path
        os.dup2(self.fd, 1)                 # each time: the last job may have closed or replaced them
        os.dup2(self.fd, 2)
        if not self._streams or any(stream.closed for stream in self._streams):
            self._streams = tuple(open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
                                  for fd in (1, 2))
        sys.stdout, sys.stderr = self._streams

    def end(self) -> str:
        """The end of what was printed."""
        for stream in (sys.stdout, sys.stderr) + self._streams:
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                pass                        # the job closed it, or put something else there
        size = os.fstat(self.fd).st_size
        return os.pread(self.fd, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode("utf-8", "replace") if size else ""


class _Process:
    """The main loop."""

    def __init__(self, sock: socket.socket):
        self._socket, self._pid, self._mark = sock, os.getpid(), os.environ.get(processes.MARK, "")
        self._hello = json.loads(processes.receive_message(sock))
        self._inbox: "SimpleQueue[_t.Tuple[bytes, bytes]]" = SimpleQueue()
        self._output = _Output()
        self._secret = base64.b64decode(self._hello["secret"]) or None
        self._stores = open_stores(self._hello["stores"], base64.b64decode(self._hello["stores_secret"]) or None)
        self._baseline = Baseline()
        processes.adopt_orphans()
        threading.Thread(target=self._read, name="seamless-reader", daemon=True).start()

    def _read(self) -> None:
        """The reading thread: it notices the end of the jobserver, whatever the job is doing."""
        try:
            while True:
                self._inbox.put((processes.receive_message(self._socket), processes.receive_message(self._socket)))
        except (EOFError, OSError):
            import shutil                   # a megabyte of memory, and hardly ever needed
            processes.kill_family(self._pid, self._mark, spare_root=True)
            shutil.rmtree(self._hello["folder"], ignore_errors=True)
            os._exit(1)

    def serve(self) -> None:
        """Run jobs until the connection closes."""
        while True:
            control, payload = self._inbox.get()
            outcome = self._one(json.loads(control), payload)
            processes.send_message(self._socket, json.dumps(outcome, separators=(",", ":")).encode())

    def _one(self, control: dict, payload: bytes) -> dict:
        global _context
        self._output.begin(control["log"])
        os.chdir(control["run_dir"])
        _context = WorkerContext(self._hello["address"], self._secret, control["id"], self._stores)
        try:
            job = Job.from_dict(json.loads(payload))
            _context.record = job.meta.record
            # In a copy of the context: decimal and numpy keep their settings there.
            outcome = contextvars.copy_context().run(run_job, job, Stores(self._stores.buffers, None), record=False,
                                                     log_fd=2, run_dir=control["run_dir"])
        except (SeamlessError, LookupError, TypeError, ValueError) as exc:
            outcome = Outcome.failure(exc if isinstance(exc, SeamlessError) else
                                      SeamlessError("job %s is malformed: %s: %s" % (control["id"], type(exc).__name__, exc)))
        except KeyboardInterrupt:
            outcome = Outcome.failure(JobError("job %s raised KeyboardInterrupt" % control["id"]))
        finally:
            _context = None
            if os.getpid() != self._pid:    # the job forked, and its child came back here
                os._exit(1)
        data = outcome.to_dict()
        fresh = self._baseline.restore()
        threads_left = _end_children(self._pid)
        logs = self._output.end()
        if logs:
            data["logs"] = logs
        if not fresh or threads_left or _resident_bytes() > RETIRE_BYTES:
            data["retire"] = True
        return data


def _end_children(pid: int) -> bool:
    """Kill the processes that the job left running; True if it left threads, which cannot be ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass                            # one that had ended
        processes.kill_family(pid, spare_root=True)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass                            # one that was killed
    except ChildProcessError:               # none (left)
        pass
    return any(not thread.name.startswith("seamless") and thread is not threading.main_thread()
               for thread in threading.enumerate())


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:                         # no /proc here: then it is not looked at
        return 0


def main(argv: _t.Sequence[str]) -> None:
    """Serve the pool on the socket whose number is the first argument; never returns."""
    number = int(argv[0])
    os.set_inheritable(number, False)
    _Process(socket.socket(fileno=number)).serve()
