"""``seamless-upload``: store files and directories, and write their sidecars.

    paths -> Sources (hashed) -> what the store lacks -> copied or linked -> sidecars -> originals deleted (--move)

Nothing is said to be stored, in a sidecar or by deleting it here, before it is durable in the store.
"""
import argparse
import os
import typing as _t

from . import commandline, outputs, placing, program, transfer
from .checksum import Checksum
from .confirm import confirm
from .durable import remove_file
from .errors import ConfigurationError, CorruptBufferError, SeamlessError, UsageError
from .folder import Folder
from .inputs import readable
from .progress import Progress, size_text
from .session import Session

PROGRAM = "seamless-upload"
DESCRIPTION = """\
Store files and directories in the buffer store that the configuration names, or in the folder of --destination, and write
FILE.CHECKSUM beside each file, DIR.INDEX and DIR.CHECKSUM beside each directory. Other commands take these as inputs, and
seamless-download gets the content back. The checksum of a .gz or .zst file is that of its decompressed content."""
EXAMPLES = ("seamless-upload data.csv results/", "seamless-upload --move results/        # only results.INDEX and results.CHECKSUM stay",
            "seamless-upload --destination /data/buffers --hardlink big.tar.zst")
CODES = "0 all is stored; 1 something could not be read or stored, or was refused"
ENVIRONMENT = """\
  SEAMLESS_MAX_UPLOAD_FILES (400), SEAMLESS_MAX_UPLOAD_SIZE (100 MB)   more is only uploaded after a question"""


def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    parser = commandline.make_parser(PROGRAM, DESCRIPTION, CODES, EXAMPLES, ENVIRONMENT)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    commandline.add_storage(parser)
    parser.add_argument("-m", "-mv", "--move", action="store_true", help="delete the originals when all is stored (what a folder "
                        "has already is read, and repaired, first)")
    parser.add_argument("--destination", metavar="DIR", help="store in this existing folder; no configuration is read")
    add_ways(parser, "--symlink", "a store that is a folder on this machine: how files get there (default: --copy). A linked file "
             "must never be written to again; its permissions stay as they are")
    parser.add_argument("--incremental", action="store_true", help="with --hardlink: do not read files that are linked to already")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dest-skip", action="store_true", help="trust what is stored already (default)")
    group.add_argument("--dest-verify", action="store_true", help="read what is stored already, and fail if it is damaged")
    group.add_argument("--dest-repair", action="store_true", help="read what is stored already, and replace it if it is damaged")
    commandline.add_answers(parser)
    parser.add_argument("paths", nargs="*", metavar="FILE|DIR", help=".CHECKSUM files are ignored")
    return commandline.run(parser, argv, lambda arguments: _Upload(arguments).run())


