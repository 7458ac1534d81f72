"""Arrays: the binary half of the celltypes ``mixed`` and ``binary`` (compat/identity.md 2.2 to 2.4).

A *binary leaf* is a numpy array, a numpy struct scalar, or ``bytes``, which counts as a 0-d array of
type ``S``.  Alone it is written as one ``.npy`` file; inside dicts and lists the whole value becomes a
*composite*: a *form* (the types), a *skeleton* (the value with 0 for every binary leaf), and the data
of all leaves.  Values without a binary leaf are JSON and the business of ``celltypes``.

numpy is loaded here, by name, and only when an array is written or read: a value cannot be a numpy
object unless somebody has imported numpy.  ``bytes`` never need it, except that they are read back as a
0-d array as in Seamless 1.x; without numpy they are read back as ``bytes``.
"""
import enum
import importlib
import itertools
import json
import re
import struct
import sys
import typing as _t

from .errors import CelltypeError

NPY_MAGIC = b"\x93NUMPY"
COMPOSITE_MAGIC = b"\x94SEAMLESS-MIXED"
INNER_MAGIC = b"\x93SEAMLESS"
#: Deeper values are refused: it is what orjson, the writer of Seamless 1.x, accepts.
MAX_DEPTH = 254

_TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_KIND_NAMES = {"b": "boolean", "i": "integer", "u": "integer", "f": "number", "S": "string"}
_ALLOWED = "booleans, integers, floats up to 64 bits, bytes ('S'), and aligned structs of these"
_HINTS = {"U": "; encode text to bytes, or use a list of str", "O": "; give it a numeric dtype",
          "c": "; store the real and the imaginary part", "M": "; store it as integers",
          "m": "; store it as integers"}


def load_numpy():
    """The numpy module.  Raises ``CelltypeError`` if it is not installed."""
    try:
        return importlib.import_module("numpy")
    except ImportError:
        raise CelltypeError("an array needs numpy, which %s does not have: pip install numpy"
                            % (sys.executable or "this Python")) from None


def loaded_numpy():
    """The numpy module if somebody has imported it, else None: then no value is a numpy object."""
    return load_numpy() if sys.modules.get("numpy") is not None else None


def type_name(value) -> str:
    """How to call the type of ``value`` in a message."""
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else "%s.%s" % (cls.__module__, cls.__name__)


# --- kinds of leaves

def is_binary(value) -> bool:
    """True for a binary leaf."""
    if isinstance(value, bytes):
        return True
    np = loaded_numpy()
    return np is not None and isinstance(value, (np.ndarray, np.void))


def plain_leaf(value):
    """The None, bool, int, float or str that ``value`` (a subclass of these, or a numpy number) stands for.

    Raises ``ValueError`` with the end of a sentence ("is a set") if it stands for none.
    """
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, enum.Enum):
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            return int.__pos__(value)
        if isinstance(value, float):
            return float.__pos__(value)
        np = loaded_numpy()
        if np is not None and isinstance(value, np.generic):
            if value.dtype.kind in "iu":
                return int(value)
            if value.dtype.kind == "f":
                return float(value)
    raise ValueError("is a %s: use None, bool, int, float, str, bytes, arrays, and lists and dicts of these"
                     % type_name(value))


def key_text(key) -> str:
    """The text of a dict key as ``json`` writes it.  Raises ``TypeError`` for what cannot be one."""
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(key)
    raise TypeError("a key is a %s" % type_name(key))


# --- writing

def dumps(value) -> bytes:
    """Write a value that is a binary leaf or has one inside.  Raises ``CelltypeError``."""
    return _npy(value) if is_binary(value) else _composite(value)


def dumps_array(value) -> bytes:
    """Write ``numpy.array(value)`` as an ``.npy`` file.  Raises ``CelltypeError``."""
    try:
        array = load_numpy().array(value)
    except (ValueError, TypeError, OverflowError) as exc:
        raise CelltypeError("a %s cannot become an array: %s" % (type_name(value), exc)) from None
    return _npy(array)


def _npy(value) -> bytes:
    if isinstance(value, bytes):
        data = value or b"\0"               # numpy has no strings of length 0
        return _npy_header("|S%d" % len(data), False, ()) + data
    np = load_numpy()
    array, clean = _storable(value)
    fortran = bool(array.flags.f_contiguous and not array.flags.c_contiguous)
    header = _npy_header(np.lib.format.dtype_to_descr(clean.dtype), fortran, clean.shape)
    return b"".join((header, np.ascontiguousarray(clean.T if fortran else clean)))


