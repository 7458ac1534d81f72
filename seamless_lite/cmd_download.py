"""``seamless-download``: files and directories out of a store, by their sidecars or checksums.

    arguments -> Items (a file, or the index of a directory or of a part of one) -> what is here already (kept, verified or
    replaced) -> the rest, written aside or linked, and renamed -> sidecars
"""
import contextlib
import io
import os
import re
import time
import typing as _t

from . import commandline, placing, program
from .celltypes import plain_dumps
from .checksum import Checksum, is_checksum
from .cmd_upload import add_ways, check_ways, in_store
from .compressed import compress, split_compression
from .confirm import confirm
from .durable import remove_file
from .errors import CacheMissError, CelltypeError, ChecksumError, CorruptBufferError, SeamlessError, UsageError
from .inputs import parse_index, read_checksum_file, readable
from .outputs import Results, is_special, named, write_aside
from .progress import Progress
from .supply import Supply

PROGRAM = "seamless-download"
DESCRIPTION = """\
Get files and directories from the buffer store that the configuration names, or from folders given by --destination.

  NAME, NAME.CHECKSUM     the file that NAME.CHECKSUM names; if there is a NAME.INDEX, the directory
  NAME.INDEX, NAME/       the directory, also if only NAME.CHECKSUM is here
  DIR/PART                one file or directory of the directory DIR
  64 hexadecimal digits   the buffer with this checksum"""
EXAMPLES = ("seamless-download data.csv results", "seamless-download results/2024/table.csv",
            "seamless-download -o here --directory CHECKSUM", "seamless-download --destination /data/buffers --hardlink results")
CODES = "0 all is here; 1 a buffer is missing or damaged, or something here is in the way"
ENVIRONMENT = """\
  SEAMLESS_MAX_DOWNLOAD_FILES (2000), SEAMLESS_MAX_DOWNLOAD_SIZE (500 MB)   more is only downloaded after a question"""
#: What was being written when an earlier download was killed; older than this it is removed.
_ASIDE = re.compile(r"\.(.{1,40})-[0-9a-f]{8}\Z", re.DOTALL)
STALE_S = 3600.0


def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    parser = commandline.make_parser(PROGRAM, DESCRIPTION, CODES, EXAMPLES, ENVIRONMENT)
    commandline.add_storage(parser)
    parser.add_argument("-o", "--output", metavar="PATH", action="append", default=[], dest="outputs",
                        help="write the first NAME to the first PATH, and so on; those without one get their own name")
    parser.add_argument("--stdout", action="store_true", help="write the content of all files to standard output instead")
    parser.add_argument("--directory", action="store_true", help="checksums, and names without .INDEX, stand for directories")
    parser.add_argument("--index", action="store_true", help="of directories, only DIR.INDEX and a .CHECKSUM for each file")
    parser.add_argument("--destination", metavar="DIR", action="append", default=[],
                        help="look in this buffer folder; no configuration is read (may be repeated)")
    add_ways(parser, "--softlink", "a store that is a folder on this machine: how files get here (default: --copy). A linked file "
             "must never be written to", "--symlink")
    parser.add_argument("--incremental", action="store_true", help="with --hardlink: trust files that are linked already")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dest-skip", action="store_true", help="keep files that are here already, unread (default)")
    group.add_argument("--dest-verify", action="store_true", help="read files that are here already, and fail if one differs")
    group.add_argument("--dest-repair", action="store_true", help="read files that are here already, and replace those that differ")
    parser.add_argument("--dest-rm", action="store_true", help="remove files from an existing directory that its index lacks")
    parser.add_argument("--compression", choices=("zst", "gz"), help="compress all files, and add this suffix to their names")
    commandline.add_answers(parser)
    parser.add_argument("names", nargs="+", metavar="NAME|CHECKSUM")
    return commandline.run(parser, argv, lambda arguments: _Download(arguments).run())


class _Item(_t.NamedTuple):
    """What an argument asks for.  ``index``: of a directory, or of a part of one, relative path -> checksum."""
    name: str
    target: str
    checksum: Checksum
    index: _t.Optional[_t.Dict[str, Checksum]] = None
    data: bytes = b""           # the index as it is stored; b"" for a part


