"""Several stores that look like one: the first is written, all are read, in order.

A layer that does not answer is left out with a warning; the first one must answer.
"""
import logging
import typing as _t

from .errors import ServiceError

log = logging.getLogger(__name__)


class _Layers:
    """``top`` is written and read, ``others`` are only read; what is not a method here is one of ``top``."""

    def __init__(self, top, others: _t.Sequence):
        self._top, self._others = top, list(others)

    def __getattr__(self, name: str):
        return getattr(self._top, name)

    def get(self, checksum):
        return self._first("get", checksum)

    def _first(self, method: str, checksum):
        """The first answer that is not None."""
        found = getattr(self._top, method)(checksum)
        for layer in list(self._others):
            if found is None:
                found = self._ask(layer, method, None, checksum)
        return found

    def _ask(self, layer, method: str, default, *arguments):
        try:
            return getattr(layer, method)(*arguments)
        except ServiceError as exc:
            log.warning("left out from now on: %s", exc)
            self._others = [other for other in self._others if other is not layer]
            return default

    def close(self) -> None:
        """Close all."""
        for layer in [self._top, *self._others]:
            layer.close()


class LayeredBuffers(_Layers):
    """A buffer store made of others; see ``MemoryBuffers`` for what each method promises."""

    def open(self, checksum):
        return self._first("open", checksum)

    def path(self, checksum):
        return self._first("path", checksum)

    def length(self, checksum):
        return self._first("length", checksum)

    def lengths(self, checksums):
        names = list(checksums)
        found = self._top.lengths(names)
        for layer in list(self._others):
            missing = [n for n, length in enumerate(found) if length is None]
            answers = self._ask(layer, "lengths", [None] * len(missing), [names[n] for n in missing])
            for n, length in zip(missing, answers):
                found[n] = length
        return found

    @property
    def remote(self) -> bool:
        return any(layer.remote for layer in [self._top, *self._others])

    def get_small(self, checksums, largest, total):
        names = list(checksums)
        found = dict(self._top.get_small(names, largest, total))
        for layer in list(self._others):
            missing = [name for name in names if name not in found]
            found.update(self._ask(layer, "get_small", {}, missing, largest, total))
        return found

    def has(self, checksums):
        checksums = list(checksums)
        found = self._top.has(checksums)
        for layer in list(self._others):
            missing = [n for n, there in enumerate(found) if not there]
            answers = self._ask(layer, "has", [False] * len(missing), [checksums[n] for n in missing])
            for n, there in zip(missing, answers):
                found[n] = there
        return found


class LayeredResults(_Layers):
    """A result store made of others; see ``MemoryResults`` for what each method promises."""

    def get_many(self, transformations):
        found = dict(self._top.get_many(transformations))
        for layer in list(self._others):
            missing = [name for name in transformations if name not in found]
            found.update(self._ask(layer, "get_many", {}, missing))
        return found

    def reverse(self, result):
        found = list(self._top.reverse(result))
        for layer in list(self._others):
            found += self._ask(layer, "reverse", [], result)
        return list(dict.fromkeys(found))
