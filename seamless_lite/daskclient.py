"""For users of Dask itself: a ``distributed.Client`` of the cluster that the daskserver manages, and its dashboard."""
import dataclasses
import typing as _t

from . import services
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
    through = dataclasses.replace(connection, place=connection.place._replace(tunnel=True))
    return through.forward(answer["dashboard"])


def _ask(session):
    """The connection to the daskserver, and what it says about its cluster."""
    settings = session.settings
    if session.nested is not None or settings is None or settings.remote != "daskserver":
        raise ConfigurationError("there is no Dask cluster here: configure 'execution: remote' and 'remote: daskserver', with a cluster that"
                                 " has a daskserver, and call seamless_lite.config.init()")
    connection = session.connect()["daskserver"]
    try:
        return connection, _post(connection)
    except ServiceError:                    # it went to sleep
        connection = services.start_again(settings)["daskserver"]
        return connection, _post(connection)


def _post(connection) -> _t.Dict[str, str]:
    http = HttpClient(connection.address, connection.secret, mend=connection.mend)
    try:
        return http.request("POST", "/dask", json={}, timeout_s=_TIMEOUT_S).expect(200).json()
    finally:
        http.close()
