"""``Jobs``: the jobs of a jobserver, from being asked for until they are forgotten.

    ask -> result table (known?) -> pool -> worker -> recorder (one commit for many) -> outcome told

A job's id is its checksum; the same job in flight is one job, whoever asks.  Whoever wants something else of it than
what runs now (a result that is recorded, the job written to a folder) gets a run of its own after that.  An outcome is told only after
its row is committed.  What ended is remembered for ten minutes at least, as long as memory allows; later,
results are found in the table.  A job that failed runs again when it is asked for again; whoever merely
repeats a request (the same ``token``) gets what the first one got.
"""
import collections
import json
import logging
import threading
import time
import typing as _t

from .checksum import Checksum
from .errors import JobCancelledError, SeamlessError, ServiceError, error_to_dict
from .leases import Lease
from .record import cached_outcome
from .recorder import Ended, Recorder
from .stores import Stores
from .transformation import Job, Meta

REMEMBER_S = 600.0          # what ended, and clients that do not call, are remembered so long ...
REMEMBER_BYTES = 64 << 20   # ... or until all that is remembered is bigger than this
LOOK_S = 0.5                # how often a request that waits looks whether the server is stopping
_KILL_S = 10.0
_FIRST = 16
_REPEATS = 16               # so many earlier runs of a job are known to those who repeat a request
_MALFORMED = (SeamlessError, LookupError, TypeError, ValueError, AttributeError)
log = logging.getLogger(__name__)


class Asker(_t.NamedTuple):
    """Who asked for a job: one POST /jobs, and its repetitions.  ``told``: by /wait."""
    client: str
    token: str
    parent: _t.Optional[str]
    told: bool


class Entry:
    """What is known of a job.  ``outcome`` is None until it has ended and is recorded."""
    __slots__ = ("id", "outcome", "askers", "waiters", "log", "ended_s", "size", "scratch", "keep", "fresh", "again", "meta", "doomed",
                 "recording", "data", "earlier")

    def __init__(self, id: str, asker: Asker, meta: Meta):
        self.id, self.askers = id, (asker,)
        self.scratch, self.keep = meta.scratch, not meta.scratch        # somebody wants the result to be kept
        self.fresh = meta.fresh                 # it is not to be recorded
        self.recording = False                  # it is too late to have it kept
        self.again = meta.again
        self.meta = meta
        self.outcome: _t.Optional[dict] = None
        self.waiters: _t.Tuple["_Waiter", ...] = ()
        self.log: _t.Any = None                 # what the pool calls its output, if there is any
        self.ended_s = 0.0
        self.size = 0
        self.doomed = False                     # it is being killed
        self.data: dict = {}                    # the job, while it waits for the end of another run
        self.earlier: _t.Tuple["Entry", ...] = ()       # runs of the same job that have ended

    def was_asked_by(self, token: _t.Optional[str]) -> bool:
        """Whether this is what the request with ``token`` asked for."""
        return any(asker.token == token for asker in self.askers)


class _Prepared(_t.NamedTuple):
    """A job that is new: what it was found to be already, or what the worker gets."""
    id: str
    meta: Meta
    known: _t.Optional[dict]
    payload: bytes


class _Waiter:
    """A request that waits until all of some jobs have ended."""

    def __init__(self, entries: _t.Iterable[Entry]):
        self.missing = set(entries)
        self.ready = threading.Event()


class _Client:
    """Outcomes that a client has not said to have."""

    def __init__(self, lock: threading.Lock):
        self.last = time.time_ns() // 1000      # also after we forgot a client, numbers only grow
        self.outcomes: "collections.deque[_t.Tuple[int, str, dict]]" = collections.deque()
        self.size = 0
        self.arrived = threading.Condition(lock)
        self.seen_s = time.monotonic()

    def tell(self, id: str, outcome: dict, can_be_read: bool) -> None:
        """Add an outcome.  If there are very many, bytes that the client can read elsewhere are left out."""
        if can_be_read and self.size > REMEMBER_BYTES and "buffer" in outcome:
            outcome = {key: value for key, value in outcome.items() if key != "buffer"}
        self.last += 1
        self.outcomes.append((self.last, id, outcome))
        self.size += _size(outcome)
        self.arrived.notify_all()

    def acknowledge(self, number: int) -> None:
        """The client has everything up to ``number``."""
        while self.outcomes and self.outcomes[0][0] <= number:
            self.size -= _size(self.outcomes.popleft()[2])