def _npy_header(descr, fortran: bool, shape: tuple) -> bytes:
    """Written by hand: which blanks numpy.save pads with depends on its version."""
    text = "{'descr': %r, 'fortran_order': %r, 'shape': %r, }" % (descr, fortran, shape)
    if shape:
        text += " " * (21 - len(repr(shape[-1 if fortran else 0])))
    text += " " * (64 - (11 + len(text)) % 64) + "\n"
    try:
        return NPY_MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin-1")
    except (struct.error, UnicodeEncodeError):
        raise CelltypeError("the struct type of an array has too many field names, or names outside Latin-1: "
                            "rename or split the fields") from None


def _storable(value):
    """``value`` as an array, twice: as it is, and with the garbage in the padding of structs zeroed."""
    np = load_numpy()
    if type(value).__name__ == "MaskedArray":
        raise CelltypeError("a masked array cannot be stored: store its .data and its .mask")
    array = np.asarray(value)
    _check_dtype(array.dtype)
    if array.dtype.names is None:
        return array, array
    clean = np.zeros(array.shape, array.dtype)
    _copy_fields(array, clean)
    return array, clean


def _copy_fields(source, target):
    """Field by field down to the last, because numpy is free to copy the padding of a struct along."""
    for name in source.dtype.names:
        if target[name].dtype.names is None:
            target[name][...] = source[name]
        else:
            _copy_fields(source[name], target[name])


def _check_dtype(dtype):
    if dtype.subdtype is not None:
        _check_dtype(dtype.base)
    elif dtype.names is not None:
        for name in dtype.names:
            _check_dtype(dtype.fields[name][0])
        if not dtype.isalignedstruct or _aligned(dtype) != dtype:
            raise CelltypeError("an array of the unaligned struct %s cannot be stored: "
                                "make the type with numpy.dtype(..., align=True)" % (dtype,))
    elif not dtype.isnative:
        raise CelltypeError("an array of foreign byte order (%s) cannot be stored: "
                            "convert it with a.astype(a.dtype.newbyteorder('='))" % dtype.str)
    elif dtype.kind not in _KIND_NAMES or dtype.itemsize == 0 or (dtype.kind == "f" and dtype.itemsize > 8):
        raise CelltypeError("an array of type %s cannot be stored: an array may hold %s%s"
                            % (dtype, _ALLOWED, _HINTS.get(dtype.kind, "")))


def _aligned(dtype):
    """The same fields with the layout of a C compiler, which is the only one that a form can describe."""
    np = load_numpy()
    if dtype.subdtype is not None:
        return np.dtype((_aligned(dtype.base), dtype.shape))
    if dtype.names is None:
        return dtype
    return np.dtype([(name, _aligned(dtype.fields[name][0])) for name in dtype.names], align=True)


def _composite(value) -> bytes:
    leaves: list = [b""]
    form, skeleton = _describe(value, "the value", 0, leaves)
    name = form.pop("storage").encode("ascii")          # that of the whole stands in front of the form
    ends = list(itertools.accumulate(map(len, leaves)))
    try:
        form_json = json.dumps(form).encode("ascii")
        jsons = json.dumps([ends, skeleton]).encode("ascii")
    except (ValueError, RecursionError) as exc:
        raise _unwritable(exc) from None
    return b"".join([COMPOSITE_MAGIC, bytes([len(name)]), name, struct.pack("<I", len(form_json)), form_json,
                     INNER_MAGIC, struct.pack("<QQ", len(jsons), ends[-1]), jsons] + leaves)


def _unwritable(reason) -> CelltypeError:
    return CelltypeError("the value cannot be written as 'mixed': %s" % reason)


def _describe(value, where: str, depth: int, leaves: list):
    """(form, skeleton) of ``value``, whose binary leaves are appended to ``leaves``.

    A form with binary leaves below says so under "storage", its last key.
    """
    if is_binary(value):
        return {**_binary_form(value, where, leaves), "storage": "pure-binary"}, 0
    if not isinstance(value, (dict, list, tuple)):
        try:
            leaf = plain_leaf(value)
        except ValueError as exc:
            raise _unwritable("%s %s" % (where, exc)) from None
        return _TYPE_NAMES[type(leaf)], leaf
    if depth == MAX_DEPTH:
        raise CelltypeError("the value contains itself or is nested more than %d levels deep" % MAX_DEPTH)
    form: dict
    if isinstance(value, dict):
        texts = _key_texts(value, where)
        parts = {texts[key]: _describe(value[key], "%s[%r]" % (where, key), depth + 1, leaves)
                 for key in sorted(value, key=texts.__getitem__)}
        # Leaves are taken in the order of the sorted keys, but forms stand in the order of the value.
        forms = [parts[text][0] for text in texts.values()]
        skeleton = {text: parts[text][1] for text in texts.values()}
        form = {"type": "object", "properties": dict(zip(skeleton, forms))} if forms else {"type": "object"}
    else:
        items = [_describe(item, "%s[%d]" % (where, index), depth + 1, leaves) for index, item in enumerate(value)]
        forms, skeleton = [item[0] for item in items], [item[1] for item in items]
        identical = all(form == forms[0] for form in forms)
        form = {"type": "array", "items": forms if not identical else forms[0] if forms else None,
                "identical": identical, "shape": [len(forms)]}
    if any(_storage(part) is not None for part in forms):
        form["storage"] = "mixed-plain"
    return form, skeleton


