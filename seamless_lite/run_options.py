"""The options of ``seamless-run``: one table, from which the parser, the help and the border of the command follow.

Options come first.  The first word that is not an option begins the command, and everything from there on
belongs to it, whatever it looks like.
"""
import argparse
import typing as _t

DESCRIPTION = """\
Run a command once and remember its output: the same command on the same input files answers from the cache.

The words of the command that are files or directories here become its inputs; it runs in a folder of its own
that holds nothing else.  Its output goes to standard output; a file that it writes with '>' comes back, with its
checksum in FILE.CHECKSUM.  The command itself reads no standard input."""

EPILOG = """\
examples:
  seamless-run wc -l a.txt
  seamless-run 'paste a.txt b.txt | sort -k2 | uniq -c'
  seamless-run -c 'sort a.txt > sorted.txt'
  seamless-run -i settings.ini --capture report -c './make-report.sh data/'

exit codes:
  the command's own (128+N if signal N killed it); 0 also when the result came from the cache;
  1 seamless-run could not do it: a file is missing, the configuration is wrong, a service is down;
  --why: 0 the result is known, 1 it is not; --verify: 0 the same result again, 1 another one, or none is known;
  --undo: 1 if there was nothing to forget;
  2 an option or the command line is wrong; 3 a bug in this program; 130 interrupted (Ctrl-C) or canceled

environment:
  SEAMLESS_CACHE=DIR keeps everything in DIR and reads no configuration file; SEAMLESS_REMOTE_CLIENTS=JSON names
  servers that run already; SEAMLESS_HOME=DIR is used instead of ~/.seamless
  SEAMLESS_MAX_UPLOAD_FILES (400), SEAMLESS_MAX_UPLOAD_SIZE (100 MB), SEAMLESS_MAX_DOWNLOAD_FILES (2000),
  SEAMLESS_MAX_DOWNLOAD_SIZE (500 MB): what goes over the network beyond these is asked about first
  SEAMLESS_QUEUE_FILE (.seamless-queue): the queue file of --qsubmit"""

_ADD, _LIST = {"action": "store_true"}, {"action": "append", "default": []}

