"""ssh.Host against real hosts behind sshd, ordinary and awkward ones."""
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from seamless_lite import hostside, ssh, sshmaster
from seamless_lite.errors import ServiceError
from seamless_lite.httpclient import HttpClient

from labs import ROOT, lab_user, netns, _netns, ssh_host, wait_until           # noqa: F401
from test_tunnel import ANSWERS

pytestmark = pytest.mark.ssh

#: Stands for a service there: answers each request on a Unix socket and a TCP port with its pid, and on a third with silence.
SERVER = r'''
import os, socket, sys, threading
def serve(sock, talk):
    while True:
        conn, _ = sock.accept()
        threading.Thread(target=talk, args=(conn,), daemon=True).start()
def http(conn):
    file = conn.makefile("rb")
    while file.readline():
        while file.readline() not in (b"\r\n", b""):
            pass
        body = b"%d" % os.getpid()
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
path = os.path.expanduser("~/service.sock")
if os.path.exists(path):
    os.unlink(path)
unix, tcp, quiet = socket.socket(socket.AF_UNIX), socket.socket(), socket.socket()
unix.bind(path)
for sock in (tcp, quiet):
    sock.bind(("127.0.0.1", int(os.environ.get("PORT", 0)) if sock is tcp else 0))
for sock in (unix, tcp, quiet):
    sock.listen(50)
threading.Thread(target=serve, args=(tcp, http), daemon=True).start()
threading.Thread(target=serve, args=(quiet, lambda conn: conn.sendall(conn.recv(100))), daemon=True).start()
print(tcp.getsockname()[1], quiet.getsockname()[1])
sys.stdout.flush()
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
serve(unix, http)
'''
START = r'''
import json, os, subprocess, sys
i = sys.stdin.buffer
source = json.loads(i.readline().decode())["source"]
child = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, start_new_session=True)
ports = child.stdout.readline().split()
print("@seamless@" + json.dumps({"ok": [os.path.expanduser("~/service.sock"), int(ports[0]), int(ports[1])]}))
'''


class Far:
    """A host of a lab as the user of this process sees it."""

    def __init__(self, lab, name=None):
        self.lab, self.before = lab, lab.logins()
        self.host = ssh.Host(name or lab.name)

    def logins(self):
        return self.lab.logins() - self.before

    def talk(self):
        return self.host.converse(ANSWERS)

    def serve(self):
        """A service there: its addresses there (Unix socket, TCP port, TCP port that does not speak HTTP)."""
        talk = self.host.converse(START)
        path, port, quiet = talk.ask({"source": SERVER})
        talk.close()
        return "unix://" + path, "http://127.0.0.1:%d" % port, "tcp://127.0.0.1:%d" % quiet


def speaks(address):
    client = HttpClient(address)
    try:
        return int(client.request("GET", "/").body)
    finally:
        client.close()


def echoes(address):
    host, _, port = address[len("http://"):].rpartition(":")
    with socket.create_connection((host, int(port)), 20) as sock:
        sock.settimeout(20)
        sock.sendall(b"hello")
        return sock.recv(100) == b"hello"


@pytest.fixture
def far(ssh_host, monkeypatch):
    """Factory: start a host with these options, and go there with the ssh on PATH."""
    fars = []

    def make(**options):
        lab = ssh_host(**options)
        monkeypatch.setenv("PATH", lab.bin + os.pathsep + os.environ["PATH"])
        fars.append(Far(lab))
        return fars[-1]
    yield make
    for far in fars:
        far.host.close()


def use_everything(far):
    """Two conversations at once and three kinds of forwards; the three addresses."""
    first, second = far.talk(), far.talk()
    assert first.ask({"n": 1}, b"x" * 1000000)[:2] == [1, 1000000]
    assert second.ask({"n": 2, "noise": 1000})[:2] == [2, 0]
    targets = far.serve()
    addresses = [far.host.forward("service", targets[0]), far.host.forward("other", targets[1]),
                 far.host.forward("dask", targets[2], tcp=True)]
    assert speaks(addresses[0]) == speaks(addresses[1])
    assert addresses[2].startswith("http://127.0.0.1:") and echoes(addresses[2])
    assert first.ask({"n": 3})[0] == 3
    for address in addresses:
        if address.startswith("unix://"):
            path = pathlib.Path(address[len("unix://"):])
            assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
            assert path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ServiceError, match="nothing answers at unix:///nowhere on %s .No such file or directory" % far.host.name):
        far.host.forward("none", "unix:///nowhere")
    return targets, addresses