class Jobs:
    """``pool`` runs them: a ``WorkerPool``, or something with the same methods.  ``stores``: where buffers and results
    are; ``stopping``: set when nobody shall wait any more.

    ``mode`` and ``target`` are what execution records say about where a job ran (``mode`` None: the pool
    records).  Safe from several threads.
    """

    def __init__(self, pool, stores: Stores, stopping: threading.Event, mode: _t.Optional[str], target: _t.Optional[str]):
        self.pool, self.stores, self.stopping = pool, stores, stopping
        self._lock = threading.Lock()
        self._entries: _t.Dict[str, Entry] = {}
        self._later: _t.Dict[str, _t.List[Entry]] = {}      # these run one after the other, when that has ended
        self._due: "collections.deque[str]" = collections.deque()   # ids: the next of these can begin
        self._ended: "collections.deque[Entry]" = collections.deque()       # oldest first
        self._remembered = 0                    # bytes
        self._children: _t.Dict[str, _t.Set[str]] = {}      # the jobs that a job which runs asked for
        self._orphans: _t.List[str] = []
        self._clients: _t.Dict[str, _Client] = {}
        self.in_flight = 0
        self._recorder = Recorder(stores, mode, target, self._tell, lambda: self.in_flight > self.pool.workers + 1)

        self._lease = Lease(self._renew)
        self._lease.begin()

    def close(self) -> None:
        """Record what has ended; the pool must be closed."""
        self._lease.end()
        self._recorder.close()

    def _renew(self) -> None:
        """Jobs may be queued for days: nobody shall delete what they need."""
        with self._lock:
            ids = [*self._later, *(id for id, entry in self._entries.items() if entry.outcome is None)]
        self.stores.buffers.has(ids)

    # --- asking for jobs ------------------------------------------------------------------------------

    def ask(self, asker: Asker, jobs: _t.List[dict]) -> _t.Tuple[_t.List[Entry], _t.Dict[str, dict]]:
        """See to it that ``jobs`` run or have run.  Returns their entries, and the outcomes of malformed ones."""
        wanted, broken = {}, {}
        for data in jobs:
            try:
                wanted[str(Checksum(data["checksum"]))] = data
            except (SeamlessError, LookupError, TypeError):
                raise SeamlessError("one of the jobs has no checksum") from None
        for id, data in list(wanted.items()):
            try:
                if not _is_other(self._entries.get(id), data):
                    continue
                error = SeamlessError("job %s is running with other variables or another environment, and "
                                      "it was asked not to wait for that (--strict)" % id)
            except _MALFORMED as exc:
                error = _malformed(id, exc)
            broken[id] = {"error": error_to_dict(error)}
            del wanted[id]
        with self._lock:
            entries = [entry for entry in (self._join(id, asker, data) for id, data in wanted.items()) if entry is not None]
        for entry in entries:
            del wanted[entry.id]
        with self._lock:
            self._client(asker.client)
        for piece in _pieces(wanted):
            prepared = self._prepare(piece, broken)
            with self._lock:
                entries += [self._join(new.id, asker, piece[new.id]) or self._enter(new, asker, piece[new.id]) for new in prepared]
        with self._lock:
            if asker.parent is not None and self._lives(asker.parent):
                self._children.setdefault(asker.parent, set()).update(entry.id for entry in entries)
            self._forget()
        self._begin_due()                   # known results, which ended at once
        for entry in list(entries) if asker.parent is not None else ():
            try:
                self.pool.wait_for(entry.id, asker.parent)
            except SeamlessError as exc:    # they would wait for each other; whoever else waits is not concerned
                broken[entry.id] = {"error": error_to_dict(exc)}
                entries.remove(entry)
        return entries, broken

    def _prepare(self, wanted: _t.Mapping[str, dict], broken: _t.Dict[str, dict]) -> "_t.List[_Prepared]":
        """Check jobs, look them up, and store what came with those that must run: all at once, since syncing
        many files together is much cheaper than each for itself."""
        jobs: _t.Dict[str, Job] = {}
        for id, data in wanted.items():
            try:
                jobs[id] = Job.from_dict(data)
            except _MALFORMED as exc:
                broken[id] = {"error": error_to_dict(_malformed(id, exc))}
        recorded, known = self._look_up({id: job.recipe.output[1] for id, job in jobs.items() if not job.meta.fresh})
        jobs = {id: job._replace(meta=job.meta._replace(again=id in recorded)) for id, job in jobs.items()}
        self.stores.buffers.put_many(data for id, job in jobs.items() if id not in known
                                     for data in (*job.buffers.values(), job.recipe.buffer))
        return [_Prepared(id, job.meta, known.get(id), json.dumps({**wanted[id], "meta": job.meta.to_dict(), "buffers": {}},
                                                                          separators=(",", ":")).encode())
                for id, job in jobs.items()]

    def _join(self, id: str, asker: Asker, data: dict) -> _t.Optional[Entry]:
        """The entry that asking for this job now means, if there is one.  The lock is held."""
        entry = self._asked(id, asker.token)
        if entry is None:
            meta = data["meta"] if isinstance(data.get("meta"), dict) else {}
            current, later = self._entries.get(id), self._later.get(id, [])
            entry = next((entry for entry in (*([current] if current is not None else []), *later) if _suits(entry, meta)), None)
        if entry is not None and asker not in entry.askers:
            entry.askers += (asker,)
        return entry

    def _asked(self, id: str, token: _t.Optional[str]) -> _t.Optional[Entry]:
        """What the request with this token asked for, if that is known."""
        current = self._entries.get(id)
        runs = [] if current is None else [current, *current.earlier]
        return next((entry for entry in (*runs, *self._later.get(id, ())) if entry.was_asked_by(token)), None)

    def _look_up(self, celltypes: _t.Mapping[str, _t.Optional[str]]) -> _t.Tuple[_t.Dict[str, Checksum], _t.Dict[str, dict]]:
        """Results of jobs (id -> celltype of the result) that were done before; and the outcomes of those that can still be read."""
        rows = self.stores.results.get_many(list(celltypes))
        outcomes = {id: cached_outcome(result, celltypes[id], self.stores.buffers) for id, result in rows.items()}
        return rows, {id: outcome.to_dict() for id, outcome in outcomes.items() if outcome is not None}

    def _enter(self, new: "_Prepared", asker: Asker, data: dict) -> Entry:
        """A new entry; its job is queued if it is not known already.  The lock is held."""
        entry, current = Entry(new.id, asker, new.meta), self._entries.get(new.id)
        if new.id not in self._later and (current is None or current.outcome is not None):
            self._begin(entry, new)
        elif new.known is not None:
            self._end(entry, new.known, None)
        else:
            entry.data = {**data, "buffers": {}}
            self._later.setdefault(new.id, []).append(entry)
            self.in_flight += 1
        return entry

    def _begin(self, entry: Entry, new: "_Prepared") -> None:
        """Queue the job of an entry, unless it is known.  The lock is held."""
        old = self._entries.get(new.id)
        if old is not None and old.outcome is not None:
            runs = old.earlier if old.outcome.get("cached") else (*old.earlier, old)
            entry.earlier = runs[-_REPEATS:]
        self._entries[new.id] = entry
        entry.again, entry.data = new.meta.again, {}
        if new.known is not None:
            self._end(entry, new.known, None)
            return
        self.in_flight += 1
        try:
            self.pool.submit(new.id, new.payload, lambda outcome, log: self._recorder.put(entry, outcome, log),
                             timeout_s=new.meta.timeout_s, parent=entry.askers[0].parent)
        except ServiceError as exc:
            self._recorder.put(entry, {"error": error_to_dict(exc)}, None)

    def _begin_due(self) -> None:
        """Begin what waited for a run that has ended; it may be known now."""
        while self._due:
            with self._lock:
                id = self._due.popleft() if self._due else ""
                current, entry = self._entries.get(id), next(iter(self._later.get(id, ())), None)
            if entry is None or current is not None and current.outcome is None:
                continue                    # all were cancelled, and then it was asked for again
            broken: _t.Dict[str, dict] = {}
            try:
                prepared = self._prepare({id: entry.data}, broken)
            except Exception as exc:        # whatever it is: who waits for this job must hear of it
                log.exception("job %s could not be begun", id)
                prepared, broken = [], {id: {"error": error_to_dict(SeamlessError("job %s could not be begun: %s" % (id, exc)))}}
            with self._lock:
                if self._drop_later(entry):
                    self._begin(entry, prepared[0] if prepared else _Prepared(id, entry.meta, broken[id], b""))
                elif id in self._later:     # it was cancelled meanwhile
                    self._due.append(id)
                parents = {asker.parent for asker in entry.askers if asker.parent is not None} if entry.outcome is None else ()
            for parent in parents:
                try:
                    self.pool.wait_for(id, parent)
                except SeamlessError as exc:    # it is told when it asks the next time
                    log.info("%s", exc)

    def _drop_later(self, entry: Entry) -> bool:
        """The entry does not wait for its turn any more; False if it did not.  The lock is held."""
        waiting = self._later.get(entry.id, [])
        if entry not in waiting:
            return False
        waiting.remove(entry)
        self.in_flight -= 1
        if not waiting:
            del self._later[entry.id]
        return True

    def wait(self, entries: _t.List[Entry], timeout_s: float, parent: _t.Optional[str] = None) -> bool:
        """Wait until all have ended, and ``parent`` has its slot again; False if that did not happen in time."""
        end = time.monotonic() + timeout_s
        waiter = _Waiter(entry for entry in entries if entry.outcome is None)
        with self._lock:
            for entry in list(waiter.missing):
                if entry.outcome is None:
                    entry.waiters += (waiter,)
                else:
                    waiter.missing.discard(entry)
        while waiter.missing and not self.stopping.is_set() and time.monotonic() < end:
            waiter.ready.wait(min(LOOK_S, max(0.0, end - time.monotonic())))
        if waiter.missing:
            with self._lock:
                for entry in waiter.missing:
                    entry.waiters = tuple(other for other in entry.waiters if other is not waiter)
            return False
        return parent is None or self.pool.resumed(parent, max(0.0, end - time.monotonic()))

    # --- what has ended -------------------------------------------------------------------------------

    def _tell(self, ended: _t.List[Ended]) -> None:
        """What the recorder calls."""
        with self._lock:
            for entry, outcome, output in ended:
                self.in_flight -= 1
                self._end(entry, outcome, output)
            self._forget()
        self._cancel_orphans()
        self._begin_due()

    def parent_ended(self, id: str, failed: bool) -> None:
        """A job that asked for others has ended; if it failed, those that nobody else wants are cancelled."""
        with self._lock:
            self._leave(id, failed)
        self._cancel_orphans()

    def _lives(self, id: str) -> bool:
        """Whether this job, which asks for others, has not ended."""
        entry = self._entries.get(id)
        return entry is not None and entry.outcome is None or self.pool.state(id) is not None

    def _leave(self, id: str, failed: bool) -> None:
        """``parent_ended``.  The lock is held; orphans are only noted."""
        children = self._children.pop(id, ()) if self._children else ()
        if failed:
            self._orphans += [child for child in children if self._withdraw(child, lambda asker: asker.parent == id)]

    def _cancel_orphans(self) -> None:
        if self._orphans:
            with self._lock:
                orphans, self._orphans = self._orphans, []
            for id in orphans:
                self.pool.cancel(id)

    def _end(self, entry: Entry, outcome: dict, output) -> None:
        """Publish an outcome.  The lock is held."""
        entry.outcome, entry.log, entry.ended_s, entry.size = outcome, output, time.monotonic(), _size(outcome)
        entry.size += len(output) if isinstance(output, bytes) else 0
        self._remembered += entry.size
        self._ended.append(entry)
        for waiter in entry.waiters:
            waiter.missing.discard(entry)
            if not waiter.missing:
                waiter.ready.set()
        entry.waiters = ()
        if not outcome.get("cached"):       # else it is told by the answer to the request that asked
            for name in {asker.client for asker in entry.askers if asker.told}:
                self._client(name).tell(entry.id, outcome, can_be_read="result" in outcome and entry.keep)
        if self._entries.get(entry.id) is entry:        # else it never began
            self._leave(entry.id, "error" in outcome)
            if entry.id in self._later:
                self._due.append(entry.id)

    def _forget(self) -> None:
        """Drop what is old, and what is too much.  The lock is held."""
        old = time.monotonic() - REMEMBER_S
        while self._ended and (self._ended[0].ended_s < old or self._remembered > REMEMBER_BYTES):
            entry = self._ended.popleft()
            self._remembered -= entry.size
            current = self._entries.get(entry.id)
            if current is entry:
                del self._entries[entry.id]
            elif current is not None:
                current.earlier = tuple(other for other in current.earlier if other is not entry)
            if entry.log is not None:
                self.pool.remove_log(entry.log)
        while self._clients:
            name, client = next(iter(self._clients.items()))        # the one that has not called for longest
            if client.seen_s > old:
                break
            del self._clients[name]

    def _client(self, name: str) -> _Client:
        """The client, which called now or whose job ended.  The lock is held."""
        client = self._clients.pop(name, None) or _Client(self._lock)
        client.seen_s = time.monotonic()
        self._clients[name] = client        # to the end
        return client

    # --- questions ------------------------------------------------------------------------------------

    def ended_since(self, name: str, number: int, timeout_s: float) -> _t.Tuple[bool, int, _t.List[_t.Tuple[str, dict]]]:
        """(whether the client is known, number of the last, (id, outcome) of the jobs that ended after ``number``).

        Waits until there is one.  What came before ``number`` is forgotten.
        """
        end = time.monotonic() + timeout_s
        with self._lock:
            known = name in self._clients
            client = self._client(name)
            client.acknowledge(number)
            while known and not client.outcomes and not self.stopping.is_set() and time.monotonic() < end:
                client.arrived.wait(min(LOOK_S, max(0.0, end - time.monotonic())))
                known = name in self._clients
                client = self._client(name)
            return known, client.last, [(id, outcome) for _, id, outcome in client.outcomes]

    def states(self, ids: _t.List[str]) -> _t.Dict[str, dict]:
        """id -> {"state", "outcome" if it has ended}."""
        found, unknown = {}, []
        for id in ids:
            entry = self._entries.get(id)
            outcome = entry.outcome if entry is not None and id not in self._later else None
            if outcome is not None:
                found[id] = {"state": _state(outcome), "outcome": outcome}
            elif entry is not None:
                found[id] = {"state": self.pool.state(id) or "running"}     # None: it is being recorded
            else:
                unknown.append(id)
        known = self._look_up(dict.fromkeys(unknown))[1] if unknown else {}
        for id in unknown:      # the pool may know it if another job asked for it, on another host
            found[id] = ({"state": "done", "outcome": known[id]} if id in known
                         else {"state": self.pool.state(id) or "unknown"})
        return found

    def logs(self, id: str, offset: int, timeout_s: float, token: _t.Optional[str] = None) -> _t.Tuple[int, bytes, bool]:
        """(new offset, what the job printed after ``offset``, whether that is all); waits for something to come.

        ``token``: of the request that asked for the job, as there may be several runs of it.
        """
        end, pause = time.monotonic() + timeout_s, 0.01
        while True:
            with self._lock:
                entry = (self._asked(id, token) if token is not None else None) or self._entries.get(id)
                waits = entry in self._later.get(id, ())
            ended = entry.outcome is not None if entry is not None else self.pool.state(id) is None
            output = None if waits else entry.log if entry is not None and ended else self.pool.log_path(id)
            offset, data, size = self.pool.read_log(output, offset)
            done = ended and offset >= size
            if data or done or self.stopping.is_set() or time.monotonic() >= end:
                return offset, data, done
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(pause * 1.5, 0.2)

    def cancel(self, ids: _t.List[str], client: str, force: bool = False) -> _t.Dict[str, dict]:
        """Kill the jobs that only ``client`` waits for (``force``: all), and say what became of them."""
        with self._lock:
            killed = [id for id in ids if self._withdraw(id, lambda asker: force or asker.client == client)]
            entries = [self._entries[id] for id in killed]
        for id in killed:
            self.pool.cancel(id)
        self.wait(entries, _KILL_S)
        return self.states(ids)

    def _withdraw(self, id: str, leaves: _t.Callable[[Asker], bool]) -> bool:
        """Some askers of a job leave; True if nobody would be left: then it is to be killed.  The lock is held."""
        entry = self._entries.get(id)
        for other in list(self._later.get(id, ())):
            if self._withdraw_from(other, leaves):
                self._drop_later(other)
                self._end(other, {"error": error_to_dict(JobCancelledError("job %s was cancelled before it began" % id))}, None)
                if entry is not None:
                    entry.earlier = (*entry.earlier, other)[-_REPEATS:]
        return entry is not None and entry.outcome is None and self._withdraw_from(entry, leaves)

    def _withdraw_from(self, entry: Entry, leaves: _t.Callable[[Asker], bool]) -> bool:
        others = tuple(asker for asker in entry.askers if not leaves(asker))
        if not others:
            entry.doomed = True
            return True
        outcome = {"error": error_to_dict(JobCancelledError("job %s goes on: others wait for it" % entry.id))}
        for name in {asker.client for asker in entry.askers if asker.told and leaves(asker)}:
            self._client(name).tell(entry.id, outcome, False)
        entry.askers = others
        return False


