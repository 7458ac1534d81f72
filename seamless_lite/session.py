"""``Session``: the one object that owns settings, stores, connections, the executor and the jobs in flight.

    run(recipe, ...) / submit(recipe, ...)
        lookup: results of this process -> result table (a hit needs nothing running)
        the table of jobs in flight: the same checksum is the same job
        push: inputs that are missing in the store (small ones travel inside the job)
        executor: in this process, private workers, or a jobserver; the side that executes records the result

Nothing is started and nothing heavy is imported before something has to run.
"""
import collections
import os
import threading
import typing as _t

from . import stores as stores_module
from .checksum import Checksum
from .cpus import usable_cpus
from .errors import CacheMissError, ConfigurationError, FunctionError, SeamlessError
from .transformation import INLINE_BYTES, Job, Meta, Outcome, Recipe

#: All small buffers of one job together; what goes beyond is stored before the job is sent.
INLINE_TOTAL = 1 << 20
#: So many results this process remembers by name; then it forgets all and asks the table again.
KNOWN_RESULTS = 200_000
PUSH_BATCH = 256
MEMORY_SPEC = {"buffers": {"directory": None, "address": None}, "results": {"file": None, "address": None}}


class Session:
    """Runs recipes as ``settings`` say; ``settings=None`` keeps everything in the memory of this process.

    ``nested`` is the ``WorkerContext`` of the job that this process is running, if it is a worker: then
    the stores are the worker's and jobs go back to its own jobserver.  ``workers`` asks for private worker
    processes whatever the settings say; ``local`` for none.  Safe from several threads.
    """

    def __init__(self, settings=None, nested=None, local: bool = False, workers: _t.Optional[int] = None):
        self.settings = settings
        self.nested = nested
        self.workers = workers
        self._local_only = local
        self._stores = nested.stores if nested is not None else None
        self._known: _t.Dict[Checksum, Checksum] = {}
        self._recent = Recent()
        self._scratch: _t.Dict[Checksum, bytes] = {}
        self._in_flight: _t.Dict[Checksum, _t.Any] = {}
        self._interest: "collections.Counter[Checksum]" = collections.Counter()    # who asked for what is in flight
        self._running = threading.local()
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._in_process = None
        self._remote = None
        self._connections: _t.Dict[str, _t.Any] = {}
        self._temporary: _t.Any = None

    # --- stores ---------------------------------------------------------------------------------------

    @property
    def stores_spec(self) -> dict:
        """Where buffers and results are, in the form that ``stores.open_stores`` and the jobserver take."""
        settings = self.settings
        if settings is not None and settings.remote_clients is not None:
            return _client_stores(settings.remote_clients)
        if settings is None or settings.buffer_directory is None:
            spawns = self.workers is not None or settings is not None and settings.execution == "spawn"
            return self._temporary_spec() if spawns else MEMORY_SPEC
        cluster = settings.cluster
        for service in ("hashserver", "database") if cluster is not None else ():
            frontend = cluster.frontend_of(service)
            if frontend is not None and not frontend.is_local:
                raise ConfigurationError(
                    "the %s of cluster '%s' is on host '%s': this version reaches only services on this machine; "
                    "give the cluster a frontend with hostname: localhost" % (service, cluster.name, frontend.hostname))
        return {"buffers": {"directory": settings.buffer_directory, "address": None},
                "results": {"file": os.path.join(settings.database_directory, "seamless.db"), "address": None}}

    def _temporary_spec(self) -> dict:
        """Workers and nothing persistent: they share a folder that goes with the session."""
        if self._temporary is None:
            import tempfile
            self._temporary = tempfile.TemporaryDirectory(prefix="seamless-spawn-")
        folder = self._temporary.name
        return {"buffers": {"directory": folder, "address": None},
                "results": {"file": os.path.join(folder, "seamless.db"), "address": None}}

    @property
    def stores(self):
        """The buffer store and the result store, opened when first used."""
        if self._stores is None:
            with self._lock:
                if self._stores is None:
                    self._stores = stores_module.open_stores(self.stores_spec, None)
        return self._stores

    @property
    def store(self):
        """The buffer store."""
        return self.stores.buffers

    def get_buffer(self, checksum: Checksum) -> bytes:
        """The bytes with this checksum.  Raises ``CacheMissError`` if no store has them."""
        data = self._recent.get(checksum)
        if data is None:
            data = self._scratch.get(checksum)
        if data is None:
            data = self.store.get(checksum)
            if data is None:
                raise CacheMissError("buffer %s is in none of the stores; was it computed as scratch, or deleted? "
                                     "Run what makes it again" % checksum)
            self._recent.put(checksum, data)
        return data

    def doubt(self, checksum: Checksum) -> None:
        """The bytes of this recipe's result could not be read: look at the stores again next time."""
        self._known.pop(checksum, None)

    def forget(self, checksum: Checksum) -> bool:
        """Forget the result of the recipe with this checksum; False if there was none."""
        known = self._known.pop(checksum, None) is not None
        return self.stores.results.forget(checksum) or known

    # --- a job from here to its outcome ---------------------------------------------------------------

    def lookup(self, recipe: Recipe, value: bool = True) -> _t.Optional[Outcome]:
        """The outcome of an earlier run, or None.  Starts nothing.

        With ``value`` the bytes of the result must be there too, and the leaves of a deep result.
        """
        checksum = recipe.checksum
        result = self._known.get(checksum)
        if result is None:
            result = self.stores.results.get(checksum)
        if result is None:
            return None
        buffer = self._recent.get(result)
        if buffer is None:
            buffer = self._scratch.get(result)
        if buffer is None and value and not self._available(result, recipe.output[1]):
            return None
        self._remember(checksum, result)
        return Outcome(result, buffer=buffer, cached=True)

    def run(self, recipe: Recipe, meta: Meta = Meta(), buffers: _t.Mapping[Checksum, bytes] = {},
            files: _t.Mapping[Checksum, str] = {}, log_fd: _t.Optional[int] = None, value: bool = True) -> Outcome:
        """Look ``recipe`` up or run it; wait for the outcome.

        ``buffers`` and ``files`` are inputs that may be missing in the store; what the job prints is
        written to ``log_fd`` as it comes.  Without ``value`` the checksum of the result will do.  What the user's code raised is in the outcome; raises
        ``ServiceError`` and its kin when nothing could be run.
        """
        hit = self.lookup(recipe, value)
        if hit is not None:
            return hit
        from .executors import Future       # from here on something runs, and 10 ms of imports do not matter
        checksum = recipe.checksum
        running = self._running.__dict__.setdefault("stack", [])
        if checksum in running:
            raise FunctionError("transformation %s calls itself with the same arguments, so it can never end; "
                                "give the inner call other arguments" % checksum)
        with self._lock:
            future = self._in_flight.get(checksum)
            mine = future is None
            if mine:
                future = self._in_flight[checksum] = Future()
            self._interest[checksum] += 1
        if not mine:
            return self.wait(checksum, future)
        running.append(checksum)
        try:
            job = Job(recipe, meta, self._push(recipe, buffers, files))
            outcome = self._executor(meta).run(job, log_fd)
            self._finish(recipe, meta, outcome)
            future.set_result(outcome)
        except BaseException as exc:        # another thread may wait for the same job: it must hear of it
            future.set_exception(exc)
            raise
        finally:
            running.pop()
            self._landed(checksum)
        return outcome

    def submit(self, recipe: Recipe, meta: Meta = Meta(), buffers: _t.Mapping[Checksum, bytes] = {}, value: bool = True):
        """Like ``run``, but returns a ``concurrent.futures.Future`` of the outcome at once."""
        from .executors import Future, done
        hit = self.lookup(recipe, value)
        if hit is not None:
            return done(hit)
        checksum = recipe.checksum
        with self._lock:
            self._interest[checksum] += 1
            if checksum in self._in_flight:
                return self._in_flight[checksum]
            future = self._in_flight[checksum] = Future()

        def finished(inner):
            self._landed(checksum)
            try:
                outcome = inner.result()
                self._finish(recipe, meta, outcome)
            except BaseException as exc:    # it belongs to whoever waits for the future
                future.set_exception(exc)
            else:
                future.set_result(outcome)
        try:
            job = Job(recipe, meta, self._push(recipe, buffers, {}))
            self._executor(meta).submit(job).add_done_callback(finished)
        except BaseException as exc:
            self._landed(checksum)
            future.set_exception(exc)
            raise
        return future

    def wait(self, checksum: Checksum, future, timeout: _t.Optional[float] = None) -> Outcome:
        """Wait for a future of ``submit``."""
        if not future.done():
            self.help(checksum)
        return future.result(timeout)

    def help(self, checksum: Checksum) -> None:
        """The calling thread is going to wait for this job: lend it to the executor meanwhile."""
        for executor in (self._in_process, self._remote):
            if executor is not None:
                executor.help(checksum)

    def cancel(self, checksum: Checksum) -> None:
        """Kill the job with this id, unless others of this session have asked for it too."""
        with self._lock:
            self._interest[checksum] -= 1
            if self._interest[checksum] > 0:
                return
        for executor in (self._in_process, self._remote):
            if executor is not None:
                executor.cancel(checksum)

    def value(self, outcome: Outcome, celltype: str):
        """The value of an outcome; raises what the job raised."""
        error = outcome.exception()
        if error is not None:
            raise error
        from .celltypes import deserialize, unpack_deep
        data = self.get_buffer(outcome.result) if outcome.buffer is None else outcome.buffer
        return unpack_deep(data, celltype, self.store.get) if celltype == "folder" else deserialize(data, celltype)

    # --- services -------------------------------------------------------------------------------------

    def connect(self) -> _t.Mapping[str, _t.Any]:
        """Start the services that the settings ask for, or find them running; service -> ``launch.Connection``.

        Raises ``ServiceError`` if one does not start.
        """
        if self.nested is not None or self.settings is None or self.settings.cluster is None:
            return {}
        from . import services
        with self._lock:
            if not self._connections:
                self._connections = services.start(self.settings, self.stores_spec)
            return self._connections

    def after_fork(self) -> None:
        """In a forked child: what is in flight belongs to the parent, and its threads are not here."""
        self._lock = threading.RLock()
        self._running = threading.local()
        self._in_flight, self._interest = {}, collections.Counter()
        self._recent = Recent()
        self._in_process = None
        if self._remote is not None:
            self._remote.after_fork()

    def close(self) -> None:
        """Give back everything that belongs to this session.  Services go on running."""
        with self._lock:
            executors, self._in_process, self._remote = (self._in_process, self._remote), None, None
        for executor in executors:
            if executor is not None:
                executor.close()
        if self._stores is not None and self.nested is None:
            self._stores.close()
        if self._temporary is not None and self._owner == os.getpid():
            self._temporary.cleanup()

    # --- the parts ------------------------------------------------------------------------------------

    def _landed(self, checksum: Checksum) -> None:
        with self._lock:
            self._in_flight.pop(checksum, None)
            self._interest.pop(checksum, None)

    def _remember(self, checksum: Checksum, result: Checksum) -> None:
        if len(self._known) >= KNOWN_RESULTS:
            self._known.clear()
        self._known[checksum] = result

    def _available(self, result: Checksum, celltype: str) -> bool:
        if not self.store.has([result])[0]:
            return False
        if celltype not in ("deepcell", "deepfolder", "folder"):
            return True
        from .celltypes import deep_checksums
        index = self.store.get(result)
        return index is not None and all(self.store.has(deep_checksums(index)))

    def _finish(self, recipe: Recipe, meta: Meta, outcome: Outcome) -> None:
        if outcome.result is None:
            return
        self._remember(recipe.checksum, outcome.result)
        if outcome.buffer is not None:
            if meta.scratch:
                self._scratch[outcome.result] = outcome.buffer
            else:
                self._recent.put(outcome.result, outcome.buffer)

    def _push(self, recipe: Recipe, buffers, files) -> _t.Dict[Checksum, bytes]:
        """Store what is missing and large; return the small buffers, which travel inside the job."""
        inline, total, large = {}, 0, {}
        if self._scratch:
            kept = {cs: self._scratch[cs] for cs in recipe.inputs() if cs in self._scratch}
            buffers = {**kept, **buffers}
        for checksum, data in buffers.items():
            if len(data) <= INLINE_BYTES and total + len(data) <= INLINE_TOTAL:
                inline[checksum] = data
                total += len(data)
            else:
                large[checksum] = data
        if large:
            present = self.store.has(list(large))
            self.store.put_many(data for data, there in zip(large.values(), present) if not there)
        if files:
            self.push_files(files)
        return inline

    def push_files(self, files: _t.Mapping[Checksum, str]) -> int:
        """Store the content of these files where it is missing; returns how many were.

        Raises ``CorruptBufferError`` if a file no longer has the content that its checksum names.
        """
        names = list(files)
        missing = [cs for cs, there in zip(names, self.store.has(names)) if not there]
        batch: _t.List[bytes] = []
        for checksum in missing:
            path = files[checksum]
            small = None
            if os.path.getsize(path) <= INLINE_BYTES:
                with open(path, "rb") as file:
                    small = file.read()
            if small is not None and Checksum.of(small) == checksum:
                batch.append(small)
                if len(batch) >= PUSH_BATCH:
                    self.store.put_many(batch)
                    batch = []
            else:                           # large, compressed, or changed: put_file knows which
                self.store.put_file(path, checksum)
        if batch:
            self.store.put_many(batch)
        return len(missing)

    def _executor(self, meta: Meta):
        from . import executors
        remote = not (meta.local or self._local_only) and (
            self.nested is not None or self.workers is not None
            or self.settings is not None and self.settings.execution != "process")
        with self._lock:
            if not remote:
                if self._in_process is None:
                    self._in_process = executors.InProcess(self.stores, usable_cpus())
                return self._in_process
            if self._remote is None:
                self._remote = self._make_remote()
            return self._remote

    def _make_remote(self):
        from . import executors, services
        if self.nested is not None:
            from .jobclient import JobserverClient
            return executors.Remote(lambda again: JobserverClient(self.nested.address, self.nested.secret),
                                    parent=self.nested.job_id)
        if self.workers is not None or self.settings.execution == "spawn":
            workers = self.workers or self.settings.workers or usable_cpus()
            private = services.PrivateJobserver(workers, self.stores_spec)
            return executors.Remote(private.connect, close=private.close)
        return executors.Remote(self._connect_jobserver)

    def _connect_jobserver(self, again: bool):
        from . import services
        if again:
            with self._lock:
                self._connections = {}
        self.connect()
        connection = self._connections.get("jobserver")
        if connection is None:
            raise SeamlessError("execution is remote, but cluster '%s' has no jobserver; add a jobserver: block to it "
                                "or set execution: process" % self.settings.cluster.name)
        return services.client(connection)


