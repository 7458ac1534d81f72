"""What ssh said, and what to do about it: the words of a failed connection -> one ``ServiceError``.

``error.final`` says that asking again will not help until somebody does something (a refused key, an unknown
host key), so that nobody waits for it.
"""
import contextlib
import os
import re
import subprocess
import typing as _t

from .errors import ServiceError

# (pattern, advice, whether asking again is in vain); the first that fits.  %s is the name of the host.
_ADVICE: _t.Tuple[_t.Tuple[str, str, bool], ...] = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "it has another key than before: if it was installed anew, run 'ssh-keygen -R %s'"
     " and then 'ssh %s' in a terminal; otherwise somebody may have put another machine in its place", True),
    ("Host key verification failed|host key is known", "its key is not accepted yet: run 'ssh %s' once in a terminal, compare the key"
     " and say yes", True),
    ("Too many authentication failures", "the agent offered too many keys: name the right one in ~/.ssh/config, under 'Host %s',"
     " with IdentityFile and 'IdentitiesOnly yes'", True),
    ("keyboard-interactive|password", "run 'ssh %s' in a terminal; if it asks for a password or a code there, run this in a"
     " terminal as well, or log in beforehand with a shared connection (ControlMaster)", True),
    ("Permission denied", "it accepts none of your keys: try 'ssh %s' in a terminal, look at User and IdentityFile in"
     " ~/.ssh/config, and put your public key there with ssh-copy-id", True),
    ("[Cc]ould not resolve hostname", "the name cannot be found: look for a typing error in the cluster file, write a 'Host %s'"
     " block in ~/.ssh/config, or switch on the network or VPN", False),
    ("Connection refused", "nothing listens at its ssh port: is %s up, and is the Port in ~/.ssh/config right?", False),
    ("timed out|[Tt]imeout, server|was silent", "it does not answer: is %s up, and are you in the network or VPN that it needs?", False),
    ("No route to host|[Nn]etwork is unreachable", "no way leads to %s: is the network or VPN on?", False),
    ("seamless: there is no python3", "install a python3 there, or name one with 'python:' in the cluster file", True),
    ("seamless: too old", "Python 3.6 is the oldest that can start anything there: install a newer one, or name one with"
     " 'python:' in the cluster file", True),
    ("[Bb]ad configuration option|bad permissions|Cannot execute command-line and remote", "repair ~/.ssh/config until"
     " 'ssh %s true' works", True),
    ("Connection (reset|closed) by|Connection closed|Broken pipe", "it hung up: too many log-ins at once (MaxStartups), or this"
     " address is blocked there; try 'ssh %s' in a terminal in a minute", False),
    ("refused by peer", "it allows too few sessions on one connection (MaxSessions): end others to %s", False),
)
_NOISE = re.compile(r"mux_client|muxclient|(kex|ssh)_exchange_identification|Control socket connect|UNKNOWN port|Warning: Permanently added"
                    r"|Pseudo-terminal|^@*$|^\s*$")
_RESET = re.compile("(kex|ssh)_exchange_identification|Connection (reset|closed) by")


def failure(host: str, words: str, code: _t.Optional[int] = None) -> ServiceError:
    """The error for what ssh wrote (``words``) before it ended with ``code``."""
    for pattern, advice, final in _ADVICE:
        if re.search(pattern, words):
            break
    else:
        pattern, final = "", False
        advice = ("it did not run what it was asked to: the account may be bound to one command, or its shell a restricted one;"
                  " try 'ssh %s python3 --version' in a terminal" if code != 255 else "try 'ssh %s' in a terminal")
    if pattern == "Permission denied":
        key = _locked_key(host)
        if key:
            advice = "the key %s has a passphrase, and no agent has it: run 'ssh-add %s', or run this in a terminal" % (key, key)
    lines = [line.strip("@ \t").rstrip(".") for line in words.replace("\r", "\n").replace("seamless: ", "").splitlines()]
    told = [line for line in lines if not _NOISE.search(line)] or [line for line in lines if line]
    told = [line for line in told if pattern and re.search(pattern.replace("seamless: ", ""), line)] or told
    text = "; ".join(dict.fromkeys(told[-5:])) or "ssh ended with exit code %s and said nothing" % code
    error = ServiceError("ssh %s: %s: %s" % (host, text[-700:], advice.replace("%s", host)))
    error.final = final             # type: ignore[attr-defined]
    return error


def hung_up(words: str) -> bool:
    """Whether sshd closed before the log-in, which it does when many come at once: a moment later it may not."""
    return bool(_RESET.search(words)) and "Permission denied" not in words


def _locked_key(host: str) -> _t.Optional[str]:
    """A key for this host that ssh cannot read without a passphrase."""
    for name in settings(host).get("identityfile", []):
        path = os.path.expanduser(name)
        if os.path.exists(path):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):       # then we cannot know
                test = subprocess.run(["ssh-keygen", "-y", "-P", "", "-f", path], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=10)
                if b"passphrase" in test.stderr:
                    return name
    return None


def settings(host: str) -> _t.Dict[str, _t.List[str]]:
    """What the user's configuration says about the host (``ssh -G``); names in lower case."""
    try:
        text = subprocess.run(["ssh", "-G", host], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=20).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: _t.Dict[str, _t.List[str]] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name.lower(), []).append(value)
    return found