def add_ways(parser: argparse.ArgumentParser, symbolic: str, text: str, *more: str) -> None:
    """``--copy``, ``--hardlink`` and the option ``symbolic``, as ``arguments.way``: None, "copy", "hardlink" or "symlink"."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--copy", action="store_const", const="copy", dest="way", help=text)
    group.add_argument("--hardlink", action="store_const", const="hardlink", dest="way", help="share the file, on one file system")
    group.add_argument(symbolic, *more, action="store_const", const="symlink", dest="way", help="point to the file")


def check_ways(arguments) -> None:
    """Raise ``UsageError`` for options that exclude each other."""
    if arguments.destination and (arguments.project or arguments.stage):
        raise UsageError("--destination reads no configuration, so --project and --stage mean nothing; leave them out")
    if arguments.incremental and arguments.way != "hardlink":
        raise UsageError("--incremental needs --hardlink")


def in_store(arguments, folders: _t.Sequence[str], who: _t.Optional[str], action: _t.Callable[[_t.Any], int], **keywords) -> int:
    """``action(store)``, with the store of the configuration or the ``Folder`` that ``folders`` are.  Raises ``SeamlessError``."""
    for folder in folders:
        if not os.path.isdir(folder):
            raise SeamlessError("--destination %s: there is no such folder; make it first" % folder)
    if folders:
        return action(Folder(folders[0], extra_dirs=folders[1:], **keywords))
    session = Session(commandline.settings_of(arguments), who=who)
    try:
        return action(session.store)
    finally:
        session.close()


class _Top(_t.NamedTuple):
    """An argument: ``base`` is the name to which ``.CHECKSUM`` is added, ``sources`` the files that it consists of."""
    path: str
    base: str
    checksum: Checksum
    index: _t.Optional[bytes]
    sources: _t.List[placing.Source]

    def changed(self) -> bool:
        """True if not all files are what they were when they were read."""
        return any(source.changed() for source in self.sources)


def check_unchanged(changed: _t.Sequence[str]) -> None:
    """Raise ``SeamlessError`` for arguments that changed meanwhile."""
    if changed:
        raise SeamlessError("'%s'%s changed during the upload, and has no new .CHECKSUM; upload it again"
                            % (changed[0], " (and %d more)" % (len(changed) - 1) if len(changed) > 1 else ""))


class _Upload:
    """One invocation."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.way = arguments.way or "copy"
        self.damaged: _t.List[Checksum] = []        # on a server

    def run(self) -> int:
        arguments = self.arguments
        check_ways(arguments)
        if arguments.move and self.way == "symlink":
            raise UsageError("--move would delete what --symlink lets the store point to; choose one")
        return in_store(arguments, [] if arguments.destination is None else [arguments.destination], self.who, self.upload)

    @property
    def who(self) -> _t.Optional[str]:
        return None if self.arguments.quiet else PROGRAM

    def say(self, text: str, verbosity: int = 0) -> None:
        if self.arguments.verbose >= verbosity and not self.arguments.quiet:
            program.say(PROGRAM, text)

    def upload(self, store) -> int:
        if not (placing.is_folder(store) or hasattr(store, "address")):
            raise ConfigurationError("there is no buffer store to upload to: the configuration keeps nothing, or all of "
                                     "SEAMLESS_REMOTE_CLIENTS is read-only")
        if self.way != "copy" and not placing.is_folder(store):
            raise UsageError("--%s needs a store that is a folder on this machine" % self.way)
        if self.arguments.move:             # that somebody else's store has it, which is only read here, is not enough
            store = getattr(store, "top", store)
        sources = placing.Sources(store if self.arguments.incremental else None)
        tops = self.read(sources, store)
        missing = self.missing(store, [*sources.files, *sources.packed, *sources.buffers])
        files = {source.checksum: source for source in sources.read.values() if source.checksum in missing}
        buffers = {name: data for name, data in sources.buffers.items() if name in missing}
        sizes = {source.path: os.path.getsize(source.path) for source in files.values()}
        total = sum(sizes.values()) + sum(map(len, buffers.values()))
        if store.remote or self.arguments.destination is not None or self.arguments.no:
            confirm("Upload", len(missing), total, self.arguments.yes, self.arguments.no)
        if missing:
            self.say("upload %d files, %s" % (len(missing), size_text(total)))
            try:
                self.store(store, buffers, files, sizes)
            except CorruptBufferError:
                check_unchanged([top.path for top in tops if top.changed()])
                raise
        return self.finish(tops)

    # --- reading --------------------------------------------------------------------------------------

    def read(self, sources: placing.Sources, store) -> _t.List[_Top]:
        tops: _t.Dict[str, _Top] = {}
        for path in self.arguments.paths:
            if path.endswith(".CHECKSUM"):
                continue
            is_directory = placing.is_directory(path)
            path = path.rstrip("/") or "/" if is_directory else path
            if is_directory and placing.is_folder(store) and _is_below(store.directory, path):
                raise SeamlessError("the store %s is in the directory '%s' that should be stored" % (store.directory, path))
            if placing.is_folder(store) and _is_below(path if is_directory else os.path.dirname(path), store.directory):
                raise SeamlessError("'%s' is a part of the store %s; its buffers are stored already" % (path, store.directory))
            before = set(sources.read)
            try:
                checksum = sources.add_top(path, is_directory)
            except OSError as exc:
                raise SeamlessError("'%s' cannot be read: %s" % (readable(exc.filename or path), exc.strerror)) from exc
            base = placing.sidecar_base(path)
            top = _Top(path, base, checksum, sources.buffers.get(checksum) if is_directory else None,
                       [source for name, source in sources.read.items() if name not in before or name == path])
            if base in tops and tops[base].checksum != checksum:
                raise SeamlessError("'%s' and '%s' differ, but both need the name %s.CHECKSUM; upload one of them"
                                    % (tops[base].path, path, base))
            tops.setdefault(base, top)
        for path, names in sources.dropped.items():
            if names:
                self.say("links to directories are not uploaded: %d in '%s', such as '%s'" % (len(names), path, readable(names[0])))
        return list(tops.values())

    def missing(self, store, names: _t.Sequence[Checksum]) -> _t.Set[Checksum]:
        """Those that the store lacks, or has damaged, as ``--dest-verify`` and ``--dest-repair`` say.

        A folder is not trusted with what ``--move`` deletes.
        """
        names = list(dict.fromkeys(names))
        there = [name for name, is_there in zip(names, store.has(names)) if is_there] if names else []
        missing = set(names) - set(there)
        arguments = self.arguments
        reads = arguments.dest_verify or arguments.dest_repair
        if arguments.move and placing.is_folder(store):
            missing.update(name for name in there if placing.drop_links(store, name))
            reads = not arguments.dest_skip
        for name in there if reads else ():
            places = placing.damaged(store, name)
            if places and arguments.dest_verify:
                raise CorruptBufferError("the stored buffer %s is damaged in %s; replace it with --dest-repair" % (name, places[0]))
            for place in places:
                if placing.is_folder(store):
                    placing.set_aside(place)
                else:
                    self.damaged.append(name)
                self.say("the buffer %s is damaged in %s, and replaced" % (name, place))
                missing.add(name)
        return missing

    # --- storing --------------------------------------------------------------------------------------

    def store(self, store, buffers, files: _t.Mapping[Checksum, placing.Source], sizes) -> None:
        try:
            alone = [source for source in files.values() if self.way != "copy" or source.suffix] if placing.is_folder(store) else []
            with Progress("upload", sum(sizes[source.path] for source in alone), self.who) as progress:
                if self.way != "copy":
                    placing.link(store, alone, self.way == "symlink", self.arguments.move, lambda done: progress.add(sizes[done.path]))
                    if alone and not self.arguments.move:
                        self.say("%d files are now shared with the store: replace them, but never write to them" % len(alone))
                else:
                    for source in alone:
                        placing.copy_packed(store, source)
                        progress.add(sizes[source.path])
            apart = {source.checksum for source in alone}
            paths = {name: source.path for name, source in files.items() if name not in apart}
            transfer.push(store, buffers, paths, self.who, local=True)
            for name in self.damaged:       # the server of Seamless 1.x keeps what it has
                if placing.damaged(store, name):
                    raise CorruptBufferError("%s keeps its damaged buffer %s; repair its folder with --destination, on its host"
                                             % (store.address, name))
        except OSError as exc:
            raise SeamlessError("'%s' cannot be read: %s" % (readable(exc.filename or "a file"), exc.strerror)) from exc

    # --- afterwards -----------------------------------------------------------------------------------

    def finish(self, tops: _t.Sequence[_Top]) -> int:
        """Sidecars of what has not changed meanwhile; returns the exit code."""
        changed = [top.path for top in tops if top.changed()]
        stored = [top for top in tops if top.path not in changed]
        for top in stored:
            if outputs.named(top.base) not in (None, top.checksum):
                self.say("%s.CHECKSUM named other content until now" % top.base, 1)
            placing.write_sidecars(top.base, top.checksum, top.index, keep_index=top.path == top.base + ".INDEX")
        for top in stored if self.arguments.move else ():
            self.remove(top)
        check_unchanged(changed)
        return 0

    def remove(self, top: _Top) -> None:
        try:
            if os.path.islink(top.path):        # of the original, only the link is named here
                return remove_file(top.path)
            for source in top.sources:
                remove_file(source.path)
            if top.index is None:
                return
            for folder, _, _ in list(os.walk(top.path, topdown=False)):
                if not os.listdir(folder):
                    os.rmdir(folder)
        except OSError as exc:
            raise SeamlessError("all is stored, but '%s' cannot be removed: %s" % (exc.filename, exc.strerror)) from exc
        if os.path.isdir(top.path):
            self.say("'%s' stays, with what was not uploaded" % top.path)


def _is_below(path: str, folder: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


if __name__ == "__main__":
    raise SystemExit(main())
