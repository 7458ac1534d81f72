"""What no store has is made again: the result table says which transformation made it, and that runs once more.

    a job lacks an input -> mend -> make, of all that is missing -> transformations that yielded it
        -> make, of what these lack, and so on -> run, all of one level together -> the same checksum, or it is an error

A buffer that was made again stays in the memory of this process, from where it travels to jobs (see ``Supply.push``),
until those that needed it have ended.  Making records nothing: only if something else comes out, and it is sure that it
ran as the first time, the transformation is recorded as irreproducible.
"""
import threading
import time
import typing as _t

from .checksum import Checksum
from .errors import CacheMissError, JobCancelledError, SeamlessError
from .references import index_leaves, is_deep_pin, makers, recipe_of
from .supply import Need
from .transformation import Meta, Outcome, Recipe, Request

#: A chain of transformations that is longer is not followed.
MOST_LEVELS = 100
#: So long jobs that lack inputs are collected.
COLLECT_S = 0.05
_CIRCLE = "it is needed to make itself"
_DOUBT = "the variables (--metavar) and the conda environment of its first run are not known"


def mend(session, maker: "Maker", needs: _t.Sequence[Need]) -> _t.Dict[Checksum, _t.Optional[SeamlessError]]:
    """Store what these jobs came with, and make again what they lack else; for each why that was not possible, or None.

    It is there as long as ``maker`` is open.
    """
    session.supply.push_buffers({name: data for _, buffers, _ in needs for name, data in buffers.items()},
                                {name: path for _, _, files in needs for name, path in files.items()})
    lacks = {recipe.checksum: maker.missing(recipe, maker.claims) for recipe, _, _ in needs}
    try:
        why = maker.make({name for missing in lacks.values() for name in missing})
    except JobCancelledError as exc:
        return dict.fromkeys(lacks, exc)
    errors: _t.Dict[Checksum, _t.Optional[SeamlessError]] = {}
    for job, missing in lacks.items():
        bad = [(pin, name) for name, pin in missing.items() if name in why]
        errors[job] = CacheMissError("the input '%s' of transformation %s is gone: %s" % (
            bad[0][0], job, why[bad[0][1]])) if bad else None
        if not maker.works_for(job):
            errors[job] = cancelled()
    return errors


def make(session, checksum: Checksum) -> None:
    """Make the buffer with this checksum again; of a file of a result, that result.  Raises ``CacheMissError`` that says why it cannot be."""
    session.supply.claim((checksum,))       # for good: who calls this is going to read it
    results = session.stores.results
    wholes = [] if results.reverse(checksum) else results.get_many(makers(checksum, session.store, results)).values()
    why: _t.Dict[Checksum, str] = {}
    with Maker(session) as maker:
        for name in dict.fromkeys(wholes or [checksum]):
            why = maker.make({name})
            if not why:
                return
    raise CacheMissError(next(iter(why.values())))