def _suits(entry: Entry, meta: _t.Mapping) -> bool:
    """Whether what this run gives is what somebody wants who asks now, with ``meta``."""
    fresh, waits = bool(meta.get("fresh")), bool(entry.data)
    if (entry.outcome is not None or entry.doomed or (meta.get("job_folder") or "") != entry.meta.job_folder
            or entry.fresh and not fresh or fresh and not entry.fresh and waits):      # a result that is found is not fresh
        return False
    if not entry.keep and not meta.get("scratch"):
        entry.keep = True                   # first this: the recorder looks at it after it has said that it is recording
        if entry.recording:
            entry.keep = False
            return False
    return True


def _malformed(id: str, exc: Exception) -> SeamlessError:
    return SeamlessError("job %s is malformed: %s" % (id, exc))


def _is_other(entry: _t.Optional[Entry], data: dict) -> bool:
    """True if a job that is strict would join one that runs with another meta."""
    if entry is None or entry.outcome is not None or not isinstance(data.get("meta"), dict) or not data["meta"].get("strict"):
        return False
    meta = Meta.from_dict(data["meta"])
    return (dict(meta.metavars), dict(meta.environment)) != (dict(entry.meta.metavars), dict(entry.meta.environment))


def _pieces(jobs: _t.Mapping[str, dict]) -> _t.Iterator[_t.Dict[str, dict]]:
    """``jobs`` in pieces, each bigger than the one before: the first ones begin while the others are being stored."""
    items, begin, size = list(jobs.items()), 0, _FIRST
    while begin < len(items):
        yield dict(items[begin:begin + size])
        begin, size = begin + size, size * 4


def _state(outcome: dict) -> str:
    if "error" not in outcome:
        return "done"
    return "canceled" if outcome["error"].get("kind") == "JobCancelledError" else "failed"


def _size(outcome: dict) -> int:
    """About what an outcome costs in memory."""
    return 1000 + len(outcome.get("buffer") or "") + len(outcome.get("logs") or "")
