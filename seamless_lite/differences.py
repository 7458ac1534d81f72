"""What differs between two texts, indices or values, in a few short lines for a person."""
import typing as _t

from .celltypes import deserialize
from .checksum import Checksum, is_checksum
from .errors import SeamlessError

SHOWN, WIDTH = 8, 160
#: Of longer texts (lines) only the first difference is shown: finding all takes time that grows with the square.
MATCHED = 4000


def short(checksum) -> str:
    """The beginning of a checksum."""
    return checksum[:10] + "..."


def listed(names: _t.Sequence[str]) -> str:
    """'a', 'b' and 3 more."""
    more = len(names) - SHOWN
    return ", ".join("'%s'" % clipped(name) for name in names[:SHOWN]) + (" and %d more" % more if more > 0 else "")


def clipped(text: str) -> str:
    """One line, not too long."""
    text = "".join(letter if letter.isprintable() else " " for letter in text.expandtabs(4)).rstrip()
    return text if len(text) <= WIDTH else text[:WIDTH - 3] + "..."


def short_value(data: bytes, celltype: str) -> _t.Optional[str]:
    """The value of a buffer if that fits into half a line; else None."""
    if celltype in ("bytes", "binary"):
        return None
    try:
        text = " ".join(repr(deserialize(data, celltype)).split())
    except SeamlessError:
        return None
    return text if len(text) <= WIDTH // 2 else None


def of_lines(old: str, new: str) -> _t.List[str]:
    """``line 3:``, then what was there with "-" and what is there with "+"."""
    import difflib                          # slow to import, and a hit needs none
    before, after, found = old.splitlines(), new.splitlines(), []
    if len(before) + len(after) > MATCHED:
        first = next((n for n, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), min(len(before), len(after)))
        return ["line %d is the first of %d that differs (%d before)" % (first + 1, len(after), len(before)),
                *("%s %s" % (sign, clipped(line)) for sign, lines in zip("-+", (before, after)) for line in lines[first:first + 1])]
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            found += ["line %d:" % (j + 1), *("- " + clipped(line) for line in before[i:i_end]),
                      *("+ " + clipped(line) for line in after[j:j_end])]
    more = len(found) - 4 * SHOWN
    return (found[:4 * SHOWN] + ["... and %d lines more" % more] if more > 0 else found) or ["only the ends of lines"]


def entries(index: bytes) -> _t.Dict[str, Checksum]:
    """path -> checksum of what a deep index names; {} if it is none."""
    found: _t.Dict[str, Checksum] = {}

    def walk(value, where):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, "%s/%s" % (where, key) if where else key)
        elif isinstance(value, list):
            for n, item in enumerate(value):
                walk(item, "%s[%d]" % (where, n))
        elif is_checksum(value):
            found[where] = Checksum(value)
    try:
        walk(deserialize(index, "deepcell"), "")
    except SeamlessError:
        pass                                # no index
    return found


def of_entries(old: _t.Mapping[str, str], new: _t.Mapping[str, str]) -> _t.List[str]:
    """A line for each entry that changed, is new, or is gone."""
    lines = ["'%s': was %s, is %s" % (clipped(path), short(old[path]), short(new[path]))
             for path in new if path in old and old[path] != new[path]]
    lines += ["'%s': is new" % clipped(path) for path in new if path not in old]
    lines += ["'%s': is not there any more" % clipped(path) for path in old if path not in new]
    more = len(lines) - 2 * SHOWN
    return lines[:2 * SHOWN] + ["... and %d more" % more] if more > 0 else lines


def of_bytes(old: bytes, new: bytes) -> _t.List[str]:
    """The lines that differ, or where the first byte is that does."""
    try:
        return of_lines(old.decode("utf-8"), new.decode("utf-8"))
    except UnicodeDecodeError:
        low, high = 0, min(len(old), len(new))      # equal up to low; not equal, or at the end, at high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if old[low:middle] == new[low:middle] else (low, middle - 1)
        return ["%d bytes, and %d now; the first that differs is number %d" % (len(old), len(new), low + 1)]


def of_values(old, new, where: str = "") -> _t.List[str]:
    """Short hints at what differs between two values: keys, positions, elements of arrays."""
    title = where + ": " if where else ""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in new if key in old and not _same(old[key], new[key])]
        lines = [line for key in keys[:SHOWN] for line in of_values(old[key], new[key], "%s[%r]" % (where, key))]
        changes = [("is new", [key for key in new if key not in old]), ("is not there any more", [key for key in old if key not in new]),
                   ("differs too", keys[SHOWN:])]
        return lines + ["%skey %s: %s" % (title, listed(list(map(str, keys))), what) for what, keys in changes if keys]
    if isinstance(old, list) and isinstance(new, list):
        lines = ["%s%d items, and %d now" % (title, len(old), len(new))] if len(old) != len(new) else []
        at = [n for n, (one, other) in enumerate(zip(old, new)) if not _same(one, other)]
        lines += [line for n in at[:1] for line in of_values(old[n], new[n], "%s[%d]" % (where, n))]
        return lines + (["%s%d items more differ" % (title, len(at) - 1)] if len(at) > 1 else [])
    if hasattr(old, "dtype") and hasattr(new, "dtype"):
        return [title + _of_arrays(old, new)]
    if isinstance(old, str) and isinstance(new, str) and ("\n" in old or "\n" in new):
        return [title + line for line in of_lines(old, new)]
    return ["%swas %s, is %s" % (title, clipped(repr(old)), clipped(repr(new)))]


def _same(one, other) -> bool:
    """Whether two values are stored as the same."""
    if hasattr(one, "dtype") and hasattr(other, "dtype"):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)        # nan is nan, and -0.0 is not 0.0


def _of_arrays(old, new) -> str:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return "was an array of %s with the shape %s, is one of %s with the shape %s" % (old.dtype, old.shape, new.dtype, new.shape)
    differs = ~((old == new) | ((old != old) & (new != new)))       # nan is nan
    text = "%d of %d elements of the array differ" % (differs.sum(), old.size)
    if old.dtype.kind in "iuf" and differs.any():
        text += ", by up to %.3g" % abs(old.astype(float) - new.astype(float))[differs].max()
    return text