class Maker:
    """Makes buffers again for some jobs; they are held until the ``with`` block ends."""

    def __init__(self, session):
        self._session = session
        self._why: _t.Dict[Checksum, str] = {}
        self.claims: _t.List[Checksum] = []
        self._jobs: _t.Set[Checksum] = set()        # for which it works: those that were not cancelled
        self._is_cancelled = False
        self._running: _t.List[Checksum] = []
        self._lock = threading.Lock()

    def __enter__(self):
        self._session.begin_making(self)
        return self

    def __exit__(self, *_):
        self._session.end_making(self)
        self._session.supply.release(self.claims)

    def add(self, job: Checksum) -> None:
        """Work for this job, until it is cancelled."""
        with self._lock:
            self._jobs.add(job)

    def works_for(self, job: Checksum) -> bool:
        """False if it was cancelled."""
        return job in self._jobs

    def cancel(self, job: Checksum) -> None:
        """This job is not wanted any more; nor, if it is the last one, what runs for it."""
        with self._lock:
            if job not in self._jobs:
                return
            self._jobs.remove(job)
            if self._jobs:
                return
            self._is_cancelled = True
            running, self._running = self._running, []
        for checksum in running:
            self._session.cancel(checksum)

    def _begin(self, requests: _t.Sequence[Request]) -> _t.List[_t.Any]:
        """Submit these, unless this was cancelled."""
        if self._is_cancelled:
            raise cancelled()
        futures = self._session.submit_many(requests)
        names = [request.recipe.checksum for request in requests]
        with self._lock:
            late, self._running = self._is_cancelled, names
        for name in names if late else ():
            self._session.cancel(name)
        return futures

    def make(self, wanted: _t.Iterable[Checksum], above: _t.FrozenSet[Checksum] = frozenset(), level: int = 0) -> _t.Dict[Checksum, str]:
        """Make these; for those that cannot be made, why.  ``above``: what they are needed for."""
        why = {name: self._why[name] for name in wanted if name in self._why}
        waiting = {name: self._makers(name) for name in wanted if name not in why}
        while waiting:                      # one round for the first that made it, one for the second ...
            chosen = {}
            for name, recipes in waiting.items():
                if recipes:
                    chosen[name] = recipes.pop(0)
                else:
                    why.setdefault(name, "buffer %s is in none of the stores, and no transformation that makes it is known; "
                                         "upload it, or run again what made it" % name)
            failed = self._run(chosen, above | set(waiting), level) if chosen else {}
            for name in failed if len(failed) < len(chosen) else ():
                if failed[name].endswith(_CIRCLE):      # of one that was made meanwhile, perhaps
                    waiting[name].insert(0, chosen[name])
            waiting = {name: waiting[name] for name in failed}
            why.update(failed)
            for name in chosen:
                if name not in failed:
                    why.pop(name, None)
        if not above:                       # what failed below may have done so only because of what was above
            self._why.update(why)
        return why

    def _makers(self, name: Checksum) -> _t.List[Recipe]:
        """The transformations that have this result and can be read."""
        session = self._session
        found = [session.store.get(Checksum(maker)) for maker in session.stores.results.reverse(name)]
        return [recipe for recipe in (recipe_of(data) for data in found if data is not None) if recipe is not None]

    def _run(self, chosen: _t.Mapping[Checksum, Recipe], above: _t.FrozenSet[Checksum], level: int) -> _t.Dict[Checksum, str]:
        """Run these transformations; for each wanted result that did not come, why."""
        claims: _t.List[Checksum] = []
        try:
            return self._run_all(chosen, above, level, claims)
        finally:
            self._session.supply.release(claims)

    def _run_all(self, chosen: _t.Mapping[Checksum, Recipe], above: _t.FrozenSet[Checksum], level: int,
                 claims: _t.List[Checksum]) -> _t.Dict[Checksum, str]:
        lacks = {name: self.missing(recipe, claims) for name, recipe in chosen.items()}
        needed = {name for missing in lacks.values() for name in missing}
        bad = {name: _CIRCLE for name in needed & above}
        if level >= MOST_LEVELS:
            bad = {name: "more than %d transformations would have to run one after the other" % MOST_LEVELS for name in needed}
        needed -= set(bad)
        if needed:
            bad.update(self.make(needed, above, level + 1))
        why = {}
        for name, recipe in chosen.items():
            gone = next((other for other in lacks[name] if other in bad), None)
            if gone is not None:
                why[name] = "transformation %s, which made %s, lacks an input: %s" % (recipe.checksum, name, bad[gone])
        ran_with = {name: self._session.ran_with(recipe.checksum) for name, recipe in chosen.items()}
        requests = {name: Request(recipe, (ran_with[name] or Meta())._replace(
            scratch=True, fresh=True, again=False, strict=False, job_folder="")) for name, recipe in chosen.items() if name not in why}
        futures = self._begin(list(requests.values()))
        for (name, (recipe, _, _, _)), future in zip(requests.items(), futures):
            doubt = "" if ran_with[name] is not None or recipe.language != "bash" else _DOUBT
            try:
                outcome = self._session.wait(recipe.checksum, future)
            except BaseException:           # Ctrl-C
                for request in requests.values():
                    self._session.cancel(request.recipe.checksum)
                raise
            error = outcome.exception()
            if isinstance(error, JobCancelledError):
                raise error
            if error is not None:
                why[name] = "transformation %s, which made %s, failed when it ran again: %s%s" % (
                    recipe.checksum, name, error.args[0], doubt and "; perhaps because " + doubt)
            elif outcome.result != name:
                why[name] = "transformation %s made %s, but when it ran again it made %s: %s" % (
                    recipe.checksum, name, outcome.result, doubt + ", so that nothing is recorded" if doubt
                    else "it is irreproducible, and recorded as such")
                if not doubt and self._session.stores.results.get(recipe.checksum) == name:
                    self._session.stores.results.put_many([(recipe.checksum, result, None) for result in (name, outcome.result)], again=True)
                    self._session.doubt(recipe.checksum)
        return why

    def missing(self, recipe: Recipe, claims: _t.List[Checksum]) -> _t.Dict[Checksum, str]:
        """The inputs that are neither in memory nor in a store -> pin.  For leaves that are gone: the index, if it can be made.

        What the store lacks is claimed, and added to ``claims``: if it is in memory, it stays there, and the next push takes it.
        What the store of another stage has is brought.
        """
        session, pins = self._session, {}
        for name, (_, _, checksum) in recipe.pins.items():
            if checksum is not None:
                pins.setdefault(Checksum(checksum), name)
        found = {name: pins[name] for name in self._lacking(list(pins), claims)}
        for pin, (_, _, checksum) in recipe.pins.items():
            if checksum is None or checksum in found or not is_deep_pin(recipe, pin):
                continue
            leaves = index_leaves(session.supply.held(checksum) or session.store.get(checksum) or b"")
            gone = self._lacking(leaves, claims)
            session.supply.note_gone([checksum])
            if gone:
                self._claim([checksum], claims)
                found.update({checksum: pin} if session.stores.results.reverse(checksum) else dict.fromkeys(gone, pin))
        return found

    def _lacking(self, names: _t.List[Checksum], claims: _t.List[Checksum]) -> _t.List[Checksum]:
        supply = self._session.supply
        gone = [name for name, there in zip(names, self._session.store.has(names)) if not there]
        self._claim(gone, claims)
        gone = [name for name in gone if supply.held(name) is None]
        brought = supply.bring(gone)
        return [name for name in gone if name not in brought]

    def _claim(self, names: _t.List[Checksum], claims: _t.List[Checksum]) -> None:
        self._session.supply.claim(names)
        self._session.supply.note_gone(names)
        claims += names


