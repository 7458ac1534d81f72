"""Celltypes: how a Python value becomes a buffer, and a buffer a value (compat/identity.md 2 and 5).

``serialize`` and ``deserialize`` are two tables of small functions, one per celltype.  Two JSON layouts
are written here, by one writer with two sets of leaves: *plain* (what orjson writes: transformations,
indexes, most celltypes) and that of *mixed* (what Python's ``json`` writes: ASCII, other floats, NaN, big
integers).  It is a writer of our own because ``json`` with an indent is slow Python code before 3.13 and has
no orjson floats.  Values with arrays or bytes in them go on to ``mixed.py``.

Deep celltypes are plain JSON whose leaves are checksums of buffers of their own: ``pack_deep`` splits a
value into that index and its leaves, ``unpack_deep`` puts it together again.
"""
import json
import typing as _t
from json.encoder import encode_basestring as _string, encode_basestring_ascii as _ascii_string

from . import mixed
from .checksum import Checksum, is_checksum
from .errors import CacheMissError, CelltypeError
from .mixed import MAX_DEPTH, key_text, plain_leaf, type_name

#: Celltypes whose buffer is an index of other buffers (``module``: of texts).
DEEP = frozenset(("deepcell", "deepfolder", "folder", "module"))


class _Unwritable(Exception):
    """Why a part of a value cannot be written; ``path`` grows on the way out and says which part."""

    def __init__(self, reason):
        super().__init__(reason)
        self.path: list = []


class _HasBinary(Exception):
    """A value for celltype ``mixed`` has bytes or an array in it, and thus is no JSON."""


# --- bytes with a name ------------------------------------------------------------------------------------

class Buffer(bytes):
    """Bytes with a name.  ``Buffer(data)`` holds ``data``; ``Buffer(value, celltype)`` serialises ``value``.

    It is what a function receives for a pin of celltype ``bytes``.
    """
    _checksum = None

    def __new__(cls, value=b"", celltype=None):
        if celltype is not None:
            value = serialize(value, celltype)
        return bytes.__new__(cls, value)

    @property
    def checksum(self) -> Checksum:
        """SHA-256 of the content; computed once."""
        if self._checksum is None:
            self._checksum = Checksum.of(self)
        return self._checksum

    def get_checksum(self) -> Checksum:
        """The same as ``checksum``; the name that Seamless 1.x uses."""
        return self.checksum

    @property
    def content(self) -> bytes:
        """The bytes, as plain ``bytes``."""
        return bytes(self)

    def get_value(self, celltype):
        """The value that these bytes stand for when read as ``celltype``.  Raises ``CelltypeError``."""
        return deserialize(self, celltype)


# --- JSON --------------------------------------------------------------------------------------

def _plain_int(value) -> str:
    if not -1 << 63 <= value < 1 << 64:
        raise _Unwritable("is an integer outside -2**63 ... 2**64-1 (celltype 'mixed' takes any)")
    return int.__repr__(value)


def _plain_float(value) -> str:
    """``repr`` but for the layout: positional down to 0.00001, no zero in front of an exponent's digits."""
    text = float.__repr__(value)
    if "e-" in text:
        mantissa, exponent = text.split("e-")
        if exponent != "05":
            return "%se-%d" % (mantissa, int(exponent))
        sign = "-" if value < 0 else ""
        return sign + "0.0000" + mantissa.lstrip("-").replace(".", "")
    return "null" if text[-1] in "nf" else text         # nan, inf, -inf


def _mixed_float(value) -> str:
    text = float.__repr__(value)
    return text if text[-1] not in "nf" else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[text]


def _bool(value) -> str:
    return "true" if value else "false"


def _null(value) -> str:
    return "null"


def _mixed_key(key) -> str:
    return _ascii_string(key if type(key) is str else key_text(key))


def _plain_other(value) -> str:
    """What is not exactly one of the types of JSON: subclasses of str and int are fine, others are not."""
    cure = ""
    try:
        leaf = plain_leaf(value)
        if isinstance(value, (str, int)):
            return _PLAIN_LEAVES[type(leaf)](leaf)
        cure = ", or celltype 'mixed'"
    except ValueError:
        if mixed.is_binary(value):
            cure = ", or celltype 'mixed'"
    raise _Unwritable("is a %s: use what JSON has%s" % (type_name(value), cure))


def _mixed_other(value) -> str:
    if mixed.is_binary(value):
        raise _HasBinary()
    try:
        value = plain_leaf(value)
    except ValueError as exc:
        raise _Unwritable(str(exc)) from None
    return _MIXED_LEAVES[type(value)](value)


_PLAIN_LEAVES = {str: _string, Checksum: _string, bool: _bool, type(None): _null,
                 int: _plain_int, float: _plain_float}
