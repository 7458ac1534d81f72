"""Many or large buffers: read from a store, pushed to it, or carried from one store to another.

With a store behind a connection each request waits for its answer, 50 ms over a long line.  So everything is
asked for many buffers together, small ones travel in batches of some MB, and a few batches or large files
are under way side by side.  What is held in memory meanwhile is some batches, whatever the whole amounts to.
"""
import collections
import io
import os
import threading
import typing as _t

from .checksum import Checksum
from .compressed import ENCODINGS
from .errors import CorruptBufferError, SeamlessError
from .progress import Progress, is_watched

BATCH_BYTES = 2 << 20
BATCH_BUFFERS = 4000
LARGE_BYTES = 1 << 20       # larger buffers travel alone
LANES = 4                   # connections side by side


def read_many(store, checksums: _t.Iterable[Checksum]) -> _t.Iterator[_t.Tuple[Checksum, _t.Optional[bytes]]]:
    """Each of ``checksums`` once, in any order, with its bytes; None for those to be had with ``store.open``, if at all."""
    names = list(dict.fromkeys(checksums))
    sizes = store.lengths(names)
    small = [_Item(name, size, None, "") for name, size in zip(names, sizes) if size is not None and size <= LARGE_BYTES]
    yield from ((name, None) for name, size in zip(names, sizes) if size is None or size > LARGE_BYTES)

    def fetch(batch):
        return store.get_small([item.checksum for item in batch], LARGE_BYTES, BATCH_BYTES)
    for batch, found in _Lanes(fetch, _batches(small), store):
        yield from ((item.checksum, found.get(item.checksum)) for item in batch)


def download(store, checksum: Checksum, file: _t.BinaryIO, who: _t.Optional[str] = None,
             progress: _t.Optional[Progress] = None) -> bool:
    """Write one buffer to the empty ``file``; False if it is not there.

    A person is told how far it is, by ``progress`` if the file is part of something larger.
    """
    if progress is None:
        size = store.length(checksum) if who is not None and is_watched() else None
        with Progress("download", size or 0, who) as progress:
            return download(store, checksum, file, None, progress)
    if hasattr(store, "download") and store.download(checksum, progress.writing(file)):
        return True
    source = store.open(checksum)           # another layer may have it
    if source is None:
        return False
    with source:
        for piece in iter(lambda: source.read(LARGE_BYTES), b""):
            file.write(piece)
            progress.add(len(piece))
    return True


class _Item(_t.NamedTuple):
    """A buffer to be sent: ``data``, or the content of the file ``path``."""
    checksum: Checksum
    size: int
    data: _t.Optional[bytes]
    path: str


def push(store, buffers: _t.Mapping[Checksum, bytes], files: _t.Mapping[Checksum, str] = {},
         who: _t.Optional[str] = None, local: bool = False) -> int:
    """Store ``buffers`` and the content of ``files`` where they are missing; returns how many were.

    ``who`` is told by ``Progress``, with ``local`` also if the store is on this machine.  Raises ``CorruptBufferError`` if a file does not have the content that its
    checksum names, and ``OSError``.
    """
    names = list(dict.fromkeys([*buffers, *files]))
    missing = [name for name, there in zip(names, store.has(names)) if not there] if names else []
    items = [_Item(name, len(buffers[name]), buffers[name], "") if name in buffers
             else _Item(name, os.path.getsize(files[name]), None, files[name]) for name in missing]
    with Progress("upload", sum(item.size for item in items), who if store.remote or local else None) as progress:
        for _ in _Lanes(lambda batch: _send(store, batch, progress), _batches(items), store):
            pass
    return len(missing)


def carry(checksums: _t.Iterable[Checksum], source, target, who: _t.Optional[str] = None) -> _t.List[Checksum]:
    """Store in ``target`` those that ``source`` has; returns which.  What is large goes through a file."""
    names = list(dict.fromkeys(checksums))
    sizes = {name: size for name, size in zip(names, source.lengths(names)) if size is not None}
    carried, batch, size = [], [], 0
    with Progress("carry", sum(sizes.values()), who) as progress:
        for name, data in read_many(source, sizes):
            if data is None:
                file = source.open(name)
                if file is None:
                    continue                # damaged, or deleted just now
                with file:
                    target.put_open(name, file)
            else:
                batch.append(data)
                size += len(data)
            if size >= BATCH_BYTES:
                target.put_many(batch)
                batch, size = [], 0
            carried.append(name)
            progress.add(sizes[name])
        target.put_many(batch)
    return carried