# --- one log-in ---

def test_commands_and_forwards_log_in_once_and_a_second_process_not_at_all(far, tmp_path):
    far = far()
    targets, addresses = use_everything(far)
    assert far.logins() == 1
    (tmp_path / "second.py").write_text(
        "import sys; sys.path.insert(0, %r)\n"
        "from seamless_lite import ssh\n"
        "host = ssh.Host(%r)\n"
        "print(host.converse(sys.argv[1]).ask({'n': 7})[0])\n"
        "print(host.forward('service', %r), host.forward('other', %r))\n" % (str(ROOT), far.host.name, *targets[:2]))
    out = subprocess.run([sys.executable, str(tmp_path / "second.py"), ANSWERS], stdout=subprocess.PIPE, check=True, timeout=60).stdout
    assert out.decode().split() == ["7"] + addresses[:2]        # and it uses the forwards that we made
    assert far.logins() == 1


def test_processes_that_come_at_once_share_one_log_in(far, tmp_path):
    far = far()
    (tmp_path / "one.py").write_text(
        "import sys; sys.path.insert(0, %r)\n"
        "from seamless_lite import ssh\n"
        "print(ssh.Host(%r).converse(sys.argv[1]).ask({'n': 7})[0])\n" % (str(ROOT), far.host.name))
    children = [subprocess.Popen([sys.executable, str(tmp_path / "one.py"), ANSWERS], stdout=subprocess.PIPE) for _ in range(6)]
    assert [child.communicate(timeout=60)[0].split() for child in children] == [[b"7"]] * 6
    assert far.logins() == 1


def test_a_shared_connection_of_the_user_is_used(far):
    far = far()
    name = far.host.name + "-mux"
    subprocess.run(["ssh", name, "true"], check=True, timeout=20)
    logins = far.logins()
    far.host = ssh.Host(name)
    use_everything(far)
    assert far.logins() == logins
    assert subprocess.run(["ssh", "-O", "exit", name], stderr=subprocess.DEVNULL, timeout=20).returncode == 0
    far.host.mend()                                         # now our own
    assert far.talk().ask({"n": 1})[0] == 1


def test_a_shared_connection_of_the_user_that_leads_nowhere_is_left_alone(far, monkeypatch):
    far = far()
    name = far.host.name + "-mux"
    subprocess.run(["ssh", name, "true"], check=True, timeout=20)
    far.host = ssh.Host(name)
    targets, addresses = use_everything(far)
    theirs = far.host._master.path
    with monkeypatch.context() as patch:                    # it says that it lives, but nothing comes through
        patch.setattr(sshmaster.Master, "alive", lambda self: self.path != theirs)
        far.host.mend()
    assert far.host._master.path != theirs
    assert speaks(addresses[0]) == speaks(addresses[1]) and echoes(addresses[2])
    assert subprocess.run(["ssh", "-O", "exit", name], stderr=subprocess.DEVNULL, timeout=20).returncode == 0


def test_a_child_process_makes_connections_of_its_own(far):
    far = far(no_forwarding=True)
    use_everything(far)
    talk = far.talk()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            host = far.host
            assert host.converse(ANSWERS).ask({"n": 9})[0] == 9
            assert host._tunnel is None
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert talk.ask({"n": 10})[0] == 10                     # the child closed nothing of ours
    assert far.logins() == 1


# --- awkward hosts ---

@pytest.mark.parametrize("shell", ["bash", "dash", "tcsh", "csh", "fish", "zsh"])
def test_login_shells_that_print_on_locked_down_hosts(far, shell):
    if not shutil.which(shell):
        pytest.skip("needs " + shell)
    far = far(shell=shutil.which(shell), locked_down=True)
    use_everything(far)
    assert far.logins() == 1


@pytest.mark.parametrize("option", ["DisableForwarding yes", "AllowTcpForwarding no", "AllowStreamLocalForwarding no"])
def test_where_sshd_forbids_forwarding_one_session_carries_it(far, option):
    far = far(sshd_option=option, noise=True)
    use_everything(far)
    assert far.logins() == 1 and far.host._tunnel is not None
    far.host.close()
    again = ssh.Host(far.host.name)
    far.host = again
    use_everything(far)                                     # what is forbidden is known by now
    assert far.logins() == 1