def cancelled() -> JobCancelledError:
    """What the outcome is of a job that was cancelled while its inputs were made again."""
    return JobCancelledError("the job was cancelled while its inputs were being made again")


class Mender:
    """Threads, while there is something to do, that make missing inputs again and then have the jobs run once more.

    Each takes what has come in a moment, and there may be several, since one may wait for what another one mends.
    """

    def __init__(self, session):
        self._session = session
        self._jobs: _t.List[_Job] = []
        self._maker: _t.Optional[Maker] = None      # of those that are being collected
        self._lock = threading.Lock()

    def put(self, request: Request, land: _t.Callable) -> None:
        """This job lacked an input; ``land`` is called with the future of its outcome, when that has ended."""
        with self._lock:
            is_first = self._maker is None
            if self._maker is None:
                self._maker = Maker(self._session).__enter__()
            self._maker.add(request.recipe.checksum)
            self._jobs.append((request, land))
        if is_first:
            try:
                threading.Thread(target=self._mend, name="seamless-fingertip", daemon=True).start()
            except RuntimeError as exc:     # there are too many threads
                maker, jobs = self._take()
                maker.__exit__()
                _land(jobs, SeamlessError("an input is gone, and cannot be made again: %s" % exc))

    def _take(self) -> _t.Tuple[Maker, "_t.List[_Job]"]:
        with self._lock:
            maker, jobs, self._maker, self._jobs = self._maker, self._jobs, None, []
        assert maker is not None
        return maker, jobs

    def _mend(self) -> None:
        time.sleep(COLLECT_S)
        maker, jobs = self._take()
        try:
            errors = mend(self._session, maker, [(request.recipe, request.buffers, {}) for request, _ in jobs])
            wanted = []
            for job in jobs:
                error = errors[job[0].recipe.checksum]
                if error is None:
                    wanted.append(job)
                else:
                    _land([job], error)
            jobs = wanted
            started = self._session.resubmit([request for request, _ in jobs])
        except BaseException as exc:        # it belongs to those who wait for the jobs
            maker.__exit__()
            _land(jobs, exc)
            return
        left = _Countdown(len(jobs), maker.__exit__)        # they need what was made until they end
        for (request, land), future in zip(jobs, started):
            if not maker.works_for(request.recipe.checksum):
                self._session.kill(request.recipe.checksum)
            future.add_done_callback(land)
            future.add_done_callback(left.one_less)


_Job = _t.Tuple[Request, _t.Callable]


class _Countdown:
    """Calls ``end`` when ``one_less`` was called ``count`` times."""

    def __init__(self, count: int, end: _t.Callable[[], None]):
        self._count, self._end, self._lock = count, end, threading.Lock()
        if not count:
            end()

    def one_less(self, _) -> None:
        with self._lock:
            self._count -= 1
            ended = self._count == 0
        if ended:
            self._end()


def _land(jobs: _t.Iterable[_Job], error: BaseException) -> None:
    """These jobs have ended with this error."""
    from .executors import Future, done     # a hit does without
    for _, land in jobs:
        if isinstance(error, (CacheMissError, JobCancelledError)):
            land(done(Outcome.failure(error)))
        else:
            future: Future = Future()
            future.set_exception(error)
            land(future)
