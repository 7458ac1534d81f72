"""``Supply``: the buffers that a session can reach, and how they get to where a job needs them.

    memory      what was used last (Recent), and results that are kept nowhere else (scratch)
    store       of the session; over a connection, results that were found come in batches, ahead of their use
    others      supplies of the stages that this program used before: what the store lacks is carried over, once
"""
import collections
import io
import itertools
import threading
import time
import typing as _t

from .checksum import Checksum
from .errors import CacheMissError, ServiceError
from .progress import is_watched
from .transformation import INLINE_BYTES, Recipe

#: All small buffers of one job together; what goes beyond is stored before the job is sent.
INLINE_TOTAL = 1 << 20
#: Results are fetched in such batches ahead of their use: small ones when they are found, others, the first
#: batch being smaller, if they are asked for in the order in which they were found.
AHEAD_BYTES, AHEAD_LARGEST, AHEAD_BUFFERS, AHEAD_FIRST = 8 << 20, 1 << 20, 1000, 1 << 19
#: So many names are remembered; then all are forgotten, and asked for again.
KNOWN = 200_000
HELD_S = 600.0
_INDEXED = ("deepcell", "deepfolder", "folder")

Need = _t.Tuple[Recipe, _t.Mapping[Checksum, bytes], _t.Mapping[Checksum, str]]


