"""The jobserver's routes of Seamless 1.x (compat/http.md section 3), on the same code path as our own.

Its clients send a failed job five times.  So a failure is remembered for ten seconds and told again.
"""
import hashlib
import json
import os
import re
import threading
import time
import typing as _t

from .checksum import Checksum
from .dunders import execution_meta
from .errors import CacheMissError, JobWritten, SeamlessError
from .httpbase import HttpError, Reply, Request
from .jobs import Asker, Jobs
from .transformation import Job, Outcome, Recipe

REPLAY_S = 10.0
_WAIT_S = 3600.0            # then it waits again
_STATES = {"queued": "running", "waiting": "running", "unknown": "not-running"}


class Compat:
    """The routes; ``jobs`` are the server's, ``record`` whether it was started in record mode."""

    def __init__(self, jobs: Jobs, record: bool):
        self._jobs, self._record = jobs, record
        self._lock = threading.Lock()
        self._failures: _t.Dict[str, _t.Tuple[float, str]] = {}
        self.routes = [
            ("GET", re.compile("/"), lambda request: "Seamless jobserver is running"),
            ("GET", re.compile("/run-transformation"), self._run),
            ("GET", re.compile("/transformation-status/([^/]*)"), self._status),
            ("POST", re.compile("/cancel-transformation/([^/]*)"), self._cancel)]

    def _run(self, request: Request):
        data = request.read()
        key = hashlib.sha256(data).hexdigest()
        with self._lock:
            now = time.monotonic()
            self._failures = {k: v for k, v in self._failures.items() if now - v[0] < REPLAY_S}
            if key in self._failures:
                return Reply(self._failures[key][1], 500)
        job = self._job(data)
        outcome, ended = self._outcome(job)
        error = outcome.exception()
        if error is None:
            return Reply(json.dumps({"result_checksum": outcome.result, "record_runtime": _runtime(outcome, ended)}),
                         headers={"Content-Type": "text/plain; charset=utf-8"})
        if isinstance(error, JobWritten):
            return {"remote_job_written": "__SEAMLESS_REMOTE_JOB_WRITTEN__:" + error.folder}
        if type(error).__name__ == "JobCancelledError":
            return "Transformation was canceled"
        text = _failure_text(error, outcome.logs)
        if not isinstance(error, CacheMissError):       # that cost nothing, and the input may come
            with self._lock:
                self._failures[key] = (time.monotonic(), text)
        return Reply(text, 500)

    def _job(self, data: bytes) -> Job:
        """The job that a request describes.  Raises ``HttpError`` 400 or 409."""
        try:
            payload = json.loads(data)
        except ValueError as exc:
            raise HttpError(400, body="Invalid JSON: %s" % exc) from None
        try:
            transformation = payload["transformation_dict"]
            dunders = {**(payload.get("tf_dunder") or {}), **transformation}
            recipe = Recipe.from_dict(transformation)
            if recipe.checksum != Checksum(payload["tf_checksum"]):
                raise SeamlessError("the transformation is %s, not tf_checksum" % recipe.checksum)
            meta = execution_meta(dunders, self._read, bool(payload.get("scratch")))
        except (SeamlessError, LookupError, TypeError, ValueError, AttributeError) as exc:
            raise HttpError(400, body="Invalid payload: %s: %s" % (type(exc).__name__, exc)) from None
        if bool(payload.get("record")) != self._record:
            raise HttpError(409, body="this jobserver was started %s record mode" % ("in" if self._record else "without"))
        return Job(recipe, meta._replace(record=self._record))

    def _read(self, checksum: str) -> bytes:
        data = self._jobs.stores.buffers.get(Checksum(checksum))
        if data is None:
            raise SeamlessError("the buffer %s is not in the store" % checksum)
        return data

    def _outcome(self, job: Job) -> _t.Tuple[Outcome, float]:
        """Wait for the outcome; and the time at which it ended."""
        asker = Asker("seamless-1.x", os.urandom(8).hex(), None, False)
        (entry,), _ = self._jobs.ask(asker, [job.to_dict()])
        while not self._jobs.wait([entry], _WAIT_S):
            if self._jobs.stopping.is_set():
                raise HttpError(503, "the jobserver is stopping")
        return Outcome.from_dict(entry.outcome), time.time() - (time.monotonic() - entry.ended_s)

    def _status(self, request: Request, checksum: str):
        return {"status": self._state(_checksum(checksum))}

    def _state(self, checksum: Checksum) -> str:
        state = self._jobs.states([str(checksum)])[str(checksum)]["state"]
        return _STATES.get(state, state)

    def _cancel(self, request: Request, checksum: str):
        id = _checksum(checksum)
        running = self._state(id) == "running"
        if running:
            self._jobs.cancel([str(id)], "", force=True)
        state = self._state(id)
        return {"canceled": running and state == "canceled", "status": state}


def _checksum(text: str) -> Checksum:
    try:
        return Checksum(text)
    except SeamlessError as exc:
        raise HttpError(400, body=str(exc)) from None


def _runtime(outcome: Outcome, ended: float) -> dict:
    wall = outcome.runtime.get("wall_time_seconds", 0.0)
    return {"started_at": _iso(ended - wall), "finished_at": _iso(ended), "wall_time_seconds": wall,
            "cpu_user_seconds": outcome.runtime.get("cpu_time_user_seconds", 0.0),
            "cpu_system_seconds": outcome.runtime.get("cpu_time_system_seconds", 0.0),
            "memory_peak_bytes": outcome.runtime.get("memory_peak_bytes", 0), "gpu_memory_peak_bytes": None}


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%06dZ" % (seconds % 1 * 1e6)


def _failure_text(error: SeamlessError, logs: str) -> str:
    text = getattr(error, "traceback", "") or str(error.args[0])
    logs = getattr(error, "logs", "") or logs
    return text + ("\n%s\n* Standard output\n%s\n%s" % ("*" * 50, "*" * 50, logs) if logs else "")


def stores_of_parameters(parameters: dict) -> dict:
    """The description of stores in the client lists that Seamless 1.x writes into a status file."""
    buffers: _t.Dict[str, object] = {"directory": None, "address": None, "auth": False}
    results: _t.Dict[str, object] = {"file": None, "address": None, "auth": False}
    for entry in parameters.get("buffer") or ():
        if not entry.get("readonly", True):
            buffers["address"] = buffers["address"] or entry.get("remote_url")
            if not entry.get("remote_url"):
                buffers["directory"] = buffers["directory"] or entry.get("remote_directory")
    for entry in parameters.get("database") or ():
        if not entry.get("readonly", True):
            results["address"] = results["address"] or entry.get("remote_url")
    return {"buffers": buffers, "results": results}
