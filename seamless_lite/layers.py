"""Several stores that look like one: the first is written, all are read, in order.

A layer that does not answer is left out with a warning; the first one must answer.
"""
import logging
import typing as _t

from .checksum import Checksum
from .errors import ServiceError

log = logging.getLogger(__name__)


class _Layers:
    """``top`` is written and read; ``others`` are only read."""

    def __init__(self, top, others: _t.Sequence):
        self._top, self._others = top, list(others)

    def _first(self, method: str, *args):
        """The first answer that is not None."""
        found = getattr(self._top, method)(*args)
        for layer in self._others if found is None else ():
            found = self._ask(layer, method, None, *args)
            if found is not None:
                break
        return found

    def _ask(self, layer, method: str, default, *args):
        try:
            return getattr(layer, method)(*args)
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

    def get(self, checksum):
        return self._first("get", checksum)

    def open(self, checksum):
        return self._first("open", checksum)

    def path(self, checksum):
        return self._first("path", checksum)

    def length(self, checksum):
        return self._first("length", checksum)

    def has(self, checksums):
        checksums = list(checksums)
        found = self._top.has(checksums)
        for layer in list(self._others):
            missing = [n for n, there in enumerate(found) if not there]
            if missing:
                answers = self._ask(layer, "has", [False] * len(missing), [checksums[n] for n in missing])
                for n, there in zip(missing, answers):
                    found[n] = there
        return found

    def put(self, data):
        return self._top.put(data)

    def put_many(self, datas):
        return self._top.put_many(datas)

    def put_file(self, path, checksum=None, move=False):
        return self._top.put_file(path, checksum, move)


class LayeredResults(_Layers):
    """A result store made of others; see ``MemoryResults`` for what each method promises."""

    def get(self, transformation) -> _t.Optional[Checksum]:
        return self._first("get", transformation)

    def get_many(self, transformations):
        found = dict(self._top.get_many(transformations))
        for layer in list(self._others):
            missing = [name for name in transformations if name not in found]
            if missing:
                found.update(self._ask(layer, "get_many", {}, missing))
        return found

    def reverse(self, result):
        found = list(self._top.reverse(result))
        for layer in list(self._others):
            found += self._ask(layer, "reverse", [], result)
        return list(dict.fromkeys(found))

    def put(self, transformation, result, metadata=None):
        self._top.put(transformation, result, metadata)

    def put_many(self, rows):
        self._top.put_many(rows)

    def forget(self, transformation):
        return self._top.forget(transformation)
