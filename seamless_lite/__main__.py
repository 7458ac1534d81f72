"""``python -m seamless_lite COMMAND ...``: the same programs as ``bin/seamless-COMMAND``."""
import importlib
import sys

from . import __version__

#: Command -> module with ``main(argv) -> exit code``.
COMMANDS = {"run": "cmd_run", "init": "cmd_init", "service": "cmd_service", "hashserver": "hashserver", "database": "database",
            "jobserver": "jobserver", "daskserver": "daskserver"}


def main(argv=None) -> int:
    """Run the command that the first word names."""
    argv = sys.argv[1:] if argv is None else argv
    usage = "usage: python -m %s COMMAND ...\ncommands: %s" % (__package__, ", ".join(COMMANDS))
    if argv[:1] == ["--version"]:
        print(__version__)
        return 0
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if not argv or argv[0] not in COMMANDS:
        if argv:
            usage = "%s: there is no command '%s'\n%s" % (__package__, argv[0], usage)
        print(usage, file=sys.stderr)
        return 2
    return importlib.import_module("." + COMMANDS[argv[0]], __package__).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
