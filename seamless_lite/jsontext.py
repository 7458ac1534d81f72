"""The two JSON layouts of buffers (compat/identity.md 2.1 and 2.2): one writer with two sets of leaves, two parsers.

*Plain* is what orjson writes (transformations, indexes, most celltypes), *mixed* what Python's ``json`` writes: ASCII,
other floats, NaN, big integers.  It is a writer of our own because ``json`` with an indent is slow Python code before
3.13 and has no orjson floats.
"""
import json
from json.encoder import encode_basestring as _string, encode_basestring_ascii as _ascii_string

from . import mixed
from .checksum import Checksum
from .errors import CelltypeError
from .mixed import MAX_DEPTH, key_text, plain_leaf, type_name


class HasBinary(Exception):
    """A value to be written as mixed JSON has bytes or an array in it, and thus is no JSON."""


class _Unwritable(Exception):
    """Why a part of a value cannot be written; ``path`` grows on the way out and says which part."""

    def __init__(self, reason):
        super().__init__(reason)
        self.path: list = []


# --- leaves

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
        return ("-" if value < 0 else "") + "0.0000" + mantissa.lstrip("-").replace(".", "")
    return "null" if text[-1] in "nf" else text         # nan, inf, -inf


def _mixed_float(value) -> str:
    text = float.__repr__(value)
    return text if text[-1] not in "nf" else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[text]


def _plain_other(value) -> str:
    """What is not exactly one of the types of JSON: subclasses of str and int are fine, others are not."""
    try:
        leaf = plain_leaf(value)
        if isinstance(value, (str, int)):
            return _PLAIN_LEAVES[type(leaf)](leaf)
        takes_mixed = True
    except ValueError:
        takes_mixed = mixed.is_binary(value)
    raise _Unwritable("is a %s: use what JSON has%s" % (type_name(value), ", or celltype 'mixed'" * takes_mixed))


def _mixed_other(value) -> str:
    if mixed.is_binary(value):
        raise HasBinary()
    try:
        value = plain_leaf(value)
    except ValueError as exc:
        raise _Unwritable(str(exc)) from None
    return _MIXED_LEAVES[type(value)](value)


def _mixed_key(key) -> str:
    return _ascii_string(key if type(key) is str else key_text(key))


_WORDS = {bool: {True: "true", False: "false"}.__getitem__, type(None): {None: "null"}.__getitem__}
_PLAIN_LEAVES = {**_WORDS, str: _string, Checksum: _string, int: _plain_int, float: _plain_float}
_MIXED_LEAVES = {**_WORDS, str: _ascii_string, Checksum: _ascii_string, int: int.__repr__, float: _mixed_float}


# --- writing

def _json_writer(leaves, other, key_string):
    """A function (value, newline) -> JSON text; ``newline`` is a newline and the indent of ``value``."""
    leaf_of = leaves.get

    def write(value, newline):
        leaf = leaf_of(type(value))
        if leaf is not None:
            return leaf(value)
        is_dict = isinstance(value, dict)
        if not is_dict and not isinstance(value, (list, tuple)):
            return other(value)
        if len(newline) > 2 * MAX_DEPTH - 1:
            raise _Unwritable("contains itself or is nested more than %d levels deep" % MAX_DEPTH)
        if not value:
            return "{}" if is_dict else "[]"
        return (write_dict if is_dict else write_list)(value, newline, newline + "  ")

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


def dumps(value, celltype: str = "plain") -> bytes:
    """``value`` as JSON: plain, but for the celltype "mixed".

    Raises ``CelltypeError``, which says where it fails, and ``HasBinary``.
    """
    write = _write_mixed if celltype == "mixed" else _write_plain
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
    raise cannot(value, celltype, reason)


def cannot(value, celltype: str, reason) -> CelltypeError:
    """The exception for a value that a celltype cannot hold."""
    return CelltypeError("a value of type %s cannot be written as celltype %r: %s"
                         % (type_name(value), celltype, reason))


# --- reading

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


def loads(data: bytes):
    """Read plain JSON; a strict parse.  Raises ``ValueError``."""
    return _decode_plain(data.decode("utf-8"))
