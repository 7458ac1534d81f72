"""Runs on the host where the services are: start, inspect and stop them, under a lock.

On this machine it is imported and its functions are called; on another one it is sent there as a part of
``hostagent``, which talks with the client.  So it imports nothing of ours and runs on Python 3.6.

A service has one name, and under it in ``$SEAMLESS_HOME/run`` (0700) a record (``NAME.json``, which is the
service's status file), a log (``NAME.log``), perhaps a socket, and while somebody looks or starts,
a lock.  A record names host, process and the start time of the process, so that the number
of a dead service, given to another process, is not taken for it.

The record is written when the process number is known, and only then does the service get its first line
of input (the secret), before which it does nothing.  So whoever dies when, what runs has a record.
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import stat
import time

MARKER = "@seamless@"       # begins each line that a client shall read, on the standard output of our programs on its host
START_S = 60.0              # a service that is not running after this is given up (Dask from a slow disk takes its time)
ANSWER_S = 10.0             # a service that lives but does not answer for so long is replaced
STOP_S = 10.0               # between SIGTERM and SIGKILL
POLL_S = 0.005
LOG_BYTES = 1 << 20         # a longer log is put aside at the next start
LOG_DAYS = 7
SOCKET_PATH_BYTES = 100
ROOM_BYTES = 1 << 20        # a disk with less left would cut what Python compiles and keeps there
_children = []              # Popen objects of services that outlive us; forgetting one would warn


class HostError(Exception):
    """One sentence for the user."""


def disk_trouble(exc, path):
    """The sentence for what went wrong when something was written in the folder ``path``."""
    cure = ("make room there" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable for you")
    return ("%s cannot be written on %s (%s): %s, or set SEAMLESS_HOME in your shell's start-up file there to another folder"
            % (exc.filename or path, os.uname().nodename, exc.strerror or exc, cure))


# --- files ------------------------------------------------------------------------------------------------

def run_folder():
    """``$SEAMLESS_HOME/run``, made if it is missing, private."""
    home = os.path.expanduser(os.environ.get("SEAMLESS_HOME") or "~/.seamless")
    path = os.path.join(os.path.abspath(home), "run")
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        return private_folder(path)
    except OSError as exc:
        raise HostError(disk_trouble(exc, path))


def private_folder(path):
    """Make the folder if it is missing, and see to it that it is ours alone.  Raises ``HostError``, ``OSError``."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path) if path.startswith("/tmp/") else os.stat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise HostError("%s is not a folder of yours: remove it, or set SEAMLESS_HOME to another place" % path)
    if status.st_mode & 0o077:
        os.chmod(path, 0o700)
    return path


def _socket_path(run, name):
    """In the run folder, or where paths are shorter if the system could not take the length."""
    path = os.path.join(run, name + ".sock")
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
        return path
    short = hashlib.sha256(os.fsencode(path)).hexdigest()[:16] + ".sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and len(os.fsencode(runtime)) < 60 and os.access(runtime, os.W_OK):
        return os.path.join(private_folder(os.path.join(runtime, "seamless")), short)
    return os.path.join(private_folder("/tmp/seamless-%d" % os.geteuid()), short)


def service_name(key, matters):
    """The key, ``-`` and eight hexadecimal digits that change with anything that ``matters`` to who uses the service."""
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode("utf-8")).hexdigest()
    return "%s-%s" % (re.sub(r"[^A-Za-z0-9._-]", "_", key)[:200], digest[:8])


def read_record(run, name):
    """The record of the service, or None."""
    try:
        with open(os.path.join(run, name + ".json"), "rb") as file:
            record = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError):
        return None                     # a record that cannot be read is as good as none: it will be replaced
    return record if isinstance(record, dict) else None


def _write_record(run, name, record):
    path = os.path.join(run, name + ".json")
    aside = "%s.%d.tmp" % (path, os.getpid())
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
        os.replace(aside, path)
    finally:
        _remove(aside)


def _remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _clean(run, name):
    """Remove what a dead service left, but for its log."""
    record = read_record(run, name) or {}
    if str(record.get("socket", "")).endswith(".sock"):
        _remove(record["socket"])
        _remove(record["socket"] + "~")
    _remove(os.path.join(run, name + ".json"))


