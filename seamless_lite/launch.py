"""Services on this machine: ``ServiceSpec`` -> ``Connection``.

``ensure`` looks for a record of the service, asks the service who it is, and is done if it answers (about
a millisecond).  Otherwise ``hostside`` looks again under a lock, starts it, and waits until it listens.
What identifies a running service is everything that matters to who uses it: its arguments, its
interpreter, the source of this package.  Changing any of them starts another one; the old one
ends when it is idle.

``Private`` is a service that belongs to one process and ends with it.
"""
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
import typing as _t

from . import hostside
from .errors import ConfigurationError, SeamlessError, ServiceError
from .httpclient import HttpClient
from .processes import MARK       # a service must outlive the job whose command started it
from .signing import PROTOCOL, load_secret

QUICK_S = 2.0               # a service that does not say within this who it is gets looked at more closely


@dataclasses.dataclass(frozen=True)
class ServiceSpec:
    """A service that should run.

    ``service`` names the module that is its program, ``key`` is its readable name (compat/http.md section
    6), ``args`` are given to the program (paths must be absolute), ``parameters`` stand in the status file.  Without
    ``port_range`` (inclusive) it listens on a Unix socket, with it on ``network_interface`` (default:
    loopback).  ``auth=False``: whoever reaches it may use it.
    """
    service: str
    key: str
    args: _t.Tuple[str, ...] = ()
    parameters: _t.Mapping[str, object] = dataclasses.field(default_factory=dict)
    host: _t.Optional[str] = None
    network_interface: _t.Optional[str] = None
    port_range: _t.Optional[_t.Tuple[int, int]] = None
    auth: bool = True
    idle_timeout_s: int = 600


@dataclasses.dataclass(frozen=True)
class Connection:
    """A service that runs.  ``secret`` is None with ``auth: none``; ``started``: by this call."""
    service: str
    key: str
    address: str
    secret: _t.Optional[bytes]
    pid: int
    started: bool


def ensure(spec: ServiceSpec) -> Connection:
    """The connection to the service, which is started if it does not run.  Raises ``ServiceError``."""
    return ensure_all([spec])[0]


def ensure_all(specs: _t.Sequence[ServiceSpec]) -> _t.List[Connection]:
    """The connections to all these services; those that do not run are started at the same time.

    Raises ``ServiceError`` if one does not start; those that did are left running, for the next attempt.
    """
    requests = [_request(spec, load_secret() if spec.auth else None) for spec in specs]
    found: _t.List[_t.Optional[Connection]] = [_running(request) for request in requests]
    missing = [n for n, connection in enumerate(found) if connection is None]
    records = _host(hostside.ensure, [requests[n] for n in missing]) if missing else []
    for n, record in zip(missing, records):
        if "error" in record:
            raise ServiceError(record["error"])
        found[n] = _connection(record, requests[n])
    return [connection for connection in found if connection is not None]


def services() -> _t.List[dict]:
    """The records of the services that run for this user: name, service, key, pid, log, socket or port, and more."""
    return _host(hostside.services)


def stop(which: _t.Union[str, _t.Mapping]) -> _t.List[str]:
    """Stop the services with this key or name, or the one with this record; returns the names of those that ran."""
    return _host(hostside.stop, which if isinstance(which, str) else which["name"])


def logs(which: str) -> _t.Optional[str]:
    """The end of the log of the service with this key or name, also if it is dead; None if there is none."""
    return _host(hostside.logs, which)


class Private:
    """A service that belongs to this process: it ends with ``close``, or when this process ends in whatever way.

    ``connection`` is how to reach it.  Raises ``ServiceError`` if it does not start.
    """

    def __init__(self, spec: ServiceSpec):
        name = "private-%s-%d-%s" % (spec.service, os.getpid(), os.urandom(4).hex())
        request = {**_request(spec, os.urandom(32)), "name": name}
        self._start = hostside.Start(_host(hostside.run_folder), request, private=True)
        try:
            _host(self._start.begin)
            record = None
            while record is None:
                time.sleep(hostside.POLL_S)
                record = _host(self._start.poll)
            self.connection = _connection({**record, "started": True}, request)
        except BaseException:
            self._start.abandon()
            raise

    def close(self):
        """End the service: by closing its standard input, after some seconds by force.  May be called twice."""
        self._start.finish()