def test_where_connections_cannot_be_shared_one_ssh_carries_everything(far, monkeypatch):
    def start(self):
        raise sshmaster.Impossible
    monkeypatch.setattr(sshmaster.Master, "_start", start)
    far = far(shell=shutil.which("tcsh") or "/bin/sh", noise=True)
    use_everything(far)
    assert far.logins() == 1
    far.host.close()
    wait_until(lambda: "relay" not in far.lab.run("ps", "-eo", "args"), "the far end is gone")


def test_folders_that_take_no_sockets_are_not_used(far, monkeypatch):
    real = sshmaster._takes_sockets
    monkeypatch.setattr(sshmaster, "_takes_sockets", lambda folder: "/run/ssh" not in folder and real(folder))
    far = far()
    use_everything(far)
    assert far.host._master.folder.startswith("/tmp/seamless-%d/" % os.geteuid())
    far.host.close()
    far.host._master.end()
    shutil.rmtree(far.host._master.folder)


def test_no_folder_for_sockets_at_all(far, monkeypatch):
    monkeypatch.setattr(sshmaster, "_takes_sockets", lambda folder: False)
    far = far()
    _, addresses = use_everything(far)
    assert all(address.startswith("http://127.0.0.1:") for address in addresses)
    assert far.logins() == 1


def test_a_host_that_allows_one_session_per_connection(far):
    far = far(sshd_option="MaxSessions 1")
    use_everything(far)
    assert far.logins() == 2                                # the second conversation needed one, and no later one did


def test_a_home_with_a_long_path(far, tmp_path, monkeypatch):
    monkeypatch.setenv("SEAMLESS_HOME", str(tmp_path / ("long" * 30)))
    far = far()
    use_everything(far)
    far.host._master.end()
    shutil.rmtree(far.host._master.folder)


def test_forced_commands_that_let_us_through_and_that_do_not(far):
    allow = ('case "$SSH_ORIGINAL_COMMAND" in "exec sh "*|exit*) echo noise; exec sh -c "$SSH_ORIGINAL_COMMAND";; *) exit 126;; esac')
    use_everything(far(forced_command=allow))
    with pytest.raises(ServiceError, match="This account makes backups: .*bound to one command") as error:
        far(forced_command="echo This account makes backups").talk().ask({})
    assert "\n" not in str(error.value)


def test_hosts_without_python_or_with_one_that_is_too_old(far, tmp_path):
    python = os.path.realpath(shutil.which("python3", path="/usr/bin"))
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(ServiceError, match="there is no python3: install a python3 there") as error:
        far(bind="/dev/null:" + python).talk().ask({})
    assert error.value.final
    with pytest.raises(ServiceError, match="too old to use: .*: Python 3.6 is the oldest"):
        far(bind="%s:%s" % (old, python)).talk().ask({})


def test_many_log_ins_at_once_are_waited_for(far):
    far = far(sshd_option="MaxStartups 1:100:1")
    with open(far.lab.info["ssh_config"]) as file:
        port = int(re.search(r"Port (\d+)", file.read()).group(1))
    with socket.create_connection(("127.0.0.1", port)) as other:        # holds the one place, and then goes
        other.recv(1)
        threading.Timer(1.0, other.shutdown, [socket.SHUT_RDWR]).start()
        assert far.talk().ask({"n": 1})[0] == 1


# --- the user's configuration ---

@pytest.fixture
def configure(monkeypatch, tmp_path):
    """``configure(text)``: the ssh on PATH has this configuration."""
    def make(text):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "config").write_text(text)
        (tmp_path / "bin/ssh").write_text("#!/bin/sh\nexec %s -F %s \"$@\"\n" % (shutil.which("ssh", path="/usr/bin:/usr/local/bin"), tmp_path / "config"))
        (tmp_path / "bin/ssh").chmod(0o755)
        monkeypatch.setenv("PATH", "%s%s%s" % (tmp_path / "bin", os.pathsep, os.environ["PATH"]))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return make


def block(lab, name=None, **changes):
    """The configuration of a lab's host, changed."""
    text = pathlib.Path(lab.info["ssh_config"]).read_text().partition("Host %s-mux" % lab.name)[0]
    lines = ["Host " + (name or lab.name)] + ["  %s %s" % item for item in changes.items()]
    return "\n".join(lines + [line for line in text.splitlines()[1:] if line.split() and line.split()[0] not in changes]) + "\n"


