"""What a stored buffer refers to: the pins of a transformation, the leaves of a deep index, and the closure of both.

    transformation -> code and inputs -> leaves of the deep ones
                   -> its result      -> leaves, if it is deep
"""
import itertools
import typing as _t

from .celltypes import deep_checksums
from .checksum import Checksum, is_checksum
from .errors import SeamlessError
from .transformation import Recipe

#: A longer buffer is not looked into: it is neither a transformation nor an index.
LARGEST = 1 << 28
_BATCH = 1000
_INDEXED = frozenset(("deepcell", "deepfolder", "folder", "checksum"))


class Closure(_t.NamedTuple):
    """``checksums``: all that was reached, the roots among them; ``missing``: those that the store lacks.

    ``transformations``: those reached whose buffers are there; ``results``: transformation -> result, as far as known;
    ``incomplete``: the indices that have missing leaves.
    """
    checksums: _t.Set[Checksum]
    missing: _t.Set[Checksum]
    transformations: _t.Set[Checksum]
    results: _t.Dict[Checksum, Checksum]
    incomplete: _t.Set[Checksum]


def recipe_of(data: bytes) -> _t.Optional[Recipe]:
    """The transformation that a buffer holds; None if it is something else."""
    if not data.startswith(b"{") or b'"__language__"' not in data or b'"__output__"' not in data:
        return None
    try:
        recipe = Recipe.from_bytes(data)
        celltypes = [recipe.output[1], *(pin[0] for pin in recipe.pins.values())]
    except (SeamlessError, TypeError, ValueError, IndexError):      # some other JSON with these words in it
        return None
    return recipe if all(isinstance(celltype, str) for celltype in celltypes) else None


def index_leaves(data: bytes) -> _t.List[Checksum]:
    """The leaves of a deep index, each once; none if the buffer is something else."""
    if data[:1] not in (b"{", b"["):
        return []
    try:
        return deep_checksums(data)
    except SeamlessError:
        return []


def is_deep_pin(recipe: Recipe, name: str) -> bool:
    """Whether the buffer of a pin is an index of others.  That of a directory of a command is "mixed", with a format."""
    celltype, subcelltype, _ = recipe.pins[name]
    formats = recipe.extra.get("__format__")
    form = formats.get(name) if isinstance(formats, dict) else None
    kinds = (celltype, subcelltype, form.get("celltype") if isinstance(form, dict) else None)
    return any(isinstance(kind, str) and kind in _INDEXED for kind in kinds)


def closure(roots: _t.Iterable, buffers, results=None) -> Closure:
    """All that ``roots`` refer to, with them: transformations, indices, or buffers that refer to nothing.

    With a result store ``results``, also the results of the transformations (whether or not their own buffers are
    there).  One buffer at a time is in memory, and the checksums of all.  What is missing is listed; damaged
    ones are missing.  Raises ``SeamlessError`` only if a store cannot be read at all.
    """
    walk = _Walk(buffers, results)
    names = map(Checksum, roots)
    for batch in iter(lambda: list(itertools.islice(names, _BATCH)), []):
        walk.add(batch)
    return walk.found


def makers(checksum: Checksum, buffers, results) -> _t.List[Checksum]:
    """The transformations that have this result; of a file or directory, those among whose result files it is."""
    found = [Checksum(name) for name in results.reverse(checksum)]
    page = None if found else results.recent()
    length = buffers.length(checksum) if page else None
    data = buffers.get(checksum) if length is not None and length <= LARGEST else None
    leaves = set(index_leaves(data or b"")) or {checksum}
    while page:
        rows = results.get_many([name for _, name in page if is_checksum(name)])
        far = buffers.get_small(rows, 1 << 20, 1 << 26) if buffers.remote else {}
        for name, result in rows.items():
            recipe = recipe_of(far.get(name) or buffers.peek(name) or b"")
            if recipe is None or recipe.output[1] in _INDEXED:
                data = buffers.peek(result)
                if data is not None and leaves.issubset(index_leaves(data)):
                    found.append(Checksum(name))
        page = results.recent(page[-1][0])
    return found


class _Walk:
    def __init__(self, buffers, results):
        self._buffers, self._results = buffers, results
        self._opened: _t.Set[Checksum] = set()
        self.found = Closure(set(), set(), set(), {}, set())

    def add(self, roots: _t.Sequence[Checksum]) -> None:
        results = dict(self._results.get_many(roots)) if self._results is not None else {}
        for root in roots:
            data = self._open(root)
            recipe = recipe_of(data) if data is not None else None
            result = results.get(root)
            if result is not None:
                self.found.results[root] = result
            if recipe is None:
                self._reach_leaves(root, data)
                self._reach((result,) if result is not None else (), deep=True)
                continue
            self.found.transformations.add(root)
            for name, pin in recipe.pins.items():
                self._reach((pin[2],) if pin[2] is not None else (), is_deep_pin(recipe, name))
            self._reach((result,) if result is not None else (), recipe.output[1] in _INDEXED)

    def _reach(self, names: _t.Iterable[Checksum], deep: bool = False) -> None:
        """Note ``names``, and look into those that are ``deep``."""
        names = list(names)
        for name in names if deep else ():
            self._reach_leaves(name, self._open(name))
        new = [name for name in names if name not in self.found.checksums]
        for start in range(0, len(new), _BATCH):
            part = new[start:start + _BATCH]
            self.found.missing.update(name for name, there in zip(part, self._buffers.has(part)) if not there)
        self.found.checksums.update(new)

    def _reach_leaves(self, index: Checksum, data: _t.Optional[bytes]) -> None:
        leaves = index_leaves(data) if data is not None else []
        self._reach(leaves)
        if not self.found.missing.isdisjoint(leaves):
            self.found.incomplete.add(index)

    def _open(self, name: Checksum) -> _t.Optional[bytes]:
        """The bytes, if they were not looked at before, and are not too many."""
        if name in self._opened:
            return None
        self._opened.add(name)
        self.found.checksums.add(name)
        length = self._buffers.length(name)
        data = self._buffers.get(name) if length is not None and length <= LARGEST else None
        if data is None and (length is None or length <= LARGEST):
            self.found.missing.add(name)
        return data
