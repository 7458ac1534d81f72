"""Several stores that look like one: one is written, all are read, in order.

A layer that does not answer or cannot be read is left out for a while, with a warning; the one that is written must answer.
"""
import logging
import time
import typing as _t

from .checksum import Checksum
from .errors import SeamlessError
from .resulttable import MemoryResults

#: A layer that failed is asked again after so long: a locked table or a service that restarts comes back.
LEFT_OUT_S = 60.0
log = logging.getLogger(__name__)


class _Layers:
    """``top`` is written and read, ``others`` are only read, ``near`` even before ``top``; what is not a method here is one of ``top``."""
    #: False: nothing will be written, so that ``top`` need not answer either.
    strict = True

    def __init__(self, top, others: _t.Sequence = (), near: _t.Sequence = ()):
        self._top, self._layers = top, [*near, top, *others]
        self._left_out: _t.Dict[int, float] = {}        # id of a layer that failed -> when it is asked again

    @property
    def top(self):
        """The one that is written."""
        return self._top

    def __getattr__(self, name: str):
        return getattr(self._top, name)

    def get(self, checksum):
        return self._first("get", checksum)

    def _first(self, method: str, checksum):
        return self.first(lambda layer: getattr(layer, method)(checksum))

    def first(self, ask: _t.Callable[[_t.Any], _t.Any]):
        """The first ``ask(layer)`` that is not None."""
        for layer in self._layers:
            found = self._guarded(layer, ask, None)
            if found is not None:
                return found
        return None

    def _ask(self, layer, method: str, default, *arguments):
        return self._guarded(layer, lambda layer: getattr(layer, method)(*arguments), default)

    def _guarded(self, layer, ask, default):
        again = self._left_out.get(id(layer))
        if again is not None and time.monotonic() < again:
            return default
        try:
            return ask(layer)
        except SeamlessError as exc:
            if layer is self._top and self.strict:
                raise
            self._left_out[id(layer)] = time.monotonic() + LEFT_OUT_S
            log.log(logging.WARNING if again is None else logging.DEBUG, "left out for %d s: %s", LEFT_OUT_S, exc)
            return default

    def close(self) -> None:
        """Close all."""
        for layer in self._layers:
            layer.close()


class LayeredBuffers(_Layers):
    """A buffer store made of others; see ``MemoryBuffers`` for what each method promises."""

    def peek(self, checksum):
        return self._first("peek", checksum)

    def open(self, checksum):
        return self._first("open", checksum)

    def path(self, checksum):
        return self._first("path", checksum)

    def length(self, checksum):
        return self._first("length", checksum)

    def has(self, checksums):
        return self._filled("has", checksums, False)

    def lengths(self, checksums):
        return self._filled("lengths", checksums, None)

    def _filled(self, method: str, checksums, nothing) -> list:
        """For each of ``checksums`` the first answer that is not ``nothing``."""
        names = list(checksums)
        found, missing = [nothing] * len(names), list(range(len(names)))
        for layer in self._layers:
            for n, answer in zip(missing, self._ask(layer, method, (), [names[n] for n in missing]) if missing else ()):
                found[n] = answer
            missing = [n for n in missing if found[n] is nothing]
        return found

    @property
    def remote(self) -> bool:
        return any(layer.remote for layer in self._layers)

    def get_small(self, checksums, largest, total):
        missing, found = list(checksums), {}
        for layer in self._layers:
            left = total - sum(len(data or b"") for data in found.values())
            found.update(self._ask(layer, "get_small", {}, missing, largest, left) if missing else {})
            missing = [name for name in missing if name not in found]
        return found


class LayeredResults(_Layers):
    """A result store made of others; see ``MemoryResults`` for what each method promises."""

    def get(self, transformation):
        for layer in self._layers:
            found = self._ask(layer, "get", None, transformation)
            if found is not None:
                return None if layer is not self._top and self._irreproducible([transformation]) else found
        return None

    def get_many(self, transformations):
        names = list(map(Checksum, transformations))
        found: dict = {}
        for layer in self._layers:
            missing = [name for name in names if name not in found]
            more = self._ask(layer, "get_many", {}, missing) if missing else {}
            doubted = self._irreproducible(more) if layer is not self._top else ()
            found.update((name, result) for name, result in more.items() if name not in doubted)
        return found

    put = MemoryResults.put

    def put_many(self, rows, again=False):
        rows = list(rows)
        if again:                           # a result that only a layer has counts as one that was known here
            rows[:0] = [(name, result, None) for name, result in self.get_many(name for name, _, _ in rows).items()]
        self._top.put_many(rows, again)

    def _irreproducible(self, names) -> set:
        """Those that yielded something else here than in a layer that is only read."""
        return self._guarded(self._top, lambda top: {name for name in names if top.irreproducible(name)}, set())

    def recent(self, before=None):
        n, before = before or (0, None)
        rows = None
        for at, layer in list(enumerate(self._layers))[n:]:
            rows, before = self._ask(layer, "recent", None, before), None
            if rows:
                return [((at, mark), name) for mark, name in rows]
        return rows

    def reverse(self, result):
        return list(dict.fromkeys(name for layer in self._layers for name in self._ask(layer, "reverse", [], result)))
