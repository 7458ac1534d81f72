"""Which services a session needs, where and with which arguments, and the clients and stores that reach them.

hashserver and database hold what is kept: on this machine their folder and file are opened directly, and they run for
others; on another host they are how the session gets there.  The jobserver or daskserver runs the jobs when
``execution: remote`` says so.  A private jobserver belongs to one session and ends with it.
"""
import contextlib
import hashlib
import os
import sys
import threading
import typing as _t

from . import hosts, hostside, launch, stores
from .clusters import Queue, is_this_machine
from .durable import make_folders
from .errors import ConfigurationError, SeamlessError, ServiceError
from .jobclient import JobserverClient
from .settings import BACKENDS

#: Service -> (its part of a description of stores, what a folder or file is called there).
_PARTS = {"hashserver": ("buffers", "directory"), "database": ("results", "file")}
#: So much of one result comes back from a daskserver that keeps nothing.
BROUGHT_BYTES = 1 << 30
#: So often a connection is tried that private workers need, while they work.
_LOOK_S = 10.0


def place_of(settings, service: str) -> launch.Place:
    """Where the cluster has this service."""
    frontend = settings.cluster.frontend_of(service)
    block = getattr(frontend, service)
    if frontend.is_local:
        return launch.HERE._replace(python=block.python, conda=block.conda)
    name = frontend.ssh_hostname or frontend.hostname
    return launch.Place(name, frontend.hostname or name, settings.cluster.tunnel is not False, block.python, block.conda)


def wanted(settings) -> _t.List[str]:
    """The services that ``settings`` ask for."""
    cluster = settings.cluster
    if cluster is None:
        return []
    kept = [service for service in _PARTS if settings.persistent and cluster.frontend_of(service) is not None]
    return kept + ([settings.remote] if settings.remote is not None else [])


def start(settings, names: _t.Optional[_t.Sequence[str]] = None,
          found: _t.Mapping[str, launch.Connection] = {}) -> _t.Dict[str, launch.Connection]:
    """Start what is not running yet, all at once; returns service -> connection, together with those in ``found``.

    ``names``: only these.  Raises ``ServiceError``, ``ConfigurationError``.
    """
    connections = dict(found)
    missing = [name for name in wanted(settings) if name not in connections and (names is None or name in names)]
    backends = [name for name in missing if name in BACKENDS and not _beside_stores(settings, name)]
    if backends:                            # they must be told addresses that are not known yet
        for backend in backends:
            _check_reachable(settings, backend)
        connections = start(settings, list(_PARTS), connections)
    specs = [_spec(settings, name, connections) for name in missing if name not in connections]
    for spec in specs:
        _make_folder(settings, spec)
    connections.update((connection.service, connection) for connection in (launch.ensure_all(specs) if specs else ()))
    for spec in specs:
        if is_exposed(spec):
            print("seamless_lite: the %s on %s asks for no signatures (auth: none): everybody who can reach it can use "
                  "it%s" % (spec.service, spec.network_interface,
                            ", and so run programs as you" if spec.service in BACKENDS else ""), file=sys.stderr)
    return connections


def running(settings) -> _t.Optional[launch.Connection]:
    """The connection to the jobserver or daskserver of ``settings``, if it runs.  Starts nothing."""
    found: _t.Dict[str, launch.Connection] = {}
    for name in ([] if _beside_stores(settings, settings.remote) else list(_PARTS)) + [settings.remote]:
        connection = launch.running(_spec(settings, name, found))
        if connection is None:
            return None
        found[name] = connection
    return found[settings.remote]


def start_again(settings) -> _t.Dict[str, launch.Connection]:
    """``start`` after a service failed; a host that cannot be reached now is waited for."""
    place = place_of(settings, settings.remote)
    if place.ssh is None:
        return start(settings)
    return hosts.patiently("the %s on %s" % (settings.remote, place.ssh), lambda: start(settings))


def _make_folder(settings, spec) -> None:
    """The folder of a store on this machine."""
    folder = {"hashserver": settings.buffer_directory, "database": settings.database_directory}.get(spec.service)
    if folder is not None and spec.place.ssh is None:
        try:
            make_folders(folder)
        except OSError as exc:
            raise ConfigurationError("%s: the folder %s of cluster '%s' cannot be made: %s" % (
                settings.cluster.where, folder, settings.cluster.name, exc.strerror)) from None


def is_exposed(spec: launch.ServiceSpec) -> bool:
    """True if other machines may use the service without a signature."""
    return not spec.auth and not _is_loopback(spec.network_interface)


def _is_loopback(interface: _t.Optional[str]) -> bool:
    return interface in (None, "", "localhost", "::1") or str(interface).startswith("127.")