class Supply:
    """``store()`` opens the store, ``others()`` lists the supplies of other stages; ``who`` begins progress lines.

    ``travels``: whoever runs the jobs does not see the store, so that all they need travels inside them.  Safe from
    several threads.
    """

    def __init__(self, store: _t.Callable[[], _t.Any], others: "_t.Callable[[], _t.Iterable[Supply]]" = tuple,
                 who: _t.Optional[str] = None, travels: bool = False):
        self._open, self._others, self._who, self._travels = store, others, who, travels
        self.recent = Recent()
        self.scratch: _t.Dict[Checksum, bytes] = {}
        self._made: _t.Set[Checksum] = set()        # those of scratch that were only made again
        self._wanted: "collections.Counter[Checksum]" = collections.Counter()       # by how many, of what may be among these
        self._ahead: "collections.OrderedDict[Checksum, None]" = collections.OrderedDict()
        self._ahead_bytes = AHEAD_FIRST
        self._here: _t.Set[Checksum] = set()        # known to be in the store
        self._held_s: _t.Dict[Checksum, float] = {}     # until when these, and their leaves, are sure to stay there
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In a forked child: a lock that nobody holds."""
        self._lock = threading.Lock()
        self.recent = Recent()

    @property
    def store(self):
        """The buffer store of the session."""
        return self._open()

    # --- reading --------------------------------------------------------------------------------------

    def held(self, checksum: Checksum) -> _t.Optional[bytes]:
        """The bytes, if they are in memory."""
        data = self.recent.get(checksum)
        return self.scratch.get(checksum) if data is None else data

    def keep(self, checksum: Checksum, data: bytes) -> None:
        """Hold a result that is kept nowhere else, as long as the session lives."""
        with self._lock:
            self.scratch[checksum] = data
            self._made.discard(checksum)

    def keep_made(self, checksum: Checksum, data: bytes) -> None:
        """Hold a result that was only made again until nobody claims it any more."""
        with self._lock:
            if self._wanted[checksum] > 0 and checksum not in self.scratch:
                self.scratch[checksum] = data
                self._made.add(checksum)

    def claim(self, names: _t.Iterable[Checksum]) -> None:
        """What is made again of these is needed for a while."""
        with self._lock:
            self._wanted.update(names)

    def release(self, names: _t.Iterable[Checksum]) -> None:
        """The end of ``claim``."""
        with self._lock:
            for name in names:
                self._wanted[name] -= 1
                if self._wanted[name] <= 0:
                    del self._wanted[name]
                    if name in self._made:
                        self._made.remove(name)
                        self.scratch.pop(name, None)

    def get(self, checksum: Checksum) -> bytes:
        """The bytes with this checksum.  Raises ``CacheMissError`` if they are neither in memory nor in the store."""
        data = self.held(checksum)
        if data is None:
            data = self._read_ahead(checksum) if checksum in self._ahead else None
        if data is None:
            data = self._read(checksum)
            if data is None:
                raise CacheMissError("buffer %s is in none of the stores; was it computed as scratch, or deleted? "
                                     "Run what makes it again" % checksum)
            self.recent.put(checksum, data)
        return data

    def _read(self, checksum: Checksum) -> _t.Optional[bytes]:
        if not (self.store.remote and self._who is not None and is_watched()):
            return self.store.get(checksum)
        from .transfer import download
        file = io.BytesIO()
        return file.getvalue() if download(self.store, checksum, file, self._who) else None

    def _read_ahead(self, checksum: Checksum) -> _t.Optional[bytes]:
        """Read it together with those that were found after it, if it is the next one."""
        with self._lock:
            is_next = next(iter(self._ahead), None) == checksum
            self._ahead.pop(checksum, None)
            self._ahead_bytes = min(2 * self._ahead_bytes, AHEAD_BYTES) if is_next else AHEAD_FIRST
            total, names = self._ahead_bytes, [checksum] + list(itertools.islice(self._ahead, AHEAD_BUFFERS))
        if not is_next:
            return None
        found = self.store.get_small(names, AHEAD_LARGEST, max(total, AHEAD_LARGEST))
        for name, data in found.items():
            if data is not None:
                self.recent.put(name, data)
                with self._lock:
                    self._ahead.pop(name, None)
        return found.get(checksum)

    def get_many(self, checksums: _t.Iterable[Checksum]) -> _t.Dict[Checksum, bytes]:
        """Those that are there.  All are in memory then."""
        names = list(dict.fromkeys(checksums))
        found = {name: data for name, data in ((name, self.held(name)) for name in names) if data is not None}
        if not self.store.remote:
            return {**found, **{name: data for name, data in ((name, self.store.get(name)) for name in names
                                                              if name not in found) if data is not None}}
        from .transfer import read_many     # only what is far away is read in batches
        missing = [name for name in names if name not in found]
        first = self.store.get_small(missing[:AHEAD_BUFFERS], AHEAD_LARGEST, AHEAD_BYTES)       # often that is all
        found.update((name, data) for name, data in first.items() if data is not None)
        rest = [name for n, name in enumerate(missing) if name not in found and (n >= AHEAD_BUFFERS or name in first)]
        for name, data in read_many(self.store, rest) if rest else ():
            data = self.store.get(name) if data is None else data
            if data is not None:
                found[name] = data
        return found

    def available(self, results: _t.Mapping[Checksum, str]) -> _t.Set[Checksum]:
        """Those of ``results`` (-> celltype) that the store has, with all their leaves.

        From a store that is far away small ones are fetched at once.
        """
        names, store = list(results), self.store
        if store.remote:
            found = store.get_small(names, INLINE_BYTES, AHEAD_BYTES)
            for name, data in found.items():
                if data is not None:
                    self.recent.put(name, data)
            with self._lock:
                if len(self._ahead) > KNOWN:
                    self._ahead.clear()
                self._ahead.update((name, None) for name, data in found.items() if data is None)
            there = set(found)
        else:
            there = {name for name, is_there in zip(names, store.has(names)) if is_there}
        indexed = [name for name in there if results[name] in _INDEXED]
        if indexed:
            leaves = self._leaves(indexed)
            missing = _missing(store, [leaf for name in leaves for leaf in leaves[name]])
            there -= {name for name in indexed if name not in leaves or not missing.isdisjoint(leaves[name])}
        self._note_held(there)
        return there

    def _leaves(self, indices: _t.Iterable[Checksum]) -> _t.Dict[Checksum, _t.List[Checksum]]:
        """The leaves of the indices that can be read."""
        from .celltypes import deep_checksums
        return {name: deep_checksums(data) for name, data in self.get_many(indices).items()}

    # --- what a job needs -----------------------------------------------------------------------------

    def note_stored(self, checksum: Checksum) -> None:
        """This is in the store now, so that nobody need ask for it."""
        if len(self._here) >= KNOWN:
            self._here = set()
        self._here.add(checksum)
        self._note_held((checksum,))

    def push(self, needs: _t.Sequence[Need]) -> _t.List[_t.Dict[Checksum, bytes]]:
        """For each (recipe, buffers, files) store what is missing; returns the small buffers, which travel inside the jobs."""
        if self._travels:
            return self._pack(needs)
        self._carry_inputs(needs)
        inlines, large, files = [], {}, {}
        for (recipe, buffers, paths), lacks in zip(needs, self._hold(needs)):
            lacks = {*lacks, *(name for name in recipe.inputs() if name in self.scratch)}
            held = {name: data for name, data in ((name, self.held(name)) for name in lacks) if data is not None}
            buffers = {**held, **buffers} if held else buffers
            inline: _t.Dict[Checksum, bytes] = {}
            total = 0
            for name, data in buffers.items():
                if len(data) <= INLINE_BYTES and total + len(data) <= INLINE_TOTAL:
                    inline[name] = data
                    total += len(data)
                else:
                    large[name] = data
            inlines.append(inline)
            files.update(paths)
        if large or files:
            self.push_buffers(large, files)
        return inlines

    def _pack(self, needs: _t.Sequence[Need]) -> _t.List[_t.Dict[Checksum, bytes]]:
        """For each job all that it needs, as far as it is in memory or in the store."""
        self._carry_inputs(needs)
        packs = []
        for recipe, buffers, _ in needs:
            pack = {**self.get_many(name for name in recipe.inputs() if name not in buffers), **buffers}
            indices = {name for celltype, _, name in recipe.pins.values() if celltype in _INDEXED and name in pack}
            if indices:
                from .celltypes import deep_checksums
                leaves = {leaf for name in indices for leaf in deep_checksums(pack[name])}
                pack.update(self.get_many(leaves - set(pack)))
            packs.append(pack)
        return packs

    def _hold(self, needs: _t.Sequence[Need]) -> _t.List[_t.Set[Checksum]]:
        """Ask for inputs that are only named, and for their leaves: what was asked for is not deleted for a while (see gc.py).

        Returns for each job what the store lacks of them, as far as it was asked.
        """
        from .references import index_leaves, is_deep_pin       # a hit pushes nothing
        now_s = time.monotonic()
        names: _t.Set[Checksum] = set()
        deep: _t.Set[Checksum] = set()
        for recipe, buffers, files in needs:
            for name, (_, _, checksum) in recipe.pins.items():
                if not (checksum is None or checksum in buffers or checksum in files or self._held_s.get(checksum, 0.0) > now_s):
                    names.add(Checksum(checksum))
                    if is_deep_pin(recipe, name):
                        deep.add(Checksum(checksum))
        if not names:
            return [set() for _ in needs]
        leaves = {name: index_leaves(data) for name, data in self.get_many(deep).items()} if deep else {}
        missing = _missing(self.store, names.union(*leaves.values()))
        self._note_held(name for name in names - missing if missing.isdisjoint(leaves.get(name, ())))
        if not missing:
            return [set() for _ in needs]
        return [missing.intersection(recipe.inputs()) | {leaf for name in recipe.inputs() for leaf in leaves.get(name, ()) if leaf in missing}
                for recipe, _, _ in needs]

    def note_gone(self, names: _t.Iterable[Checksum]) -> None:
        """The store lacks these, or some of their leaves: the next job that needs them asks anew."""
        for name in names:
            self._here.discard(name)
            self._held_s.pop(name, None)

    def _note_held(self, names: _t.Iterable[Checksum]) -> None:
        if len(self._held_s) >= KNOWN:
            self._held_s = {}
        self._held_s.update(dict.fromkeys(names, time.monotonic() + HELD_S))

    def push_buffers(self, buffers: _t.Mapping[Checksum, bytes], files: _t.Mapping[Checksum, str]) -> int:
        """Store these bytes, and the content of these files, where they are missing; returns how many were.

        Raises ``CorruptBufferError`` if a file no longer has the content that its checksum names.
        """
        from .transfer import push          # a hit pushes nothing
        missing = push(self.store, buffers, files, self._who)
        for name in (*buffers, *files):
            self.note_stored(name)
        return missing

    def _carry_inputs(self, needs: _t.Sequence[Need]) -> None:
        """Inputs that only a checksum names may be in the store of another stage."""
        wanted: _t.Set[Checksum] = set()
        given: _t.Dict[Checksum, bytes] = {}
        indices: _t.Set[Checksum] = set()
        for recipe, buffers, _ in needs:
            given.update(buffers)
            wanted.update(Checksum(name) for _, _, name in recipe.pins.values() if name is not None)
            indices.update(Checksum(name) for celltype, _, name in recipe.pins.values() if celltype in _INDEXED and name is not None)
        wanted -= set(given)
        others = [other for other in self._others() if other is not self] if wanted or indices else []
        if not others:
            return
        new = wanted - self._here           # what a look shows to be there, or is brought, need not be looked at again
        missing = _missing(self.store, new)
        found = self._carry(missing, others)
        self._here.update(new - missing, found)
        known = {**{name: given[name] for name in indices if name in given}, **self.get_many(indices & found)}
        if known:
            from .celltypes import deep_checksums
            leaves = {leaf for data in known.values() for leaf in deep_checksums(data)} - set(given) - self._here
            self._here.update(self._carry(_missing(self.store, leaves), others))

    def bring(self, names: _t.Collection[Checksum]) -> _t.Set[Checksum]:
        """Store those of ``names`` that another stage has, and return them."""
        return self._carry(set(names), [other for other in self._others() if other is not self]) if names else set()

    def _carry(self, names: _t.Set[Checksum], others: "_t.Sequence[Supply]") -> _t.Set[Checksum]:
        """Get these from the first that has them; returns those that were found."""
        from .transfer import carry         # only with several stages
        missing, gone = set(names), None
        for other in others:
            if not missing:
                break
            held = {name: data for name, data in ((name, other.held(name)) for name in missing) if data is not None}
            self.store.put_many(held.values())
            missing -= set(held)
            try:
                missing -= set(carry(missing, other.store, self.store, self._who))
            except ServiceError as exc:     # another one may have it
                gone = exc
        if missing and gone is not None:
            raise gone
        return set(names) - missing


def _missing(store, names: _t.Iterable[Checksum]) -> _t.Set[Checksum]:
    names = list(dict.fromkeys(names))
    return {name for name, there in zip(names, store.has(names)) if not there} if names else set()


class Recent:
    """The small buffers that were used last, up to ``limit`` bytes in all.  Safe from several threads."""

    def __init__(self, limit: int = 64 << 20, largest: int = 1 << 20):
        self._limit, self._largest, self._size = limit, largest, 0
        self._items: "collections.OrderedDict[str, bytes]" = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, checksum: str) -> _t.Optional[bytes]:
        """The buffer, or None."""
        with self._lock:
            data = self._items.get(checksum)
            if data is not None:
                self._items.move_to_end(checksum)
            return data

    def drop(self, checksum: _t.Optional[str]) -> None:
        """Do not keep it any more."""
        with self._lock:
            data = self._items.pop(checksum, None)
            self._size -= len(data) + 200 if data is not None else 0

    def put(self, checksum: str, data: bytes) -> None:
        """Keep ``data`` for a while, if it is small."""
        if len(data) > self._largest:
            return
        with self._lock:
            if checksum not in self._items:
                self._items[checksum] = data
                self._size += len(data) + 200       # about what an entry costs besides
                while self._size > self._limit:
                    self._size -= len(self._items.popitem(last=False)[1]) + 200
