"""The program that a client runs on the host of its services, and talks with over ssh's standard input and output.

    {"action": NAME, "bytes": N, ...arguments}      a line of JSON, and N bytes if it says so
    @seamless@{"ok": VALUE}                         the answer, or {"error": SENTENCE}; other lines are not from us

Its actions: ``receive`` (the source of the package), ``ensure`` (services that shall run),
``services``, ``stop``, ``logs``, ``remove`` and ``uninstall``.  The client sends it with ``hostside``, ``conda``, ``hostpython``, ``hostsource``,
``leftovers``, ``signing`` and ``errors``, in one text (``shipping.agent``).  All of it runs on Python 3.6.  It ends with its input.

``act`` does the same in the client's own process, for services on its host that want another Python.
"""
import contextlib
import json
import os
import re
import shutil
import sys

from . import hostpython, hostside, hostsource, leftovers
from .errors import SeamlessError
from .hostside import HostError
from .signing import load_secret

DATA_BYTES = 64 << 20       # more does not arrive at once
#: What we made in the folder of the user, which ``SEAMLESS_HOME`` may have put among other things.
_PROJECT = r"[^.].*"
_OURS = {"run": r".*\.(json|log|log\.1|sock|sock~|lock|secret|tmp)|ssh|tmp",
         "dist": r"\.?[0-9a-f]{64}(\..*)?|pythons\.json.*|[0-9a-f]{16}-.*\.zlib.*",
         "dask": r"(pure-)?daskserver-.*|by-hand"}
#: What must not reach a service that outlives the connection which started it.
_OF_THE_CONNECTION = ("SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY", "SSH_AUTH_SOCK", "SSH_ORIGINAL_COMMAND")


# --- actions ------------------------------------------------------------------------------------------------

def receive(home, dist, data):
    """Unpack the source ``dist``."""
    return {"folder": hostsource.unpack(home, dist, data)}


def ensure(home, dist, package, requests, wishes=(), unset=()):
    """Start those services that do not run.

    A request says service, key, args, parameters, network_interface, port_range, auth, idle_timeout_s and protocol; perhaps
    python, conda, needs and port.  ``records`` has for each the record of the service with ``started``, or ``error``.
    ``missing`` instead: the source is not here.
    """
    folder, asked = hostsource.dist_folder(home), {}
    pythons = [hostpython.find(folder, request.get("python"), request.get("conda"), request.get("needs", ()), wishes, asked)
               for request in requests]
    source = hostsource.source_folder(home, dist)
    if source is None:
        return {"missing": dist}
    secret = load_secret(os.path.join(home, "secret"))
    env = {"PYTHONPATH": os.pathsep.join([source] + [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path.startswith("/")]),
           **_temporary_folder(home)}
    orders = [_order(request, python, dist, package, env, secret, unset) for request, python in zip(requests, pythons)]
    records = hostside.ensure(orders)
    if any("marshal data" in record.get("error", "") for record in records):    # a disk or quota that was full cut what Python keeps there
        hostsource.forget_compiled(source)
        records = hostside.ensure(orders)
    if any(record.get("started") for record in records):
        hostsource.sweep(home, hostside.run_folder())
    notes = {}
    for order in orders:
        notes.setdefault(order["note"], []).append(order["record"]["service"])
    return {"records": records, "secret": secret.hex(), "node": os.uname().nodename,
            "notes": ["%s on %s: %s" % (", ".join(names), os.uname().nodename, note) for note, names in notes.items()]}


def _temporary_folder(home):
    """What services need in their environment where nobody can write to /tmp."""
    usual = [os.environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP")] + ["/tmp", "/var/tmp", "/usr/tmp"]
    if any(os.access(path, os.W_OK | os.X_OK) for path in usual if path):
        return {}
    return {"TMPDIR": hostside.private_folder(os.path.join(hostside.run_folder(), "tmp"))}


def _order(request, python, dist, package, env, secret, unset):
    """What ``hostside.Start`` needs to know to start the service of the request."""
    matters = [request[name] for name in ("service", "key", "args", "parameters", "network_interface", "port_range", "auth", "protocol")]
    matters += [python["argv"], python["version"], python["env"].get("CONDA_PREFIX"), dist, package, os.uname().nodename, secret.hex()]
    record = {"service": request["service"], "key": request["key"], "parameters": request["parameters"], "auth": request["auth"],
              "arguments": request["args"], "dist": dist, "python": python["path"], "version": ".".join(map(str, python["version"]))}
    return {"name": hostside.service_name(request["key"], matters), "argv": python["argv"] + ["-m", "%s.%s" % (package, request["service"])],
            "args": request["args"], "env": dict(python["env"], **env),
            "unset": list(unset) + list(_OF_THE_CONNECTION), "secret": secret.hex() if request["auth"] else "",
            "idle_timeout_s": request["idle_timeout_s"], "network_interface": request["network_interface"],
            "port_range": request["port_range"], "port": request.get("port"), "note": python["note"], "record": record}


def services(home):
    """The records of the services that live.  What killed ones left goes."""
    leftovers.sweep()
    return hostside.services()


def stop(home, which):
    """Stop the services with this name or key; the names of those that lived.  What killed ones left goes too."""
    stopped = hostside.stop(which)
    leftovers.sweep()
    return stopped


def logs(home, which):
    """The end of the newest log with this name or key; None if there is none."""
    return hostside.logs(which)


def remove(home, which):
    """Remove what dead services with this name or key left behind; the paths."""
    return hostside.remove(which)


def uninstall(home, data=False):
    """Stop all services and remove what we made, also stored results if ``data``; what is ``kept``: [[path, bytes]...].

    Of the folder itself, files that the user wrote (clusters.yaml) stay.  Raises ``HostError`` if services run on other hosts that
    share the folder.
    """
    records = hostside.services()
    elsewhere = sorted({str(record.get("node")) for record in records} - {os.uname().nodename})
    if elsewhere:
        raise HostError("services of yours run on %s with the same home folder: stop them there first (seamless-service stop --all %s)"
                        % (" and ".join(elsewhere), elsewhere[0]))
    stopped = [name for record in records for name in hostside.stop(record["name"])]
    outside = {path for record in records for path in [record.get("socket")] if path and not path.startswith(home + os.sep)}
    leftovers.sweep()                                       # of services that were killed
    for name, ours in _OURS.items():                        # the folder may be one that the user has for other things too
        _remove_ours(os.path.join(home, name), ours)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(home, "secret"))
    kept = []
    for name in ("cache", "clusters-data"):                 # where results are if nothing else is said
        path = os.path.join(home, name)
        if os.path.isdir(path):
            if data:
                _remove_ours(path, _PROJECT, _is_store)
            if os.path.isdir(path):
                kept.append([path, _size(path)])
    kept += [[path, _size(path)] for path in sorted(_stores(records)) if not path.startswith(home + os.sep)]
    for folder in {os.path.dirname(path) for path in outside} | {home}:
        with contextlib.suppress(OSError):                  # not empty: something of the user's
            os.rmdir(folder)
    left = sorted(os.listdir(home)) if os.path.isdir(home) else []
    return {"node": os.uname().nodename, "home": home, "stopped": stopped, "kept": kept, "left": left}


