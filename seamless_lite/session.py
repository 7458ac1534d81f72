"""``Session``: the one object that owns settings, stores, connections, the executor and the jobs in flight.

    run(recipe, ...) / submit_many(requests)
        lookup: results of this process -> result table (a hit on this machine needs nothing running)
        the table of jobs in flight: the same checksum is the same job
        push: inputs that are missing in the store (small ones travel inside the job)
        executor: in this process, private workers, a jobserver or a daskserver; who executes records the result
    a job that lacked an input: fingertip makes that again, and the job runs once more

Nothing is started and nothing heavy is imported before something has to run, or the stores are on another host.
"""
import collections
import functools
import os
import threading
import typing as _t

from . import stores as stores_module
from .checksum import Checksum
from .cpus import usable_cpus
from .errors import FunctionError, ServiceError
from .supply import Supply
from .transformation import Job, Meta, Outcome, Recipe, Request

#: So many results this process remembers by name; then it forgets all and asks the table again.
KNOWN_RESULTS = 200_000
#: The services in which a session keeps things.
STORES = ("hashserver", "database")
MEMORY_SPEC = {"buffers": {"directory": None, "address": None}, "results": {"file": None, "address": None}}


class Session:
    """Runs recipes as ``settings`` say; ``settings=None`` keeps everything in the memory of this process.

    ``nested`` is the ``WorkerContext`` of the job that this process is running, if it is a worker: then
    the stores are the worker's and jobs go back to its own jobserver.  ``workers`` asks for private worker
    processes whatever the settings say; ``local`` for none.  ``others()`` lists the sessions of stages that were
    used before, whose results may be inputs here; ``who`` begins the lines that tell of progress, None: there are
    none.  Safe from several threads.
    """

    def __init__(self, settings=None, nested=None, local: bool = False, workers: _t.Optional[int] = None,
                 others: "_t.Callable[[], _t.Iterable[Session]]" = tuple, who: _t.Optional[str] = "seamless_lite"):
        self.settings = settings
        self.nested = nested
        self.workers = workers
        self._local_only = local
        self._stores = nested.stores if nested is not None else None
        self._known: _t.Dict[Checksum, Checksum] = {}
        self._doubted: _t.Dict[Checksum, _t.Optional[Checksum]] = {}    # of these only this result may be remembered, or none
        # what runs on a cluster that keeps nothing comes back here, with its bytes
        self._pure = settings is not None and settings.remote is not None and not settings.persistent
        self.supply = Supply(lambda: self.store, lambda: [session.supply for session in others()], who, self._pure)
        self._who = who
        self._in_flight: _t.Dict[str, _t.Any] = {}
        self._interest: "collections.Counter[str]" = collections.Counter()    # who asked for what is in flight
        self._kept: _t.Set[str] = set()         # what is in flight, of which somebody wants the bytes kept
        self._running = threading.local()
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._in_process = self._remote = None
        self._connections: _t.Dict[str, _t.Any] = {}
        self._temporary: _t.Any = None
        self._lease: _t.Any = None
        self._mender: _t.Any = None
        self._makers: _t.List[_t.Any] = []      # that make inputs of jobs in flight again
        self._metas: _t.Dict[Checksum, Meta] = {}       # with which this session ran what it ran

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
        if self._is_far():
            from . import services
            return services.reached_stores(settings, self.connect(STORES))
        return {"buffers": {"directory": settings.buffer_directory, "address": None, "extra": settings.extra("hashserver")},
                "results": {"file": settings.database_file, "address": None, "extra": settings.extra("database")}}

    def _is_far(self) -> bool:
        """True if buffers or results are on another host."""
        settings = self.settings
        if settings is None or settings.cluster is None or not settings.persistent:
            return False
        frontends = map(settings.cluster.frontend_of, STORES)
        return any(frontend is not None and not frontend.is_local for frontend in frontends)

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
                if self._stores is None and self._is_far():
                    from . import services
                    self._stores = services.open_stores(self.settings, self.connect(STORES))
                elif self._stores is None:
                    self._stores = stores_module.open_stores(self.stores_spec, None)
        return self._stores

    @property
    def store(self):
        """The buffer store."""
        return self.stores.buffers

    def get_buffer(self, checksum: Checksum) -> bytes:
        """The bytes with this checksum.  Raises ``CacheMissError`` if no store has them."""
        return self.supply.get(checksum)

    def doubt(self, checksum: Checksum, result: _t.Optional[Checksum] = None) -> None:
        """The bytes of this recipe's ``result`` could not be read, or it has several: believe only the stores from now on."""
        self._known.pop(checksum, None)
        self._doubted[checksum] = None
        self.supply.recent.drop(result)

    def forget(self, checksum: Checksum) -> bool:
        """Forget the result of the recipe with this checksum; False if there was none."""
        known = self._known.pop(checksum, None) is not None
        return self.stores.results.forget(checksum) or known

    # --- a job from here to its outcome ---------------------------------------------------------------

    def lookup(self, recipe: Recipe, value: bool = True) -> _t.Optional[Outcome]:
        """The outcome of an earlier run, or None.  Starts nothing.

        With ``value`` the bytes of the result must be there too, and the leaves of a deep result.
        """
        checksum = recipe.checksum          # a program may ask for one after the other, and often: no detours
        result = self._known.get(checksum)
        if result is None:
            result = self.stores.results.get(checksum)
        if result is None:
            return None
        buffer = self.supply.held(result)
        if buffer is None and value and not self.supply.available({result: recipe.output[1]}):
            self._doubted.setdefault(checksum, result)
            return None
        self._remember(checksum, result)
        return Outcome(result, buffer=buffer, cached=True)

    def lookup_many(self, requests: _t.Sequence[Request]) -> _t.Dict[Checksum, Outcome]:
        """``lookup`` of many, by the checksums of those that have run; from a store far away in a few messages."""
        if len(requests) == 1:
            outcome = self.lookup(requests[0].recipe, requests[0].value)
            return {} if outcome is None else {requests[0].recipe.checksum: outcome}
        results = {request.recipe.checksum: self._known.get(request.recipe.checksum) for request in requests}
        unknown = [name for name, result in results.items() if result is None]
        if unknown:
            results.update(self.stores.results.get_many(unknown))
        held, wanted = {}, {}
        for recipe, _, _, value in requests:
            result = results[recipe.checksum]
            if result is not None:
                held[result] = self.supply.held(result)
                if value and held[result] is None:
                    wanted[result] = recipe.output[1]
        there = self.supply.available(wanted) if wanted else ()
        found = {}
        for name, result in results.items():
            if result is not None and (result not in wanted or result in there):
                self._remember(name, result)
                found[name] = Outcome(result, buffer=held[result], cached=True)
            elif result is not None:
                self._doubted.setdefault(name, result)
        return found

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
        meta, ended = self._meta(meta), Future()
        with self._lock:
            future, is_new = self._join(checksum, meta)
        if not is_new:
            return self.wait(checksum, future)
        running.append(checksum)
        try:
            ended.set_result(self._perform(recipe, meta, buffers, files, log_fd))
        except BaseException as exc:        # another thread may wait for the same job: it must hear of it
            ended.set_exception(exc)
        finally:
            running.pop()
        self._land(Request(recipe, meta), ended)
        return ended.result()

    def rerun(self, recipe: Recipe, meta: Meta = Meta(), buffers: _t.Mapping[Checksum, bytes] = {},
              files: _t.Mapping[Checksum, str] = {}, log_fd: _t.Optional[int] = None) -> Outcome:
        """Run ``recipe`` whatever is known of it, and record nothing.

        The bytes of the result are in the outcome and nowhere else; those of a deep one are in the store.
        """
        with self._lock:
            self._interest[recipe.checksum] += 1
        try:
            outcome = self._perform(recipe, self._meta(meta)._replace(scratch=True, fresh=True), buffers, files, log_fd)
        finally:
            with self._lock:
                self._interest[recipe.checksum] -= 1
                if self._interest[recipe.checksum] <= 0:
                    del self._interest[recipe.checksum]
        if outcome.cached:
            raise ServiceError("the %s is of an older version and does not run again what it knows: stop it with "
                               "seamless-service stop" % (self.settings.remote or "jobserver"))
        return outcome

    def _perform(self, recipe: Recipe, meta: Meta, buffers, files, log_fd) -> Outcome:
        """Run it, if need be after making its inputs again."""
        [inline] = self.supply.push([(recipe, buffers, files)])
        outcome = self._executor(meta).run(Job(recipe, meta, inline), log_fd)
        if not _lacks_input(outcome):
            return outcome
        from . import fingertip             # hardly ever needed
        with fingertip.Maker(self) as maker:
            maker.add(recipe.checksum)
            error = fingertip.mend(self, maker, [(recipe, buffers, files)])[recipe.checksum]
            if error is not None:
                return Outcome.failure(error)
            [inline] = self.supply.push([(recipe, buffers, files)])
            return self._executor(meta).run(Job(recipe, meta, inline), log_fd)

    def submit(self, recipe: Recipe, meta: Meta = Meta(), buffers: _t.Mapping[Checksum, bytes] = {}, value: bool = True):
        """Like ``run``, but returns a ``concurrent.futures.Future`` of the outcome at once."""
        return self.submit_many([Request(recipe, meta, buffers, value)])[0]

    def submit_many(self, requests: _t.Sequence[Request]) -> _t.List[_t.Any]:
        """``submit`` of many at once.  Raises ``SeamlessError`` if none of those that must run can be."""
        from .executors import Future, done
        hits = self.lookup_many(requests)
        futures, new = [], collections.deque()
        with self._lock:
            for request in requests:
                checksum = request.recipe.checksum
                if checksum in hits:
                    futures.append(done(hits[checksum]))
                    continue
                request = request._replace(meta=self._meta(request.meta))
                future, is_new = self._join(checksum, request.meta)
                futures.append(future)
                if is_new:
                    new.append(request)
        try:
            inlines = self.supply.push([(recipe, buffers, {}) for recipe, _, buffers, _ in new])
            for inline in inlines:
                request = new[0]
                started = self._executor(request.meta).submit(Job(request.recipe, request.meta, inline))
                new.popleft()
                started.add_done_callback(functools.partial(self._ended, request))
        except BaseException as exc:
            failed: Future = Future()
            failed.set_exception(exc)
            for request in new:
                self._land(request, failed)
            raise
        return futures

    def _ended(self, request: Request, ended) -> None:
        """The executor's future of this job has ended.  If it lacked an input, it runs once more when that is there: not in this thread."""
        if ended.exception() is not None or not _lacks_input(ended.result()):
            self._land(request, ended)
            return
        from . import fingertip
        with self._lock:
            if self._mender is None:
                self._mender = fingertip.Mender(self)
        self._mender.put(request, functools.partial(self._land, request))

    def begin_making(self, maker) -> None:
        """``maker`` works for jobs in flight: it hears of those that are cancelled."""
        with self._lock:
            self._makers.append(maker)

    def end_making(self, maker) -> None:
        """The end of ``begin_making``."""
        with self._lock:
            self._makers.remove(maker)

    def ran_with(self, checksum: Checksum) -> _t.Optional[Meta]:
        """The ``Meta`` with which this session ran the recipe with this checksum; None if it is not known."""
        return self._metas.get(checksum)

    def resubmit(self, requests: _t.Sequence[Request]) -> _t.List[_t.Any]:
        """For ``Mender``: futures of the outcomes of jobs that are in flight already."""
        inlines = self.supply.push([(recipe, buffers, {}) for recipe, _, buffers, _ in requests])
        return [self._executor(meta).submit(Job(recipe, meta, inline))
                for (recipe, meta, _, _), inline in zip(requests, inlines)]

    def _meta(self, meta: Meta) -> Meta:
        """``meta`` as the settings want it."""
        record = meta.record or (self.nested if self.nested is not None else self.settings or meta).record
        return meta._replace(scratch=meta.scratch or self._pure, record=record) \
            if self._pure or record != meta.record else meta

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
            if self._interest.get(checksum, 0) > 0:         # a job that was run and interrupted has left already
                self._interest[checksum] -= 1
                if self._interest[checksum] > 0:
                    return
            makers = list(self._makers)
        for maker in makers:
            maker.cancel(checksum)
        self.kill(checksum)

    def kill(self, checksum: Checksum) -> None:
        """Have the executors cancel this job, whoever asked for it."""
        for executor in (self._in_process, self._remote):
            if executor is not None:
                executor.cancel(checksum)

    def value(self, outcome: Outcome, celltype: str):
        """The value of an outcome; raises what the job raised."""
        error = outcome.exception()
        if error is not None:
            raise error
        from .celltypes import deep_checksums, deserialize, unpack_deep
        data = self.get_buffer(outcome.result) if outcome.buffer is None else outcome.buffer
        if celltype != "folder":
            return deserialize(data, celltype)
        return unpack_deep(data, celltype, self.supply.get_many(deep_checksums(data)).get)

    # --- services -------------------------------------------------------------------------------------

    def connect(self, names: _t.Optional[_t.Sequence[str]] = None) -> _t.Mapping[str, _t.Any]:
        """Start the services that the settings ask for, or find them running; service -> ``launch.Connection``.

        ``names``: only these.  Raises ``ServiceError`` if one does not start.
        """
        if self.nested is not None or self.settings is None or self.settings.cluster is None:
            return {}
        from . import services
        with self._lock:
            self._connections = services.start(self.settings, names, self._connections)
            return self._connections

    def after_fork(self) -> None:
        """In a forked child: what is in flight belongs to the parent, and its threads are not here."""
        self._lock = threading.RLock()
        self._running = threading.local()
        self._in_flight, self._interest, self._kept = {}, collections.Counter(), set()
        self.supply.after_fork()
        self._in_process = self._mender = self._lease = None
        self._makers = []
        if self._remote is not None:
            self._remote.after_fork()

    def close(self) -> None:
        """Give back everything that belongs to this session.  Services go on running."""
        if self._lease is not None:
            self._lease.end()
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

    def _join(self, checksum: Checksum, meta: Meta):
        """(The future of this job, whether it was not in flight before).  The lock is held."""
        from .executors import Future
        key = checksum + meta.job_folder        # one that is only written to a folder has no result for others
        is_new = key not in self._in_flight
        if is_new:
            self._in_flight[key] = Future()
        self._interest[key] += 1
        if not meta.scratch:
            self._kept.add(key)
        return self._in_flight[key], is_new

    def _land(self, request: Request, ended) -> None:
        """This job is not in flight any more; ``ended`` is the future of its outcome."""
        meta, key = request.meta, request.recipe.checksum + request.meta.job_folder
        with self._lock:
            future, keep = self._in_flight.pop(key, None), key in self._kept
            self._interest.pop(key, None)
            self._kept.discard(key)
        if future is None:                  # in a child that the job forked nobody waits
            return
        try:
            outcome = ended.result()
            if meta.scratch and keep and outcome.buffer is not None:        # it was joined by somebody who wants the bytes kept
                self.store.put(outcome.buffer)
            self._finish(request.recipe, meta._replace(scratch=meta.scratch and not keep), outcome)
        except BaseException as exc:        # it belongs to whoever waits for the future
            future.set_exception(exc)
        else:
            future.set_result(outcome)

    def _remember(self, checksum: Checksum, result: Checksum) -> None:
        if len(self._known) >= KNOWN_RESULTS:
            self._known.clear()
        self._known[checksum] = result

    def _finish(self, recipe: Recipe, meta: Meta, outcome: Outcome) -> None:
        if outcome.result is None:
            return
        if meta.fresh:                      # somebody makes it again, and sees whether it is the same
            if outcome.buffer is not None:
                self.supply.keep_made(outcome.result, outcome.buffer)
            return
        if self._doubted.pop(recipe.checksum, outcome.result) == outcome.result:
            self._remember(recipe.checksum, outcome.result)
        else:
            self.doubt(recipe.checksum)
        if not outcome.cached:
            if len(self._metas) >= KNOWN_RESULTS:
                self._metas.clear()
            self._metas[recipe.checksum] = meta
        if not meta.scratch:
            self.supply.note_stored(outcome.result)
        if outcome.buffer is not None:
            if meta.scratch:
                self.supply.keep(outcome.result, outcome.buffer)
            else:
                self.supply.recent.put(outcome.result, outcome.buffer)

    def push_files(self, files: _t.Mapping[Checksum, str]) -> int:
        """Store the content of these files where it is missing; returns how many were.

        Raises ``CorruptBufferError`` if a file no longer has the content that its checksum names.
        """
        return self.supply.push_buffers({}, files)

    def _renew(self) -> None:
        """Nobody shall delete what waits for its turn here, or results that may be inputs of what comes."""
        with self._lock:
            if self._is_far() and not self._in_flight:
                return                      # a line that is lost must not be mended for nothing
            jobs, names = self._in_process.unended() if self._in_process is not None else ((), [])
            names = [*names, *self._known.values()]
        self.store.put_many(job.recipe.buffer for job in jobs)
        self.store.has(names)

    def _executor(self, meta: Meta):
        from . import executors, leases
        if self._lease is None:
            self._lease = leases.Lease(self._renew)
            self._lease.begin()
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
            watched = self.stores if self._is_far() else None
            private = services.PrivateJobserver(workers, self.stores_spec, watched)
            return executors.Remote(private.connect, close=private.close)
        if self.settings.remote_clients is not None:
            from . import jobclient1x
            address = next(client.url for client in self.settings.remote_clients if client.service == "jobserver")
            return executors.Remote(lambda again: jobclient1x.connect(address, self.stores), who=self._who)
        bring = functools.partial(services.bring, lambda: self._connections[self.settings.remote], self.store) if self._pure else None
        return executors.Remote(self._connect_backend, who=self._who, bring=bring)

    def _connect_backend(self, again: bool):
        from . import services
        if again:
            self._connections = services.start_again(self.settings)
        connection = self.connect().get(self.settings.remote)
        assert connection is not None       # settings and services agree on what there is
        return services.client(connection)


def _lacks_input(outcome: Outcome) -> bool:
    """True if the job found that an input is in no store."""
    return outcome.error is not None and outcome.error.get("kind") == "CacheMissError"


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
