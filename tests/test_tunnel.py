"""relay and tunnel without ssh: the far end is a child of this process."""
import ast
import contextlib
import hashlib
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from seamless_lite import relay, ssh
from seamless_lite.conversation import Conversation
from seamless_lite.errors import DeadlineError, ServiceError
from seamless_lite.sshadvice import failure
from seamless_lite.tunnel import Tunnel

ANSWERS = r'''
import json, os, sys, time
i = sys.stdin.buffer
while True:
    line = i.readline()
    if not line:
        break
    request = json.loads(line.decode())
    n = len(i.read(request.get("bytes", 0)))
    if "sleep" in request:
        time.sleep(request["sleep"])
    if "exit" in request:
        sys.exit(request["exit"])
    sys.stdout.write("x" * request.get("noise", 0))
    answer = {"error": request["fail"]} if "fail" in request else {"ok": [request.get("n"), n, os.getpid(), list(sys.version_info[:2])]}
    sys.stdout.write("@seamless@" + json.dumps(answer) + "\n")
    sys.stdout.flush()
'''


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="tunnel-") as path:     # paths of sockets must be short
        yield path


@pytest.fixture
def tunnel():
    tunnel = Tunnel("here", [sys.executable, "-ISc", relay.LOADER], 20)
    yield tunnel
    tunnel.close()


@contextlib.contextmanager
def server(path, serve):
    """Accepts connections at a socket, each in a thread with ``serve(sock)``."""
    listening = socket.socket(socket.AF_UNIX) if isinstance(path, str) else socket.socket()
    listening.bind(path)
    listening.listen(50)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listening.accept()[0],), daemon=True).start()

    def one(sock):
        with sock, contextlib.suppress(OSError):
            serve(sock)
    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def echo(sock):
    for data in iter(lambda: sock.recv(1 << 16), b""):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def dial(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(path)
    return sock


def receive_all(sock):
    return b"".join(iter(lambda: sock.recv(1 << 18), b""))


def test_the_far_end_parses_on_python_3_6_and_imports_nothing_of_ours():
    source = pathlib.Path(relay.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 6))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_connections_reach_unix_sockets_and_tcp_ports_and_both_directions_end_by_themselves(tunnel, folder):
    with server(folder + "/far", echo), server(("127.0.0.1", 0), echo) as (_, port):
        tunnel.listen(folder + "/a", {"unix": folder + "/far"})
        tunnel.listen(folder + "/b", {"tcp": ["127.0.0.1", port]})
        for local in "ab":
            with dial(folder + "/" + local) as sock:
                sock.sendall(b"hello " + local.encode())
                sock.shutdown(socket.SHUT_WR)
                assert receive_all(sock) == b"hello " + local.encode()
        assert stat.S_ISSOCK(os.stat(folder + "/a").st_mode)


