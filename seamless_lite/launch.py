"""Services on this machine and on others: ``ServiceSpec`` -> ``Connection``.

``ensure`` looks for a record of the service, asks the service who it is, and is done if it answers (about
a millisecond).  Otherwise ``hostside`` looks again under a lock, starts it, and waits until it listens.
What identifies a running service is everything that matters to who uses it: its arguments, its
interpreter, the source of this package.  Changing any of them starts another one; the old one
ends when it is idle.

    on this machine, our Python     _request -> hostside
    another Python, another host    _wish -> hosts -> hostagent (there) -> hostside; then a forward through ssh

``Private`` is a service that belongs to one process and ends with it.
"""
import dataclasses
import hashlib
import os
import sys
import threading
import time
import typing as _t

from . import hosts, hostside, shipping
from .errors import ConfigurationError, SeamlessError, ServiceError
from .httpclient import HttpClient
from .processes import MARK, package_root       # a service must outlive the job whose command started it
from .signing import PROTOCOL, load_secret

QUICK_S = 2.0               # a service that does not say within this who it is gets looked at more closely
LOOPBACK = (None, "", "localhost", "127.0.0.1", "::1")


class Place(_t.NamedTuple):
    """Where a service runs.

    ``ssh``: the name of the host as ssh is given it (None: this machine); ``hostname``: its name in URLs (None: the same);
    without ``tunnel`` it is reached directly, not through ssh.  ``python`` (an interpreter) or ``conda`` (an
    environment, by name or path) is what it runs with; neither: our own Python here, the best one there.
    """
    ssh: _t.Optional[str] = None
    hostname: _t.Optional[str] = None
    tunnel: bool = True
    python: _t.Optional[str] = None
    conda: _t.Optional[str] = None


#: This machine, this Python.
HERE = Place()


@dataclasses.dataclass(frozen=True)
class ServiceSpec:
    """A service that should run.

    ``service`` names the module that is its program, ``key`` is its readable name (compat/http.md section
    6), ``args`` are given to the program (paths must be absolute, on another host perhaps with a leading ``~``),
    ``parameters`` stand in the status file.  Without ``port_range`` (inclusive) it listens on a Unix socket, with it on
    ``network_interface`` (default: loopback).  ``auth=False``: whoever reaches it may use it.  ``needs`` are modules
    that its Python must have.
    """
    service: str
    key: str
    args: _t.Tuple[str, ...] = ()
    parameters: _t.Mapping[str, object] = dataclasses.field(default_factory=dict)
    place: Place = HERE
    needs: _t.Tuple[str, ...] = ()
    network_interface: _t.Optional[str] = None
    port_range: _t.Optional[_t.Tuple[int, int]] = None
    auth: bool = True
    idle_timeout_s: int = 600


@dataclasses.dataclass(frozen=True)
class Connection:
    """A service that runs.  ``secret`` is None with ``auth: none``; ``started``: by this call.

    ``mend`` is for its ``HttpClient``: it brings the service back to the same ``address`` when requests do not get
    through (None on this machine).  ``pid``, ``name`` and ``port`` (None: it has a socket) are those on its host.
    """
    service: str
    key: str
    address: str
    secret: _t.Optional[bytes]
    pid: int
    started: bool
    place: Place = HERE
    name: str = ""
    port: _t.Optional[int] = None
    mend: _t.Optional[_t.Callable[[], None]] = dataclasses.field(default=None, compare=False)

    def forward(self, address: str) -> str:
        """What leads from here to another ``address`` (``SCHEME://HOST:PORT/...``) at the same place.  Raises ``ServiceError``."""
        scheme, _, rest = address.partition("://")
        where, slash, path = rest.partition("/")
        host, _, port = where.rpartition(":")
        if self.place.ssh is None:
            return address
        if self.place.tunnel:
            kind = "http" if scheme == "http" else "tcp"
            local = _host(self.place).forward("%s %s" % (self.name, address), "%s://%s:%s" % (kind, host, port), tcp=True)
            where = local.partition("://")[2]
        elif hostside.reachable(host.strip("[]")) in LOOPBACK:
            where = "%s:%s" % (self.place.hostname or self.place.ssh, port)
        return "%s://%s%s%s" % (scheme, where, slash, path)


