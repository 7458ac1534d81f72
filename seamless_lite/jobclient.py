"""``JobserverClient``: has jobs run by a jobserver, or a daskserver.

``run`` waits for one job: one request, which is answered when the job has ended, or repeated until it has.
``submit`` is for many: one thread sends what has been collected in one request, another waits for whatever
has ended; both exist only while there is something to do.  A job's id is its checksum and each submission
has a token, so that any request may be repeated: a job that ended meanwhile is not run again.

A connection that is lost is mended, as often as needed and as long as ``mend`` has patience; meanwhile the jobs
go on.  A server that died with its jobs is another one afterwards, and gets them again; after five such
deaths without an outcome the jobs are held to be the reason.

After a fork the child is a client of its own, which waits for nothing; the parent's jobs stay the parent's.
"""
import base64
import collections
import logging
import os
import threading
import time
import typing as _t
import weakref

from .errors import DeadlineError, JobCancelledError, SeamlessError, ServiceError
from .httpclient import HttpClient
from .transformation import Job, Outcome

#: A request asks the server to wait so long; then it is repeated.
WAIT_S = 20.0
#: An answer may take so much longer than the server was asked to wait.
_GRACE_S = 60.0
#: So long a job may take before its output is followed instead of waited for.
_QUIET_S = 0.1
_BATCH_JOBS = 500
_BATCH_BYTES = 8 << 20
_ABANDON_S = 3.0            # telling the server that a job was given up takes no longer
_SLOWEST = 20_000           # bytes a second: what a line carries that we still wait for
_DEATHS = 5                 # of servers, without one outcome in between
_LINGER_S = 0.5             # the sending thread ends when it has had nothing to do for so long
log = logging.getLogger(__name__)

Callback = _t.Callable[[_t.Optional[Outcome], _t.Optional[SeamlessError]], None]


class _Submitted:
    """A job that ``submit`` was given, until its callbacks are called."""

    def __init__(self, job: dict, parent: _t.Optional[str], size: int):
        self.job, self.parent, self.size = job, parent, size
        self.callbacks: _t.List[Callback] = []
        self.later: _t.List[_t.Tuple[Job, Callback, _t.Optional[str]]] = []     # outcomes come by id: one run at a time