def _key_texts(value: dict, where: str) -> dict:
    """The texts of the keys.  They are made before sorting, because the reader can sort nothing but text."""
    try:
        texts = {key: key_text(key) for key in value}
    except TypeError as exc:
        raise _unwritable("in %s %s" % (where, exc)) from None
    if len(set(texts.values())) < len(texts):
        raise _unwritable("%s has two keys that are the same as text" % where)
    return texts


def _binary_form(value, where: str, leaves: list) -> dict:
    if isinstance(value, bytes):
        data = bytes(value) or b"\0"
        leaves.append(data)
        items: dict = {"type": "string", "bytesize": len(data)}
        return {"type": "array", "items": items, "identical": True, "shape": [], "contiguous": True}
    try:
        array, clean = _storable(value)
    except CelltypeError as exc:
        raise CelltypeError("%s cannot be written as 'mixed': %s" % (where, exc)) from None
    leaves.append(clean.tobytes())
    form = _dtype_form(array.dtype)
    if isinstance(value, load_numpy().ndarray):
        form = {"type": "array", "items": form, "identical": True, "shape": list(array.shape),
                "contiguous": _is_contiguous(array)}
        if not form["contiguous"]:
            form["strides"] = list(array.strides)
    return form


def _is_contiguous(array) -> bool:
    """Stricter than numpy's flag: strides that nothing depends on (of dimensions of size 1) count too."""
    expected = array.itemsize
    for size, stride in zip(reversed(array.shape), reversed(array.strides)):
        if stride != expected:
            return False
        expected *= size
    return array.flags.c_contiguous


def _dtype_form(dtype) -> dict:
    if dtype.subdtype is not None:
        return {"type": "tuple", "items": _dtype_form(dtype.base), "identical": True, "shape": list(dtype.shape)}
    if dtype.names is not None:
        return {"type": "object", "properties": {name: _dtype_form(dtype.fields[name][0]) for name in dtype.names},
                "bytesize": dtype.itemsize, "order": list(dtype.names)}
    form = {"type": _KIND_NAMES[dtype.kind], "bytesize": dtype.itemsize}
    if form["type"] == "integer":
        form["unsigned"] = dtype.kind == "u"
    return form


# --- reading

_DAMAGE = (KeyError, IndexError, TypeError, AttributeError, SyntaxError, OverflowError, MemoryError, struct.error)


def is_binary_buffer(data: bytes) -> bool:
    """True if ``data`` starts as an ``.npy`` file or a composite does."""
    return data.startswith((NPY_MAGIC, COMPOSITE_MAGIC))


def loads(data: bytes):
    """Read what ``dumps`` wrote.  A single array is a read-only view of ``data``; structs, and what a composite holds, are copies.

    Raises ``ValueError`` with a reason if ``data`` is damaged, ``CelltypeError`` if numpy is missing.
    """
    try:
        return _read_npy(data) if data.startswith(NPY_MAGIC) else _Composite(data).value()
    except CelltypeError:
        raise
    except _DAMAGE as exc:
        raise ValueError("it is damaged (%s: %s)" % (type(exc).__name__, exc)) from None


def bytes_array(content: bytes):
    """``content`` as a read-only 0-d array of type ``S``, or as ``bytes`` where numpy is not installed."""
    try:
        np = load_numpy()
    except CelltypeError:
        return b"" if content == b"\0" else bytes(content)
    content = content or b"\0"
    return np.ndarray((), "S%d" % len(content), content)


