"""The jobserver: takes jobs over HTTP and runs them in a pool of worker processes.

    POST /jobs    {"client", "jobs", "wait": s, "parent": id|None, "token"} -> {"outcomes": {id: outcome}}
                  what ended within ``wait``; with ``wait`` 0 the rest is told by /wait, else by repeating the request
    POST /wait    {"client", "after": n, "timeout": s} -> {"last": n, "outcomes": [[id, outcome]...], "known": bool}
    POST /status  {"ids"} -> {"states": {id: {"state", "outcome"?}}}
    POST /logs    {"id", "offset", "timeout": s, "token"} -> {"offset", "data": base64, "done": bool}
    POST /cancel  {"client", "ids", "force": bool} -> {"states": {...}}

What happens to the jobs is in ``jobs``; the routes of Seamless 1.x are in ``jobcompat``.  Workers reach the
server through a Unix socket and a secret of their own, made at each start, so that user code never meets
the user's secret.
"""
import argparse
import base64
import json
import os
import re
import sys
import threading
import typing as _t

from .cpus import usable_cpus
from .errors import ConfigurationError
from .httpbase import HttpError, Listen, Request, Running, Service, run_service, service_arguments, start
from .jobcompat import Compat, stores_of_parameters
from .jobs import Asker, Jobs
from .pool import WorkerPool
from .signing import load_secret
from .statusfile import await_status
from .stores import Stores, open_stores

REQUEST_BYTES = 1 << 30     # a job may have a megabyte of buffers, and a request hundreds of jobs
_SOCKET_BYTES = 90


class JobService(Service):
    """The routes, over the jobs that ``pool`` runs, whatever it is.

    ``mode`` and ``target`` are what execution records say about where a job ran (``mode`` None: the pool records),
    ``record`` whether Seamless 1.x clients must ask for full ones.
    """
    name = "jobserver"

    def __init__(self, pool, stores: Stores, mode: _t.Optional[str] = "remote", target: _t.Optional[str] = "jobserver",
                 record: bool = False):
        super().__init__()
        self.pool = pool
        self.jobs = Jobs(pool, stores, self.stopping, mode, target)
        self.routes = [("POST", re.compile("/" + name), handler) for name, handler in (
            ("jobs", self._jobs), ("wait", self._wait), ("status", self._status), ("logs", self._logs),
            ("cancel", self._cancel))]
        self.routes += Compat(self.jobs, record).routes

    def busy(self) -> bool:
        """True while there are jobs."""
        return self.jobs.in_flight > 0

    def info(self) -> dict:
        """Numbers for people."""
        return {"workers": self.pool.workers, "jobs": self.jobs.in_flight}

    def close(self) -> None:
        """Kill all jobs; what has ended is recorded."""
        self.pool.close()
        self.jobs.close()
        self.jobs.stores.close()

    def _jobs(self, request: Request):
        body = _object(request)
        wait, parent = _number(body, "wait"), body.get("parent")
        if not isinstance(body.get("jobs"), list):
            raise HttpError(400, "the request needs a list 'jobs'")
        asker = Asker(_text(body, "client"), str(body.get("token") or os.urandom(8).hex()), parent, wait <= 0)
        entries, outcomes = self.jobs.ask(asker, body["jobs"])
        if wait <= 0 or self.jobs.wait(entries, wait, parent) or parent is None:    # else the parent has no slot yet
            outcomes.update((entry.id, entry.outcome) for entry in entries if entry.outcome is not None)
        return {"outcomes": outcomes}

    def _wait(self, request: Request):
        body = _object(request)
        known, last, outcomes = self.jobs.ended_since(_text(body, "client"), int(_number(body, "after")), _number(body, "timeout"))
        return {"known": known, "last": last, "outcomes": outcomes}

    def _status(self, request: Request):
        return {"states": self.jobs.states(_ids(_object(request)))}

    def _logs(self, request: Request):
        body = _object(request)
        offset, data, done = self.jobs.logs(_text(body, "id"), int(_number(body, "offset")), _number(body, "timeout"), body.get("token"))
        return {"offset": offset, "data": _base64(data), "done": done}

    def _cancel(self, request: Request):
        body = _object(request)
        return {"states": self.jobs.cancel(_ids(body), _text(body, "client"), bool(body.get("force")))}


class Workers:
    """A ``WorkerPool``, and the socket through which its processes reach ``service`` (set it before the first job).

    ``spec``: how a worker opens the stores (with ``stores_secret``); ``command`` starts a worker.
    """

    def __init__(self, workers: int, spec: dict, stores_secret: _t.Optional[bytes] = None,
                 command: _t.Optional[_t.Sequence[str]] = None):
        self.service: _t.Optional[JobService] = None
        self._secret = os.urandom(32)
        self._inner: _t.List[Running] = []
        self._lock = threading.Lock()
        hello = {"stores": spec, "stores_secret": _base64(stores_secret), "secret": _base64(self._secret)}
        self.pool = WorkerPool(workers, lambda: {**hello, "address": self._inner[0].address}, command, look_after=self._listen)

    def begin(self, service: JobService) -> None:
        """Answer the workers from now on, and start the first one.  Raises ``ServiceError``."""
        self.service = service
        try:
            self._listen()
        except BaseException:
            self.pool.close()
            raise
        self.pool.prestart()

    def _listen(self) -> None:
        """Listen for workers, unless we do; again, at the same address, if somebody removed the socket."""
        path = os.path.join(self.pool.folder, "socket")
        is_unix = len(path) < _SOCKET_BYTES
        with self._lock:
            if self._inner and (not is_unix or os.path.exists(path)):
                return
            inner = Service()
            inner.name, inner.routes, inner.stopping = "jobserver-for-workers", self.service.routes, self.service.stopping
            self._inner.append(start(inner, Listen(path) if is_unix else Listen(None, "127.0.0.1", 0), secret=self._secret))

    def stop(self) -> None:
        """Answer no more."""
        for inner in self._inner:
            inner.stop()


