"""Between stores and user code: buffers are fetched and become values, the result becomes buffers."""
import typing as _t

from .celltypes import DEEP, deep_checksums, deserialize, pack_deep, plain_loads, serialize, unpack_deep
from .checksum import Checksum, is_checksum
from .errors import CacheMissError, CelltypeError, JobError, SeamlessError
from .transfer import read_many


def fetch(store, checksum, what: str) -> bytes:
    """The buffer from ``store``; ``CacheMissError`` calls it ``what``."""
    data = store.get(checksum)
    if data is None:
        raise missing_error(checksum, what)
    return data


def missing_error(checksum, what: str) -> CacheMissError:
    """The error for a buffer that is nowhere."""
    return CacheMissError("%s (%s) is in none of the stores: compute or upload it again" % (what, checksum))


def read_value(store, data: bytes, celltype: str, sub, what: str):
    """What the code gets for a pin (identity.md 4.2)."""
    try:
        if celltype == "folder":
            here = dict(read_many(store, deep_checksums(data))) if store.remote else {}
            return unpack_deep(data, celltype, lambda leaf: here.get(leaf) or store.get(leaf))
        return _checksums(plain_loads(data)) if sub == "checksum" else deserialize(data, celltype)
    except (CacheMissError, CelltypeError) as exc:
        raise type(exc)("%s: %s" % (what, exc)) from None


def _checksums(value):
    if isinstance(value, dict):
        return {key: _checksums(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_checksums(item) for item in value]
    return Checksum(value) if is_checksum(value) else value


def store_value(store, value, celltype: str, label: str) -> Checksum:
    """Store what the code of ``label`` made; its leaves go first.  Raises ``JobError`` if it fits no buffer."""
    leaves: _t.Mapping[Checksum, bytes] = {}
    try:
        if celltype in DEEP:
            data, leaves = pack_deep(value, celltype)
        else:
            data = serialize(value, celltype)
    except CelltypeError as exc:
        raise JobError("the result of %s cannot be stored: %s" % (label, exc)) from None
    except Exception as exc:                # the value's own methods (__len__, __array__...) are user code
        raise JobError("the result of %s, a %s, cannot be stored as celltype '%s' (%s: %s)" % (
            label, type(value).__name__, celltype, type(exc).__name__, exception_text(exc))) from None
    if leaves:
        store.put_many(leaves.values())
    return store.put(data)


def exception_text(exc: BaseException) -> str:
    """``str(exc)``, whatever its own ``__str__`` does."""
    if isinstance(exc, SeamlessError) and exc.args:
        return str(exc.args[0])             # without the traceback and logs of the nested job
    try:
        return str(exc)
    except Exception as inner:              # a broken __str__ is the user's too
        return "(its text cannot be shown: __str__ raised %s)" % type(inner).__name__
