"""The daskserver: a jobserver whose jobs run on a Dask cluster, which it starts and which ends with it.

    jobserver's routes -> Jobs -> ``DaskPool`` -> Dask scheduler (here) -> Dask workers (``daskworker``) -> worker processes

Clients speak the jobserver's protocol (see ``jobserver``) and need no Dask.  The cluster lives on this machine (``dasklocal``),
or in jobs of SLURM or OAR (``daskqueue``).  Besides:

    POST /dask    {} -> {"scheduler", "dashboard", "no_dashboard", "ca", "cert", "key"}     signed requests only
    GET /..., POST /get       as a hashserver, with 'persistent: false': what results consist of
    GET /info     also {"cluster": {"workers", "pending_jobs", "running_jobs", "reason", "waiting_tasks", "sentence"}, "dashboard"}

Scheduler, workers and clients of the cluster know each other by a key pair that was made for it.
"""
import contextlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import typing as _t

from . import dasktls, leftovers
from .dasklocal import Local, free_ports
from .daskstores import Buffers, NodeStores
from .errors import ConfigurationError
from .hashserver import HashService
from .httpbase import LOOPBACK, HttpError, Request
from .jobserver import JobService, run_program, stores_of
from .processes import package_root
from .signing import seamless_home
from .statusfile import await_status
from .stores import Stores, open_stores

PREFIX = "seamless-dask-"
OWN = "seamless"            # the names of our own Dask clients begin with this
#: Dask's settings, whatever its version: what waits waits at the scheduler; nothing is spilled; workers serve no pages; and
#: no long memory of messages and transitions, each of which holds on to a task.
SETTINGS = {"distributed.scheduler.worker-saturation": 1.1, "distributed.worker.memory.spill": False,
            "distributed.worker.memory.target": False, "distributed.worker.http.routes": [], "distributed.admin.tick.limit": "30s",
            "distributed.admin.low-level-log-length": 50, "distributed.scheduler.transition-log-length": 50, "distributed.scheduler.events-log-length": 1000}
#: Clients of Dask that are ours, or live in a worker, or are none.
_NOT_FOREIGN = ("Client-" + OWN, "Client-worker", "fire-and-forget")
_CONNECT_S = 30.0
_LOOK_S = 2.0
log = logging.getLogger(__name__)