class _Buffers(Results):
    """Reads buffers from ``store``."""

    def __init__(self, store):
        super().__init__(Supply(lambda: store), None, PROGRAM)

    def open(self, checksum, progress=None):
        file = self.fetch(checksum, progress)
        if file is None:
            raise CacheMissError("the buffer %s is damaged in the store, or was just deleted; upload it again, with --dest-repair" % checksum)
        return file


class _Download:
    """One invocation."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.suffix = "." + arguments.compression if arguments.compression else ""
        self._named: _t.Dict[_t.Tuple[str, bool], _t.Any] = {}

    def run(self) -> int:
        arguments = self.arguments
        check_ways(arguments)
        if len(arguments.outputs) > len(arguments.names):
            raise UsageError("there are more --output than names; give one for each name")
        if arguments.stdout and (arguments.outputs or arguments.way):
            raise UsageError("--stdout writes no files, so --output, --copy, --hardlink and --symlink mean nothing; leave them out")
        return in_store(arguments, arguments.destination, PROGRAM, self.download, writable=False)

    def download(self, store) -> int:
        self.store, self.buffers = store, _Buffers(store)
        store.strict = False                # of several sources some may be dead
        if self.arguments.way in ("hardlink", "symlink") and store.remote:
            raise UsageError("--%s needs a store that is a folder on this machine" % self.arguments.way)
        outputs = self.arguments.outputs + [None] * len(self.arguments.names)
        try:
            items = [self.item(name, output) for name, output in zip(self.arguments.names, outputs)]
            return self.print(items) if self.arguments.stdout else self.write(items)
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise SeamlessError("%s: %s" % ("'%s'" % readable(exc.filename) if exc.filename else "a temporary file (in TMPDIR)", exc.strerror)) from exc

    # --- what to download -----------------------------------------------------------------------------

    def item(self, name: str, output: _t.Optional[str]) -> _Item:
        """What the argument ``name`` stands for.  Raises ``SeamlessError``."""
        base, is_index = name.rstrip("/") or name, name.endswith("/")
        for suffix in (".CHECKSUM", ".INDEX"):
            if base.endswith(suffix) and os.path.basename(base) != suffix:
                base, is_index = base[:-len(suffix)], is_index or suffix == ".INDEX"
                break
        target = (output or base).rstrip("/") or "/"
        found = self.named(base, is_index)
        if found is not None:
            return _Item(name, target, *found)
        parts = base.split("/")
        for n in range(len(parts) - 1, 0, -1):
            found = self.named("/".join(parts[:n]), True)
            if found is not None:
                return self.part(name, target, found[1], "/".join(parts[n:]))
        raise SeamlessError("'%s' is no checksum, and there is no %s.CHECKSUM, nor the .CHECKSUM of a directory that it is part of"
                            % (name, base))

    def named(self, base: str, is_index: bool):
        """(checksum, index or None, its bytes) of ``base``; None if it is neither a checksum nor has a sidecar."""
        if (base, is_index) not in self._named:
            self._named[base, is_index] = self._find(base, is_index)
        return self._named[base, is_index]

    def _find(self, base: str, is_index: bool):
        has_index = os.path.isfile(base + ".INDEX") and bool(os.path.basename(base))
        checksum = None
        if os.path.isfile(base + ".CHECKSUM") and os.path.basename(base):
            checksum = read_checksum_file(base + ".CHECKSUM")
            is_index = is_index or os.path.isdir(base)
        elif is_checksum(base):
            checksum = Checksum(base)
        if checksum is None and not has_index:
            return None
        if not (is_index or has_index or self.arguments.directory):
            return checksum, None, b""
        if has_index:
            with open(base + ".INDEX", "rb") as file:
                data = file.read()
            if checksum is not None and Checksum.of(data) != checksum:
                raise SeamlessError("%s.INDEX is not the index that %s.CHECKSUM names; remove the wrong one" % (base, base))
        else:
            data = self.store.get(checksum)
            if data is None:
                raise CacheMissError("the index %s of the directory '%s' is not in the store" % (checksum, base))
        try:
            return Checksum.of(data), parse_index(data, "%s.INDEX" % base), data
        except (CelltypeError, ChecksumError):
            raise SeamlessError("'%s' is not a directory: %s is not the index of one" % (base, Checksum.of(data))) from None

    @staticmethod
    def part(name: str, target: str, index: _t.Mapping[str, Checksum], path: str) -> _Item:
        """One file or directory of a directory."""
        path = os.path.normpath(path)
        if path in index:
            return _Item(name, target, index[path])
        inside = {entry[len(path) + 1:]: checksum for entry, checksum in index.items() if entry.startswith(path + "/")}
        if not inside:
            raise SeamlessError("'%s': the index of that directory has no '%s'" % (name, path))
        return _Item(name, target, Checksum.of(plain_dumps(inside)), inside)

    # --- standard output ------------------------------------------------------------------------------

    def print(self, items: _t.Sequence[_Item]) -> int:
        for item in items:
            if item.index is not None and not self.arguments.index:
                raise SeamlessError("'%s' is a directory, which cannot be written to standard output; --index writes its index"
                                    % item.name)
        names = [item.checksum for item in items if item.index is None]
        sizes = self.store.lengths(names)
        self.check_missing([name for name, size in zip(names, sizes) if size is None])
        self.confirm(len(names), sum(sizes))
        for item in items:
            with (self.buffers.open(item.checksum) if item.index is None else io.BytesIO(plain_dumps(item.index))) as source:
                self.print_file(source)
        return 0

    def print_file(self, source: _t.BinaryIO) -> None:
        if not self.suffix:
            return self.buffers.copy(source)
        import tempfile                     # slow to import, and rarely needed
        with tempfile.TemporaryFile() as packed:
            compress(source, packed, self.suffix)
            packed.seek(0)
            self.buffers.copy(packed)

    def confirm(self, count: int, size: int) -> None:
        if self.store.remote or self.arguments.destination or self.arguments.no:
            confirm("Download", count, size, self.arguments.yes, self.arguments.no)

    @staticmethod
    def check_missing(names: _t.Sequence[str]) -> None:
        if names:
            raise CacheMissError("not in the store: %s%s; upload it again, or name another store"
                                 % (", ".join(names[:3]), " and %d more" % (len(names) - 3) if len(names) > 3 else ""))

    # --- files ----------------------------------------------------------------------------------------

    def write(self, items: _t.Sequence[_Item]) -> int:
        """All that is there is written, also if something else is missing."""
        files: _t.Dict[str, Checksum] = {}
        for item in items:
            for target, checksum in self.targets(item).items():
                if files.setdefault(target, checksum) != checksum:
                    raise SeamlessError("two different files would be written to '%s'" % target)
        extras = {path: item.target for item in items if item.index is not None for path in self.extras(item)}
        sizes = dict(zip(files, self.store.lengths(files.values())))
        wanted = {target: checksum for target, checksum in files.items() if self.is_wanted(target, checksum, sizes[target])}
        missing = ["'%s' (%s)" % (target, wanted.pop(target)) for target in list(wanted) if sizes[target] is None]
        total = sum(sizes[target] for target in wanted)
        self.confirm(len(wanted), total)
        for path, top in extras.items():
            _remove(path, top)
        with Progress("download", total, PROGRAM) as progress:
            rest = {target: checksum for target, checksum in wanted.items() if not self.link(target, checksum)}
            for target, source in self.buffers.each(rest, progress):
                self.place(target, rest[target], source)
                if not self.store.remote:
                    progress.add(sizes[target])
        for item in items:
            self.finish(item)
        self.check_missing(missing)
        return 0

    def targets(self, item: _Item) -> _t.Dict[str, Checksum]:
        """path -> content of the files to be written."""
        if item.index is None:
            return {item.target + self.suffix: item.checksum}
        if self.arguments.index:
            return {}
        return {os.path.join(item.target, path) + self.suffix: checksum for path, checksum in item.index.items()}

    def extras(self, item: _Item) -> _t.List[str]:
        """Files in the directory that its index lacks; to be removed if that is asked for, else a reason to stop."""
        suffix = ".CHECKSUM" if self.arguments.index else self.suffix
        listed = {os.path.join(item.target, path) + suffix for path in item.index}
        begins = {os.path.basename(path)[:40] for path in listed}
        extras = []
        if os.path.lexists(item.target) and not os.path.isdir(item.target):
            raise SeamlessError("'%s' is a directory, but a file of that name is here; remove it, or use --output" % item.target)
        for folder, folders, names in os.walk(item.target):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for path in (os.path.join(folder, name) for name in names + links):
                aside = _ASIDE.match(os.path.basename(path))
                if aside and aside.group(1) in begins and path not in listed:
                    with contextlib.suppress(FileNotFoundError):       # another download renamed it just now
                        if time.time() - os.lstat(path).st_mtime > STALE_S:
                            remove_file(path)
                elif path not in listed or os.path.isdir(path):
                    extras.append(path)
        if extras and not self.arguments.dest_rm:
            raise SeamlessError("'%s' holds %d files or links that its index lacks, such as '%s'; --dest-rm removes them"
                                % (item.target, len(extras), readable(os.path.relpath(extras[0], item.target))))
        return extras

    def is_wanted(self, target: str, checksum: Checksum, size: _t.Optional[int]) -> bool:
        """Whether the file must be written.  Raises ``SeamlessError`` if what is there must stay and may not."""
        if not os.path.exists(target) or is_special(target):       # a link that dangles is replaced
            return True
        if os.path.isdir(target):
            raise SeamlessError("'%s' is a file, but a directory of that name is here; remove it, or use --output" % target)
        arguments = self.arguments
        if not (arguments.dest_verify or arguments.dest_repair):
            if not self.suffix and None is not size != os.stat(target).st_size:
                program.say(PROGRAM, "'%s' is here already, with other content, and stays; --dest-repair replaces it" % target)
            return False
        if arguments.incremental and self.is_linked(target, checksum) or placing.is_same(target, self.suffix, checksum):
            return False
        if arguments.dest_verify:
            raise CorruptBufferError("'%s' is here already, with other content than %s; --dest-repair replaces it" % (target, checksum))
        return True

    def is_linked(self, target: str, checksum: Checksum) -> bool:
        stored = placing.form(self.store, checksum, self.suffix)
        return stored is not None and os.path.samestat(os.stat(stored), os.stat(target))

    def link(self, target: str, checksum: Checksum) -> bool:
        """Link the file, if that is asked for and can be; False if it must be copied."""
        way = self.arguments.way
        if way not in ("hardlink", "symlink") or is_special(target):
            return False
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        return self.with_sidecar(target, checksum, lambda: placing.link_out(self.store, checksum, self.suffix, target, way == "symlink"))

    def place(self, target: str, checksum: Checksum, source: _t.BinaryIO) -> None:
        """Write one file."""
        def write():
            if not is_special(target):
                os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
                return write_aside(target, source, self.suffix)
            with open(target, "wb") as file:
                compress(source, file, self.suffix)
        self.with_sidecar(target, checksum, write)

    @staticmethod
    def with_sidecar(target: str, checksum: Checksum, write: _t.Callable[[], _t.Any]):
        """``write()``; a sidecar that names other content goes before, and is written again after it."""
        base = split_compression(target)[0]
        stale = named(base) not in (None, checksum)
        if stale:
            remove_file(base + ".CHECKSUM")
        try:
            written = write()
        except OSError as exc:
            raise SeamlessError("'%s' cannot be written: %s" % (readable(target), exc.strerror)) from exc
        if stale:
            placing.write_sidecars(base, checksum)
        return written

    def finish(self, item: _Item) -> None:
        """The sidecars of a directory."""
        if item.index is None:
            return
        os.makedirs(item.target, exist_ok=True)         # it may be empty
        if item.data:
            placing.write_sidecars(item.target, item.checksum, item.data)
        for path, checksum in item.index.items() if self.arguments.index else ():
            base = os.path.join(item.target, path)
            os.makedirs(os.path.dirname(base), exist_ok=True)
            placing.write_sidecars(base, checksum, sync=False)


def _remove(path: str, top: str) -> None:
    """Remove a file, and the folders below ``top`` that it leaves empty."""
    remove_file(path)
    folder = os.path.dirname(path)
    while folder != top and not os.listdir(folder):
        os.rmdir(folder)
        folder = os.path.dirname(folder)


if __name__ == "__main__":
    raise SystemExit(main())
