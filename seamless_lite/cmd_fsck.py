"""``seamless-fsck``: check a store, and move aside what is damaged."""
import json
import sys
import typing as _t

from . import commandline
from .fsck import Finding, Fsck
from .progress import is_watched, size_text

PROGRAM = "seamless-fsck"
_DESCRIPTION = """\
Check the buffers and results of this folder's configuration: damaged, misnamed and left-over files, rows that are malformed or
contradict each other.  Rows without buffers (scratch results, for instance) and buffers that no row refers to (uploaded files,
for instance) are legal: they are only counted, and listed with -v.  Others may use the store meanwhile."""


def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    parser = commandline.make_parser(
        PROGRAM, _DESCRIPTION,
        "0 all is well, or all damage was repaired; 1 there is damage (left), or the store cannot be read",
        ("seamless-fsck", "seamless-fsck --quick --json", "seamless-fsck --repair --destination /data/buffers --database /data/seamless.db"))
    commandline.add_store(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print damage only")
    parser.add_argument("--quick", action="store_true", help="look at names and sizes only, and read no buffer")
    parser.add_argument("--repair", action="store_true", help="move damaged files into the folder .quarantine of the store, and "
                        "remove rows that cannot be right after copying them there; note.jsonl there says what came from where")
    parser.add_argument("--json", action="store_true", help="print a JSON object per line: kind, where, text, damage, size, repaired; "
                        "the last line sums up")
    return commandline.run(parser, argv, _check)


def _check(arguments) -> int:
    directory, database = commandline.store_here(arguments, PROGRAM)
    counts: _t.Dict[str, _t.List[int]] = {}

    def tell(finding: Finding) -> None:
        count = counts.setdefault(finding.kind, [0, 0]) if not finding.damage else [0, 0]
        count[0], count[1] = count[0] + 1, count[1] + finding.size
        if arguments.json:
            print(json.dumps(finding._asdict()), flush=True)
        elif finding.damage or arguments.verbose:
            if is_watched():
                sys.stderr.write("\r\033[K")
            print("%s %s: %s%s" % (finding.kind, finding.where, finding.text, " [repaired]" if finding.repaired else ""), flush=True)
    fsck = Fsck(directory, database, tell, arguments.quick, arguments.repair, None if arguments.quiet else PROGRAM)
    fsck.run()
    summary = {"directory": directory, "database": database, "buffers": fsck.buffers, "bytes": fsck.size, "rows": fsck.rows,
               "damage": fsck.damage, "repaired": fsck.repaired, "quarantine": fsck.quarantine.folder or None}
    if arguments.json:
        print(json.dumps(summary))
    elif not arguments.quiet:
        print("%d buffers (%s) and %d results are %s" % (fsck.buffers, size_text(fsck.size), fsck.rows,
                                                        "there" if arguments.quick else "sound"))
        for kind, (count, size) in sorted(counts.items()):
            print("%d %s%s: no damage, list them with -v" % (count, kind, " (%s)" % size_text(size) if size else ""))
        if fsck.damage:
            print("%d damaged, %d repaired%s" % (fsck.damage, fsck.repaired, "; what was there is in %s" % fsck.quarantine.folder
                                                 if fsck.quarantine.folder else "" if arguments.repair else " (--repair moves aside what can be)"))
    return 1 if fsck.damage > fsck.repaired else 0