def ensure(spec: ServiceSpec) -> Connection:
    """The connection to the service, which is started if it does not run.  Raises ``ServiceError``."""
    return ensure_all([spec])[0]


def ensure_all(specs: _t.Sequence[ServiceSpec]) -> _t.List[Connection]:
    """The connections to all these services; those that do not run are started at the same time.

    Raises ``ServiceError`` if one does not start; those that did are left running, for the next attempt.
    """
    groups: _t.Dict[tuple, _t.List[int]] = {}
    for n, spec in enumerate(specs):
        place = spec.place
        ours = place.ssh is None and not place.python and not place.conda
        groups.setdefault((place.ssh, ours), []).append(n)
    found: _t.Dict[int, Connection] = {}

    def work(group) -> None:
        wanted = [specs[n] for n in groups[group]]
        found.update(zip(groups[group], _ensure_ours(wanted) if group[1] else _ensure_there(wanted)))
    _together(work, list(groups))
    return [found[n] for n in range(len(specs))]


def running(spec: ServiceSpec) -> _t.Optional[Connection]:
    """The connection to the service if it runs; it is not started.  Raises ``ServiceError`` if its host cannot be reached."""
    place = spec.place
    if place.ssh is None and not place.python and not place.conda:
        return _running(_request(spec, load_secret() if spec.auth else None))
    runs = any(record.get("key") == spec.key for record in far(place, "services"))
    return ensure(spec) if runs else None


