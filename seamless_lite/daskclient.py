"""For users of Dask itself: a ``distributed.Client`` of the cluster that the daskserver manages, and its dashboard."""
import dataclasses
import typing as _t

from . import hostside, services
from .errors import ConfigurationError, ServiceError
from .httpclient import HttpClient

_TIMEOUT_S = 60


def client(session, **options):
    """A connected ``distributed.Client``; ``options`` are for it.  Raises ``ConfigurationError`` or ``ServiceError``."""
    try:
        import distributed                  # only its users need it here; the daskserver has its own
    except ImportError as exc:
        raise ConfigurationError("dask_client() needs dask in this Python (%s): pip install 'seamless_lite[dask]'" % exc) from None
    from .dasktls import security
    connection, answer = _ask(session)
    address = connection.forward(answer["scheduler"])
    try:
        return distributed.Client(address, security=security(answer), **{"timeout": _TIMEOUT_S, **options})
    except OSError as exc:
        raise ServiceError("the Dask scheduler at %s does not answer: %s" % (address, exc)) from None


def dashboard_link(session) -> str:
    """The address of the dashboard, for a browser on this machine.  Raises ``ConfigurationError`` or ``ServiceError``."""
    connection, answer = _ask(session)
    if answer["dashboard"] is None:
        raise ConfigurationError(answer["no_dashboard"])
    # It listens on the loopback interface of its host, so it takes a tunnel even if the services do not.
    return _with_tunnel(connection).forward(answer["dashboard"])


def _ask(session):
    """The connection to the daskserver, and what it says about its cluster."""
    settings = session.settings
    if session.nested is not None or settings is None or settings.remote != "daskserver":
        raise ConfigurationError("there is no Dask cluster here: configure 'execution: remote' and 'remote: daskserver', with a cluster that"
                                 " has a daskserver, and call seamless_lite.config.init()")
    connection = session.connect()["daskserver"]
    host = hostside.reachable(settings.cluster.frontend_of("daskserver").daskserver.network_interface)
    try:
        return connection, _post(connection, host)
    except ServiceError:                    # it went to sleep
        connection = services.start_again(settings)["daskserver"]
        return connection, _post(connection, host)


def _with_tunnel(connection):
    return dataclasses.replace(connection, place=connection.place._replace(tunnel=True))


def _post(connection, host: str) -> _t.Dict[str, str]:
    """``host``: where it listens, as seen from its own host."""
    address = connection.address
    if connection.place.ssh is not None and not connection.place.tunnel:
        # Its requests are signed and not encrypted, and the answer holds a private key.
        address = _with_tunnel(connection).forward("http://%s:%s" % ("[%s]" % host if ":" in host else host, connection.port))
    http = HttpClient(address, connection.secret, mend=connection.mend)
    try:
        return http.request("POST", "/dask", json={}, timeout_s=_TIMEOUT_S).expect(200).json()
    finally:
        http.close()
