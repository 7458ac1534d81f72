"""``JobserverClient1x``: has jobs run by a jobserver of Seamless 1.x, which ``SEAMLESS_REMOTE_CLIENTS`` names
(compat/http.md section 3).

    GET  /run-transformation            answered when the job has ended; so there is a thread for each job under way
    POST /cancel-transformation/<tf>    it says so then, but lets the job go on

That jobserver takes all inputs from its hashserver, stores the result there, and records nothing: the client does both
ends.  A job whose request broke off may still be running, and one that failed would fail again: neither is sent twice.
"""
import logging
import queue
import re
import threading
import typing as _t

from .checksum import Checksum
from .dunders import execution_dunders
from .errors import CacheMissError, DeadlineError, JobCancelledError, JobError, JobWritten, SeamlessError, ServiceError
from .httpclient import HttpClient
from .jobclient import Callback, JobserverClient
from .record import minimal_record
from .transformation import INLINE_BYTES, Job, Outcome

_THREADS = 200              # jobs under way; more wait here instead of there
_SILENCE_S = 30 * 86400.0   # nothing comes before the job has ended
_PING_S = 30.0              # it stops after a time without new requests, whatever runs
_QUICK_S = 20.0
log = logging.getLogger(__name__)
_CANCELED = "Transformation was canceled"
_CACHE_MISS = re.compile(r"(?:[\w.]+\.)?CacheMissError(?::\s*(.*))?$")
_RUNTIME = ("wall_time_seconds", "cpu_user_seconds", "cpu_system_seconds", "memory_peak_bytes")


def connect(address: str, stores):
    """The client for the jobserver at ``address``, whichever it is.  Raises ``ServiceError`` if it is none."""
    http = HttpClient(address)
    try:
        answer = http.request("GET", "/info", timeout_s=_QUICK_S)
        if answer.status != 404:
            answer.expect(200)
            return JobserverClient(address)
        if b"jobserver" not in http.request("GET", "/", timeout_s=_QUICK_S).body:
            raise ServiceError("what answers at %s is not a jobserver" % address)
        return JobserverClient1x(address, stores)
    finally:
        http.close()