def refuse(name, sentence):
    with pytest.raises(ServiceError, match=sentence) as error:
        ssh.Host(name).converse(ANSWERS).ask({})
    assert str(error.value).startswith("ssh %s: " % name) and "\n" not in str(error.value)
    return error.value


def test_a_host_behind_another_one(ssh_host, configure):
    gate, inner = ssh_host(), ssh_host()
    configure(block(gate) + block(inner, ProxyJump=gate.name))
    far = Far(inner)
    use_everything(far)
    assert far.logins() == 1
    far.host._master.end()


def test_directives_that_would_be_in_the_way(ssh_host, configure):
    lab = ssh_host()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        configure(block(lab, RemoteCommand="tmux attach", RequestTTY="force", LocalForward="%d 127.0.0.1:9" % taken.getsockname()[1],
                        ExitOnForwardFailure="yes", ControlMaster="yes", SendEnv="*", LogLevel="QUIET", Compression="yes"))
        far = Far(lab)
        use_everything(far)
        assert far.logins() == 1
        far.host._master.end()


def test_unknown_and_changed_host_keys(ssh_host, configure, tmp_path):
    lab, other = ssh_host(), ssh_host()
    (tmp_path / "none").write_text("")
    configure(block(lab, UserKnownHostsFile=tmp_path / "none"))
    assert refuse(lab.name, "run 'ssh %s' once in a terminal, compare the key" % lab.name).final
    known = pathlib.Path(other.info["known_hosts"]).read_text().replace(other.name, lab.name)
    (tmp_path / "changed").write_text(known)
    configure(block(lab, UserKnownHostsFile=tmp_path / "changed"))
    assert refuse(lab.name, "HAS CHANGED.*ssh-keygen -R %s" % lab.name).final


def test_refused_keys_and_names_and_ports_that_are_wrong(ssh_host, configure, tmp_path):
    lab = ssh_host()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True, timeout=20)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configure(block(lab, IdentityFile=tmp_path / "key") + block(lab, "closed", Port=port)
              + block(lab, "lost", HostName="no-such-host.invalid"))
    assert refuse(lab.name, "Permission denied .*ssh-copy-id").final
    assert not refuse("closed", "Connection refused.*Port").final
    assert not refuse("lost", "Could not resolve hostname no-such-host.invalid.*typing error").final
    configure("Host x\n  NoSuchOption yes\n")
    assert refuse("x", "(?i)bad configuration option: nosuchoption.*repair").final


def test_a_key_with_a_passphrase_needs_its_agent(ssh_host, configure, tmp_path):
    lab = ssh_host()
    key = tmp_path / "key"
    shutil.copy(lab.info["key"], key)
    key.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)], check=True, timeout=20, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(prefix="agent-") as folder:
        configure(block(lab, IdentityFile=key, IdentityAgent=folder + "/agent"))
        assert refuse(lab.name, "the key %s has a passphrase, and no agent has it: run 'ssh-add" % key).final
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", folder + "/agent"], stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: os.path.exists(folder + "/agent"), "the agent runs")
            subprocess.run(["ssh-add", "-q", lab.info["key"]], env=dict(os.environ, SSH_AUTH_SOCK=folder + "/agent"), check=True, timeout=20)
            far = Far(lab)
            use_everything(far)
            far.host._master.end()
        finally:
            agent.kill()
            agent.wait()


def test_a_program_that_cannot_be_found(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceError, match="no program 'ssh' on PATH"):
        ssh.Host("anywhere").converse(ANSWERS).ask({})


# --- mending ---

def test_a_shared_connection_that_died_is_made_again_with_its_forwards(far):
    far = far()
    _, addresses = use_everything(far)
    pid = int(far.host._master.identity().split()[0])
    os.kill(pid, signal.SIGKILL)                            # leaves its sockets behind
    wait_until(lambda: not far.host._master.identity(), "it is gone")
    far.host.mend()
    assert speaks(addresses[0]) == speaks(addresses[1]) and echoes(addresses[2])
    assert far.talk().ask({"n": 1})[0] == 1
    assert far.logins() == 2
    far.host.mend()
    assert far.logins() == 2                                # nothing was lost, so nothing was done