class JobServer(JobService):
    """The jobserver: ``workers`` worker processes of its own, and ``stores``, which they open as ``spec`` says."""

    def __init__(self, workers: int, stores: Stores, spec: dict, stores_secret: _t.Optional[bytes] = None,
                 mode: str = "remote", target: _t.Optional[str] = "jobserver", record: bool = False,
                 command: _t.Optional[_t.Sequence[str]] = None):
        self._workers = Workers(workers, spec, stores_secret, command)
        super().__init__(self._workers.pool, stores, mode, target, record)
        self._workers.begin(self)

    def info(self) -> dict:
        """Numbers for people."""
        return {**super().info(), "worker_pids": self.pool.pids()}

    def close(self) -> None:
        """Kill all jobs and workers; what has ended is recorded."""
        super().close()
        self._workers.stop()


def _base64(data: _t.Optional[bytes]) -> str:
    return base64.b64encode(data or b"").decode("ascii")


def _object(request: Request) -> dict:
    value = request.json(REQUEST_BYTES)
    if not isinstance(value, dict):
        raise HttpError(400, "the body is not a JSON object")
    return value


def _text(body: dict, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise HttpError(400, "the request needs a text '%s'" % name)
    return value


def _number(body: dict, name: str) -> float:
    value = body.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2 ** 53:
        raise HttpError(400, "'%s' of the request is not a number of 0 or more" % name)
    return value


def _ids(body: dict) -> _t.List[str]:
    ids = body.get("ids")
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise HttpError(400, "the request needs a list 'ids'")
    return ids


# --- the program --------------------------------------------------------------------------------------

def stores_of(args, parameters: dict) -> _t.Tuple[dict, _t.Optional[bytes]]:
    """Where the stores are, as command line or status file say; and the secret to use them.  Raises ``ConfigurationError``."""
    try:
        spec = json.loads(args.stores) if args.stores else parameters.get("stores") or (
            stores_of_parameters(parameters) if parameters else _named_stores())
        if not isinstance(spec, dict):
            raise TypeError("not an object")
        addresses = [part.get("address") for part in (spec.get("buffers") or {}, spec.get("results") or {}) if part.get("auth", True)]
    except (ValueError, TypeError, LookupError, AttributeError) as exc:
        raise ConfigurationError("it cannot be understood where the stores are (--stores, or 'parameters' in the status file): %s"
                                 % exc) from None
    if not any((spec.get("buffers") or {}).get(key) for key in ("directory", "address")):
        raise ConfigurationError("it is not known where to keep buffers: give --stores, set SEAMLESS_CACHE or SEAMLESS_REMOTE_CLIENTS, or "
                                 "write 'stores' in the 'parameters' of the status file")
    for part, key in (("buffers", "directory"), ("results", "file")):
        if (spec.get(part) or {}).get(key):
            spec[part] = {**spec[part], key: os.path.expanduser(spec[part][key])}
    return spec, load_secret(args.secret_file) if any(addresses) else None


def _named_stores() -> dict:
    """Where ``SEAMLESS_CACHE`` or ``SEAMLESS_REMOTE_CLIENTS`` say that the stores are, as ``settings`` reads them too."""
    cache = os.environ.get("SEAMLESS_CACHE", "").strip()
    if not cache:
        return stores_of_parameters(json.loads(os.environ.get("SEAMLESS_REMOTE_CLIENTS") or "{}"))
    folder = os.path.join(os.path.abspath(os.path.expanduser(cache)), "__TOPLEVEL__")
    return {"buffers": {"directory": folder}, "results": {"file": os.path.join(folder, "seamless.db")}}


def make_service(args) -> JobServer:
    """The service that the command line describes.  Raises ``ConfigurationError`` or ``ServiceError``."""
    parameters = await_status(args.status_file).get("parameters") or {}
    spec, secret = stores_of(args, parameters)
    private = args.exit_with_stdin
    return JobServer(args.workers or usable_cpus(), open_stores(spec, secret), spec, secret, "spawn" if private else "remote",
                     None if private else "jobserver", bool(parameters.get("record")))


def _positive(text: str) -> int:
    """For ``argparse``: a whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def main(argv: _t.Optional[_t.List[str]] = None) -> int:
    """The program ``seamless-jobserver``; returns its exit code."""
    return run_program("seamless-jobserver", "Run transformations in worker processes.", make_service, argv)


def run_program(name: str, description: str, make: _t.Callable[[_t.Any], JobService], argv: _t.Optional[_t.List[str]]) -> int:
    """The program ``name``, whose service ``make`` makes of the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--workers", type=_positive, metavar="N", help="jobs at a time on this machine (default: the usable CPUs)")
    parser.add_argument("--stores", metavar="JSON", help="where buffers and results are (default: as the status file says, else SEAMLESS_CACHE or SEAMLESS_REMOTE_CLIENTS)")
    service_arguments(parser)
    return run_service(make, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
