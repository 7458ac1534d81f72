"""``parallel``, ``parallel_async`` and ``TransformationList``: many transformations at once.

Transformations are taken from the iterable only as there is room (``nparallel``), and yielded in the
order of the input, when they have ended; whether one failed is in its ``exception``.
"""
import collections
import contextlib
import sys
import time
import typing as _t

from . import config
from .errors import UsageError
from .handle import Transformation, start_all

LEND_S = 1.0
COLLECT_S = 0.05            # transformations that are given within this are started together


class TransformationList:
    """A list of transformations that reports progress while ``parallel`` runs it.

    ``show_progress``: a line on stderr, if that is a terminal.  ``on_error``: None, "print" (each failure
    to stderr) or "raise" (the first one).  ``store_details``: replace each that has ended by None, to save
    memory, and keep what became of it in ``checksums`` and ``exceptions`` (index -> value).
    """

    def __init__(self, transformations: _t.Iterable[Transformation], show_progress: bool = True,
                 on_error: _t.Optional[str] = None, store_details: bool = False):
        if on_error not in (None, "print", "raise"):
            raise UsageError("on_error is %r; one of None, 'print', 'raise'" % (on_error,))
        self._items: _t.List[_t.Optional[Transformation]] = list(transformations)
        self._on_error = on_error
        self._store_details = store_details
        self.exceptions: _t.Dict[int, _t.Optional[BaseException]] = {}
        self.checksums: _t.Dict[int, _t.Any] = {}
        self.finished = self.errors = 0
        self._show = show_progress and sys.stderr.isatty()
        self._began = time.monotonic()
        self._shown = 0.0

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)

    def __getitem__(self, key):
        return self._items[key]

    def finish(self, index: int) -> None:
        """Called when the transformation at ``index`` has ended.  Raises its error if ``on_error`` says so."""
        transformation = self._items[index]
        if transformation is None:
            return
        error = transformation.exception
        self.finished += 1
        self.errors += error is not None
        if self._store_details:
            self.exceptions[index] = error
            self.checksums[index] = transformation.result_checksum
            self._items[index] = None
        self._progress()
        if error is not None and self._on_error == "print":
            print("transformation %d: %s" % (index, error), file=sys.stderr)
        elif error is not None and self._on_error == "raise":
            raise error

    def _progress(self) -> None:
        now, total = time.monotonic(), len(self._items)
        if not self._show or now - self._shown < 0.1 and self.finished < total:
            return
        self._shown = now
        left = (now - self._began) / self.finished * (total - self.finished)
        sys.stderr.write("\r%d of %d done%s, about %d s left \033[K" % (
            self.finished, total, ", %d failed" % self.errors if self.errors else "", left + 0.5))
        sys.stderr.flush()

    def close(self) -> None:
        """End the progress line."""
        if self._show and self.finished:
            sys.stderr.write("\n")
        self._show = False


def parallel(transformations: _t.Iterable[Transformation], stage: _t.Optional[str] = None,
             substage: _t.Optional[str] = None) -> _t.Iterator[Transformation]:
    """Run transformations, at most ``nparallel`` at a time, and yield each when it has ended, in input order.

    ``stage``/``substage``: call ``config.set_stage`` first.  Leaving the loop cancels those in flight.
    Raises ``UsageError`` under a running event loop, where ``parallel_async`` is the one to use.
    """
    import asyncio
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if stage is not None or substage is not None:
            config.set_stage(stage, substage)
        return _parallel(transformations)
    raise UsageError("parallel() would block the event loop that is running; use parallel_async() here")


def _parallel(transformations) -> _t.Iterator[Transformation]:
    import queue
    window = _Window(transformations)
    ended: "queue.SimpleQueue[int]" = queue.SimpleQueue()
    try:
        while window.fill(ended.put):
            while not window.head_ended():
                if ended.empty():
                    window.head._lend()         # nothing to collect: lend this thread to the one we wait for
                with contextlib.suppress(queue.Empty):      # then its next part may need the thread
                    window.collect(ended.get(timeout=LEND_S))
                    while True:                 # all that have ended, so that as many can be started together
                        window.collect(ended.get_nowait())
                window.fill(ended.put)
            yield window.pop()
    finally:
        window.close()


async def parallel_async(transformations: _t.Iterable[Transformation], stage: _t.Optional[str] = None,
                         substage: _t.Optional[str] = None) -> _t.AsyncIterator[Transformation]:
    """The same as ``parallel`` for use under an event loop: ``async for transformation in parallel_async(...)``."""
    import asyncio
    loop = asyncio.get_running_loop()
    if stage is not None or substage is not None:
        await loop.run_in_executor(None, config.set_stage, stage, substage)
    ended: "asyncio.Queue[int]" = asyncio.Queue()

    def put(index):
        loop.call_soon_threadsafe(ended.put_nowait, index)
    window = _Window(transformations)
    try:
        while await loop.run_in_executor(None, window.fill, put):
            while not window.head_ended():
                if config.in_worker():          # a job that waits must say so, to give its slot back
                    await loop.run_in_executor(None, window.head._wait)
                window.collect(await ended.get())
                while not ended.empty():
                    window.collect(ended.get_nowait())
                await loop.run_in_executor(None, window.fill, put)
            yield window.pop()
    finally:
        window.close()


_END = (None, None)


class _Window:
    """The transformations that have been started and not yet yielded, oldest first."""

    def __init__(self, transformations):
        self._source = enumerate(transformations)
        self._finish = getattr(transformations, "finish", lambda index: None)
        self._close = getattr(transformations, "close", lambda: None)
        self._limit = config.get_nparallel()
        self._items: "collections.OrderedDict[int, Transformation]" = collections.OrderedDict()
        self._ended: _t.Set[int] = set()
        self._exhausted = False

    @property
    def head(self) -> Transformation:
        return next(iter(self._items.values()))

    def fill(self, put) -> bool:
        """Start as many as there is room for; False if all have been yielded."""
        # what has ended behind a slow one is kept until that has ended too: there is a limit to that as well
        new: _t.List[int] = []
        began = time.monotonic()
        while not self._exhausted and len(self._items) - len(self._ended) < self._limit \
                and len(self._items) < 10 * self._limit:
            index, transformation = next(self._source, _END)
            if index is None:
                self._exhausted = True
            elif not isinstance(transformation, Transformation):
                raise UsageError("item %d given to parallel is %.60r, which is not a Transformation; decorate the function "
                                 "with @delayed and pass what its calls return" % (index, transformation))
            else:
                self._items[index] = transformation
                new.append(index)
            if time.monotonic() - began > COLLECT_S:        # making them takes time: those that are there begin
                self._start(new, put)
                new, began = [], time.monotonic()
        self._start(new, put)
        return bool(self._items)

    def _start(self, new: _t.Sequence[int], put) -> None:
        start_all(self._items[index] for index in new)
        for index in new:
            future = self._items[index]._future
            if future is None:                              # it had ended before
                put(index)
            else:
                future.add_done_callback(lambda _, index=index: put(index))

    def head_ended(self) -> bool:
        return next(iter(self._items)) in self._ended

    def collect(self, index: int) -> None:
        self._ended.add(index)
        self._finish(index)

    def pop(self) -> Transformation:
        index, transformation = self._items.popitem(last=False)
        self._ended.discard(index)
        return transformation

    def close(self) -> None:
        for index, transformation in self._items.items():
            if index not in self._ended:
                transformation.cancel()
        self._close()