def test_a_shared_connection_that_hangs_is_replaced(far, monkeypatch):
    monkeypatch.setattr(sshmaster, "PROBE_S", 1)
    far = far()
    _, addresses = use_everything(far)
    pid = int(far.host._master.identity().split()[0])
    os.kill(pid, signal.SIGSTOP)
    far.host.mend()
    assert speaks(addresses[0]) == speaks(addresses[1]) and echoes(addresses[2])
    wait_until(lambda: hostside.identity(pid) is None, "it is dead")


def test_what_a_killed_process_left_is_removed(far):
    far = far(no_forwarding=True)
    far.talk().ask({})
    path = far.host._master.path_of("-0123abcd-4194000-beef.sock")      # no process has such a number here
    pathlib.Path(path).touch()
    use_everything(far)
    assert not os.path.exists(path)


def test_a_conversation_finds_a_connection_that_died_unnoticed(far):
    far = far()
    far.talk().ask({})
    os.kill(int(far.host._master.identity().split()[0]), signal.SIGKILL)
    assert far.talk().ask({"n": 5})[0] == 5


def test_threads_and_processes_that_mend_at_once_log_in_once(far, tmp_path):
    far = far()
    targets, addresses = use_everything(far)
    (tmp_path / "other.py").write_text(
        "import sys; sys.path.insert(0, %r)\n"
        "from seamless_lite import ssh\n"
        "host = ssh.Host(%r)\n"
        "print(host.forward('service', %r), host.forward('third', %r), flush=True)\n"
        "sys.stdin.readline(); host.mend(); print('mended', flush=True); sys.stdin.readline()\n"
        % (str(ROOT), far.host.name, targets[0], targets[1]))
    other = subprocess.Popen([sys.executable, str(tmp_path / "other.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    service, third = other.stdout.readline().decode().split()
    assert service == addresses[0]
    os.kill(int(far.host._master.identity().split()[0]), signal.SIGKILL)
    other.stdin.write(b"go\n")
    other.stdin.flush()
    threads = [threading.Thread(target=far.host.mend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert other.stdout.readline() == b"mended\n"
    assert speaks(addresses[0]) == speaks(addresses[1]) == speaks(third) and echoes(addresses[2])
    assert far.logins() == 2
    other.communicate(b"end\n", timeout=20)


def test_the_one_ssh_that_carries_everything_is_mended_too(far):
    far = far(no_forwarding=True)
    _, addresses = use_everything(far)
    far.host._tunnel._ssh.kill()
    far.host._tunnel._thread.join(20)
    client = HttpClient(addresses[0], mend=far.host.mend)
    assert int(client.request("GET", "/").body) == speaks(addresses[1])
    assert echoes(addresses[2])
    assert far.talk().ask({"n": 1})[0] == 1
    assert far.logins() == 1                                # in the shared connection, which still lives


@pytest.mark.parametrize("no_forwarding", [False, True])
def test_a_service_that_moved_gets_the_same_address_here(far, no_forwarding):
    far = far(no_forwarding=no_forwarding)
    targets, addresses = use_everything(far)
    old = speaks(addresses[0])
    assert far.host.forward("service", targets[1]) == addresses[0]
    assert speaks(addresses[0]) == old
    assert far.host.forward("service", targets[0]) == addresses[0]
    assert speaks(addresses[0]) == old
    assert far.host.forward("dask", targets[1], tcp=True) == addresses[2]
    assert speaks(addresses[2]) == old


def test_an_error_tells_whether_a_person_is_needed_or_patience(ssh_host, configure, tmp_path):
    lab = ssh_host()
    configure(block(lab))
    far = Far(lab)
    far.talk().ask({})
    far.host._master.end()
    (tmp_path / "none").write_text("")
    configure(block(lab, UserKnownHostsFile=tmp_path / "none"))
    with pytest.raises(ServiceError, match="compare the key") as error:
        far.host.mend()
    assert error.value.final
    configure(block(lab, Port=1))
    with pytest.raises(ServiceError, match="Connection refused") as error:
        far.host.mend()
    assert not error.value.final


NETWORK = r'''
import sys, time, threading
from seamless_lite import hosts, ssh
from seamless_lite.httpclient import HttpClient
host, start, server = ssh.Host("h1"), sys.argv[1], sys.argv[2]
talk = host.converse(start)
path, port, _ = talk.ask({"source": server})
talk.close()
unix, tcp = host.forward("a", "unix://" + path), host.forward("b", "http://127.0.0.1:%d" % port, tcp=True)
clients = [HttpClient(address, mend=hosts.Mending('h1', host.mend)) for address in (unix, tcp)]
pid = clients[0].request("GET", "/").body
print("ready", flush=True)
while not sys.stdin.closed:
    begun = time.time()
    for client in clients:
        assert client.request("GET", "/").body == pid
    print("answered %.1f" % (time.time() - begun), flush=True)
    time.sleep(0.2)
'''


@pytest.mark.slow
@pytest.mark.parametrize("away_s", [5, 40])
def test_a_network_that_is_cut_and_comes_back(netns, lab_user, away_s):
    user = lab_user(netns)
    running = user.start_python(NETWORK, START, SERVER)
    wait_until(lambda: running.stdout.count("answered") > 2, "the service answers", 30)
    before = netns.logins("h1")
    netns("cut", "h1")
    time.sleep(away_s)
    answers = running.stdout.count("answered")
    netns("restore", "h1")
    wait_until(lambda: running.stdout.count("answered") > answers + 3, "the service answers again: " + running.stderr, 60)
    assert netns.logins("h1") - before <= 1
    if away_s > 30:
        assert "waiting for h1: " in running.stderr
    running.kill()


@pytest.mark.slow
def test_a_host_that_does_not_answer_is_told_within_the_time_limit_of_connecting(netns, lab_user):
    user = lab_user(netns)
    netns("cut", "h1")
    done = user.python("import sys; from seamless_lite import ssh; ssh.Host('h1').converse('').ask({})")
    assert done.returncode and "ssh h1: " in done.stderr and "timed out" in done.stderr and "VPN" in done.stderr


# --- terminals ---

def at_terminal(script, *args):
    """Run a Python script at a terminal of its own; its pid and the terminal's other end."""
    import pty
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import sys; sys.path.insert(0, %r)\n%s" % (str(ROOT), script), *args])
    return pid, terminal


def read_until(terminal, text, timeout_s=30):
    import select
    heard, end = b"", time.monotonic() + timeout_s
    while text not in heard:
        left = end - time.monotonic()
        if left <= 0 or not select.select([terminal], [], [], left)[0]:
            pytest.fail("the terminal shows only %r" % heard)
        try:
            heard += os.read(terminal, 4096)
        except OSError:
            pytest.fail("it ended and showed %r" % heard)
    return heard


AT_TERMINAL = r'''
import time
from seamless_lite import hostside, ssh, sshmaster
if sys.argv[2] == "alone":
    def start(self):
        raise sshmaster.Impossible
    sshmaster.Master._start = start
host = ssh.Host(sys.argv[1])
talk = host.converse(sys.argv[3])
try:
    print("answer", talk.ask({"n": 6})[0] * 7, flush=True)
    for _ in range(300):
        time.sleep(0.1)             # a signal just before a sleep is seen after it
except KeyboardInterrupt:
    print("answer", talk.ask({"n": 9})[0], host.converse(sys.argv[3]).ask({"n": 8})[0], flush=True)
host.close()
'''


@pytest.mark.parametrize("way", ["shared", "alone"])
def test_at_a_terminal_ssh_may_ask_and_ctrl_c_does_not_reach_the_connection(ssh_host, configure, tmp_path, way):
    lab = ssh_host()
    key = tmp_path / "key"
    shutil.copy(lab.info["key"], key)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)], check=True, timeout=20, stdout=subprocess.DEVNULL)
    configure(block(lab, IdentityFile=key, BatchMode="no", StrictHostKeyChecking="ask", UserKnownHostsFile=tmp_path / "none"))
    far = Far(lab)
    pid, terminal = at_terminal(AT_TERMINAL, lab.name, way, ANSWERS)
    try:
        read_until(terminal, b"continue connecting")
        os.write(terminal, b"yes\n")
        read_until(terminal, b"passphrase for key")
        os.write(terminal, b"secret\n")
        read_until(terminal, b"answer 42")
        os.write(terminal, b"\x03")
        read_until(terminal, b"answer 9 8")
        assert far.logins() == 1
    finally:
        os.close(terminal)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if way == "shared":
        assert far.host._connect() and far.logins() == 1        # it is still there
        far.host._master.end()
