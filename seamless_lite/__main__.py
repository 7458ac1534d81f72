"""``python -m seamless_lite COMMAND ...``: the same programs as ``bin/seamless-COMMAND``."""
import importlib
import sys

from . import __version__

#: Command -> module and function ``(argv) -> exit code``.
COMMANDS = {
    "run": "cmd_run.main", "init": "cmd_init.main", "upload": "cmd_upload.main", "download": "cmd_download.main",
    "checksum": "cmd_checksum.checksum", "checksum-file": "cmd_checksum.checksum_file",
    "checksum-index": "cmd_checksum.checksum_index", "resolve": "cmd_resolve.resolve", "fingertip": "cmd_resolve.fingertip",
    "run-transformation": "cmd_transformation.run_transformation", "cancel": "cmd_transformation.cancel",
    "queue": "cmd_queue.queue", "queue-finish": "cmd_queue.queue_finish", "gc": "cmd_gc.main", "fsck": "cmd_fsck.main",
    "export": "cmd_archive.export", "import": "cmd_archive.import_", "completion": "cmd_completion.main",
    "service": "cmd_service.main",
    "service-ps": "cmd_service_family.ps", "service-stop": "cmd_service_family.stop", "service-rm": "cmd_service_family.rm",
    "service-logs": "cmd_service_family.logs", "service-inspect": "cmd_service_family.inspect",
    "service-resolve": "cmd_service_family.resolve", "service-clear": "cmd_service_family.clear",
    "hashserver": "hashserver.main", "database": "database.main", "jobserver": "jobserver.main", "daskserver": "daskserver.main"}


def main(argv=None) -> int:
    """Run the command that the first word names."""
    argv = sys.argv[1:] if argv is None else argv
    usage = "usage: python -m %s COMMAND ...\ncommands: %s" % (__package__, ", ".join(COMMANDS))
    if argv[:1] == ["--version"]:
        print(__version__)
        return 0
    if argv[:1] in (["-h"], ["--help"]):
        print(usage + "\nexit codes: that of the command (COMMAND --help tells); 2 there is no such command")
        return 0
    if not argv or argv[0] not in COMMANDS:
        if argv:
            usage = "%s: there is no command '%s'\n%s" % (__package__, argv[0], usage)
        print(usage, file=sys.stderr)
        return 2
    module, _, function = COMMANDS[argv[0]].partition(".")
    return getattr(importlib.import_module("." + module, __package__), function)(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