def _client_stores(clients) -> dict:
    """The stores of ``SEAMLESS_REMOTE_CLIENTS``: the first that may be written, and all others to read."""
    spec: _t.Dict[str, dict] = {}
    for kind, service in (("buffers", "hashserver"), ("results", "database")):
        found = []
        for client in clients:
            if client.service == service:
                parts = [{"directory": client.directory}] if client.directory is not None else []
                if client.url is not None:
                    parts.append({"address": client.url, "auth": False})
                found += [(client.readonly or "directory" in part, part) for part in parts]
        top = next((part for readonly, part in found if not readonly), {})
        spec[kind] = {**top, "read": [part for _, part in found if part is not top]}
    return spec


class Recent:
    """The small buffers that were used last, up to ``limit`` bytes in all.  Safe from several threads."""

    def __init__(self, limit: int = 64 << 20, largest: int = 1 << 20):
        self._limit, self._largest, self._size = limit, largest, 0
        self._items: "collections.OrderedDict[str, bytes]" = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, checksum: str) -> _t.Optional[bytes]:
        """The buffer, or None."""
        with self._lock:
            data = self._items.get(checksum)
            if data is not None:
                self._items.move_to_end(checksum)
            return data

    def put(self, checksum: str, data: bytes) -> None:
        """Keep ``data`` for a while, if it is small."""
        if len(data) > self._largest:
            return
        with self._lock:
            if checksum not in self._items:
                self._items[checksum] = data
                self._size += len(data) + 200       # about what an entry costs besides
                while self._size > self._limit:
                    self._size -= len(self._items.popitem(last=False)[1]) + 200