# --- what a service is started with -------------------------------------------------------------------

def _spec(settings, service: str, connections) -> launch.ServiceSpec:
    cluster, needs = settings.cluster, ()
    block = getattr(cluster.frontend_of(service), service)
    args: _t.Tuple[str, ...] = ()
    parameters: _t.Dict[str, object] = {}
    if service in _PARTS:
        args = (_path(settings, service), "--writable")
        if settings.extra(service):
            args += ("--extra-dirs" if service == "hashserver" else "--extra-files", ";".join(settings.extra(service)))
    else:
        parameters = {"stores": _stores_of_backend(settings, service, connections) if settings.persistent else None,
                      "record": settings.record}
    if service == "jobserver" and cluster.workers:
        args = ("--workers", str(cluster.workers))
    if service == "daskserver":
        parameters.update(_dask_parameters(settings, block))
        needs = ("dask", "distributed") + (() if parameters["type"] == "local" else ("dask_jobqueue",))
    return launch.ServiceSpec(service, settings.service_key(service), args, parameters, place=place_of(settings, service),
                              needs=needs, network_interface=block.network_interface, port_range=block.port_range,
                              auth=block.auth != "none")


def _dask_parameters(settings, block) -> dict:
    cluster, queue = settings.cluster, None
    if settings.queue is not None:
        queue = {name: value for name, value in cluster.queues[settings.queue]._asdict().items()
                 if name != "where" and value != Queue._field_defaults.get(name)}
    return {"type": cluster.type or "local", "cluster": cluster.name, "queue": queue, "node": settings.node,
            "memory_per_core_property_name": cluster.memory_per_core_property_name, "workers": cluster.workers,
            "network_interface": block.network_interface, "ports": list(block.port_range) if block.port_range else None,
            "pure": not settings.persistent}


def _beside_stores(settings, backend: str) -> bool:
    """True if the host of ``backend`` is that of the stores, so that it can open folder and file."""
    host = place_of(settings, backend).ssh
    return not settings.persistent or all(place_of(settings, service).ssh == host for service in _PARTS)


def _check_reachable(settings, backend: str) -> None:
    """Raise ``ConfigurationError`` if the host of ``backend`` cannot reach the stores."""
    host = place_of(settings, backend).ssh
    for service in _PARTS:
        block = getattr(settings.cluster.frontend_of(service), service)
        if place_of(settings, service).ssh != host and host is not None and (
                block.auth != "none" or block.port_range is None or _is_loopback(block.network_interface)):
            raise ConfigurationError(
                "%s: the %s of cluster '%s' cannot reach its %s, which is on another host; put both below the same hostname, "
                "or give the %s ports, a network_interface that other hosts reach, and 'auth: none'"
                % (settings.cluster.where, backend, settings.cluster.name, service, service))


def _stores_of_backend(settings, backend: str, connections) -> dict:
    """Where a jobserver or daskserver finds the stores."""
    host, spec = place_of(settings, backend).ssh, {}
    for service, (part, key) in _PARTS.items():
        if place_of(settings, service).ssh == host:
            spec[part] = _opened(settings, service)
        elif host is None:
            spec[part] = _reached(connections[service])
        else:                               # only ports that ask for no signature can be used from a third host
            name = settings.cluster.frontend_of(service).hostname
            name = os.uname().nodename if is_this_machine(name) else name
            spec[part] = {"address": "http://%s:%d" % (name, connections[service].port), "auth": False}
    return spec


def _path(settings, service: str) -> str:
    return settings.buffer_directory if service == "hashserver" else settings.database_file


# --- how this process reaches them --------------------------------------------------------------------

def open_stores(settings, connections: _t.Mapping[str, launch.Connection]) -> stores.Stores:
    """The stores: through a connection if they are on another host, else opened here."""
    from .database import DatabaseClient
    from .hashserver import HashserverClient
    here = stores.open_stores({part: _opened(settings, service) for service, (part, _) in _PARTS.items()})
    opened = []
    for service, client_class, store in (("hashserver", HashserverClient, here.buffers), ("database", DatabaseClient, here.results)):
        if place_of(settings, service).ssh is None:
            opened.append(store)
        else:
            connection = connections[service]
            opened.append(client_class(connection.address, connection.secret, mend=connection.mend))
    return stores.Stores(*opened)


def reached_stores(settings, connections: _t.Mapping[str, launch.Connection]) -> dict:
    """The same as a description for other processes of this machine."""
    return {part: _opened(settings, service) if place_of(settings, service).ssh is None else _reached(connections[service])
            for service, (part, _) in _PARTS.items()}


