# For an interactive bash: source this file, and Ctrl-U U switches a mode on and off in which each command
# that you type is run by seamless-run, with the options in $SEAMLESS_MODE_OPTS.
#
# Builtins, functions, aliases, assignments and seamless-* themselves run as ever.  A shell variable that the line
# uses becomes an input of the command (--var), so that another value is another result.  The history keeps what you typed.

case $- in
*i*) ;;
*)
  echo "seamless-mode-bind.sh: this is not an interactive bash; source the file in your terminal, or in ~/.bashrc" >&2
  return 1 2>/dev/null || exit 1
  ;;
esac

# Whether bash would wait for another line after this text.
_seamless_incomplete() {
  [[ $1 == *\\ ]] || LC_ALL=C bash -n -c "$1" 2>&1 | grep -q -e 'unexpected end of file' -e 'unexpected EOF' -e 'here-document'
}

# Before each first prompt nothing is left of an earlier, unfinished command.
_seamless_prompt() {
  _seamless_pending=
}

# Options that make inputs of the shell variables that the text uses.
_seamless_variables() {
  local name declared found=
  for name in $(grep -o -E '\$\{?[A-Za-z_][A-Za-z0-9_]*' <<<"$1" | tr -d '${' | sort -u); do
    declared=$(declare -p "$name" 2>/dev/null) || continue
    case $name:$declared in
    PATH:* | *:"declare -"*[aA]*" $name"*) continue ;;
    esac
    found+=" --var $(printf '%q' "$name=${!name}")"
  done
  printf '%s' "$found"
}

# Enter: rewrite the line, if it is for seamless-run.
_seamless_rewrite() {
  local line=$READLINE_LINE first
  if [[ -n $_seamless_pending ]] || _seamless_incomplete "$line"; then
    _seamless_pending+=$line$'\n'
    return
  fi
  read -r first _ <<<"$line"
  case $first in
  '' | '#'* | '!'* | seamless* | *=*) return ;;
  esac
  case $(type -t -- "$first") in
  file) ;;
  '') [[ $first == */* && -x $first ]] || return ;;
  *) return ;;
  esac
  history -s -- "$line"
  READLINE_LINE=" seamless-run${SEAMLESS_MODE_OPTS:+ $SEAMLESS_MODE_OPTS}$(_seamless_variables "$line") -c $(printf '%q' "$line")"
  READLINE_POINT=${#READLINE_LINE}
}

seamless-mode-on() {
  [[ -n $_seamless_mode ]] && return
  _seamless_mode=on _seamless_pending= _seamless_histcontrol=$HISTCONTROL _seamless_ps1=$PS1
  HISTCONTROL=ignorespace${HISTCONTROL:+:$HISTCONTROL}
  PROMPT_COMMAND="_seamless_prompt${PROMPT_COMMAND:+; $PROMPT_COMMAND}"
  PS1="(seamless) $PS1"
  bind -x '"\C-x\C-s": _seamless_rewrite'
  bind '"\C-m": "\C-x\C-s\C-j"'
  echo "seamless mode is on${SEAMLESS_MODE_OPTS:+ (options: $SEAMLESS_MODE_OPTS)}: commands are run by seamless-run"
}

seamless-mode-off() {
  [[ -z $_seamless_mode ]] && return
  bind '"\C-m": accept-line'
  bind -r '\C-x\C-s'
  PROMPT_COMMAND=${PROMPT_COMMAND#_seamless_prompt}
  PROMPT_COMMAND=${PROMPT_COMMAND#; }
  HISTCONTROL=$_seamless_histcontrol PS1=$_seamless_ps1 _seamless_mode=
  echo "seamless mode is off"
}

seamless-mode-toggle() {
  if [[ -n $_seamless_mode ]]; then seamless-mode-off; else seamless-mode-on; fi
}

bind '"\C-j": accept-line'
bind -r '\C-u'
bind '"\C-u\C-u": unix-line-discard'
bind '"\C-uu": "\C-a\C-k seamless-mode-toggle\C-j"'
