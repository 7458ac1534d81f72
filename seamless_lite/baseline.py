"""``Baseline``: the state of a worker process before its first job, and the way back to it after each.

A result is recorded under the content of its job, so a job must not see what an earlier one did to the
process they share.  What a fresh process would have is put back; where that cannot be done, the worker asks
for a fresh process.  Not noticed: what a job changes inside modules that it imported, other than a few.
"""
import _locale                              # ``locale`` would cost each worker 160 kB
import _signal                              # ``signal`` makes an enum of each handler: 20 us a job
import builtins
import math
import os
import resource
import signal
import sys
import time
import typing as _t
import warnings

_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_SIGNALS = [number for number in range(1, 32) if number in signal.valid_signals()]      # real-time ones: hardly used


class Baseline:
    """The state when it was made.  For the main thread."""

    def __init__(self):
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._environ = dict(os.environb)
        self._current = os.environ._data    # what environ and environb show; comparing those takes 15 us
        self._lists = [(name, value, list(value)) for name in ("path", "argv") for value in [getattr(sys, name)]]
        self._recursion = sys.getrecursionlimit()
        self._handlers = [(number, _signal.getsignal(number)) for number in _SIGNALS]
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._locale = _locale.setlocale(_locale.LC_ALL, None)
        self._filters = list(warnings.filters)
        self._modules = [(vars(module), dict(vars(module))) for module in (builtins, math, os, time)]
        self._limits = _limits()

    def restore(self) -> bool:
        """Put everything back; False if the process must not run another job."""
        try:
            self._restore_signals()         # first: from now on nothing of the job's is called
            imported = self._imported_from_elsewhere()
            self._restore_environment()
            self._restore_interpreter()
            return not imported and _limits() == self._limits and all(now == before for now, before in self._modules)
        except Exception:                   # user code may have put anything anywhere: then a fresh process it is
            return False

    def _restore_signals(self) -> None:
        for timer in _TIMERS:
            signal.setitimer(timer, 0)
        for number, handler in self._handlers:
            if _signal.getsignal(number) != handler:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _restore_environment(self) -> None:
        os.chdir("/")                       # the job's folder is going to be removed
        os.umask(self._umask)
        if self._current != self._environ:
            for name in set(os.environb) - set(self._environ):
                del os.environb[name]
            os.environb.update(self._environ)
        if _locale.setlocale(_locale.LC_ALL, None) != self._locale:
            _locale.setlocale(_locale.LC_ALL, self._locale)

    def _restore_interpreter(self) -> None:
        for name, value, items in self._lists:
            if value != items:
                value[:] = items
            setattr(sys, name, value)
        sys.setrecursionlimit(self._recursion)
        sys.settrace(None)
        sys.setprofile(None)
        if warnings.filters != self._filters:
            warnings.resetwarnings()        # drops what was remembered of the job's filters too
            warnings.filters[:] = self._filters
        for name in ("random", "numpy.random"):
            module = sys.modules.get(name)
            if module is not None:
                module.seed()               # anew, as in a fresh process

    def _imported_from_elsewhere(self) -> bool:
        """True if the job changed ``sys.path`` and a module came from there: the next job may mean another one."""
        known = self._lists[0][2]
        if sys.path == known:
            return False
        added = tuple(os.path.join(os.path.abspath(entry), "") for entry in sys.path if entry not in known)
        files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        return any(isinstance(file, str) and file.startswith(added) for file in files)


def _limits() -> _t.List[object]:
    """What a process may lower but perhaps not raise again."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return [os.nice(0), affinity] + [resource.getrlimit(number) for number in _LIMITS]