def test_many_streams_at_once_arrive_whole(tunnel, folder):
    tunnel.listen(folder + "/a", {"unix": folder + "/far"})
    failures = []

    def one(n):
        data = hashlib.sha256(b"%d" % n).digest() * 60000
        with dial(folder + "/a") as sock:
            threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR))).start()
            if receive_all(sock) != data:
                failures.append(n)
    with server(folder + "/far", echo):
        threads = [threading.Thread(target=one, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not failures


def memory(pid):
    for line in pathlib.Path("/proc/%d/status" % pid).read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_slow_reader_fills_no_memory_and_holds_up_nobody_else(tunnel, folder):
    sent = []

    def pour(sock):
        for _ in range(400):
            sock.sendall(bytes(1 << 20))
            sent.append(1 << 20)
    with server(folder + "/pour", pour), server(folder + "/far", echo):
        tunnel.listen(folder + "/slow", {"unix": folder + "/pour"})
        tunnel.listen(folder + "/a", {"unix": folder + "/far"})
        before = memory(tunnel._ssh.pid)
        with dial(folder + "/slow") as slow:
            slow.recv(1)
            for n in range(30):
                with dial(folder + "/a") as sock:
                    sock.sendall(b"x")
                    assert sock.recv(1) == b"x"
                time.sleep(0.01)
            assert sum(sent) < 20 << 20
            assert memory(tunnel._ssh.pid) - before < 20 << 20
        for _ in range(500):                        # who hangs up is not sent the rest
            if not tunnel.channels:
                break
            time.sleep(0.01)
        assert not tunnel.channels and sum(sent) < 20 << 20


def test_what_cannot_be_connected_is_closed_and_the_reason_is_known(tunnel, folder):
    tunnel.listen(folder + "/a", {"unix": folder + "/none"})
    with dial(folder + "/a") as sock:
        assert sock.recv(1) == b""
    assert tunnel.reasons[str({"unix": folder + "/none"})] == "No such file or directory"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tunnel.open({"tcp": ["127.0.0.1", port]}) as sock:
        sock.settimeout(20)
        assert sock.recv(1) == b""
    assert tunnel.reasons[str({"tcp": ["127.0.0.1", port]})] == "Connection refused"


def test_when_the_far_end_dies_connections_and_listening_sockets_close(tunnel, folder):
    with server(folder + "/far", echo):
        tunnel.listen(folder + "/a", {"unix": folder + "/far"})
        with dial(folder + "/a") as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            tunnel._ssh.kill()
            assert sock.recv(1) == b""
        tunnel._thread.join(20)
        assert not tunnel.alive and not os.path.exists(folder + "/a")
        with tunnel.open({"unix": folder + "/far"}) as late:
            late.settimeout(20)
            assert late.recv(1) == b""
        assert not tunnel.answers(1)


def test_when_the_near_end_goes_so_does_the_far_one_with_its_children(folder):
    tunnel = Tunnel("here", [sys.executable, "-ISc", relay.LOADER], 20)
    talk = Conversation("here", lambda alone: ssh.Stream(tunnel.open({"run": []}), tunnel.words), ANSWERS)
    pid, far = talk.ask({})[2], tunnel._ssh
    tunnel.close()
    assert far.poll() is not None
    for _ in range(500):
        with contextlib.suppress(FileNotFoundError):
            if pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
                continue
        break
    else:
        pytest.fail("the child lives on")


def test_conversations_run_beside_each_other_and_what_follows_a_request_arrives(tunnel):
    def open_stream(alone):
        return ssh.Stream(tunnel.open({"run": []}), tunnel.words)
    first, second = Conversation("here", open_stream, ANSWERS), Conversation("here", open_stream, ANSWERS)
    assert first.ask({"n": 1}, b"x" * 3000000)[:2] == [1, 3000000]
    assert second.ask({"n": 2, "noise": 300000})[:2] == [2, 0]
    assert first.ask({"n": 3})[2] != second.ask({"n": 4})[2]
    with pytest.raises(ServiceError, match="^here: the disk is full$"):
        first.ask({"fail": "the disk is full"})
    with pytest.raises(DeadlineError, match="here did not answer within 0.2 s"):
        second.ask({"sleep": 5}, timeout_s=0.2)
    assert first.ask({"n": 5})[0] == 5
    with pytest.raises(ServiceError, match="^ssh here: "):
        first.ask({"exit": 3})


@pytest.mark.parametrize("argv, sentence", [
    ([sys.executable, "-c", "import sys; sys.stderr.write('Host key verification failed.\\n'); sys.exit(255)"], "run 'ssh there' once"),
    ([sys.executable, "-c", "print('This account is for backups.')"], "This account is for backups: .*bound to one command"),
    ([sys.executable, "-c", "import time; time.sleep(60)"], "the log-in timed out"),
])
@pytest.mark.slow
def test_a_far_end_that_does_not_come_is_one_sentence(argv, sentence):
    with pytest.raises(ServiceError, match=sentence):
        Tunnel("there", argv, 1.0)


def test_a_far_end_that_is_loud_is_heard_nevertheless():
    code = "import sys; sys.stderr.write('e' * 300000); sys.stdout.write('o' * 50000); sys.stdout.flush();" + relay.LOADER
    tunnel = Tunnel("here", [sys.executable, "-ISc", code], 20)
    assert tunnel.answers(20)
    tunnel.close()


SHELLS = [shell for shell in ("sh", "bash", "dash", "zsh", "csh", "tcsh", "fish", "ksh") if shutil.which(shell)]


def fake(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def load(shell, python, environment, source="print('runs', sys.executable, flush=True); print(i.readline().decode())"):
    source = source.encode()
    child = subprocess.run([shutil.which(shell), "-c", ssh.loader(python)], input=b"%d\n%sand more\n" % (len(source), source),
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, timeout=60)
    return child.returncode, child.stdout.decode(), child.stderr.decode()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("python", [None, sys.executable, "~/my env/python", "it's none", "/nowhere/python3"])
@pytest.mark.slow
def test_the_loader_works_in_every_login_shell(shell, python, home):
    (home / "my env").mkdir()
    (home / "my env/python").symlink_to(sys.executable)
    code, out, err = load(shell, python, {"HOME": str(home), "PATH": os.environ["PATH"]})
    assert code == 0 and out.endswith("\nand more\n\n"), err
    chosen = out.splitlines()[0]
    if python == sys.executable:
        assert chosen == "runs " + python
    assert (chosen == "runs %s" % (home / "my env/python")) == (python == "~/my env/python")


def test_the_loader_is_one_line_without_what_shells_trip_over():
    text = ssh.loader("python3.11")
    assert not set(text) & set("\n!\\") and text.count("'") == 2
    assert len(text) < 1500


def test_the_loader_passes_over_a_python_that_is_too_old_or_broken(home, tmp_path):
    fake(tmp_path / "python3", "echo 3.4; exit 1\n")
    fake(tmp_path / "python3.16", "exec %s \"$@\"\n" % sys.executable)
    (tmp_path / "sh").symlink_to(shutil.which("sh"))
    code, out, err = load("sh", None, {"HOME": str(home), "PATH": str(tmp_path)})
    assert code == 0 and out.startswith("runs"), err


def test_a_program_without_python_says_so_and_how_old_ones_are_told_apart(home, tmp_path):
    places = ssh._PLACES
    (tmp_path / "sh").symlink_to(shutil.which("sh"))
    text = ssh.loader().replace(":".join(places), "/nowhere")
    for python, sentence in ((None, "there is no python3: install"), ("exit 1\n", "too old to use: .*python3: Python 3.6")):
        if python:
            fake(tmp_path / "python3", python)
        child = subprocess.run([shutil.which("sh"), "-c", text], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={"HOME": str(home), "PATH": str(tmp_path)}, timeout=60)
        assert child.returncode == 93
        error = failure("there", child.stderr.decode(), 93)
        assert error.final
        with pytest.raises(ServiceError, match=sentence):
            raise error


@pytest.mark.parametrize("words, cure, final", [
    ("@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "ssh-keygen -R there", True),
    ("No ED25519 host key is known for there and you have requested strict checking.\nHost key verification failed.", "compare the key", True),
    ("tester@there: Permission denied (publickey).", "ssh-copy-id", True),
    ("tester@there: Permission denied (publickey,keyboard-interactive).", "in a terminal as well", True),
    ("ssh: Could not resolve hostname there: Name or service not known", "'Host there' block", False),
    ("ssh: connect to host there port 22: Connection refused", "Port in ~/.ssh/config", False),
    ("ssh: connect to host there port 22: Connection timed out", "VPN", False),
    ("ssh: connect to host there port 22: No route to host", "no way leads to there", False),
    ("kex_exchange_identification: read: Connection reset by peer\nConnection reset by 1.2.3.4 port 22", "MaxStartups", False),
    ("/home/u/.ssh/config: line 3: Bad configuration option: foo", "repair", True),
])
def test_the_words_of_ssh_come_with_one_piece_of_advice(words, cure, final):
    error = failure("there", words, 255)
    assert str(error).startswith("ssh there: ") and cure in str(error) and error.final is final
    assert "\n" not in str(error) and "%s" not in str(error)


@pytest.mark.parametrize("name", ["", "-oProxyCommand=touch x", "a b", "a;b", "$(a)", "a\nb"])
def test_a_name_that_is_none_is_refused(name, home):
    with pytest.raises(Exception, match="is not the name of a host"):
        ssh.Host(name)