def _is_store(path):
    """True if somewhere below there are buffers or results of ours."""
    return any("seamless.db" in files or any(len(name) == 2 for name in folders) for _, folders, files in os.walk(path))


def _remove_ours(folder, ours, is_ours=lambda path: True):
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if re.fullmatch(ours, name) and is_ours(path):
            if os.path.isdir(path) and not os.path.islink(path):
                _remove_folder(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
    with contextlib.suppress(OSError):                      # not empty: something of the user's; or not there
        os.rmdir(folder)


def _remove_folder(path):
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise HostError("%s on %s cannot be removed completely (%s): remove the rest yourself" % (path, os.uname().nodename, exc.strerror))


def _stores(records):
    """The folders and files that the hashservers and databases among the services were given."""
    paths = {os.path.expanduser(word) for record in records if record.get("service") in ("hashserver", "database")
             for word in record.get("arguments", ())}
    paths = {path.rstrip(os.sep) for path in paths if os.path.isabs(path) and os.path.exists(path)}
    return {path for path in paths if not any(path.startswith(other + os.sep) for other in paths)}


def _size(folder):
    """Bytes in the files of the folder, or in the file."""
    total = os.lstat(folder).st_size if os.path.isfile(folder) else 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


ACTIONS = {"receive": receive, "ensure": ensure, "services": services, "stop": stop, "logs": logs, "remove": remove, "uninstall": uninstall}


# --- the conversation ---------------------------------------------------------------------------------------

def act(home, request, data=b""):
    """What the action brings.  Raises ``HostError``."""
    arguments = dict(request)
    action = arguments.pop("action", None)
    arguments.pop("bytes", None)
    if action not in ACTIONS:
        raise HostError("there is no action %r" % (action,))
    if action == "receive":
        arguments["data"] = data
    try:
        return ACTIONS[action](home, **arguments)
    except SeamlessError as exc:
        raise HostError(str(exc))
    except OSError as exc:
        raise HostError(hostside.disk_trouble(exc, home))


def _answers(stream):
    """The answer to each request of ``stream``."""
    home, note = hostsource.choose_home()
    # This process belongs to one conversation; its children, the services, must have their files in the same place.
    os.environ["SEAMLESS_HOME"] = home
    for line in iter(stream.readline, b""):
        try:
            request = json.loads(line.decode("utf-8"))
            length = int(request.get("bytes") or 0)
            if not 0 <= length <= DATA_BYTES:
                raise ValueError("%d bytes" % length)
        except (ValueError, AttributeError, TypeError) as exc:
            yield {"error": "the request to the host is not understood: %s" % exc}
            return                          # nobody knows where the next one begins
        data = stream.read(length)
        if len(data) < length:
            return                          # cut off: there is nobody to hear of it
        try:
            answer = {"ok": act(home, request, data)}
            if note and request["action"] == "ensure":
                answer["ok"].setdefault("notes", []).append(note)
        except HostError as exc:
            answer = {"error": str(exc)}
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            answer = {"error": "the request to the host is not understood: %s: %s" % (type(exc).__name__, exc)}
        yield answer


def main():
    """Answer until the input ends."""
    try:
        for answer in _answers(sys.stdin.buffer):
            _say(answer)
    except HostError as exc:
        _say({"error": str(exc)})
        return 1
    except BrokenPipeError:                 # the client is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _say(answer):
    # the line end before it: what a start-up file printed may have none
    sys.stdout.write("\n%s%s\n" % (hostside.MARKER, json.dumps(answer)))
    sys.stdout.flush()