# --- pushing ------------------------------------------------------------------------------------------

def _batches(items: _t.Iterable[_Item]) -> _t.Iterator[_t.List[_Item]]:
    """Small items together, each large one alone."""
    batch: _t.List[_Item] = []
    size = 0
    for item in items:
        if item.size > LARGE_BYTES:
            yield [item]
            continue
        if batch and (size + item.size > BATCH_BYTES or len(batch) == BATCH_BUFFERS):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.size
    if batch:
        yield batch


def _send(store, batch: _t.List[_Item], progress: Progress) -> None:
    datas = []
    for item in batch:
        data = item.data if item.size > LARGE_BYTES else _content(item)
        if data is not None and not (item.size > LARGE_BYTES and store.remote):
            datas.append(data)
        else:                               # large, compressed, or changed
            _send_alone(store, item, progress)
    if datas:
        store.put_many(datas)
        progress.add(sum(map(len, datas)))


def _content(item: _Item) -> _t.Optional[bytes]:
    """The bytes of a small item; None if those of its file are not the ones that are wanted."""
    if item.data is not None:
        return item.data
    with open(item.path, "rb") as file:
        data = file.read(LARGE_BYTES + 1)
    return data if Checksum.of(data) == item.checksum else None


def _send_alone(store, item: _Item, progress: Progress) -> None:
    if item.data is None and (not store.remote or os.path.splitext(item.path)[1] in ENCODINGS):
        store.put_file(item.path, item.checksum)
        progress.add(item.size)
        return
    with (open(item.path, "rb") if item.data is None else io.BytesIO(item.data)) as file:
        try:
            store.put_open(item.checksum, progress.reading(file))
        except SeamlessError:               # the other side only sees that something is wrong
            if item.data is not None or Checksum.of_file(item.path) == item.checksum:
                raise
            raise CorruptBufferError("the file %s has changed since its checksum was computed" % item.path) from None


class _Lanes:
    """Iterates over (batch, ``work(batch)``), in their order; some are under way side by side if the store is far away.

    A line that is never idle carries several times as much.  The threads are daemons: a program that is
    interrupted does not wait for a large file, or for a connection that is lost.
    """

    def __init__(self, work: _t.Callable[[_t.List[_Item]], _t.Any], batches: _t.Iterable[_t.List[_Item]], store):
        self._work, self._batches = work, list(batches)
        self._lanes = min(LANES, len(self._batches)) if store.remote else 1
        self._todo = collections.deque(enumerate(self._batches))
        self._results: _t.Dict[int, _t.Any] = {}
        self._taken = 0                     # so many results have been used
        self._changed = threading.Condition()

    def __iter__(self):
        if self._lanes < 2:
            for batch in self._batches:
                yield batch, self._work(batch)
            return
        for _ in range(self._lanes):
            threading.Thread(target=self._run, name="seamless-transfer", daemon=True).start()
        try:
            for n, batch in enumerate(self._batches):
                with self._changed:
                    self._changed.wait_for(lambda: n in self._results)
                    result, error = self._results.pop(n)
                    self._taken += 1
                    self._changed.notify_all()
                if error is not None:
                    raise error
                yield batch, result
        finally:
            with self._changed:
                self._todo.clear()
                self._changed.notify_all()

    def _run(self) -> None:
        """One thread: ahead of what is used by as many batches as there are threads, and no more."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._todo or self._todo[0][0] < self._taken + self._lanes)
                if not self._todo:
                    return
                n, batch = self._todo.popleft()
            result, error = None, None
            try:
                result = self._work(batch)
            except BaseException as exc:    # raised where the results are used
                error = exc
            with self._changed:
                self._results[n] = result, error
                self._changed.notify_all()