class JobserverClient:
    """The jobserver at ``address``.  Safe from several threads.

    ``mend`` is that of ``HttpClient``, ``pid`` the process that is the server now.  All methods raise ``ServiceError``
    if the jobserver cannot be reached, or died meanwhile; its attribute ``final`` is true if asking again is no use.
    """

    def __init__(self, address: str, secret: _t.Optional[bytes] = None, mend: _t.Optional[_t.Callable[[], object]] = None,
                 pid: _t.Optional[int] = None):
        self._mend, self._pid, self._deaths = mend, pid, 0
        self._http = HttpClient(address, secret, mend=self._mended if mend is not None else None)
        self._plain = HttpClient(address, secret)       # for what is not worth waiting for a lost connection
        self._begin()
        _clients.add(self)

    def _begin(self) -> None:
        """Nothing is asked for yet: when it is made, and in a child that was forked."""
        self.name = "%d-%s" % (os.getpid(), os.urandom(6).hex())
        self._changed = threading.Condition()
        self._pending: _t.Dict[str, _Submitted] = {}
        self._outbox: "collections.deque[str]" = collections.deque()
        self._sender: _t.Optional[threading.Thread] = None
        self._waiter: _t.Optional[threading.Thread] = None
        self._seen = 0              # the number of the last outcome that arrived
        self._tokens = 0

    # --- one job --------------------------------------------------------------------------------------

    def run(self, job: Job, parent: _t.Optional[str] = None, on_log: _t.Optional[_t.Callable[[bytes], None]] = None,
            deadline_s: _t.Optional[float] = None) -> Outcome:
        """Have ``job`` run and wait for its outcome.

        ``parent``: the id of the job that waits here, which gives its slot back meanwhile.  ``on_log`` gets
        what the job prints, as it comes.  Raises ``DeadlineError`` after ``deadline_s``; the job is cancelled,
        as it is when the waiting is interrupted (Ctrl-C).
        """
        try:
            return self._run(job, parent, on_log, deadline_s)
        except SeamlessError:
            raise
        except BaseException:               # Ctrl-C, or on_log failed
            self._abandon(str(job.checksum))
            raise

    def _run(self, job: Job, parent, on_log, deadline_s) -> Outcome:
        id = str(job.checksum)
        end = None if deadline_s is None else time.monotonic() + deadline_s
        body = {"client": self.name, "jobs": [job.to_dict()], "parent": parent, "token": self._token()}
        wait, follow = (WAIT_S, None) if on_log is None else (_QUIET_S, self._follow(id, on_log, body["token"]))
        while True:
            if end is not None:
                wait = min(wait, end - time.monotonic())
                if wait <= 0:
                    self.cancel([id])
                    raise DeadlineError("job %s was given up after %g s" % (id, deadline_s))
            answer = self._post("/jobs", {**body, "wait": wait}, wait)
            data = answer["outcomes"].get(id)
            if data is not None:
                self._deaths = 0
                if follow is not None and data.get("logs"):
                    for _ in follow:
                        pass
                return _outcome(data)
            if follow is None:
                continue
            for done in follow:             # comes back each WAIT_S, with or without output
                if done or (end is not None and time.monotonic() >= end):
                    break
            wait = WAIT_S

    def _abandon(self, id: str) -> None:
        """Cancel a job that nobody here waits for any more, if that can be done quickly."""
        try:
            self._plain.request("POST", "/cancel", json={"client": self.name, "ids": [id], "force": False}, timeout_s=_ABANDON_S)
        except SeamlessError as exc:
            log.info("job %s could not be cancelled: %s", id, exc)

    def _follow(self, id: str, on_log, token: str) -> _t.Iterator[bool]:
        """Hand on what the job prints, as it comes; the values say whether that was all."""
        offset, done = 0, False
        while not done:
            offset, data, done = self.logs(id, offset, WAIT_S, token)
            if data:
                on_log(data)
            yield done

    # --- many jobs ------------------------------------------------------------------------------------

    def submit(self, job: Job, callback: Callback, parent: _t.Optional[str] = None) -> None:
        """Have ``job`` run; ``callback(outcome, error)`` is called once, from another thread.

        ``error`` is a ``ServiceError`` if the jobserver is gone.  ``parent``: the job that submits it, whose
        failure or death cancels it.
        """
        data = job.to_dict()
        id = str(data["checksum"])
        with self._changed:
            entry = self._pending.get(id)
            if entry is None:
                size = 1000 + sum(map(len, data["buffers"].values()))
                entry = self._pending[id] = _Submitted(data, parent, size)
                self._outbox.append(id)
                if self._sender is None:
                    self._sender = self._thread(self._send)
                elif len(self._outbox) == 1:
                    self._changed.notify_all()
            if entry.job["meta"].get("job_folder") == data["meta"].get("job_folder"):
                entry.callbacks.append(callback)
            else:
                entry.later.append((job, callback, parent))

    @staticmethod
    def _thread(target) -> threading.Thread:
        thread = threading.Thread(target=target, name="seamless-jobs", daemon=True)
        thread.start()
        return thread

    def _send(self) -> None:
        """The sending thread."""
        while True:
            with self._changed:
                if not self._outbox and not self._changed.wait_for(lambda: bool(self._outbox), _LINGER_S):
                    self._sender = None
                    return
                batch = self._take_batch()
            if not batch:
                continue
            try:
                answer = self._post("/jobs", {
                    "client": self.name, "jobs": [entry.job for entry in batch.values()], "wait": 0,
                    "parent": next(iter(batch.values())).parent, "token": self._token()}, 0,
                    sum(entry.size for entry in batch.values()) / _SLOWEST)
            except Exception as exc:        # of whatever kind: those who wait must hear of it
                for id in batch:
                    self._finish(id, None, _as_ours(exc))
                continue
            for id, data in answer["outcomes"].items():
                self._finish(id, data)
            with self._changed:
                if self._waiter is None and self._pending:
                    self._waiter = self._thread(self._wait)

    def _take_batch(self) -> _t.Dict[str, _Submitted]:
        batch: _t.Dict[str, _Submitted] = {}
        size, parent = 0, None
        while self._outbox and len(batch) < _BATCH_JOBS and size < _BATCH_BYTES:
            entry = self._pending.get(self._outbox[0])
            if entry is not None:           # not cancelled meanwhile
                if batch and entry.parent != parent:
                    break
                batch[self._outbox[0]] = entry
                size, parent = size + entry.size, entry.parent
            self._outbox.popleft()
        return batch

    def _wait(self) -> None:
        """The waiting thread."""
        while True:
            with self._changed:
                if not self._pending:
                    self._waiter = None
                    return
            try:
                answer = self._post("/wait", {"client": self.name, "after": self._seen, "timeout": WAIT_S}, WAIT_S)
            except Exception as exc:        # of whatever kind: those who wait must hear of it
                with self._changed:
                    lost, self._waiter = list(self._pending), None
                for id in lost:
                    self._finish(id, None, _as_ours(exc))
                return
            if not answer.get("known", True):
                self._send_again()
                time.sleep(_QUIET_S)
            for id, data in answer["outcomes"]:
                self._finish(id, data)
            self._seen = answer["last"]

    def _send_again(self) -> None:
        """The server is another one, or forgot us: all that we wait for must be sent again."""
        with self._changed:
            self._seen = 0
            self._outbox = collections.deque(self._pending)
            if self._sender is None:
                self._sender = self._thread(self._send)
            self._changed.notify_all()

    def _finish(self, id: str, data: _t.Optional[dict], error: _t.Optional[SeamlessError] = None) -> None:
        with self._changed:
            entry = self._pending.pop(id, None)
        if data is not None:
            self._deaths = 0
        if entry is None:
            return                          # it came twice
        try:
            outcome = _outcome(data) if data is not None else None
        except SeamlessError as exc:
            outcome, error = None, exc
        for callback in entry.callbacks:
            try:
                callback(outcome, error)
            except Exception:               # the caller's; the outcomes of other jobs must not be lost
                log.exception("the callback for job %s failed", id)
        for job, callback, parent in entry.later:
            if error is None:
                self.submit(job, callback, parent)
            else:
                callback(None, error)

    # --- questions ------------------------------------------------------------------------------------

    def cancel(self, ids: _t.Iterable[str], force: bool = False) -> _t.Dict[str, str]:
        """Kill jobs that nobody else waits for (``force``: in any case).  Returns id -> state.

        A lost connection is not waited for.
        """
        ids = [str(id) for id in ids]
        states = self._plain.request("POST", "/cancel", json={"client": self.name, "ids": ids, "force": force},
                                     timeout_s=WAIT_S + _GRACE_S).expect(200).json()["states"]
        for id in ids:
            with self._changed:
                unsent = id in self._outbox
            if unsent:
                self._finish(id, None, JobCancelledError("job %s was cancelled before it was sent" % id))
        return {id: state["state"] for id, state in states.items()}

    def status(self, ids: _t.Iterable[str]) -> _t.Dict[str, dict]:
        """id -> {"state": queued, running, waiting, done, failed, canceled or unknown, "outcome": if it has ended}."""
        return self._post("/status", {"ids": [str(id) for id in ids]}, 0)["states"]

    def logs(self, id: str, offset: int = 0, timeout_s: float = 0.0, token: _t.Optional[str] = None) -> _t.Tuple[int, bytes, bool]:
        """(new offset, what the job printed after ``offset``, whether that is all there will be).

        Waits up to ``timeout_s`` for something to come.  ``token``: of the request that asked for the job.
        """
        answer = self._post("/logs", {"id": str(id), "offset": offset, "timeout": timeout_s, "token": token}, timeout_s)
        return answer["offset"], base64.b64decode(answer["data"]), answer["done"]

    def info(self) -> dict:
        """What the server says about itself.  A lost connection is not waited for."""
        return self._plain.request("GET", "/info", timeout_s=WAIT_S).expect(200).json()

    def close(self) -> None:
        """Close the connections; what was submitted and has not ended gets a ``ServiceError``."""
        with self._changed:
            lost = list(self._pending)
            self._outbox.clear()
        for id in lost:
            self._finish(id, None, ServiceError("the connection to the jobserver was closed before job %s ended" % id))
        self._http.close()
        self._plain.close()

    def _post(self, target: str, body: dict, wait_s: float, sending_s: float = 0.0) -> dict:
        for _ in range(_DEATHS):
            try:
                return self._http.request("POST", target, json=body, timeout_s=wait_s + sending_s + _GRACE_S).expect(200).json()
            except DeadlineError as exc:    # it was to answer much earlier: it hangs, or the line is dead and does not say so
                silence = ServiceError(str(exc))
                if self._mend is None:
                    break
                self._mended()
        raise silence

    def _mended(self) -> None:
        """Bring the connection back, and look who is there.  Raises ``ServiceError``."""
        assert self._mend is not None
        self._mend()
        try:
            pid = self.info()["pid"]
        except (SeamlessError, KeyError):
            return                          # the request that is repeated now will say what is wrong
        if self._pid is not None and pid != self._pid:
            self._deaths += 1
        self._pid = pid
        if self._deaths >= _DEATHS:
            error = ServiceError("the server at %s died %d times while the same jobs were running, and none of them ended: see its log"
                                 % (self._http.address, _DEATHS))
            error.final = True              # type: ignore[attr-defined]
            raise error

    def _token(self) -> str:
        with self._changed:
            self._tokens += 1
            return "%s-%d" % (self.name, self._tokens)


def _outcome(data: dict) -> Outcome:
    """The outcome; that the server was stopped is none: it is raised as the ``ServiceError`` that it is."""
    outcome = Outcome.from_dict(data)
    error = outcome.exception()
    if isinstance(error, ServiceError):
        raise error
    return outcome


def _as_ours(error: Exception) -> SeamlessError:
    return error if isinstance(error, SeamlessError) else ServiceError(
        "the jobserver cannot be asked: %s: %s" % (type(error).__name__, error))


def _forked() -> None:
    for client in list(_clients):
        client._begin()


_clients: "weakref.WeakSet[JobserverClient]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
