"""``seamless-completion``: prints a script with which bash or zsh complete the names, options and files of our commands.

The options are read from each command's own ``--help``, so that they are never other than those.
"""
import argparse
import contextlib
import importlib
import io
import re
import typing as _t

from . import commandline, program
from .__main__ import COMMANDS

_OPTION = re.compile(r"(?<![\w-])(-{1,2}[A-Za-z][\w-]*)(?:[ =](?P<value>\{[^}]*\}|[A-Z\[][\w:\[\]-]*))?")
_ENDS = re.compile(r"^\s+(-[^\n]*?)(?:\s{2,}|$)", re.M)
_SCRIPT = """\
_seamless() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} program=${COMP_WORDS[0]##*/} words= options= word at
  case $program:$previous in
%(values)s
  *:--stage) words=$(sed -n 's/^ *- *stage  *\\([^:]*\\):.*/\\1/p' seamless.yaml seamless.profile.yaml 2>/dev/null) ;;
  *)
    options=yes
    case $program in
%(options)s
    esac
    ;;
  esac
  if [[ $program == seamless-run ]]; then
    for ((at = 1; at < COMP_CWORD; at++)); do
      word=${COMP_WORDS[at]}
      case $word in
      -*) case " $_seamless_run_values " in *" $word "*) at=$((at + 1)) ;; esac ;;
      *) words= && break ;;
      esac
    done
    if ((at == COMP_CWORD)) && [[ $current != -* && -z $words ]]; then
      COMPREPLY=($(compgen -c -- "$current") $(compgen -f -- "$current"))
      return
    fi
  fi
  COMPREPLY=()
  if [[ -n $words && ( $current == -* || -z $options ) ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  else
    COMPREPLY=($(compgen -f -- "$current"))
  fi
}
_seamless_run_values="%(run_values)s"
complete -o filenames -F _seamless %(programs)s
"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit -u && bashcompinit\n"


def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    parser = commandline.make_parser(
        "seamless-completion", "Print a script that completes the options and files of all seamless commands, for bash or zsh.",
        "0 done", ["seamless-completion bash > ~/.seamless/completion.bash; echo '. ~/.seamless/completion.bash' >> ~/.bashrc",
                   "seamless-completion zsh > ~/.seamless/completion.zsh; echo '. ~/.seamless/completion.zsh' >> ~/.zshrc"],
        configured=False)
    parser.add_argument("shell", choices=("bash", "zsh"))
    return commandline.run(parser, argv, _print)


def _print(arguments: argparse.Namespace) -> None:
    options, values, run_values = [], [], []
    for name in sorted(COMMANDS):
        found = _options(name)
        options.append("    seamless-%s) words='%s' ;;" % (name, " ".join(found)))
        for flag, value in found.items():
            if value.startswith("{"):
                values.append("  seamless-%s:%s) words='%s' ;;" % (name, flag, value.strip("{}").replace(",", " ")))
        if name == "run":
            run_values = [flag for flag, value in found.items() if value]
    text = _SCRIPT % {"options": "\n".join(options), "values": "\n".join(values), "run_values": " ".join(run_values),
                      "programs": " ".join("seamless-" + name for name in sorted(COMMANDS))}
    program.write_output(((_ZSH if arguments.shell == "zsh" else "") + text).encode("utf-8"))


def _options(name: str) -> _t.Dict[str, str]:
    """option -> what its value is called in the help ("" if it takes none)."""
    module, _, function = COMMANDS[name].partition(".")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        getattr(importlib.import_module("." + module, __package__), function)(["--help"])
    found: _t.Dict[str, str] = {}
    for line in _ENDS.findall(shown.getvalue()):
        flags = _OPTION.findall(line)
        value = next((value for _, value in flags if value), "")
        found.update((flag, value) for flag, _ in flags)
    return found
