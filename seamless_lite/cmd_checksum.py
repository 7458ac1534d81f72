"""``seamless-checksum``, ``seamless-checksum-file`` and ``seamless-checksum-index``: names of files, without any store."""
import os
import typing as _t

from . import commandline, program
from .checksum import Checksum
from .errors import SeamlessError
from .inputs import Inputs, readable
from .placing import is_directory, sidecar_base, write_sidecars

_CODES = "0 done; 1 a file cannot be read or written"
_SAME = "\n\nThe checksum is the SHA-256 of the content; that of a .gz or .zst file is that of its decompressed content"


def checksum(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Print the checksums of files and directories."""
    parser = commandline.make_parser(
        "seamless-checksum", "Print the checksum of each file or directory." + _SAME + ",\nthat of a directory that of its index.",
        _CODES, ["seamless-checksum data.csv", "seamless-checksum data.csv.gz results/"], configured=False)
    parser.add_argument("files", nargs="+", metavar="FILE")
    return commandline.run(parser, argv, _print)


def _print(arguments) -> None:
    for path in arguments.files:
        found, _ = _read(path)
        program.write_output(found.encode("ascii") + b"\n")


def checksum_file(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Write ``FILE.CHECKSUM``."""
    parser = commandline.make_parser(
        "seamless-checksum-file", "Write the checksum of each FILE to FILE.CHECKSUM." + _SAME + "\n(for data.csv.gz, data.csv.CHECKSUM), "
        "and D.INDEX, the index of a directory, gets D.CHECKSUM.\nNothing is uploaded.", _CODES, ["seamless-checksum-file data.csv"],
        configured=False)
    parser.add_argument("files", nargs="+", metavar="FILE")
    return commandline.run(parser, argv, _write_file)


def _write_file(arguments) -> None:
    for path in arguments.files:
        if os.path.isdir(path):
            raise SeamlessError("'%s' is a directory; use seamless-checksum-index" % path)
        found, _ = _read(path)
        base = sidecar_base(path)
        write_sidecars(base, found, keep_index=base + ".INDEX" == path)


def checksum_index(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Write ``DIR.INDEX`` and ``DIR.CHECKSUM``."""
    parser = commandline.make_parser(
        "seamless-checksum-index", "Write the index of each directory DIR, the checksums of all files in it, to DIR.INDEX, and the "
        "checksum of\nthat to DIR.CHECKSUM. Hidden files are included; empty directories and links to directories are\nnot. "
        "Nothing is uploaded.", _CODES, ["seamless-checksum-index results/"], configured=False)
    parser.add_argument("directories", nargs="+", metavar="DIR")
    return commandline.run(parser, argv, _write_index)


def _write_index(arguments) -> None:
    for path in arguments.directories:
        if not os.path.isdir(path):
            raise SeamlessError("'%s' is not a directory; for a file, use seamless-checksum-file" % path)
        found, index = _read(path)
        write_sidecars(sidecar_base(path), found, index)


def _read(path: str) -> _t.Tuple[Checksum, bytes]:
    """(checksum, index if it is a directory) of what is at ``path``.  Raises ``SeamlessError``."""
    inputs = Inputs()
    try:
        found = inputs.add_directory(path.rstrip("/") or "/") if is_directory(path) else inputs.add_file(path)
    except OSError as exc:
        raise SeamlessError("'%s' cannot be read: %s" % (readable(exc.filename or path), exc.strerror)) from exc
    return found, inputs.buffers.get(found, b"")