_MIXED_LEAVES = {str: _ascii_string, Checksum: _ascii_string, bool: _bool, type(None): _null,
                 int: int.__repr__, float: _mixed_float}


def _deeper(newline: str) -> str:
    if len(newline) > 2 * MAX_DEPTH - 1:
        raise _Unwritable("contains itself or is nested more than %d levels deep" % MAX_DEPTH)
    return newline + "  "


def _json_writer(leaves, other, key_string):
    """A function (value, newline) -> JSON text; ``newline`` is a newline and the indent of ``value``."""
    leaf_of = leaves.get

    def write(value, newline):
        leaf = leaf_of(type(value))
        if leaf is not None:
            return leaf(value)
        if isinstance(value, dict):
            inner = _deeper(newline)
            return write_dict(value, newline, inner) if value else "{}"
        if isinstance(value, (list, tuple)):
            inner = _deeper(newline)
            return write_list(value, newline, inner) if value else "[]"
        return other(value)

    # Both loops look up leaves themselves: a call less for each, and most items are leaves.
    def write_list(value, newline, inner):
        parts = []
        try:
            for item in value:
                leaf = leaf_of(type(item))
                parts.append(leaf(item) if leaf is not None else write(item, inner))
        except _Unwritable as exc:
            exc.path.append(len(parts))
            raise
        return "[" + inner + ("," + inner).join(parts) + newline + "]"

    def write_dict(value, newline, inner):
        parts, key = [], None
        try:
            for key in sorted(value):
                item = value[key]
                leaf = leaf_of(type(item))
                parts.append(key_string(key) + ": " + (leaf(item) if leaf is not None else write(item, inner)))
        except _Unwritable as exc:
            exc.path.append(key)
            raise
        except TypeError:               # from sorted or key_string
            bad = next((key for key in value if not isinstance(key, str)), key)
            raise _Unwritable("has the key %.60r, which is not a str" % (bad,)) from None
        return "{" + inner + ("," + inner).join(parts) + newline + "}"

    return write


_write_plain = _json_writer(_PLAIN_LEAVES, _plain_other, _string)
_write_mixed = _json_writer(_MIXED_LEAVES, _mixed_other, _mixed_key)


def _cannot(value, celltype: str, reason) -> CelltypeError:
    return CelltypeError("a value of type %s cannot be written as celltype %r: %s"
                         % (type_name(value), celltype, reason))


def _to_bytes(write, value, celltype: str) -> bytes:
    try:
        return (write(value, "\n") + "\n").encode("utf-8")
    except _Unwritable as exc:
        path = exc.path[::-1]
        where = "".join("[%r]" % key for key in path[:8]) + ("[...]" if len(path) > 8 else "")
        reason = "%s %s" % ("its item " + where if path else "it", exc)
    except UnicodeEncodeError as exc:
        reason = "it has text that is not Unicode (a lone surrogate, %r)" % exc.object[exc.start]
    except (ValueError, RecursionError) as exc:     # an integer with too many digits; no stack left
        reason = str(exc)
    raise _cannot(value, celltype, reason)


def plain_dumps(value) -> bytes:
    """``value`` as plain JSON (compat/identity.md 2.1).  Raises ``CelltypeError``, which says where it fails."""
    return _to_bytes(_write_plain, value, "plain")


def plain_loads(data: bytes):
    """Read plain JSON; a strict parse.  Raises ``CelltypeError``."""
    return deserialize(data, "plain")


def _refuse(text):
    raise ValueError("%s is not JSON" % text)


def _read_int(text):
    """As orjson reads numbers: integers beyond 64 bits as floats, and none that is infinite."""
    if len(text) <= 20:                 # so long are the longest that fit into 64 bits
        value = int(text)
        if -1 << 63 <= value < 1 << 64:
            return value
    return _read_float(text)


def _read_float(text):
    value = float(text)
    if value - value != 0:
        raise ValueError("the number %.30s is too large" % text)
    return value


_decode_plain = json.JSONDecoder(parse_constant=_refuse, parse_int=_read_int, parse_float=_read_float).decode
_decode_mixed = json.JSONDecoder().decode


def _read_plain(data: bytes):
    return _decode_plain(data.decode("utf-8"))


# --- mixed and binary --------------------------------------------------------------------------

def _mixed_dumps(value) -> bytes:
    try:
        return _to_bytes(_write_mixed, value, "mixed")
    except _HasBinary:
        return mixed.dumps(value)


def _read_mixed(data: bytes):
    if mixed.is_binary_buffer(data):
        return mixed.loads(data)
    text = data.decode("utf-8")
    try:
        return _decode_mixed(text)
    except json.JSONDecodeError:
        return mixed.bytes_array(data)


def _binary_dumps(value) -> bytes:
    return bytes(value) if isinstance(value, bytes) else mixed.dumps_array(value)


