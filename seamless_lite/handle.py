"""``Transformation``: one computation in the user's hands, from its arguments to its value.

    start() walks the dependencies, children first; each transformation waits for a count of unfinished
    dependencies to reach zero, fills their result checksums into its recipe, and is ready.  Those that are
    ready together are submitted together (start_all).  No thread waits for a dependency: the completion
    of one starts the next.

    run(), compute(), value wait; a waiting thread runs in-process jobs itself that nobody has begun.
"""
import collections
import contextlib
import itertools
import logging
import os
import threading
import typing as _t

from . import config
from .celltypes import Buffer
from .checksum import Checksum
from .errors import CacheMissError, JobCancelledError, JobError, SeamlessError, ServiceError
from .session import Request
from .transformation import Meta, Outcome, Recipe

log = logging.getLogger(__name__)
#: So many transformations at most are submitted together.
TOGETHER = 1000


def _reset() -> None:
    """For a new process: a forked child has none of the threads that held the lock or emptied the queue."""
    global _lock, _ready, _later
    _lock, _ready, _later = threading.RLock(), _Ready(), _Later()


def start_all(transformations: _t.Iterable["Transformation"]) -> None:
    """``start`` them all, together: with a server far away that takes a few messages, and not some for each."""
    order: _t.List["Transformation"] = []
    for transformation in transformations:
        found = transformation._unstarted()
        for node in found:
            node._prepare()
        order += found
    with _ready.hold():
        for node in order:
            node._one_less()                # the one that _prepare counted extra, so that nothing began early


class _Ready(threading.local):
    """The transformations of this thread that are ready to be submitted."""

    def __init__(self):
        self._nodes: "collections.deque[Transformation]" = collections.deque()
        self.held = False

    @contextlib.contextmanager
    def hold(self):
        """What gets ready in the ``with`` block is submitted at its end, unless another one is around it."""
        if self.held:
            yield
            return
        self.held = True
        try:
            yield
            self._submit()
        except BaseException as exc:        # Ctrl-C, or a bug: whoever waits must hear of it
            for node in self._nodes:
                node._end(error=exc if isinstance(exc, Exception) else JobCancelledError(
                    "transformation %s was interrupted before it began" % node._name))
            self._nodes.clear()
            raise
        finally:
            self.held = False

    def put(self, node: "Transformation") -> None:
        self._nodes.append(node)

    def _submit(self) -> None:
        """All; and those that get ready because these are hits: so a long chain of hits is a loop and no recursion."""
        while self._nodes:
            batch = list(itertools.islice(self._nodes, TOGETHER))
            _submit_all(batch)
            for _ in batch:
                self._nodes.popleft()