def _together(work: _t.Callable, items: _t.Sequence) -> list:
    """``work`` of each item, at the same time if there are several; raises the first error when all have ended."""
    if len(items) < 2:
        return [work(item) for item in items]
    results, errors = [None] * len(items), []

    def run(n: int) -> None:
        try:
            results[n] = work(items[n])
        except BaseException as exc:        # raised below, in the thread that asked
            errors.append(exc)
    # daemons, and no pool: a program that is interrupted does not wait for a host that is silent
    threads = [threading.Thread(target=run, args=(n,), name="seamless-launch", daemon=True) for n in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def far(place: Place, action: str, **arguments):
    """What an action of ``hostagent`` (services, stop, logs, remove, uninstall) brings at the place.  Raises ``ServiceError``."""
    return hosts.ask(place.ssh, place.python, {"action": action, **arguments})[0]


def services() -> _t.List[dict]:
    """The records of the services that run for this user: name, service, key, pid, log, socket or port, and more."""
    return _call(hostside.services)


def stop(which: _t.Union[str, _t.Mapping]) -> _t.List[str]:
    """Stop the services with this key or name, or the one with this record; returns the names of those that ran."""
    return _call(hostside.stop, which if isinstance(which, str) else which["name"])


def logs(which: str) -> _t.Optional[str]:
    """The end of the log of the service with this key or name, also if it is dead; None if there is none."""
    return _call(hostside.logs, which)


class Private:
    """A service that belongs to this process: it ends with ``close``, or when this process ends in whatever way.

    ``connection`` is how to reach it.  Raises ``ServiceError`` if it does not start.
    """

    def __init__(self, spec: ServiceSpec):
        name = "private-%s-%d-%s" % (spec.service, os.getpid(), os.urandom(4).hex())
        request = {**_request(spec, os.urandom(32)), "name": name}
        self._start = hostside.Start(_call(hostside.run_folder), request, private=True)
        try:
            _call(self._start.begin)
            record = None
            while record is None:
                time.sleep(hostside.POLL_S)
                record = _call(self._start.poll)
            self.connection = _connection({**record, "started": True}, request)
        except BaseException:
            self._start.abandon()
            raise

    def close(self):
        """End the service: by closing its standard input, after some seconds by force.  May be called twice."""
        self._start.finish()


def _call(function, *args):
    try:
        return function(*args)
    except hostside.HostError as exc:
        raise ServiceError(str(exc)) from None
    except OSError as exc:                  # a full disk
        raise ServiceError("services cannot be used, because their folder %s cannot: %s" % (exc.filename or "", exc.strerror)) from exc


# --- with our own Python on this machine ----------------------------------------------------------------------

def _ensure_ours(specs: _t.Sequence[ServiceSpec]) -> _t.List[Connection]:
    for spec in specs:
        _check_needs(spec)
    requests = [_request(spec, load_secret() if spec.auth else None) for spec in specs]
    found: _t.List[_t.Optional[Connection]] = [_running(request) for request in requests]
    missing = [n for n, connection in enumerate(found) if connection is None]
    records = _call(hostside.ensure, [requests[n] for n in missing]) if missing else []
    for n, record in zip(missing, records):
        if "error" in record:
            raise ServiceError(record["error"])
        found[n] = _connection(record, requests[n])
    return [connection for connection in found if connection is not None]


def _check_needs(spec: ServiceSpec) -> None:
    import importlib.util
    missing = [name for name in spec.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError("the %s needs %s, which this Python (%s) does not have: pip install 'seamless_lite[%s]', or name a Python "
                                 "that has it with 'python:' or 'conda:' in the cluster file" % (
                                     spec.service, " and ".join(missing), sys.executable, "hpc" if "dask_jobqueue" in missing else "dask"))


def _request(spec: ServiceSpec, secret: _t.Optional[bytes]) -> dict:
    """What ``hostside`` needs to know to start ``spec``."""
    if not sys.executable:
        raise ServiceError("the %s cannot be started: this Python does not know its own program" % spec.service)
    argv, env = [sys.executable, "-m", "%s.%s" % (__package__, spec.service)], _environment()
    # not sys.executable: "python" and "python3" of one environment are the same interpreter
    matters = [spec.service, spec.key, list(spec.args), spec.parameters, spec.network_interface, spec.port_range, spec.auth,
               sys.prefix, sys.version, shipping.source_state(), PROTOCOL, os.uname().nodename,
               hashlib.sha256(b"name" + (secret or b"")).hexdigest()]
    return {"name": hostside.service_name(spec.key, matters), "argv": argv, "args": list(spec.args), "env": env, "unset": [MARK],
            "secret": secret.hex() if secret else "", "idle_timeout_s": spec.idle_timeout_s,
            "network_interface": spec.network_interface, "port_range": spec.port_range,
            "record": {"service": spec.service, "key": spec.key, "arguments": list(spec.args), "parameters": dict(spec.parameters),
                       "auth": spec.auth}}


def _running(request: dict) -> _t.Optional[Connection]:
    """The connection, if the service runs and says that it is the one."""
    run = _call(hostside.run_folder)
    record = hostside.read_record(run, request["name"])
    if record is None or record.get("status") != "running" or not hostside.alive(record):
        return None
    try:
        return _connection({**record, "started": False}, request, timeout_s=QUICK_S)
    except SeamlessError:
        return None                 # hostside looks again, with more patience


def _connection(record: dict, request: dict, timeout_s: float = 20.0) -> Connection:
    """The connection to the service of the record.  Raises ``ServiceError`` if it is not the one we want."""
    secret = bytes.fromhex(request["secret"]) or None
    service, key, address = request["record"]["service"], request["record"]["key"], _address(record)
    _greet(address, secret, service, record["pid"], timeout_s)
    return Connection(service, key, address, secret, record["pid"], record["started"], name=request["name"],
                      port=record.get("port"))


def _address(record: dict, host: _t.Optional[str] = None) -> str:
    """Where the service listens, as seen from its own host, or under the name ``host``."""
    if record.get("socket"):
        return "unix://" + record["socket"]
    host = host or hostside.reachable(record.get("network_interface"))
    return "http://%s:%d" % ("[%s]" % host if ":" in host else host, record["port"])


def _greet(address: str, secret: _t.Optional[bytes], service: str, pid: int, timeout_s: float = 20.0) -> None:
    """Ask who is there.  Raises ``ServiceError`` if it is not that service, or does not know the secret."""
    client = HttpClient(address, secret)
    try:
        info = client.request("GET", "/info", timeout_s=timeout_s).expect(200).json()
    finally:
        client.close()
    wanted = {"service": service, "protocol": PROTOCOL, "pid": pid}
    if any(info.get(name) != value for name, value in wanted.items()):
        raise ServiceError("at %s is not the %s that was started there but %s: stop it" % (address, service, info))


def _environment() -> _t.Dict[str, str]:
    """What is added to our environment so that the service finds this package, installed or not, under whatever name."""
    root = package_root()
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    # An installed package is found anyway, and its folder must not come before the standard library.
    if os.path.basename(root) not in ("site-packages", "dist-packages") and root not in paths:
        paths.insert(0, root)
    return {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}


# --- with another Python, or on another host ------------------------------------------------------------------

def _ensure_there(specs: _t.Sequence[ServiceSpec]) -> _t.List[Connection]:
    """Services of one host, all in one conversation."""
    place = specs[0].place
    for spec in specs:
        _check_reachable(spec)
    answer = hosts.ensure(place.ssh, place.python, [_wish(spec) for spec in specs])
    for note in answer["notes"] if place.ssh and answer.get("sent") else ():    # the first time there; later the logs say it
        print("seamless_lite: " + note, file=sys.stderr, flush=True)
    secret = bytes.fromhex(answer["secret"])
    return _together(lambda pair: _reach(pair[0], pair[1], secret), list(zip(specs, _records(answer, place))))


def _wish(spec: ServiceSpec, port: _t.Optional[int] = None) -> dict:
    """What ``hostagent.ensure`` needs to know to start ``spec``; ``port``: on this one if it is free."""
    return {"service": spec.service, "key": spec.key, "args": list(spec.args), "parameters": dict(spec.parameters), "auth": spec.auth,
            "network_interface": spec.network_interface, "port_range": spec.port_range, "idle_timeout_s": spec.idle_timeout_s,
            "protocol": PROTOCOL, "python": spec.place.python, "conda": spec.place.conda, "needs": list(spec.needs), "port": port}


def _check_reachable(spec: ServiceSpec) -> None:
    if spec.place.ssh is None or spec.place.tunnel:
        return
    if spec.port_range is None or spec.network_interface in LOOPBACK:
        raise ConfigurationError("the %s on %s cannot be reached without a tunnel, because it has no port that other machines see: give it "
                                 "a network_interface, a port_start and a port_end, or remove 'tunnel: false'"
                                 % (spec.service, spec.place.hostname or spec.place.ssh))


def _reach(spec: ServiceSpec, record: dict, secret: bytes) -> Connection:
    """The connection to the service of the record, through a tunnel if it needs one.  Raises ``ServiceError``."""
    place, name, key, port = spec.place, record["name"], secret if spec.auth else None, record.get("port")

    def lead(record: dict) -> str:
        address = _lead(place, name, record)
        try:
            _greet(address, key, spec.service, record["pid"])
        except ServiceError as exc:
            if place.ssh is None or place.tunnel:
                raise
            raise ServiceError("%s, or a firewall is in between: remove 'tunnel: false' from the cluster file to reach it through ssh"
                               % exc) from None
        return address

    def again() -> None:
        _host(place).mend()
        answer = hosts.ensure(place.ssh, place.python, [_wish(spec, port)])
        (now,) = _records(answer, place)
        if answer["secret"] != secret.hex() or lead(now) != address:
            raise hosts.final(ServiceError("the %s on %s was started again, with another secret or address: run this program again"
                                           % (spec.service, place.ssh)))

    address = lead(record)
    mend = hosts.Mending("the %s on %s" % (spec.service, place.ssh), again) if place.ssh is not None else None
    return Connection(spec.service, spec.key, address, key, record["pid"], record["started"], place, name, port, mend)


def _records(answer: dict, place: Place) -> _t.List[dict]:
    """The records of services that run.  Raises ``ServiceError`` if one does not."""
    for record in answer["records"]:
        if "error" in record:
            known = place.ssh is None or " on %s " % answer["node"] in record["error"]
            raise hosts.final(ServiceError(record["error"] if known else "on %s, %s" % (answer["node"], record["error"])))
    return answer["records"]


def _lead(place: Place, label: str, record: dict) -> str:
    """An address that leads to the service from here, the same for the same label."""
    if place.ssh is None:
        return _address(record)
    if not place.tunnel:
        return _address(record, place.hostname or place.ssh)
    return _host(place).forward(label, _address(record))


def _host(place: Place):
    return hosts.host(str(place.ssh), place.python)