@contextlib.contextmanager
def locked(run, name, wait_s):
    """Hold the lock of ``name``.  The holder removes the file, so a lock counts only while the file is still in its place."""
    path = os.path.join(run, name + ".lock")
    end = time.monotonic() + wait_s
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    break
        except BlockingIOError:
            pass
        except OSError as exc:
            os.close(fd)
            raise HostError("the file %s cannot be locked: %s" % (path, exc.strerror))
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > end:
            raise HostError("another process has been starting or stopping %s for %g s: look what holds %s" % (name, wait_s, path))
        time.sleep(POLL_S)
    try:
        yield
    finally:
        _remove(path)
        os.close(fd)


# --- processes --------------------------------------------------------------------------------------------

def identity(pid):
    """When the process ``pid`` started, as text that no later process with this number has; None if it is dead."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open("/proc/sys/kernel/random/boot_id") as file:
            return None if fields[0] in (b"Z", b"X") else "%s-%s" % (file.read(8), fields[19].decode("ascii"))
    except (OSError, IndexError):
        if os.path.exists("/proc/self/stat"):
            return None
    import subprocess                   # no /proc: not Linux
    ps = subprocess.Popen(["ps", "-o", "stat=,lstart=", "-p", str(pid)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env=dict(os.environ, LC_ALL="C"))
    state, _, started = ps.communicate()[0].decode("ascii", "replace").strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


def alive(record):
    """Whether the process of the record lives; also True if it is on another host and nobody here can know."""
    if record.get("node", os.uname().nodename) != os.uname().nodename:
        return True
    started = identity(record["pid"]) if isinstance(record.get("pid"), int) else None
    return started is not None and started == record.get("pid_started")


def answers(record, timeout_s):
    """Whether the service says that it is well."""
    try:
        where, family = record.get("socket"), socket.AF_UNIX
        if not where:
            where = (reachable(record.get("network_interface")), int(record["port"]))
            family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(where)
            sock.sendall(b"GET /healthcheck HTTP/1.0\r\n\r\n")
            return sock.recv(100).startswith(b"HTTP/1.1 200 ")
    except (OSError, KeyError, ValueError):
        return False


def reachable(interface):
    """The address under which a service on ``interface`` is reached from the same host."""
    return {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(interface, interface)


def _current(run, name):
    """The record of the service if it runs and answers.  Otherwise nothing of it is left.  Under the lock."""
    end = time.monotonic() + ANSWER_S
    while True:
        record = read_record(run, name)
        if record is None or not alive(record) or record.get("status") in ("stopped", "failed") or time.monotonic() > end:
            break
        if record.get("status") == "running" and answers(record, min(2.0, ANSWER_S)):
            return record
        time.sleep(POLL_S)
    if record is not None:
        _end(record)
    _clean(run, name)
    return None


def _end(record):
    """End the process of the record, with its children if it does not go by itself.  Raises ``HostError`` if it stays."""
    if record.get("node") != os.uname().nodename or not alive(record):
        return
    pid, killed = record["pid"], False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + STOP_S
        while alive(record):
            if time.monotonic() > end:
                if killed:
                    raise HostError("the process %d of %s does not end, not even when it is killed: does it wait for a disk?"
                                    % (pid, record.get("name")))
                with contextlib.suppress(PermissionError):      # of a group in which not all is ours
                    # it was started as the leader of its own session, unless somebody started it by hand
                    (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
                end, killed = end + STOP_S, True
            _reap()
            time.sleep(POLL_S)


def _reap():
    """Take note of the services we started that have ended, so that they do not stay as zombies."""
    _children[:] = [child for child in _children if child.poll() is None]


# --- starting ---------------------------------------------------------------------------------------------

class Start:
    """The start of one service: ``begin``, then ``poll`` until it is not None, or ``abandon``.

    ``request``: name, service, argv (of the program), args (of the service), env (added to ours), unset (taken from it), secret
    (hex, "" for none), idle_timeout_s, network_interface, port_range or None, and record (fields for the record);
    perhaps a note for its log, and a port that should be taken if it is free.
    With ``private`` the service ends when this process, or whoever holds ``child.stdin``, does.
    """

    def __init__(self, run, request, private=False):
        self.run, self.request, self.name, self.private = run, request, request["name"], private
        self.log = os.path.join(run, self.name + ".log")
        self.child = None
        self.offset = 0             # where in the log our start begins
        self._end = 0.0

    def begin(self):
        """Start the process, write the record, and let the process go on."""
        import subprocess               # only where something is started
        request, record = self.request, dict(self.request["record"])
        argv = request["argv"] + ["--status-file", os.path.join(self.run, self.name + ".json")]
        interface = request.get("network_interface")
        if request.get("port_range"):
            argv += ["--host", interface or "127.0.0.1"] + _ports(interface, request["port_range"], request.get("port"))
        else:
            interface = None
            record["socket"] = _socket_path(self.run, self.name)
            argv += ["--socket", record["socket"]]
        argv += ["--timeout", "%g" % request["idle_timeout_s"], "--secret-stdin"] + ([] if request["secret"] else ["--auth", "none"])
        argv += (["--exit-with-stdin"] if self.private else []) + request["args"]
        environment = dict(os.environ, **request["env"])
        for name in request["unset"]:
            environment.pop(name, None)
        _reap()
        disk = os.statvfs(self.run)
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < ROOM_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.run)
        self._end = time.monotonic() + START_S
        with open(self._new_log(), "ab") as log:
            self.offset = log.tell()
            if request.get("note"):
                log.write(("%s INFO %s\n" % (time.strftime("%Y-%m-%d %H:%M:%S"), request["note"])).encode("utf-8"))
                log.flush()
            try:
                self.child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/",
                                              env=environment, start_new_session=True)
            except OSError as exc:
                raise HostError("%s cannot be run: %s" % (argv[0], exc.strerror))
        record.update(name=self.name, command=argv, uid=os.geteuid(), node=os.uname().nodename, pid=self.child.pid,
                      pid_started=identity(self.child.pid), log=self.log, network_interface=interface,
                      status="starting", started_at=time.time())
        _write_record(self.run, self.name, record)
        with contextlib.suppress(BrokenPipeError):      # it died: poll says so
            self.child.stdin.write(request["secret"].encode("ascii") + b"\n")
            self.child.stdin.flush()
            if not self.private:
                self.child.stdin.close()

    def _new_log(self):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.log).st_size > LOG_BYTES:
                os.replace(self.log, self.log + ".1")
        os.close(os.open(self.log, os.O_WRONLY | os.O_CREAT, 0o600))
        return self.log

    def poll(self):
        """The record if the service runs, None if it is not there yet.  Raises ``HostError`` if it will not come."""
        code = self.child.poll()
        record = read_record(self.run, self.name) or {}
        if code is None and record.get("status") == "running":
            if not self.private:
                _children.append(self.child)
            return record
        if record.get("status") == "failed":
            raise HostError("the %s did not start: %s (its log: %s)" % (self.request["record"]["service"], record.get("error"), self.log))
        if code is None and time.monotonic() < self._end:
            return None
        how = "it was not ready within %g s" % START_S if code is None else "it ended with exit code %d" % code
        end = "\n".join(tail(self.log, self.offset).splitlines()[-12:]) or "(nothing)"
        raise HostError("the %s did not start: %s; look into its log %s, which ends:\n%s"
                        % (self.request["record"]["service"], how, self.log, end))

    def abandon(self):
        """Leave nothing behind but the log."""
        if self.child is not None:
            with contextlib.suppress(BrokenPipeError):
                self.child.stdin.close()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, signal.SIGKILL)       # it leads its own group, in which its children are
            self.child.wait()
        _clean(self.run, self.name)

    def finish(self):
        """End a private service, by the end of its input if it listens to that, and remove its log."""
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        end = time.monotonic() + STOP_S
        while self.child.poll() is None and time.monotonic() < end:
            time.sleep(POLL_S)
        self.abandon()
        _remove(self.log)


def _ports(interface, port_range, wanted):
    """Where to listen: on the port ``wanted``, so that clients find the service again, if that is free."""
    if wanted is not None and port_range[0] <= wanted <= port_range[1]:
        where = interface or "127.0.0.1"
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((where, wanted))
            return ["--port", str(wanted)]
    return ["--port-range"] + [str(port) for port in port_range]


def tail(path, offset=0, n_bytes=8192):
    """The end of the log, as far as it was written after ``offset``."""
    with open(path, "rb") as file:
        file.seek(max(offset, os.fstat(file.fileno()).st_size - n_bytes))
        return file.read().decode("utf-8", "replace")


def ensure(requests):
    """Start those services that do not run; for each the record plus ``started``, or ``{"name", "error"}``.

    All are started at once.  The locks are taken in the order of names, so two callers cannot wait for each other.
    """
    run, results = run_folder(), {}
    with contextlib.ExitStack() as stack:
        starts = []
        try:
            for name, request in sorted((request["name"], request) for request in requests):
                if name in results:
                    continue
                stack.enter_context(locked(run, name, START_S + ANSWER_S + STOP_S))
                record = _current(run, name)
                results[name] = record and dict(record, started=False)
                if record is None:
                    starts.append(Start(run, request))
                    _attempt(starts[-1], starts[-1].begin, results)
            while None in results.values():
                for start in starts:
                    if results[start.name] is None:
                        _attempt(start, start.poll, results)
                time.sleep(POLL_S)
        except BaseException:
            for start in starts:
                if results[start.name] is None:
                    start.abandon()
            raise
    if starts:
        sweep(run)
    return [results[request["name"]] for request in requests]


def _attempt(start, step, results):
    """One step of a start; what it brings goes to ``results``."""
    try:
        record = step()
        results[start.name] = record and dict(record, started=True)
    except (HostError, OSError) as exc:
        start.abandon()
        results[start.name] = {"name": start.name, "error": str(exc) if isinstance(exc, HostError) else disk_trouble(exc, start.run)}


# --- looking and stopping -----------------------------------------------------------------------------------

def _names(run, ending):
    return sorted(entry[:-len(ending)] for entry in os.listdir(run) if entry.endswith(ending))


def sweep(run):
    """Remove what dead services of this host left behind, and their logs after some days."""
    for name in _names(run, ".json"):
        if not alive(read_record(run, name) or {}):
            with contextlib.suppress(HostError), locked(run, name, 0):      # locked: somebody takes care of it
                if not alive(read_record(run, name) or {}):
                    _clean(run, name)
    for entry in os.listdir(run):
        path = os.path.join(run, entry)
        with contextlib.suppress(OSError):                                  # gone meanwhile
            old = time.time() - os.stat(path).st_mtime > LOG_DAYS * 86400
            if old and (entry.endswith(".log.1") or entry.endswith(".log") and not os.path.exists(path[:-4] + ".json")):
                os.unlink(path)


def services():
    """The records of the services that live."""
    run = run_folder()
    sweep(run)
    return [record for record in (read_record(run, name) for name in _names(run, ".json")) if record]


def _matches(name, which):
    return name == which or name[:-9] == which          # the name is the key, "-" and eight hexadecimal digits


def stop(which):
    """Stop the services with this name or key; the names of those that lived."""
    run, stopped, elsewhere = run_folder(), [], []
    for name in _names(run, ".json"):
        if _matches(name, which):
            with locked(run, name, START_S + ANSWER_S + STOP_S):
                record = read_record(run, name)
                if record and record.get("node") != os.uname().nodename:
                    elsewhere.append("%s runs on %s: stop it there" % (name, record.get("node")))
                elif record:
                    stopped += [name] if alive(record) else []
                    _end(record)
                    _clean(run, name)
    if elsewhere and not stopped:
        raise HostError("; ".join(elsewhere))
    return stopped


def remove(which):
    """Remove what dead services with this name or key left behind, and their logs; the paths.  Raises ``HostError`` if one lives."""
    run, removed = run_folder(), []
    for name in sorted(set(_names(run, ".json") + _names(run, ".log"))):
        if _matches(name, which):
            with locked(run, name, ANSWER_S):
                if alive(read_record(run, name) or {}):
                    raise HostError("%s runs: stop it first" % name)
                found = [path for path in (os.path.join(run, name + end) for end in (".json", ".log", ".log.1")) if os.path.exists(path)]
                _clean(run, name)
                for path in found:
                    _remove(path)
                removed += found
    return removed


def logs(which):
    """The end of the newest log with this name or key; None if there is none."""
    run = run_folder()
    paths = [os.path.join(run, name + ".log") for name in _names(run, ".log") if _matches(name, which)]
    return tail(max(paths, key=os.path.getmtime), n_bytes=1 << 20) if paths else None

