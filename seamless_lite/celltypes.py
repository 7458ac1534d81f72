"""Celltypes: how a Python value becomes a buffer, and a buffer a value (compat/identity.md 2 and 5).

``serialize`` and ``deserialize`` look up a pair of small functions, one pair per celltype.  What is JSON is written by
``jsontext.py``; values with arrays or bytes in them go on to ``mixed.py``.

Deep celltypes are plain JSON whose leaves are checksums of buffers of their own: ``pack_deep`` splits a
value into that index and its leaves, ``unpack_deep`` puts it together again.
"""
import json
import typing as _t

from . import jsontext, mixed
from .checksum import Checksum, is_checksum
from .errors import CacheMissError, CelltypeError
from .jsontext import cannot
from .mixed import type_name

#: Celltypes whose buffer is an index of other buffers (``module``: of texts).
DEEP = frozenset(("deepcell", "deepfolder", "folder", "module"))


# --- bytes with a name

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


# --- JSON, mixed and binary

def plain_dumps(value) -> bytes:
    """``value`` as plain JSON (compat/identity.md 2.1).  Raises ``CelltypeError``, which says where it fails."""
    return jsontext.dumps(value)


def plain_loads(data: bytes):
    """Read plain JSON; a strict parse.  Raises ``CelltypeError``."""
    return deserialize(data, "plain")


def _mixed_dumps(value) -> bytes:
    try:
        return jsontext.dumps(value, "mixed")
    except jsontext.HasBinary:
        return mixed.dumps(value)