def _read_binary(data: bytes):
    if not data.startswith(mixed.NPY_MAGIC):
        raise ValueError("it is not an array in npy format")
    return mixed.loads(data)


# --- scalars, text, bytes, checksums -----------------------------------------------------------

def _scalar_writer(constructor, celltype):
    def dumps(value) -> bytes:
        try:
            number = constructor(value.decode("utf-8") if isinstance(value, bytes) else value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise _cannot(value, celltype, exc) from None
        return _to_bytes(_write_plain, number, celltype)
    return dumps


def _str_dumps(value) -> bytes:
    return _to_bytes(_write_plain, value if isinstance(value, bool) else str(value), "str")


def _scalar_reader(constructor):
    def read(data: bytes):
        value = _read_plain(data)
        if isinstance(value, constructor):      # a bool counts as an int
            return value
        return constructor(value)
    return read


def _text_dumps(value) -> bytes:
    try:
        text = value.decode("utf-8") if isinstance(value, (bytes, bytearray)) else str(value)
        return (text.rstrip("\n") + "\n").encode("utf-8")
    except UnicodeError as exc:
        raise _cannot(value, "text", exc) from None


def _read_text(data: bytes) -> str:
    return data.decode("utf-8").rstrip("\n")


def _read_python(data: bytes) -> str:
    text = _read_text(data)
    try:
        # 0x400 is ast.PyCF_ONLY_AST: a parse, nothing is compiled or run.
        compile(text, "<python>", "exec", flags=0x400, dont_inherit=True)
    except SyntaxError as exc:
        raise ValueError("it is not Python %s" % exc) from None
    return text


def _bytes_dumps(value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bytearray):
        return bytes(value)
    if hasattr(value, "tobytes"):
        if getattr(getattr(value, "dtype", None), "hasobject", False):
            raise _cannot(value, "bytes", "it holds Python objects, give it a numeric dtype")
        return value.tobytes()
    return _text_dumps(value)[:-1]


def _read_bytes(data: bytes) -> Buffer:
    return data if type(data) is Buffer else Buffer(data)


# --- deep celltypes and checksums --------------------------------------------------------------

def _map_leaves(value, function, where: str = ""):
    """``value`` with ``function(leaf, where)`` for each leaf; tuples become lists."""
    if isinstance(value, dict):
        return {key: _map_leaves(item, function, "%s[%r]" % (where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_leaves(item, function, "%s[%d]" % (where, index)) for index, item in enumerate(value)]
    return function(value, where)


def _as_checksum(leaf, where: str) -> Checksum:
    if not is_checksum(leaf):
        raise CelltypeError("%s is %.80r, which is not a checksum (64 hexadecimal digits)" % (where or "it", leaf))
    return Checksum(leaf)


def _checksum_dumps(value) -> bytes:
    try:
        return plain_dumps(_map_leaves(value, _as_checksum))
    except (CelltypeError, RecursionError) as exc:
        raise _cannot(value, "checksum", exc) from None


def _read_checksum(data: bytes):
    """A bare checksum, or JSON with checksums for leaves.  (Seamless 1.x cannot read its own JSON form.)"""
    text = data.decode("utf-8").strip()
    return Checksum(text) if is_checksum(text) else _map_leaves(_read_plain(data), _as_checksum)


def _read_index(data: bytes):
    index = _read_plain(data)
    if not isinstance(index, (dict, list)):
        raise ValueError("it holds a %s instead of an index" % type_name(index))
    return _map_leaves(index, _as_checksum)


def pack_deep(value, celltype: str) -> _t.Tuple[bytes, _t.Dict[Checksum, bytes]]:
    """Split ``value`` into the buffer of its index and the buffers of its leaves.

    Leaves of a deepcell are written as ``mixed``, those of a folder or deepfolder (a dict path -> content)
    as ``bytes``; a leaf that is a str of 64 hexadecimal digits is a checksum already.  A module has no
    leaves.  Raises ``CelltypeError``.
    """
    _lookup(_WRITERS, celltype)
    if celltype == "module":
        return plain_dumps(value), {}
    leaf_type = _leaf_celltype(celltype)
    if not isinstance(value, dict) and (leaf_type == "bytes" or not isinstance(value, (list, tuple))):
        raise _cannot(value, celltype, "a dict of path: content is needed" if leaf_type == "bytes"
                      else "a dict or a list is needed")
    if leaf_type == "bytes":
        for path, content in value.items():
            if isinstance(content, (dict, list, tuple)):
                raise _cannot(value, celltype, "the content of %r is a %s; a file in a folder has the key "
                              "'folder/file'" % (path, type_name(content)))
    leaves: _t.Dict[Checksum, bytes] = {}

    def pack(leaf, where):
        if is_checksum(leaf):
            return Checksum(leaf)
        try:
            data = serialize(leaf, leaf_type)
        except CelltypeError as exc:
            raise CelltypeError("the leaf %s of a %s: %s" % (where, celltype, exc)) from None
        checksum = Checksum.of(data)
        leaves[checksum] = data
        return checksum

    try:
        return plain_dumps(_map_leaves(value, pack)), leaves
    except RecursionError:
        raise _cannot(value, celltype, "it contains itself or is nested too deeply") from None


def unpack_deep(index: bytes, celltype: str, get: _t.Callable[[Checksum], _t.Optional[bytes]]):
    """The value that ``pack_deep`` split: every leaf fetched with ``get`` and read.

    Contents of a folder or deepfolder are ``bytes``.  Raises ``CelltypeError``, and ``CacheMissError`` for
    a leaf of which ``get`` returns None.
    """
    value = deserialize(index, celltype)
    if celltype == "module":
        return value
    leaf_type = _leaf_celltype(celltype)

    def unpack(checksum, where):
        data = get(checksum)
        if data is None:
            raise CacheMissError("the buffer %s, which is %s of a %s, is in none of the stores"
                                 % (checksum, where, celltype))
        return data if leaf_type == "bytes" else deserialize(data, leaf_type)

    return _map_leaves(value, unpack)


def deep_checksums(index: bytes) -> _t.List[Checksum]:
    """The checksums in the index of a deepcell, deepfolder or folder, each once.  Raises ``CelltypeError``."""
    found: _t.Dict[Checksum, None] = {}
    _map_leaves(deserialize(index, "deepcell"), lambda checksum, where: found.setdefault(checksum))
    return list(found)


def _leaf_celltype(celltype: str) -> str:
    if celltype not in DEEP:
        raise CelltypeError("celltype %r is not deep; one of %s is" % (celltype, ", ".join(sorted(DEEP))))
    return "mixed" if celltype == "deepcell" else "bytes"


# --- the two tables ----------------------------------------------------------------------------

_WRITERS = {
    "plain": plain_dumps, "mixed": _mixed_dumps, "binary": _binary_dumps, "bytes": _bytes_dumps,
    "str": _str_dumps, "int": _scalar_writer(int, "int"), "float": _scalar_writer(float, "float"),
    "bool": _scalar_writer(bool, "bool"),
    "text": _text_dumps, "python": _text_dumps, "ipython": _text_dumps, "yaml": _text_dumps,
    "checksum": _checksum_dumps,
    "deepcell": plain_dumps, "deepfolder": plain_dumps, "folder": plain_dumps, "module": plain_dumps,
}

# ipython and yaml are not parsed here: that takes packages that a worker need not have.
_READERS = {
    "plain": _read_plain, "mixed": _read_mixed, "binary": _read_binary, "bytes": _read_bytes,
    "str": _scalar_reader(str), "int": _scalar_reader(int), "float": _scalar_reader(float),
    "bool": _scalar_reader(bool),
    "text": _read_text, "python": _read_python, "ipython": _read_text, "yaml": _read_text,
    "checksum": _read_checksum,
    "deepcell": _read_index, "deepfolder": _read_index, "folder": _read_index, "module": _read_plain,
}

#: All celltypes.
CELLTYPES = frozenset(_WRITERS)


def _lookup(table, celltype):
    try:
        return table[celltype]
    except (KeyError, TypeError):
        pass
    import difflib                      # slow to import, and needed for nothing but this message
    name = getattr(celltype, "__name__", str(celltype)).lower()
    near = difflib.get_close_matches(name, sorted(CELLTYPES), 1, 0.5)
    raise CelltypeError("there is no celltype %r%s: the celltypes are %s" % (
        celltype, "; did you mean %r?" % near[0] if near else "", ", ".join(sorted(CELLTYPES))))


def serialize(value, celltype: str) -> bytes:
    """The buffer of ``value``.  Raises ``CelltypeError`` for an unknown celltype or a value that it cannot hold."""
    return _lookup(_WRITERS, celltype)(value)


def deserialize(data: bytes, celltype: str):
    """The value of a buffer.  Arrays are read-only; the leaves of an index are ``Checksum``; ``bytes`` is a ``Buffer``.

    Raises ``CelltypeError`` for an unknown celltype or a buffer that does not hold one.
    """
    read = _lookup(_READERS, celltype)
    if not isinstance(data, bytes):
        data = bytes(memoryview(data))
    try:
        return read(data)
    except (TypeError, ValueError, OverflowError, RecursionError, MemoryError) as exc:
        raise CelltypeError("the buffer %s (%d bytes) cannot be read as celltype %r: %s"
                            % (Checksum.of(data), len(data), celltype, exc)) from None
