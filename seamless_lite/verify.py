"""``verify``: compute a result again and compare it with the one that is recorded."""
import typing as _t

from . import differences
from .celltypes import DEEP, deserialize
from .checksum import Checksum
from .errors import CacheMissError, SeamlessError
from .transformation import Meta, Recipe

_TEXTS = frozenset(("bytes", "text", "str", "python", "ipython", "yaml"))
#: Larger results are compared by checksum only.
LARGEST = 1 << 28


class Verdict(_t.NamedTuple):
    """Whether the result that was ``recorded`` and the one that was ``computed`` now are ``equal``; true if so.

    ``lines`` say it to a person, with what differs.
    """
    equal: bool
    recorded: Checksum
    computed: Checksum
    lines: _t.Tuple[str, ...]

    def __bool__(self):
        return self.equal

    def __str__(self):
        return "\n".join(self.lines)

    __repr__ = __str__


def verify(session, recipe: Recipe, meta: Meta = Meta(), buffers: _t.Mapping[Checksum, bytes] = {},
           files: _t.Mapping[Checksum, str] = {}, log_fd: _t.Optional[int] = None) -> Verdict:
    """Run ``recipe`` although its result is known.  ``buffers`` and ``files``: inputs that may be missing in the store.

    What it prints goes to ``log_fd``.  Nothing that is stored is replaced; if another result comes out, both are stored,
    and the transformation is recorded as irreproducible.  Raises ``CacheMissError`` if there is no result, and what the job raises.
    """
    recorded = session.stores.results.get(recipe.checksum)
    if recorded is None:                    # where nothing is kept, the session knows what it ran
        several = session.stores.results.irreproducible(recipe.checksum)
        if several:
            session.doubt(recipe.checksum)
            raise CacheMissError("transformation %s is known to be irreproducible (%d results), so there is none to compare with"
                                 % (recipe.checksum, len(several)))
        known = session.lookup(recipe, value=False)
        if known is None:
            raise CacheMissError("there is no result of transformation %s to compare with; run it first" % recipe.checksum)
        recorded = known.result
    outcome = session.rerun(recipe, meta, buffers, files, log_fd)
    error = outcome.exception()
    if error is not None:
        raise error
    if outcome.result == recorded:
        return Verdict(True, recorded, recorded, ("equal: transformation %s gives %s again" % (recipe.checksum, recorded),))
    if outcome.buffer is not None:
        session.store.put(outcome.buffer)
    session.stores.results.put_many([(recipe.checksum, result, None) for result in (recorded, outcome.result)], again=True)
    session.doubt(recipe.checksum)
    before, after = _read(session, recorded), _read(session, outcome.result)
    lines = ["different: transformation %s has the result %s, and gave %s now" % (recipe.checksum, recorded, outcome.result)]
    return Verdict(False, recorded, outcome.result, (*lines, *("  " + line for line in _differences(before, after, recipe.output[1]))))


def _read(session, checksum: Checksum) -> _t.Optional[bytes]:
    data = session.supply.held(checksum)
    return session.store.get_small([checksum], LARGEST, LARGEST).get(checksum) if data is None else data


def _differences(before: _t.Optional[bytes], after: _t.Optional[bytes], celltype: str) -> _t.List[str]:
    if before is None or after is None:
        return ["what differs cannot be said, as the bytes of the %s result are not in the store" % (
            "recorded" if before is None else "new")]
    if celltype in DEEP:
        return differences.of_entries(differences.entries(before), differences.entries(after))
    if celltype in _TEXTS:
        return differences.of_bytes(before, after)
    try:
        return differences.of_values(deserialize(before, celltype), deserialize(after, celltype))
    except SeamlessError as exc:
        return ["the values cannot be compared: %s" % exc]