#: Heading -> (flags, keywords of add_argument).
OPTIONS = {
    "the command": (
        (("-c",), dict(_ADD, dest="command_is_string", help="the command is one word, used as it is")),
        (("--primary",), dict(type=int, default=1, metavar="N",
                              help="the N-th simple command is the one whose words are inputs (default 1)")),
        (("--prologue",), dict(_LIST, metavar="CMD", help="run CMD first; may be repeated")),
    ),
    "inputs": (
        (("-i", "--input"), dict(_LIST, dest="inputs", metavar="PATH",
                                 help="one more input file or directory; may be repeated")),
        (("-I", "--input-file"), dict(_LIST, dest="input_files", metavar="LIST",
                                      help="a file with one input per line, relative to that file")),
        (("-g1",), dict(_ADD, help="words with an extension, or that end in '/', need not exist")),
        (("-g2",), dict(_ADD, help="words without an extension may be input files")),
        (("-w", "--workdir"), dict(metavar="DIR", help="names of inputs are relative to DIR (default: this folder)")),
        (("-W",), dict(action="store_const", dest="workdir", const="/", help="the same as -w /")),
        (("-ms",), dict(action="store_const", dest="mapping", const="strip", default="literal",
                        help="inputs lose their folders where the command runs")),
        (("-mx",), dict(action="store_const", dest="mapping", const="extension",
                        help="inputs are called file1.ext, file2.ext, ... where the command runs")),
        (("--var",), dict(_LIST, dest="variables", metavar="NAME=VALUE",
                          help="a shell variable that is an input; may be repeated")),
        (("--metavar",), dict(_LIST, dest="metavars", metavar="NAME=VALUE",
                              help="a shell variable that cannot change the result, such as a number of threads")),
    ),
    "results": (
        (("-cp", "--capture"), dict(_LIST, dest="captures", metavar="SRC[:DST]",
                                    help="bring the file or directory SRC back, as DST; an empty SRC is the output")),
        (("-nd", "--no-download"), dict(_ADD, help="write only .CHECKSUM and .INDEX files, not the results")),
        (("--scratch",), dict(_ADD, help="do not keep the result, only its checksum (result files are kept, but not brought here)")),
        (("--fingertip",), dict(_ADD, help="accepted for compatibility; has no effect")),
        (("--verify",), dict(_ADD, help="run the command although its result is known, and print what differs; the exit code is "
                                        "0 if nothing does, 1 if something does: then it is irreproducible, and will run each time")),
        (("--undo",), dict(_ADD, help="forget the result of this command instead of running it")),
    ),
    "where it runs": (
        (("--local",), dict(_ADD, help="in this process, even if the configuration says 'execution: remote'")),
        (("--project",), dict(metavar="P[:SUB]", help="storage of this project and subproject")),
        (("--stage",), dict(metavar="S[:SUB]", help="use this stage and substage of the configuration")),
        (("--conda", "--conda-env", "--conda-environment"),
         dict(dest="conda", metavar="ENV", help="run in this conda environment")),
        (("--docker", "--docker-image"), dict(dest="docker", metavar="IMG", help="not supported; with --dry it is recorded")),
        (("--queue",), dict(metavar="Q", help="the queue of the cluster to use (daskserver only)")),
        (("--node",), dict(metavar="NODE", help="the cluster node to run on (daskserver only)")),
    ),
    "without running it now": (
        (("--why",), dict(_ADD, help="print whether the command would run, and what differs from its nearest earlier run; "
                                     "the exit code is 0 if its result is known, 1 if it would run")),
        (("--dry", "--dry-run"), dict(_ADD, dest="dry", help="only work out what would run")),
        (("-j", "--write-job"), dict(dest="write_job", metavar="DIR",
                                     help="with --dry: write the transformation to the new folder DIR")),
        (("--upload",), dict(_ADD, help="with --dry: store the inputs and the transformation")),
        (("--write-remote-job",), dict(metavar="DIR", help="with --dry: upload as --upload does, and have the executing side write "
                                                        "the inputs and transform.sh to the new folder DIR there, instead of running it")),
        (("--qsubmit", "--qsub"), dict(_ADD, dest="qsubmit", help="append the command to the queue file, for seamless-queue; it may "
                                                                  "use what commands before it in the queue will make")),
    ),
    "messages": (
        (("-h", "--help"), dict(action="help", help="show this text and exit")),
        (("-v", "--verbose"), dict(action="count", default=0, help="say more; -vv shows tracebacks")),
        (("-q", "--quiet"), dict(_ADD, help="say nothing but errors")),
        (("--direct-print",), dict(_ADD, help="accepted for compatibility; messages are always shown as they come")),
        (("-y", "--yes"), dict(_ADD, help="transfer large inputs and results without asking")),
        (("-n", "--no"), dict(_ADD, help="do not ask, and do not transfer what is large")),
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the options, without the command."""
    parser = argparse.ArgumentParser("seamless-run", usage="seamless-run [options] command ...", epilog=EPILOG,
                                     description=DESCRIPTION, add_help=False,   # argparse's own costs 2 ms
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for heading, options in OPTIONS.items():
        group = parser.add_argument_group(heading)
        for flags, keywords in options:
            group.add_argument(*flags, **keywords)
    return parser


def split(argv: _t.Sequence[str]) -> _t.Tuple[_t.List[str], _t.List[str]]:
    """(options with their values, words of the command).

    argparse cannot do this: it looks for options among the words of the command too.
    """
    takes_value = {flag: "action" not in keywords or keywords["action"] == "append"
                   for options in OPTIONS.values() for flags, keywords in options for flag in flags}
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "-":
        word = argv[at]
        at += 1
        if word == "--":
            return list(argv[:at - 1]), list(argv[at:])
        if word in takes_value:
            at += takes_value[word]
        elif word.startswith("--"):         # an abbreviation; argparse complains if it is not one
            at += "=" not in word and any(takes_value[flag] for flag in takes_value if flag.startswith(word))
        else:                               # letters in one word: the value of the first that takes one follows it
            first = next((n for n, letter in enumerate(word) if takes_value.get("-" + letter)), None)
            at += first == len(word) - 1
    return list(argv[:at]), list(argv[at:])