class JobserverClient1x:
    """The methods are those of ``JobserverClient`` that ``executors.Remote`` needs.  Safe from several threads.

    ``stores``: the session's; the jobserver's are the same, or it finds no inputs.
    """

    def __init__(self, address: str, stores):
        self.address, self._stores = address, stores
        self._http = HttpClient(address)
        self._lock = threading.Lock()
        self._callbacks: _t.Dict[str, _t.List[Callback]] = {}
        self._queue: "queue.SimpleQueue[_t.Optional[Job]]" = queue.SimpleQueue()
        self._threads = self._idle = 0
        self._closed = threading.Event()

    def run(self, job: Job, parent=None, on_log=None) -> Outcome:
        """Wait for the outcome.  The job is cancelled if the waiting is interrupted.

        What a job prints is only known if it fails, and then at its end.
        """
        ended, told = threading.Event(), []
        self.submit(job, lambda *found: (told.append(found), ended.set()))
        try:
            ended.wait()
        except BaseException:
            self.cancel([job.checksum])
            raise
        outcome, error = told[0]
        if error is not None:
            raise error
        logs = (outcome.error or {}).get("logs")
        if logs and on_log is not None:
            on_log(logs.encode() + b"\n")
        return outcome

    def submit(self, job: Job, callback: Callback, parent=None) -> None:
        """As ``JobserverClient.submit``."""
        with self._lock:
            callbacks = self._callbacks.setdefault(job.checksum, [])
            callbacks.append(callback)
            if len(callbacks) > 1:
                return
            new = self._idle <= self._queue.qsize() and self._threads < _THREADS
            targets = ([self._work] if new else []) + ([] if self._threads else [self._ping])
            self._threads += new
            self._queue.put(job)
        for target in targets:
            threading.Thread(target=target, name="seamless-job-1x", daemon=True).start()

    def cancel(self, ids: _t.Iterable[str], force: bool = False) -> _t.Dict[str, str]:
        """Let go of jobs; returns id -> state.  What has begun goes on over there, and its result is not recorded."""
        states = {}
        for id in map(str, ids):
            self._tell(id, Outcome.failure(JobCancelledError("job %s was cancelled" % id)))
            states[id] = self._revoke(id)
        return states

    def info(self) -> dict:
        """It says nothing about itself."""
        return {}

    def close(self) -> None:
        """What was submitted and has not ended gets a ``ServiceError``."""
        self._closed.set()
        for id in list(self._callbacks):
            self._tell(id, None, ServiceError("the connection to the jobserver was closed before job %s ended" % id))
        for _ in range(self._threads):
            self._queue.put(None)
        self._http.close()

    # --- the threads ------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            job = self._queue.get()
            with self._lock:
                self._idle -= 1
            if job is None:
                return
            outcome: _t.Optional[Outcome] = None
            error: _t.Optional[SeamlessError] = None
            try:
                if job.checksum in self._callbacks:         # not cancelled meanwhile
                    outcome = self._perform(job)
            except SeamlessError as exc:
                error = exc
            except Exception as exc:        # of whatever kind: those who wait must hear of it
                error = ServiceError("%s: %s: %s" % (self.address, type(exc).__name__, exc))
            self._tell(job.checksum, outcome, error)

    def _ping(self) -> None:
        while not self._closed.wait(_PING_S):
            if self._callbacks:
                try:
                    self._http.request("GET", "/healthcheck", timeout_s=_QUICK_S)
                except SeamlessError:
                    pass                    # the jobs will say so

    def _tell(self, id: str, outcome: _t.Optional[Outcome], error: _t.Optional[SeamlessError] = None) -> None:
        if error is not None:
            error.final = True              # type: ignore[attr-defined]  # sending the job once more is no use, or does harm
        with self._lock:
            callbacks = self._callbacks.pop(id, ())
        for callback in callbacks:
            try:
                callback(outcome, error)
            except Exception:               # the caller's; the outcomes of other jobs must not be lost
                log.exception("the callback for job %s failed", id)

    def _revoke(self, id: str) -> str:
        """Say that nobody waits for the job any more, if that can be done quickly; its state."""
        try:
            return self._http.request("POST", "/cancel-transformation/" + id, timeout_s=_QUICK_S).expect(200).json()["status"]
        except SeamlessError as exc:
            log.info("job %s could not be cancelled: %s", id, exc)
            return "unknown"

    # --- one job ----------------------------------------------------------------------------------------

    def _perform(self, job: Job) -> Outcome:
        buffers, recipe = self._stores.buffers, job.recipe
        again = self._stores.results.get(job.checksum) is not None
        dunders = {"__meta__": {}, **execution_dunders(job.meta, buffers.put)}
        buffers.put_many([*job.buffers.values(), recipe.buffer])
        # What it does not store it cannot hand out: a scratch result is stored nevertheless.
        body = {"transformation_dict": {**recipe.to_dict(), **dunders}, "tf_checksum": recipe.checksum,
                "tf_dunder": dunders, "scratch": False, "strict_dunder": False, "record": job.meta.record}
        http = HttpClient(self.address, read_timeout_s=_SILENCE_S)      # of its own: it may take days
        try:
            answer = http.request("GET", "/run-transformation", json=body, timeout_s=job.meta.timeout_s, repeat=False)
        except DeadlineError:
            self._revoke(job.checksum)
            return Outcome.failure(DeadlineError("job %s took longer than its time limit (timeout_s) and was given up" % job.checksum))
        finally:
            http.close()
        text = answer.body.decode("utf-8", "replace").strip()
        if _CANCELED in text and answer.status in (200, 409):
            return Outcome.failure(JobCancelledError("job %s was cancelled" % job.checksum))
        if answer.status == 500:
            return Outcome.failure(self._failure(text))
        answer.expect(200)
        return self._outcome(job, answer.json() if text.startswith("{") else {"result_checksum": text}, again)

    def _failure(self, text: str) -> SeamlessError:
        """What it said of a job that failed: a traceback, or a report; and then, between stars, what was printed."""
        traceback, stars, printed = text.partition("\n*****")
        traceback = traceback.rstrip()
        last = traceback.rpartition("\n")[2]
        missing = _CACHE_MISS.match(last)
        if missing is not None:             # so that the session makes the input again
            return CacheMissError("the jobserver %s found an input in none of its stores: %s" % (self.address, missing[1]))
        if not text.startswith("Traceback"):
            return JobError("the command failed on the jobserver %s" % self.address, logs=text)
        return JobError(last, traceback=traceback, logs=(stars + printed).strip())

    def _outcome(self, job: Job, found: _t.Mapping, again: bool) -> Outcome:
        if "remote_job_written" in found:
            return Outcome.failure(JobWritten(JobWritten.PREFIX + found["remote_job_written"].partition(":")[2]))
        result, said = Checksum(found.get("result_checksum")), found.get("record_runtime") or {}
        runtime = {name.replace("cpu_", "cpu_time_"): said[name] for name in _RUNTIME if said.get(name) is not None}
        # The minimal record also with ``record``: what a full one says of the machine, only the other side knows.
        if job.checksum in self._callbacks and not job.meta.fresh:
            self._stores.results.put(job.checksum, result, minimal_record(job.checksum, result, runtime, "remote", "jobserver"), again)
        wanted = job.meta.scratch or (self._stores.buffers.length(result) or 0) <= INLINE_BYTES
        return Outcome(result, buffer=self._stores.buffers.get(result) if wanted else None, runtime=runtime)