class _Later:
    """Submits, in a thread of its own, what gets ready when a job far away has ended.

    The thread that tells of such ends does not wait for the network; meanwhile more gets ready, and is submitted together.
    """

    def __init__(self):
        self._nodes: _t.List["Transformation"] = []
        self._is_working = False
        self._lock = threading.Lock()

    def put(self, node: "Transformation") -> None:
        with self._lock:
            self._nodes.append(node)
            if not self._is_working:
                self._is_working = True
                threading.Thread(target=self._work, name="seamless-submit", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                nodes, self._nodes = self._nodes, []
                self._is_working = bool(nodes)
            if not nodes:
                return
            try:
                with _ready.hold():
                    for node in nodes:
                        _ready.put(node)
            except Exception:               # a defect of ours; those who wait have heard of it
                log.exception("%d transformations could not be submitted", len(nodes))


def _submit_all(nodes: _t.Iterable["Transformation"]) -> None:
    """Submit these, or end them if that cannot be."""
    ready: _t.Dict[_t.Any, _t.List["Transformation"]] = {}
    for node in nodes:
        if node._completed():
            ready.setdefault(node._session, []).append(node)
    for session, members in ready.items():
        _submit_to(session, members)


def _submit_to(session, nodes: _t.List["Transformation"]) -> None:
    try:
        futures = session.submit_many([Request(node._recipe, node._meta, node._buffers, node._keep) for node in nodes])
    except SeamlessError as exc:
        if len(nodes) > 1 and not isinstance(exc, ServiceError):        # it is the matter of one of them
            for node in nodes:
                _submit_to(session, [node])
        else:
            for node in nodes:
                node._end(error=exc)
        return
    for node, future in zip(nodes, futures):
        future.add_done_callback(node._land)


_lock = threading.RLock()           # guards the few fields that say how far a transformation is
_ready = _Ready()
_later = _Later()
os.register_at_fork(after_in_child=_reset)


class Transformation:
    """What calling a ``delayed`` function gives: a computation that has a name and can be run.

    ``recipe`` has a placeholder for each pin named in ``dependencies`` (name -> Transformation), whose
    result checksum is filled in when it is known.  ``buffers`` are the inputs' bytes.
    """

    def __init__(self, recipe: Recipe, buffers: _t.Mapping[Checksum, bytes], meta: Meta,
                 dependencies: _t.Mapping[str, "Transformation"] = {}):
        self._recipe = recipe
        self._buffers = buffers
        self._meta = meta
        self._dependencies = dict(dependencies)
        self._constructed = not self._dependencies
        self._session: _t.Any = None
        self._future: _t.Any = None             # of the outcome, once started
        self._unfinished = 0                    # dependencies that have no outcome yet
        self._submitted = False
        self._keep = not meta.scratch           # the bytes of the result are wanted, and not only their checksum
        self._outcome: _t.Optional[Outcome] = None
        self._error: _t.Optional[BaseException] = None

    # --- running --------------------------------------------------------------------------------------

    def run(self):
        """Compute the result, or find it, and return its value.

        Raises ``JobError`` (a ``RuntimeError``) with the user's traceback if the code failed, another
        ``SeamlessError`` if it could not be run.
        """
        return self.value

    def compute(self) -> _t.Optional[Checksum]:
        """Compute the result, or find it, and return its checksum; None if that failed (see ``exception``)."""
        self._compute()
        return self.result_checksum

    def start(self) -> "Transformation":
        """Begin, dependencies first, and return self at once."""
        start_all([self])
        return self

    def task(self):
        """An ``asyncio.Task`` that runs the transformation and returns its value; needs a running event loop."""
        import asyncio
        return asyncio.get_running_loop().create_task(self._await())

    def __await__(self):
        return self._await().__await__()

    def construct(self) -> _t.Optional[Checksum]:
        """Run the dependencies, and return the transformation checksum; None if a dependency failed."""
        if not self._constructed:
            for dependency in self._dependencies.values():
                dependency.start()
            for name, dependency in self._dependencies.items():
                dependency._compute()
                if dependency._error is not None:
                    self._error = _dependency_error(name, dependency)
                    return None
            self._construct()
        return self.transformation_checksum

    def cancel(self, *, recursive: bool = False) -> bool:
        """Kill the computation; with ``recursive`` those of its dependencies too.  False if it had ended."""
        if recursive:
            for dependency in self._dependencies.values():
                dependency.cancel(recursive=True)
        with _lock:
            if self._ended:
                return False
            future, session = self._future, self._session
            self._error = JobCancelledError("transformation %s was cancelled" % self._name)
        if session is not None and self._submitted:
            session.cancel(self._recipe.checksum)
        if future is not None:
            self._end(error=self._error)
        return True

    def clear_exception(self) -> None:
        """Forget a failure, so that the transformation can be run again."""
        with _lock:
            if self._error is not None and not isinstance(self._error, JobCancelledError):
                self._error = self._outcome = self._future = None
                self._submitted = False

    def why(self):
        """Whether this has a result, and if not, what differs from the nearest earlier run of the function: a ``Why``,
        whose text says it.  Runs nothing; of dependencies without a result the first are explained.
        """
        from .why import Step, explain_last     # only who asks pays for it
        if self._constructed and self._choose_session().stores.results.irreproducible(self._recipe.checksum):
            self._session.doubt(self._recipe.checksum)      # another program has found out
        return explain_last([Step(node, node._choose_session(), node._filled, node._buffers, node._keep, node._outcome, node._name)
                             for node in self._walk(lambda node: True)])

    def verify(self):
        """Compute the result again, and compare it with the one that is recorded: a ``Verdict``, true if they are equal,
        whose text says what differs.  Dependencies are found or computed; nothing that is stored is replaced.
        Raises ``CacheMissError`` if there is no result yet, and what ``run`` raises.
        """
        from .verify import verify
        if self.construct() is None:
            raise self._error
        return verify(self._choose_session(), self._recipe, self._meta, self._buffers)

    # --- what it is and how far it is -----------------------------------------------------------------

    @property
    def transformation_checksum(self) -> _t.Optional[Checksum]:
        """The identity; None while a dependency has no result."""
        return self._recipe.checksum if self._constructed else None

    @property
    def result_checksum(self) -> _t.Optional[Checksum]:
        """The checksum of the result; None while there is none."""
        return self._outcome.result if self._outcome is not None else None

    @property
    def celltype(self) -> str:
        """The celltype of the result."""
        return self._recipe.output[1]

    @property
    def buffer(self) -> Buffer:
        """The bytes of the result.  Raises what ``run`` raises."""
        return self._read(lambda: Buffer(self._session.get_buffer(self._outcome.result)
                                         if self._outcome.buffer is None else self._outcome.buffer))

    @property
    def value(self):
        """The value of the result.  Raises what ``run`` raises."""
        return self._read(lambda: self._session.value(self._outcome, self.celltype))

    @property
    def status(self) -> str:
        """``Status: `` and one of ready, pending, OK, exception, canceled."""
        if isinstance(self._error, JobCancelledError):
            return "Status: canceled"
        if self._error is not None:
            return "Status: exception"
        if self._outcome is not None:
            return "Status: OK"
        return "Status: pending" if self._future is not None else "Status: ready"

    @property
    def exception(self) -> _t.Optional[BaseException]:
        """Why there is no result; its text has the user's traceback.  None if nothing failed (yet)."""
        return self._error

    @property
    def logs(self) -> str:
        """The end of what the job printed; "" if it was answered from the cache or ran in this process."""
        if self._outcome is not None:
            return self._outcome.logs
        return getattr(self._error, "logs", "")

    @property
    def meta(self) -> Meta:
        """What does not change the identity."""
        return self._meta

    @property
    def scratch(self) -> bool:
        """True if the bytes of the result are not kept in the store."""
        return self._meta.scratch

    def __repr__(self):
        return "<Transformation %s, %s>" % (self._name, self.status)

    # --- the parts ------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        label = self._meta.label
        return ("%s %s" % (label, self._recipe.checksum[:10]) if label else self._recipe.checksum) \
            if self._constructed else label or "(waiting for dependencies)"

    @property
    def _ended(self) -> bool:
        return self._outcome is not None or self._error is not None

    def _choose_session(self):
        if self._session is None:
            self._session = config.session()
        return self._session

    def _compute(self, keep: bool = False) -> None:
        if keep:
            self._make_kept()
        if self._ended:
            return
        if self._future is None and self._constructed and not self._dependencies:   # the calling thread does it
            self._choose_session()
            self._submitted = True                          # so that another thread can cancel it
            try:
                self._set(self._session.run(self._recipe, self._meta, self._buffers, value=self._keep))
            except SeamlessError as exc:
                self._set(None, exc)
            return
        self.start()
        self._wait()

    def _read(self, read):
        """Compute, then ``read``; once more if a cached result turns out to be damaged or gone."""
        for last in (False, True):
            self._compute(keep=True)
            if self._error is not None:
                raise self._error
            try:
                return read()
            except CacheMissError:
                if last or not self._outcome.cached:
                    raise
                with _lock:
                    self._session.doubt(self._recipe.checksum, self._outcome.result)
                    self._outcome = self._future = None
                    self._submitted = False

    def _wait(self) -> None:
        from concurrent.futures import wait
        pause_s = 0.05
        while not self._future.done():
            self._lend()
            wait([self._future], pause_s)                   # then look again: others may have been submitted meanwhile
            pause_s = min(2 * pause_s, 2.0)

    def _lend(self) -> None:
        """Let the calling thread, which is going to wait for this, do what it can for it."""
        for transformation in self._unended():
            if transformation._submitted and not transformation._ended:
                transformation._session.help(transformation._recipe.checksum)

    async def _await(self):
        import asyncio
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.start)        # it may read files and ask the store
        if config.in_worker():                              # a waiting job must give its slot back, in a thread
            await loop.run_in_executor(None, self._wait)
        elif not self._ended:
            try:
                await asyncio.wait([asyncio.wrap_future(self._future)])
            except asyncio.CancelledError:
                await loop.run_in_executor(None, self.cancel)
                raise
        if self._error is not None:
            raise self._error
        return await loop.run_in_executor(None, lambda: self.value)

    def _walk(self, wanted) -> _t.List["Transformation"]:
        """This one and what it depends on, dependencies first, as far as ``wanted`` says yes."""
        order, seen, stack = [], set(), [(self, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                order.append(node)
            elif id(node) not in seen and wanted(node):
                seen.add(id(node))
                stack.append((node, True))
                stack.extend((dependency, False) for dependency in node._dependencies.values())
        return order

    def _unstarted(self):
        return self._walk(lambda node: node._future is None and not node._ended)

    def _unended(self):
        return self._walk(lambda node: not node._ended)

    def _prepare(self) -> None:
        from concurrent.futures import Future
        with _lock:
            if self._future is not None:
                self._unfinished += 1
                return
            self._choose_session()
            self._future = Future()
            waiting = [] if self._constructed else [d for d in self._dependencies.values() if d._future is not None]
            self._unfinished = 1 + len(waiting)
        for dependency in waiting:
            dependency._future.add_done_callback(lambda _: self._one_less())

    def _one_less(self) -> None:
        with _lock:
            self._unfinished -= 1
            if self._unfinished or self._submitted or self._ended:
                return
            self._submitted = True
        if not _ready.held and self._session.store.remote:
            _later.put(self)
            return
        with _ready.hold():
            _ready.put(self)

    def _completed(self) -> bool:
        """Fill in the results of the dependencies; False if one failed, or must be made again first."""
        failed = next((name for name, d in self._dependencies.items() if d._error is not None), None)
        if failed is not None:
            self._end(error=_dependency_error(failed, self._dependencies[failed]))
            return False
        try:
            self._construct()
            for name, d in self._dependencies.items():
                if self._recipe.pins[name][2] != d.result_checksum:
                    raise SeamlessError("transformation %s is irreproducible: it made %s, and %s when it ran again for %s" % (
                        d._recipe.checksum, self._recipe.pins[name][2], d.result_checksum, self._name))
            forgotten = any(not d._keep and d._outcome.buffer is None for d in self._dependencies.values())
            return not (forgotten and self._session.lookup(self._recipe, self._keep) is None and self._revive())
        except SeamlessError as exc:
            self._end(error=exc)
            return False

    def _land(self, done) -> None:
        """The future ``done`` of the outcome has ended."""
        self._end(done.result() if done.exception() is None else None, done.exception())

    def _make_kept(self) -> bool:
        """If this is a scratch result of which only the checksum is known, forget that it has ended; False if not."""
        with _lock:
            kept, self._keep = self._keep, True
            if kept or self._outcome is None or self._outcome.buffer is not None \
                    or self._session.store.has([self._outcome.result])[0]:
                return False
            self._outcome = self._future = None
            self._submitted = False
            return True

    def _revive(self) -> bool:
        """Make scratch results again that this needs and nobody kept; this is submitted when they are there."""
        gone = [d for d in self._dependencies.values() if d._make_kept()]
        if not gone:
            return False
        with _lock:
            self._submitted = False
            self._unfinished = len(gone)
        for dependency in gone:
            dependency.start()
            dependency._future.add_done_callback(lambda _: self._one_less())
        return True

    def _filled(self, results: _t.Mapping["Transformation", Checksum]) -> _t.Optional[Recipe]:
        """The recipe with these results of the dependencies; None if one is missing."""
        if self._constructed:
            return self._recipe
        if not all(dependency in results for dependency in self._dependencies.values()):
            return None
        filled = {name: self._recipe.pins[name][:2] + (results[d],) for name, d in self._dependencies.items()}
        return self._recipe._replace(pins={**self._recipe.pins, **filled})

    def _construct(self) -> None:
        with _lock:
            if not self._constructed:
                self._recipe = self._filled({d: d.result_checksum for d in self._dependencies.values()})
                self._constructed = True

    def _set(self, outcome: _t.Optional[Outcome], error: _t.Optional[BaseException] = None) -> None:
        if error is None and outcome is not None:
            error = outcome.exception()
        with _lock:
            if self._ended:
                return
            if error is not None:
                self._error = error
            else:
                self._outcome = outcome

    def _end(self, outcome: _t.Optional[Outcome] = None, error: _t.Optional[BaseException] = None) -> None:
        self._set(outcome, error)
        with _lock:
            future = self._future
            if future is None or future.done():
                return
        future.set_result(None)


def _dependency_error(name: str, dependency: Transformation) -> SeamlessError:
    error = dependency._error
    if isinstance(error, JobCancelledError):
        return JobCancelledError("argument '%s' has no value, because %s" % (name, error))
    return JobError("argument '%s' has no value, because %s failed: %s" % (name, dependency._name, error))