def _opened(settings, service: str) -> dict:
    """The description of a store that is opened on its own host."""
    extra = settings.extra(service)
    return {_PARTS[service][1]: _path(settings, service), "address": None, **({"extra": extra} if extra else {})}


def _reached(connection: launch.Connection) -> dict:
    return {"address": connection.address, "auth": connection.secret is not None, "patient": True,
            "secret_file": _secret_file(connection.secret)}


def _secret_file(secret: _t.Optional[bytes]) -> _t.Optional[str]:
    """A private file with the secret of an account on another host, for workers that are processes of their own."""
    if secret is None:
        return None
    path = os.path.join(hostside.run_folder(), "far-%s.secret" % hashlib.sha256(secret).hexdigest()[:16])
    if not os.path.exists(path):
        aside = "%s.%d-%s" % (path, os.getpid(), os.urandom(4).hex())
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secret.hex().encode("ascii") + b"\n")
        os.replace(aside, path)
    return path


def client(connection: launch.Connection) -> JobserverClient:
    """A client of the jobserver or daskserver that ``connection`` reaches."""
    return JobserverClient(connection.address, connection.secret, connection.mend, connection.pid)


def bring(connection: _t.Callable[[], launch.Connection], store, job, outcome):
    """The ``outcome`` of a job of the daskserver at ``connection()``, which keeps nothing, with its bytes; its leaves are in ``store`` then.

    Raises ``SeamlessError`` if they are too large, ``ServiceError`` if they are not there.
    """
    from .celltypes import DEEP             # most sessions do not need these
    from .hashserver import HashserverClient
    from .references import index_leaves
    data, deep = outcome.buffer, job.recipe.output[1] in DEEP
    if outcome.result is None or data is not None and not deep:
        return outcome
    there = connection()
    with contextlib.closing(HashserverClient(there.address, there.secret, mend=there.mend)) as source:
        if data is None:                    # it is large, or the server knew it
            _bring(source, store, [outcome.result], outcome.result)
            data = store.get(outcome.result)
        if deep:
            _bring(source, store, index_leaves(data), outcome.result)
    return outcome._replace(buffer=data)


def _bring(source, store, names: _t.Sequence[str], result: str) -> None:
    from .transfer import BATCH_BYTES, LARGE_BYTES, carry
    missing = [name for name, there in zip(names, store.has(names)) if not there]
    found = source.get_small(missing, LARGE_BYTES, BATCH_BYTES) if missing else {}      # often that is all
    rest = [name for name in missing if found.get(name) is None]
    size = sum(length or 0 for length in source.lengths(rest)) if rest else 0
    if size > BROUGHT_BYTES:
        raise SeamlessError("the result %s has %d MB, and with 'persistent: false' no more than %d come back from the daskserver: "
                            "set 'persistent: true'" % (result, size >> 20, BROUGHT_BYTES >> 20))
    store.put_many(data for data in found.values() if data is not None)
    if len(carry(rest, source, store)) < len(rest):
        raise ServiceError("a part of the result %s is not in the daskserver that made it: run it again" % result)


class PrivateJobserver:
    """A jobserver with ``workers`` worker processes that belongs to this process and ends with it.

    ``watched``: stores on another host, which the workers reach through connections that this process looks after.
    """

    def __init__(self, workers: int, spec: dict, watched: _t.Optional[stores.Stores] = None):
        self._spec = launch.ServiceSpec("jobserver", "jobserver-private", ("--workers", str(workers)), {"stores": spec})
        self._private: _t.Optional[launch.Private] = None
        self._owner = os.getpid()
        self._watched = [store for store in watched or () if hasattr(store, "request")]
        self._ended = threading.Event()

    def connect(self, again: bool) -> JobserverClient:
        """A client; ``again``: the one that was had before does not answer any more."""
        if again:
            self.close()
        if self._private is None:
            self._ended = threading.Event()
            self._private = launch.Private(self._spec)
            if self._watched:
                threading.Thread(target=self._watch, args=(self._ended,), name="seamless-watch", daemon=True).start()
        return client(self._private.connection)

    def _watch(self, ended: threading.Event) -> None:
        """Ask now and then: whoever asks mends what is broken, and keeps the services from their idle exit."""
        while not ended.wait(_LOOK_S):
            for store in self._watched:
                try:
                    store.request("GET", "/healthcheck")
                except SeamlessError:
                    pass                    # the jobs will say so

    def close(self) -> None:
        """End the workers; in a forked child, only forget them."""
        self._ended.set()
        private, self._private = self._private, None
        if private is not None and self._owner == os.getpid():
            private.close()