class DaskServer(JobService):
    """``parameters``: those of the status file; ``spec``: where the stores are, with ``secret`` (None: stores of its own, which
    end with it); ``label``: names its folder.

    Raises ``ConfigurationError`` or ``ServiceError``.
    """
    name = "daskserver"

    def __init__(self, parameters: _t.Mapping, spec: _t.Optional[dict], secret: _t.Optional[bytes], label: str):
        import dask.config                  # Dask is not imported above, so that this module can say that it is missing
        from .daskpool import DaskPool
        from .daskworker import Plugin
        from distributed import Client
        self._folder = _PrivateFolder()
        dask.config.set({"temporary-directory": self._folder.path})
        self._managed: _t.Any = None
        self._queue_folder: _t.Optional[str] = None
        self._storage: _t.List[NodeStores] = []
        try:
            self._keys = dasktls.make_keys()
            security = dasktls.security(self._keys)
            self._managed = self._start(parameters, security, label)
            spec = spec or self._folder.stores()
            client = Client(self.cluster.scheduler_address, loop=self.cluster.loop, security=security, set_as_default=False,
                            timeout=_CONNECT_S, name=OWN)
            stores = open_stores(spec, secret)
            plugin = Plugin(self._managed.slots, *self._stores_of_workers(parameters, spec, secret, stores))
            pool = DaskPool(client, self.cluster.scheduler, self._managed, lambda: _register(client, plugin))
            if not parameters.get("pure"):
                pool.prepare()
            super().__init__(pool, stores, None, None, bool(parameters.get("record")))
        except BaseException:
            self._end_cluster()
            raise
        self.routes.append(("POST", re.compile("/dask"), self._dask))
        if parameters.get("pure"):          # what a result consists of is here and nowhere else: clients come for it
            held = HashService(Buffers(stores.buffers))
            self.routes += [route for route in held.routes if route[2] in (held.get, held.get_batch, held.has_now, held.buffer_length)]
        threading.Thread(target=self._watch, name="seamless-circles", daemon=True).start()

    @property
    def cluster(self):
        """Dask's cluster object."""
        return self._managed.cluster

    def busy(self) -> bool:
        """True while there are jobs, or clients of Dask that are not ours, or tasks of theirs."""
        scheduler = self.cluster.scheduler
        return (super().busy() or any(not name.startswith(_NOT_FOREIGN) for name in list(scheduler.clients))
                or any(worker.processing for worker in list(scheduler.workers.values())))

    def info(self) -> dict:
        """Numbers for people."""
        return {**super().info(), "cluster": self._managed.describe(), "dashboard": self._dashboard()}

    def close(self) -> None:
        """Kill all jobs and end the cluster."""
        super().close()
        self._end_cluster()

    def _dask(self, request: Request):
        """What a client of Dask needs.  Whoever has it may run programs as this user, so it takes a signature."""
        request.read()
        if request.digest is None:
            raise HttpError(403, "the keys of the Dask cluster are given only to signed requests: remove 'auth: none' of the daskserver")
        dashboard = self._dashboard()
        return {**self._keys, "scheduler": self.cluster.scheduler_address, "dashboard": dashboard,
                "no_dashboard": None if dashboard else "Dask's dashboard needs bokeh on %s: install it there with 'pip install bokeh'"
                                                       % os.uname().nodename}

    def _dashboard(self) -> _t.Optional[str]:
        if importlib.util.find_spec("bokeh") is None:
            return None
        return "http://127.0.0.1:%d/%s/status" % (self.cluster.scheduler.http_server.port, self._token)

    def _watch(self) -> None:
        """Look for workers that are gone for good, and for jobs on several workers that wait for each other.  (A job whose own chain of callers would close is
        refused where it runs; but two that were begun independently may meet later.)"""
        while not self.stopping.wait(_LOOK_S):
            try:
                self._managed.tend()
            except RuntimeError:            # the cluster's loop has ended
                log.info("the cluster could not be looked after", exc_info=True)
            workers = [address for address, state in list(self.cluster.scheduler.workers.items()) if state.long_running]
            if workers:
                try:
                    self.pool.end_circle(workers)
                except Exception:           # workers come and go; the next look is soon
                    log.info("the workers could not be asked what waits for what", exc_info=True)

    def _start(self, parameters: _t.Mapping, security, label: str):
        """The cluster: a ``dasklocal.Local`` or a ``daskqueue.Managed``."""
        self._token = os.urandom(16).hex()
        options = {"dashboard_address": "127.0.0.1:0", "http_prefix": "/" + self._token}
        host, ports = parameters.get("network_interface"), parameters.get("ports")
        if ports and ports[0] == ports[1]:
            raise ConfigurationError("'port_start' and 'port_end' of the daskserver are both %d, and it needs at least two ports: "
                                     "one for itself and one for the Dask scheduler" % ports[0])
        if parameters.get("type") in (None, "local"):
            return Local(parameters, security, host or "127.0.0.1", ports, options, self._folder.path)
        from .daskqueue import make_cluster     # needs dask-jobqueue
        from .queuestate import FILE, sweep
        folder = os.path.join(seamless_home(), "dask", label)
        sweep(os.path.dirname(folder))
        os.makedirs(folder, 0o700, exist_ok=True)
        self._queue_folder = folder
        if ports:
            options["port"] = next(free_ports(host or "0.0.0.0", ports))
        return make_cluster(parameters, security=security, host=None if host in LOOPBACK else host, scheduler_options=options,
                            environment={"PYTHONPATH": package_root()}, log_folder=folder, state_file=os.path.join(folder, FILE))

    def _stores_of_workers(self, parameters: _t.Mapping, spec: dict, secret: _t.Optional[bytes], stores: Stores) -> _t.Tuple[dict, _t.Optional[bytes]]:
        """How the workers open the stores: on other hosts, what this host would open directly is served from here."""
        if parameters.get("type") in (None, "local"):
            return spec, secret
        host = re.sub(r"^\w+://|:\d+$", "", self.cluster.scheduler_address).strip("[]")
        self._storage.append(NodeStores(stores, spec["buffers"].get("directory"), host, parameters.get("ports")))
        return self._storage[0].spec, self._storage[0].secret

    def _end_cluster(self) -> None:
        if self._managed is not None:
            self._managed.close()
        if self._queue_folder is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._queue_folder)        # unless logs of jobs that failed are in it
        for storage in self._storage:
            storage.close()
        self._folder.remove()


