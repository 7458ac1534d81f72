"""``Lease``: what a process still needs, said again and again to the store that has it.

Nothing is written for a job.  That a job runs is known from its transformation buffer: the submitter stores it, or
finds it, and so it was used just now; ``seamless-gc`` keeps what was used lately, and all that such transformations
refer to.  A ``Lease`` uses the transformations that are queued or running again every ``RENEW_S`` seconds, so
that they stay young for days.  Who dies stops doing so; there is nothing to clean up, and no lock that a network file
system could get wrong.  It works the same through a hashserver on another host, which notes the use there.
"""
import logging
import threading
import typing as _t
import weakref

#: ``seamless-gc`` keeps what was used in the last hour at least.
RENEW_S = 900.0
log = logging.getLogger(__name__)


class Lease:
    """``renew``, a bound method, is called every ``RENEW_S`` s after ``begin``, in a thread, until ``end`` or its object is gone."""

    def __init__(self, renew: _t.Callable[[], None]):
        self._renew = weakref.WeakMethod(renew)
        self._ended = threading.Event()
        self._thread: _t.Optional[threading.Thread] = None

    def begin(self) -> None:
        """Something is needed from now on.  Costs nothing the second time."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="seamless-lease", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Nothing is needed any more."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(RENEW_S):
            renew = self._renew()
            if renew is None:
                return
            try:
                renew()
            except Exception as exc:        # the store is away, the disk is full: it will be asked again
                log.warning("what is needed here could not be kept from seamless-gc, and will be tried again in %d s: %s",
                            RENEW_S, str(exc) or type(exc).__name__)      # the exception itself would keep the owner alive
            del renew