def _read_npy(data: bytes):
    version = data[6]
    if version not in (1, 2, 3):
        raise ValueError("version %d of the npy format is unknown" % version)
    start, size = (10, "<H") if version == 1 else (12, "<I")
    length = struct.unpack(size, data[8:start])[0]
    offset = start + length
    # ast is needed for nothing else here, and a header is a Python literal by definition.
    import ast
    header = ast.literal_eval(data[start:offset].decode("utf-8" if version == 3 else "latin-1").strip())
    descr, shape = header["descr"], header["shape"]
    if shape == () and isinstance(descr, str) and re.fullmatch(r"[|<>]?S\d+", descr):
        content = data[offset:]
        if len(content) != int(descr.lstrip("|<>S")):
            raise ValueError("it is damaged (%d bytes of data for %s)" % (len(content), descr))
        return bytes_array(content)
    dtype = load_numpy().lib.format.descr_to_dtype(descr)
    return _array(dtype, shape, data, offset, len(data) - offset, "F" if header["fortran_order"] else "C")


def _array(dtype, shape, data: bytes, offset: int, size: int, order: str = "C"):
    """The array (0-d: the scalar) in ``size`` bytes of ``data``.  Raises ``ValueError``."""
    np = load_numpy()
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    count = 1
    for length in shape:
        count *= length
    if count * dtype.itemsize != size or min(shape, default=0) < 0:
        raise ValueError("it is damaged (%d bytes of data for %s elements of %d bytes)" % (size, count, dtype.itemsize))
    array = np.ndarray(shape, dtype, data, offset, order=order)
    if dtype.names:                         # a copy that may be written to, as in Seamless
        array = array.astype(_aligned(dtype))
    return array if array.shape or dtype.kind == "S" else array[()]


class _Composite:
    """One composite buffer while it is read: leaves are taken in the order in which they were written."""

    def __init__(self, data: bytes):
        self.data = data
        at = len(COMPOSITE_MAGIC) + 1
        storage = data[at:at + data[at - 1]]
        at += len(storage)
        form_end = at + 4 + struct.unpack_from("<I", data, at)[0]
        self.form = {**json.loads(data[at + 4:form_end].decode("utf-8")), "storage": "mixed-plain"}
        if storage != b"mixed-plain" or not data.startswith(INNER_MAGIC, form_end):
            raise ValueError("it is damaged (its parts are not those of a composite)")
        at = form_end + len(INNER_MAGIC)
        json_length, data_length = struct.unpack_from("<QQ", data, at)
        at += 16
        offsets, self.skeleton = json.loads(data[at:at + json_length].decode("utf-8"))
        self.start = at + json_length
        if len(data) != self.start + data_length or offsets[-1] != data_length:
            raise ValueError("it is damaged (%d bytes instead of %d)" % (len(data), self.start + data_length))
        self.pieces: _t.Iterator = iter(list(zip(offsets, offsets[1:])))

    def value(self):
        value = self._build(self.form, self.skeleton)
        if next(self.pieces, None) is not None:
            raise ValueError("it is damaged (more data than its form describes)")
        return value

    def _build(self, form, skeleton):
        storage = _storage(form)
        if storage is None:                 # no binary leaf below: the skeleton is the value
            return skeleton
        if storage == "pure-binary":
            return self._leaf(form)
        if form["type"] == "object":
            built = dict.fromkeys(skeleton)
            for key in sorted(skeleton):
                built[key] = self._build(form["properties"][key], skeleton[key])
            return built
        items = [form["items"]] * len(skeleton) if form["identical"] else form["items"]
        if len(items) != len(skeleton):
            raise ValueError("it is damaged (a list of %d items has %d forms)" % (len(skeleton), len(items)))
        return [self._build(item, value) for item, value in zip(items, skeleton)]

    def _leaf(self, form):
        begin, end = next(self.pieces, (0, -1))
        if not 0 <= begin <= end:
            raise ValueError("it is damaged (less data than its form describes)")
        is_array = form["type"] == "array"
        items, shape = (form["items"], tuple(form["shape"])) if is_array else (form, ())
        if items["type"] == "string" and shape == () and items["bytesize"] == end - begin:
            return bytes_array(self.data[self.start + begin:self.start + end])
        array = _array(_form_dtype(items), shape, self.data, self.start + begin, end - begin)
        # A copy, as in Seamless: functions write to it, 0-d stays 0-d, and without elements it has numpy's own strides,
        # which are hashed.
        return load_numpy().array(array) if is_array else array


def _storage(form):
    return form.get("storage") if isinstance(form, dict) else None


def _form_dtype(form: dict):
    np = load_numpy()
    kind = form["type"]
    if kind == "tuple":
        return np.dtype((_form_dtype(form["items"]), tuple(form["shape"])))
    if kind == "object":
        return np.dtype([(name, _form_dtype(form["properties"][name])) for name in form["order"]], align=True)
    letter = {"boolean": "b", "integer": "u" if form.get("unsigned") else "i", "number": "f", "string": "S"}[kind]
    return np.dtype("%s%d" % (letter, form["bytesize"]))
