"""What no store has is made again: the result table says which transformation made it, and that runs once more.

    a job lacks an input -> mend -> make, of all that is missing -> transformations that yielded it
        -> make, of what these lack, and so on -> run, all of one level together -> the same checksum, or it is an error

A buffer that was made again stays in the memory of this process, from where it travels to jobs (see ``Supply.push``).
"""
import threading
import time
import typing as _t

from .checksum import Checksum
from .errors import CacheMissError, JobCancelledError, SeamlessError
from .references import index_leaves, is_deep_pin, recipe_of
from .transformation import Meta, Outcome, Recipe, Request

#: A chain of transformations that is longer is not followed.
MOST_LEVELS = 100
#: So long jobs that lack inputs are collected.
COLLECT_S = 0.05


def recompute(session, recipe: Recipe, meta: Meta = Meta(), log_fd: _t.Optional[int] = None) -> Outcome:
    """Run ``recipe`` without looking its result up and without recording it.

    The bytes of the result are in the outcome; of a deep one, they are in the store.  To record a result that
    differs, put it into the result table: that makes the transformation irreproducible.
    """
    return session.rerun(recipe, meta, log_fd)


def mend(session, recipes: _t.Sequence[Recipe]) -> _t.Dict[Checksum, _t.Optional[CacheMissError]]:
    """Make again what these jobs lack; for each why that was not possible, or None."""
    maker = _Maker(session)
    lacks = {recipe.checksum: maker.missing(recipe) for recipe in recipes}
    why = maker.make({name for missing in lacks.values() for name in missing})
    errors: _t.Dict[Checksum, _t.Optional[CacheMissError]] = {}
    for recipe in recipes:
        bad = [(pin, name) for name, pin in lacks[recipe.checksum].items() if name in why]
        errors[recipe.checksum] = CacheMissError("the input '%s' of transformation %s is gone: %s" % (
            bad[0][0], recipe.checksum, why[bad[0][1]])) if bad else None
    return errors


def make(session, checksum: Checksum) -> None:
    """Make the buffer with this checksum again.  Raises ``CacheMissError`` that says why it cannot be."""
    why = _Maker(session).make({checksum})
    if why:
        raise CacheMissError(why[checksum])


class _Maker:
    """Each transformation runs once at most, and each buffer is made once."""

    def __init__(self, session):
        self._session = session
        self._why: _t.Dict[Checksum, str] = {}

    def make(self, wanted: _t.Iterable[Checksum], above: _t.FrozenSet[Checksum] = frozenset(), level: int = 0) -> _t.Dict[Checksum, str]:
        """Make these; for those that cannot be made, why.  ``above``: what they are needed for."""
        why = {name: self._why[name] for name in wanted if name in self._why}
        waiting = {name: self._makers(name) for name in wanted if name not in why}
        while waiting:                      # one round for the first that made it, one for the second ...
            chosen = {}
            for name, makers in waiting.items():
                if makers:
                    chosen[name] = makers.pop(0)
                else:
                    why.setdefault(name, "buffer %s is in none of the stores, and no transformation that makes it is known; "
                                         "upload it, or run again what made it" % name)
            failed = self._run(chosen, above | set(waiting), level) if chosen else {}
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
        lacks = {name: self.missing(recipe) for name, recipe in chosen.items()}
        needed = {name for missing in lacks.values() for name in missing}
        bad = {name: "it is needed to make itself" for name in needed & above}
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
        requests = {name: Request(recipe, Meta(scratch=True)) for name, recipe in chosen.items() if name not in why}
        futures = self._session.submit_many(list(requests.values()))
        for (name, (recipe, _, _, _)), future in zip(requests.items(), futures):
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
                why[name] = "transformation %s, which made %s, failed when it ran again: %s" % (recipe.checksum, name, error.args[0])
            elif outcome.result != name:
                why[name] = ("transformation %s made %s, but when it ran again it made %s: it is irreproducible, and recorded as such"
                             % (recipe.checksum, name, outcome.result))
        return why

    def missing(self, recipe: Recipe) -> _t.Dict[Checksum, str]:
        """The inputs that are neither in memory nor in the store -> pin.  For leaves that are gone: the index, if it can be made."""
        session, pins = self._session, {}
        for name, (_, _, checksum) in recipe.pins.items():
            if checksum is not None and session.supply.held(checksum) is None:
                pins.setdefault(checksum, name)
        found = {name: pins[name] for name, there in zip(pins, session.store.has(list(pins))) if not there}
        for pin, (_, _, checksum) in recipe.pins.items():
            if checksum is None or checksum in found or not is_deep_pin(recipe, pin):
                continue
            leaves = index_leaves(session.supply.held(checksum) or session.store.get(checksum) or b"")
            gone = [leaf for leaf, there in zip(leaves, session.store.has(leaves)) if not there and session.supply.held(leaf) is None]
            if gone:
                found.update({checksum: pin} if session.stores.results.reverse(checksum) else dict.fromkeys(gone, pin))
        return found


class Mender:
    """Threads, while there is something to do, that make missing inputs again and then have the jobs run once more.

    Each takes what has come in a moment, and there may be several, since one may wait for what another one mends.
    """

    def __init__(self, session):
        self._session = session
        self._jobs: _t.List[_t.Tuple[Request, _t.Callable]] = []
        self._is_collecting = False
        self._lock = threading.Lock()

    def put(self, request: Request, land: _t.Callable) -> None:
        """This job lacked an input; ``land`` is called with the future of its outcome, when that has ended."""
        with self._lock:
            self._jobs.append((request, land))
            if not self._is_collecting:
                self._is_collecting = True
                threading.Thread(target=self._mend, name="seamless-fingertip", daemon=True).start()

    def _mend(self) -> None:
        from .executors import Future, done     # a hit does without
        time.sleep(COLLECT_S)
        with self._lock:
            jobs, self._jobs, self._is_collecting = self._jobs, [], False
        landed = 0
        try:
            errors = mend(self._session, [request.recipe for request, _ in jobs])
            jobs.sort(key=lambda job: errors[job[0].recipe.checksum] is None)       # those that cannot be helped first
            for request, land in jobs:
                error = errors[request.recipe.checksum]
                if error is None:
                    break
                landed += 1
                land(done(Outcome.failure(error)))
            started = self._session.resubmit([request for request, _ in jobs[landed:]])
        except BaseException as exc:        # it belongs to those who wait for the jobs
            for _, land in jobs[landed:]:
                future: Future = Future()
                future.set_exception(exc)
                land(future)
        else:
            for (_, land), future in zip(jobs[landed:], started):
                future.add_done_callback(land)