def _register(client, plugin) -> None:
    """Have all workers, also later ones, be ours."""
    # Its name was another one before 2023.9.2.
    register = getattr(client, "register_plugin", None) or client.register_worker_plugin
    register(plugin, name=plugin.name)


class _PrivateFolder:
    """A folder for what the cluster puts on disk, removed at the end; what processes left that were killed is removed before."""

    def __init__(self):
        leftovers.sweep()
        self.path = tempfile.mkdtemp(prefix=PREFIX)
        self._hold: _t.Optional[int] = leftovers.hold(self.path)

    def stores(self) -> dict:
        """Stores that end with the cluster."""
        folder = os.path.join(self.path, "stores")
        return {"buffers": {"directory": folder}, "results": {"file": os.path.join(folder, "seamless.db")}}

    def remove(self) -> None:
        """Remove it; may be called twice."""
        if self._hold is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._hold)
            self._hold = None


# --- the program --------------------------------------------------------------------------------------

def _need_dask() -> None:
    """Raises ``ConfigurationError`` if Dask is missing; else it is as it comes, whatever the user's own configuration says."""
    try:
        import dask.config
        import distributed
    except Exception as exc:                # also a configuration file of the user that Dask cannot read
        missing = isinstance(exc, ImportError)
        raise ConfigurationError("the daskserver needs dask and distributed in %s on %s%s" % (
            sys.executable, os.uname().nodename, ": install them there with 'pip install seamless_lite[dask]'" if missing
            else ", and importing them fails: %s" % exc)) from None
    dask.config.refresh(paths=[], env={})
    # What has another name by now would overwrite what is set under that name.
    dask.config.set({key: value for key, value in SETTINGS.items() if key not in dask.config.deprecations})
    log.info("dask %s, distributed %s", dask.__version__, distributed.__version__)


def make_service(args) -> DaskServer:
    """The service that the command line describes.  Raises ``ConfigurationError`` or ``ServiceError``."""
    _need_dask()
    parameters = await_status(args.status_file).get("parameters") or {}
    if args.workers:
        queue = parameters.get("queue") or {}
        if parameters.get("type") in (None, "local"):
            queue = {**queue, "cores": None}        # which would count for more
        parameters = {**parameters, "workers": args.workers, "queue": queue or None}
    spec, secret = None, None
    if args.stores or not parameters.get("pure"):
        spec, secret = stores_of(args, parameters)
    label = (os.path.splitext(os.path.basename(args.status_file))[0] if args.status_file
             else "by-hand-%s-%d" % (os.uname().nodename, os.getpid()))
    return DaskServer(parameters, spec, secret, label)


def main(argv: _t.Optional[_t.List[str]] = None) -> int:
    """The program ``seamless-daskserver``; returns its exit code."""
    return run_program("seamless-daskserver", "Run transformations on a Dask cluster.", make_service, argv)


if __name__ == "__main__":
    sys.exit(main())
