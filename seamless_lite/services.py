"""Which services a session needs, with which arguments, and the clients that reach them.

hashserver and database are started for other hosts and for Seamless 1.x, if the cluster has them; the
jobserver when ``execution: remote`` says so.  A private jobserver belongs to one session and ends with it.
"""
import os
import sys
import typing as _t

from . import launch
from .cpus import usable_cpus
from .durable import make_folders
from .errors import ConfigurationError
from .jobclient import JobserverClient


def specs(settings, stores: dict) -> _t.List[launch.ServiceSpec]:
    """The services that ``settings`` ask for.  ``stores`` is the form that ``stores.open_stores`` takes."""
    cluster, found = settings.cluster, []
    if cluster is None or not settings.persistent:
        return found
    writable = {"hashserver": (settings.buffer_directory, "--writable"),
                "database": (stores["results"]["file"], "--writable")}
    for service, args in writable.items():
        if cluster.frontend_of(service) is not None:
            found.append(_spec(settings, service, args, {}))
    if settings.execution == "remote" and settings.remote == "jobserver":
        workers = cluster.workers or usable_cpus()
        found.append(_spec(settings, "jobserver", ("--workers", str(workers)),
                           {"stores": stores, "record": settings.record}))
    return found


def _spec(settings, service: str, args, parameters: dict) -> launch.ServiceSpec:
    block = getattr(settings.cluster.frontend_of(service), service)
    ports = (block.port_start, block.port_end) if block.port_start is not None else None
    return launch.ServiceSpec(service, settings.service_key(service), tuple(args), parameters,
                              network_interface=block.network_interface, port_range=ports, auth=block.auth != "none")


def start(settings, stores: dict) -> _t.Dict[str, launch.Connection]:
    """Start what is not running yet, all at once; returns service -> connection.  Raises ``ServiceError``."""
    wanted = specs(settings, stores)
    if wanted:
        for folder in (settings.buffer_directory, settings.database_directory):
            try:
                make_folders(folder)
            except OSError as exc:
                raise ConfigurationError("%s: the folder %s of cluster '%s' cannot be made: %s" % (
                    settings.cluster.where, folder, settings.cluster.name, exc.strerror)) from None
    found = {connection.service: connection for connection in launch.ensure_all(wanted)}
    for spec in wanted:
        if is_exposed(spec):
            print("seamless_lite: the %s on %s asks for no signatures (auth: none): everybody who can reach it can use "
                  "it%s" % (spec.service, spec.network_interface,
                            ", and so run programs as you" if spec.service == "jobserver" else ""), file=sys.stderr)
    return found


def is_exposed(spec: launch.ServiceSpec) -> bool:
    """True if other machines may use the service without a signature."""
    interface = spec.network_interface or "localhost"
    return not spec.auth and interface not in ("localhost", "::1") and not interface.startswith("127.")


def client(connection: launch.Connection) -> JobserverClient:
    """A client of the jobserver that ``connection`` reaches."""
    return JobserverClient(connection.address, connection.secret)


class PrivateJobserver:
    """A jobserver with ``workers`` worker processes that belongs to this process and ends with it."""

    def __init__(self, workers: int, stores: dict):
        self._spec = launch.ServiceSpec("jobserver", "jobserver-private", ("--workers", str(workers)), {"stores": stores})
        self._private: _t.Optional[launch.Private] = None
        self._owner = os.getpid()

    def connect(self, again: bool) -> JobserverClient:
        """A client; ``again``: the one that was had before does not answer any more."""
        if again:
            self.close()
        if self._private is None:
            self._private = launch.Private(self._spec)
        return client(self._private.connection)

    def close(self) -> None:
        """End the workers; in a forked child, only forget them."""
        private, self._private = self._private, None
        if private is not None and self._owner == os.getpid():
            private.close()