def _read_mixed(data: bytes):
    if mixed.is_binary_buffer(data):
        return mixed.loads(data)
    text = data.decode("utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return mixed.bytes_array(data)


def _binary_dumps(value) -> bytes:
    return bytes(value) if isinstance(value, bytes) else mixed.dumps_array(value)


def _read_binary(data: bytes):
    value = _read_mixed(data)               # bytes and text are arrays, too
    if not data.startswith(mixed.NPY_MAGIC) and not mixed.is_binary(value):
        raise ValueError("it holds a %s instead of an array" % type_name(value))
    return value


# --- scalars, text, bytes

def _scalar(constructor):
    """The pair of functions for the celltype that is called like its ``constructor``."""
    celltype = constructor.__name__

    def dumps(value) -> bytes:
        try:
            number = constructor(value.decode("utf-8") if isinstance(value, bytes) else value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise cannot(value, celltype, exc) from None
        return jsontext.dumps(number, celltype)

    def read(data: bytes):
        value = jsontext.loads(data)
        return value if isinstance(value, constructor) else constructor(value)      # a bool counts as an int
    return dumps, read


def _str_dumps(value) -> bytes:
    return jsontext.dumps(value if isinstance(value, bool) else str(value), "str")


def _text_dumps(value) -> bytes:
    try:
        text = value.decode("utf-8") if isinstance(value, (bytes, bytearray)) else str(value)
        return (text.rstrip("\n") + "\n").encode("utf-8")
    except UnicodeError as exc:
        raise cannot(value, "text", exc) from None


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
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if hasattr(value, "tobytes"):
        if getattr(getattr(value, "dtype", None), "hasobject", False):
            raise cannot(value, "bytes", "it holds Python objects, give it a numeric dtype")
        return value.tobytes()
    return _text_dumps(value)[:-1]


def _read_bytes(data: bytes) -> Buffer:
    return data if type(data) is Buffer else Buffer(data)


# --- deep celltypes and checksums

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
        raise cannot(value, "checksum", exc) from None


def _read_checksum(data: bytes):
    """A bare checksum, or JSON with checksums for leaves.  (Seamless 1.x cannot read its own JSON form.)"""
    text = data.decode("utf-8").strip()
    return Checksum(text) if is_checksum(text) else _map_leaves(jsontext.loads(data), _as_checksum)


def _read_index(data: bytes):
    index = jsontext.loads(data)
    if not isinstance(index, (dict, list)):
        raise ValueError("it holds a %s instead of an index" % type_name(index))
    return _map_leaves(index, _as_checksum)


def pack_deep(value, celltype: str) -> _t.Tuple[bytes, _t.Dict[Checksum, bytes]]:
    """Split ``value`` into the buffer of its index and the buffers of its leaves.

    Leaves of a deepcell are written as ``mixed``, those of a folder or deepfolder (a dict path -> content)
    as ``bytes``; a leaf that is a str of 64 hexadecimal digits is a checksum already.  A module has no
    leaves.  Raises ``CelltypeError``.
    """
    if celltype == "module":
        return plain_dumps(value), {}
    leaf_type = _leaf_celltype(celltype)
    if leaf_type == "mixed":
        if not isinstance(value, (dict, list, tuple)):
            raise cannot(value, celltype, "a dict or a list is needed")
    else:
        if not isinstance(value, dict):
            raise cannot(value, celltype, "a dict of path: content is needed")
        for path, content in value.items():
            if isinstance(content, (dict, list, tuple)):
                raise cannot(value, celltype, "the content of %r is a %s; a file in a folder has the key "
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
        raise cannot(value, celltype, "it contains itself or is nested too deeply") from None


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
    _lookup(celltype)
    if celltype not in DEEP:
        raise CelltypeError("celltype %r is not deep; one of %s is" % (celltype, ", ".join(sorted(DEEP))))
    return "mixed" if celltype == "deepcell" else "bytes"


# --- the table

_TEXT, _INDEX = (_text_dumps, _read_text), (plain_dumps, _read_index)

# ipython and yaml are not parsed here: that takes packages that a worker need not have.
_CELLTYPES = {
    "plain": (plain_dumps, jsontext.loads), "mixed": (_mixed_dumps, _read_mixed),
    "binary": (_binary_dumps, _read_binary), "bytes": (_bytes_dumps, _read_bytes),
    "str": (_str_dumps, _scalar(str)[1]), "int": _scalar(int), "float": _scalar(float), "bool": _scalar(bool),
    "text": _TEXT, "python": (_text_dumps, _read_python), "ipython": _TEXT, "yaml": _TEXT,
    "checksum": (_checksum_dumps, _read_checksum),
    "deepcell": _INDEX, "deepfolder": _INDEX, "folder": _INDEX, "module": (plain_dumps, jsontext.loads),
}

#: All celltypes.
CELLTYPES = frozenset(_CELLTYPES)


def _lookup(celltype):
    """The functions that write and read ``celltype``."""
    try:
        return _CELLTYPES[celltype]
    except (KeyError, TypeError):
        pass
    import difflib                      # slow to import, and needed for nothing but this message
    name = getattr(celltype, "__name__", str(celltype)).lower()
    near = difflib.get_close_matches(name, sorted(CELLTYPES), 1, 0.5)
    raise CelltypeError("there is no celltype %r%s: the celltypes are %s" % (
        celltype, "; did you mean %r?" % near[0] if near else "", ", ".join(sorted(CELLTYPES))))


def serialize(value, celltype: str) -> bytes:
    """The buffer of ``value``.  Raises ``CelltypeError`` for an unknown celltype or a value that it cannot hold."""
    return _lookup(celltype)[0](value)


def deserialize(data: bytes, celltype: str):
    """The value of a buffer.  An array is read-only; the leaves of an index are ``Checksum``; ``bytes`` is a ``Buffer``.

    Raises ``CelltypeError`` for an unknown celltype or a buffer that does not hold one.
    """
    read = _lookup(celltype)[1]
    if not isinstance(data, bytes):
        data = bytes(memoryview(data))
    try:
        return read(data)
    except (TypeError, ValueError, OverflowError, RecursionError, MemoryError) as exc:
        raise CelltypeError("the buffer %s (%d bytes) cannot be read as celltype %r: %s"
                            % (Checksum.of(data), len(data), celltype, exc)) from None
