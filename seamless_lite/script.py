"""The script that a job runs: the user's command, and what brings its results to RESULT.

Every byte of it is part of the identity (compat/bash.md section 5).
"""
import os
import re
import typing as _t

STDOUT = "STDOUT"
_SPECIAL = re.compile(r"""[\s"'`$\\;&|<>()*?\[\]]|^[~#]|\{[^}]*(,|\.\.)""")


class Target(_t.NamedTuple):
    """A result: its name where the command runs, and where it goes here.  ``append``: it was opened with ``>>``."""
    server: str
    local: str
    append: bool = False


def quote(name: str) -> str:
    """``name`` as one word of bash; unchanged unless that is necessary."""
    if not _SPECIAL.search(name):
        return name
    return "'%s'" % name.replace("'", "'\"'\"'")


def code_text(command: str, targets: _t.Sequence[Target], executables: _t.Sequence[str],
              metavars: _t.Sequence[str]) -> str:
    """The script; every byte of it is part of the identity."""
    lines = []
    if any("/" not in name for name in executables):
        lines.append("export PATH=./:$PATH")
    if executables:
        lines.append("chmod +x " + " ".join("'%s'" % name.replace("'", "'\"'\"'") for name in executables))
    lines += ['export %s="${META__%s}"' % (name, name) for name in metavars]
    if not targets:
        lines.append("(\n%s\n) > RESULT" % command)
    else:
        folders = dict.fromkeys("RESULT/" + os.path.dirname(target.server) for target in targets)
        lines.append("mkdir -p " + " ".join(map(quote, folders)))
        with_stdout = any(target.server == STDOUT for target in targets)
        lines.append("(\n%s\n) > %s" % (command, STDOUT) if with_stdout else command)
        lines += ["mv %s %s" % (quote("./" + target.server if target.server.startswith("-") else target.server),
                                quote("RESULT/" + os.path.dirname(target.server))) for target in targets]
    return "\n".join(lines).rstrip("\n") + "\n"