def _host(function, *args):
    try:
        return function(*args)
    except hostside.HostError as exc:
        raise ServiceError(str(exc)) from None


def _request(spec: ServiceSpec, secret: _t.Optional[bytes]) -> dict:
    """What ``hostside`` needs to know to start ``spec``."""
    if spec.host not in (None, "", "localhost", "127.0.0.1", "::1", os.uname().nodename):
        raise ConfigurationError("the %s should run on %s, but services can be started only on this machine so far:"
                                 " write 'hostname: localhost'" % (spec.service, spec.host))
    if not sys.executable:
        raise ServiceError("the %s cannot be started: this Python does not know its own program" % spec.service)
    argv, env = [sys.executable, "-m", "%s.%s" % (__package__, spec.service)], _environment()
    # not sys.executable: "python" and "python3" of one environment are the same interpreter
    matters = [spec.service, spec.key, list(spec.args), spec.parameters, spec.network_interface, spec.port_range, spec.auth,
               sys.prefix, sys.version, _source(), PROTOCOL, os.uname().nodename, hashlib.sha256(b"name" + (secret or b"")).hexdigest()]
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode("utf-8")).hexdigest()
    return {"name": "%s-%s" % (re.sub(r"[^A-Za-z0-9._-]", "_", spec.key)[:200], digest[:8]), "argv": argv,
            "args": list(spec.args), "env": env, "unset": [MARK], "secret": secret.hex() if secret else "", "idle_timeout_s": spec.idle_timeout_s,
            "network_interface": spec.network_interface, "port_range": spec.port_range,
            "record": {"service": spec.service, "key": spec.key, "parameters": dict(spec.parameters), "auth": spec.auth}}


def _running(request: dict) -> _t.Optional[Connection]:
    """The connection, if the service runs and says that it is the one."""
    run = _host(hostside.run_folder)
    record = hostside.read_record(run, request["name"])
    if record is None or record.get("status") != "running" or not hostside.alive(record):
        return None
    try:
        return _connection({**record, "started": False}, request, timeout_s=QUICK_S)
    except SeamlessError:
        return None                 # hostside looks again, with more patience


def _connection(record: dict, request: dict, timeout_s: float = 20.0) -> Connection:
    """Ask the service of the record who it is.  Raises ``ServiceError`` if it is not the one we want."""
    host = hostside.reachable(record.get("network_interface"))
    address = ("unix://" + record["socket"] if record.get("socket")
               else "http://%s:%d" % ("[%s]" % host if ":" in host else host, record["port"]))
    secret = bytes.fromhex(request["secret"]) or None
    client = HttpClient(address, secret)
    try:
        info = client.request("GET", "/info", timeout_s=timeout_s).expect(200).json()
    finally:
        client.close()
    wanted = {"service": request["record"]["service"], "protocol": PROTOCOL, "pid": record["pid"]}
    if any(info.get(name) != value for name, value in wanted.items()):
        raise ServiceError("at %s is not the %s that was started there but %s: stop it" % (address, wanted["service"], info))
    return Connection(wanted["service"], request["record"]["key"], address, secret, record["pid"], record["started"])


def _environment() -> _t.Dict[str, str]:
    """What is added to our environment so that the service finds this package, installed or not, under whatever name."""
    root = _root()
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    # An installed package is found anyway, and its folder must not come before the standard library.
    if os.path.basename(root) not in ("site-packages", "dist-packages") and root not in paths:
        paths.insert(0, root)
    return {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}


def _root() -> str:
    """The folder, or the zip, from which this package is imported."""
    root = os.path.dirname(os.path.abspath(__file__))
    for _ in __package__.split("."):
        root = os.path.dirname(root)
    return root


def _source() -> _t.List[list]:
    """Names, sizes and times of the files of this package: enough to know a changed version without reading it."""
    folder = os.path.dirname(os.path.abspath(__file__))
    if not os.path.isdir(folder):       # in a zip
        status = os.stat(_root())
        return [[status.st_size, status.st_mtime_ns]]
    return sorted([entry.name, entry.stat().st_size, entry.stat().st_mtime_ns]
                  for entry in os.scandir(folder) if entry.name.endswith(".py"))
