"""Services on other hosts: started, found, mended, stopped and removed, over real ssh to hosts that are often awkward."""
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from labs import ROOT, wait_until

pytestmark = pytest.mark.ssh

#: The beginning of each script: three services below ~/store, and what a connection is, as JSON.
BEGIN = """\
import json, os, sys, time
from seamless_lite import launch, hosts
from seamless_lite.httpclient import HttpClient

def specs(host, **fields):
    place = launch.Place(ssh=host, **fields.pop("place", {}))
    stores = {"buffers": {"directory": "~/store/buffers", "address": None}, "results": {"file": "~/store/seamless.db", "address": None}}
    return [launch.ServiceSpec("hashserver", "hashserver-t", ("~/store/buffers", "--writable"), place=place, **fields),
            launch.ServiceSpec("database", "database-t", ("~/store/seamless.db", "--writable"), place=place, **fields),
            launch.ServiceSpec("jobserver", "jobserver-t", ("--workers", "1"), {"stores": stores, "record": True}, place=place, **fields)]

def show(connections):
    print(json.dumps([[c.service, c.pid, c.started, c.address] for c in connections]), flush=True)

def info(connection):
    client = HttpClient(connection.address, connection.secret, mend=connection.mend)
    try:
        return client.request("GET", "/info", timeout_s=60).expect(200).json()
    finally:
        client.close()

host = sys.argv[1]
"""
ENSURE = BEGIN + "show(launch.ensure_all(specs(host)))\n"


def start(user, code, host, **kwargs):
    return user.start_python(BEGIN + textwrap.dedent(code), host, **kwargs)


def run(user, code, host, timeout_s=60, **kwargs):
    return start(user, code, host, **kwargs).finish(timeout_s)


def ensure(user, host):
    """[[service, pid, started, address]...] of the three services."""
    return json.loads(run(user, "show(launch.ensure_all(specs(host)))", host).ok())


def dist(home):
    """Names of the sources on a host, and of what else is in their folder."""
    return sorted(path.name for path in (home / ".seamless" / "dist").iterdir() if path.name != "pythons.json")


def test_services_start_on_a_bare_host_with_one_login_and_are_found_by_the_next_process(netns, lab_user):
    user, before = lab_user(netns), netns.logins("h1")
    done = run(user, "show(launch.ensure_all(specs(host)))\nshow(launch.ensure_all(specs(host)))", "h1")
    first, second = map(json.loads, done.ok().splitlines())
    assert done.stderr.startswith("seamless_lite: hashserver, database, jobserver on h1: chose Python /usr/bin/python3")
    assert [entry[:3:2] for entry in first] == [["hashserver", True], ["database", True], ["jobserver", True]]
    third = ensure(user, "h1")
    for other in (second, third):
        assert [entry[1] for entry in other] == [entry[1] for entry in first] and not any(entry[2] for entry in other)
    assert third == second and all(entry[3].startswith("unix://%s/" % user.home) for entry in third)
    assert netns.logins("h1") == before + 1 and len(dist(netns.home("h1"))) == 1
    assert sorted(path.name for path in (netns.home("h1") / "store").iterdir()) == ["buffers", "seamless.db"]
    assert "chose Python" in user.run("seamless-service", "logs", "jobserver-t", "h1").ok()
    secret = (netns.home("h1") / ".seamless" / "secret").read_text()
    assert not (user.home / ".seamless" / "secret").exists() and secret not in done.stdout + done.stderr


def test_two_clients_at_once_share_what_they_start(netns, lab_user):
    users = [lab_user(netns) for _ in range(3)]
    running = [start(user, "show(launch.ensure_all(specs(host)))", "h1") for user in users]
    found = [json.loads(one.finish().ok()) for one in running]
    for n in range(3):
        assert len({entry[n][1] for entry in found}) == 1 and sum(entry[n][2] for entry in found) == 1
    assert len(dist(netns.home("h1"))) == 1


def test_another_version_starts_beside_and_disturbs_nothing(netns, lab_user, tmp_path):
    shutil.copytree(ROOT / "seamless_lite", tmp_path / "seamless_lite", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "seamless_lite" / "signing.py"
    source.write_text(source.read_text().replace("PROTOCOL = 1\n", "PROTOCOL = 2\n"))
    now, newer = lab_user(netns), lab_user(netns, pythonpath=str(tmp_path))
    first, second = ensure(now, "h1"), ensure(newer, "h1")
    assert {entry[1] for entry in first}.isdisjoint(entry[1] for entry in second) and all(entry[2] for entry in second)
    code = "print(sorted(info(c)['protocol'] for c in launch.ensure_all(specs(host))))"
    assert run(now, code, "h1").ok() == "[1, 1, 1]\n" and run(newer, code, "h1").ok() == "[2, 2, 2]\n"
    assert [entry[1] for entry in ensure(now, "h1")] == [entry[1] for entry in first]
    assert len(dist(netns.home("h1"))) == 2


def test_an_upload_that_is_cut_off_leaves_nothing_and_goes_on_when_the_host_is_back(netns, lab_user):
    user, home = lab_user(netns), netns.home("h1")
    user.run("ssh", "h1", "true").ok()
    netns("shape", "h1", "--rate", "0.4")                       # so that sending takes seconds
    client = start(user, "show(launch.ensure_all(specs(host)))", "h1")
    wait_until(lambda: (home / ".seamless" / "dist" / "pythons.json").exists(), "the client is asked for the source")
    netns("cut", "h1")
    netns("rst", "h1")                                          # it has forgotten the connection when it is back
    assert dist(home) == []
    netns("restore")
    assert [entry[2] for entry in json.loads(client.finish(90).ok())] == [True] * 3
    assert len(dist(home)) == 1


def test_a_client_that_is_killed_while_it_sends_or_starts_leaves_nothing_half(netns, lab_user):
    user, home = lab_user(netns), netns.home("h1")
    for seen in ("dist/pythons.json", "secret", "run/*.json"):
        client = start(user, "show(launch.ensure_all(specs(host)))", "h1")
        wait_until(lambda: list(home.glob(".seamless/" + seen)), seen)
        client.kill()
        client.finish()
    found = ensure(user, "h1")
    running = [line for line in netns.processes("h1") if "-m seamless_lite." in line]
    assert sorted(int(line.split()[0]) for line in running) == sorted(entry[1] for entry in found)
    assert len(dist(home)) == 1


def test_services_that_were_killed_are_started_again(netns, lab_user):
    user = lab_user(netns)
    first = ensure(user, "h1")
    netns.run("h1", "kill", "-9", *(str(entry[1]) for entry in first[:2]))
    second = ensure(user, "h1")
    assert [entry[2] for entry in second] == [True, True, False]
    assert [entry[3] for entry in second] == [entry[3] for entry in first]


def test_after_a_reboot_state_files_of_dead_services_are_recognized(netns, lab_user):
    user = lab_user(netns)
    first = ensure(user, "h1")
    netns("reboot", "h1")
    assert len(list((netns.home("h1") / ".seamless/run").glob("*.json"))) == 3
    second = ensure(user, "h1")
    assert all(entry[2] for entry in second) and [entry[3] for entry in second] == [entry[3] for entry in first]
    assert sorted(line.split()[0] for line in user.run("seamless-service", "ps", "h1").ok().splitlines()[1:]) == [
        "database-t", "hashserver-t", "jobserver-t"]


MENDED = """\
found = launch.ensure_all(specs(host))
show(found)
while True:
    line = sys.stdin.readline()
    if not line:
        break
    print(json.dumps([info(c)["pid"] for c in found]), flush=True)
"""


@pytest.mark.parametrize("faults", [["kill services"], ["kill master"], ["reset"], ["reboot"], ["kill services", "kill master"]], ids="+".join)
def test_a_lost_service_or_connection_is_mended_under_the_same_address(netns, lab_user, faults):
    user = lab_user(netns)
    client = start(user, MENDED, "h1", stdin=subprocess.PIPE)
    wait_until(lambda: client.stdout.count("\n") == 1, "services")
    first = json.loads(client.stdout)
    for fault in faults:
        if fault == "kill services":
            netns.run("h1", "kill", "-9", *(str(entry[1]) for entry in first))
        elif fault == "kill master":
            for pid in user.processes():
                with open("/proc/%d/cmdline" % pid, "rb") as file:
                    if b"ControlMaster=yes" in file.read():
                        os.kill(pid, 9)
        else:
            netns(*{"reset": ("rst", "h1"), "reboot": ("reboot", "h1")}[fault])
    client.process.stdin.write(b"go\n")
    client.process.stdin.close()
    done = client.finish(90)
    pids = json.loads(done.ok().splitlines()[1])
    same = [pid == entry[1] for pid, entry in zip(pids, first)]
    assert same == [not set(faults) & {"kill services", "reboot"}] * 3


def test_a_host_that_is_away_for_a_while_is_waited_for_and_said(netns, lab_user):
    user = lab_user(netns)
    client = start(user, "hosts.PAUSES_S = (0.5, 1.0)\n" + MENDED, "h1", stdin=subprocess.PIPE)
    wait_until(lambda: client.stdout.count("\n") == 1, "services")
    netns("kill", "h1")
    client.process.stdin.write(b"go\n")
    client.process.stdin.close()
    wait_until(lambda: "waiting for the hashserver on h1: ssh h1: " in client.stderr, "the sentence")
    netns("boot", "h1")
    assert len(json.loads(client.finish(60).ok().splitlines()[1])) == 3


def test_a_host_that_stays_away_is_given_up_with_the_words_of_ssh(netns, lab_user):
    user = lab_user(netns)
    client = start(user, "hosts.PATIENCE_S = 3.0\n" + MENDED, "h1", stdin=subprocess.PIPE)
    wait_until(lambda: client.stdout.count("\n") == 1, "services")
    netns("kill", "h1")
    client.process.stdin.write(b"go\n")
    client.process.stdin.close()
    done = client.finish(60)
    assert done.returncode != 0 and "ServiceError: ssh h1: " in done.stderr and "onnection refused" in done.stderr and "(tried for " in done.stderr


def test_without_a_tunnel_the_network_is_used_and_a_service_comes_back_at_its_port(netns, lab_user):
    user = lab_user(netns)
    done = run(user, """\
        found = launch.ensure_all(specs(host, place={"tunnel": False, "hostname": "10.99.0.1"}, network_interface="0.0.0.0", port_range=(56000, 56999)))
        show(found)
        launch.far(found[0].place, "stop", which="jobserver-t")
        print(info(found[2])["pid"] != found[2].pid, all(c.address == "http://10.99.0.1:%d" % c.port for c in found))
        print(found[0].forward("tls://127.0.0.1:8786"), found[0].forward("http://10.99.0.2:87/x/status"))
        """, "h1")
    lines = done.ok().splitlines()
    assert lines[1:] == ["True True", "tls://10.99.0.1:8786 http://10.99.0.2:87/x/status"]


def test_further_addresses_of_the_host_are_reached_through_the_tunnel(netns, lab_user):
    user = lab_user(netns)
    done = run(user, """\
        import urllib.request
        place = launch.Place(ssh=host)
        spec = specs(host, network_interface="127.0.0.1", port_range=(56000, 56999), auth=False)[0]
        connection = launch.ensure(spec)
        address = connection.forward("http://127.0.0.1:%d/healthcheck" % connection.port)
        print(address.startswith("http://127.0.0.1:"), connection.forward("http://127.0.0.1:%d/healthcheck" % connection.port) == address)
        print(urllib.request.urlopen(address, timeout=20).read().decode())
        print(connection.forward("tls://127.0.0.1:%d" % connection.port).startswith("tls://127.0.0.1:"))
        """, "h1")
    assert done.ok() == "True True\nOK\nTrue\n"


def test_a_python_that_is_named_is_used_there(netns_dask, lab_user):
    user = lab_user(netns_dask)
    code = """\
        for place, needs in (({}, ()), ({"python": sys.executable}, ("distributed",)), ({}, ("dask", "distributed")), ({"python": "~/nothing"}, ()),
                             ({"conda": "nosuch"}, ()), ({}, ("no_such_module",))):
            try:
                launch.ensure(specs(host, place=place, needs=needs)[2])
                print(launch.far(launch.Place(ssh=host), "services")[0]["python"])
                launch.far(launch.Place(ssh=host), "stop", which="jobserver-t")
            except launch.ServiceError as exc:
                print(exc)
        """
    lines = run(user, code, "h1").ok().splitlines()
    assert lines[1].startswith(os.path.dirname(sys.executable)) and lines[2].startswith(os.path.dirname(sys.executable))
    assert "there is no such interpreter on h1" in lines[3] and "conda environment nosuch is not on h1" in lines[4]
    assert "no suitable Python on h1" in lines[5] and "without no_such_module" in lines[5]


@pytest.fixture
def old_python():
    """An interpreter that can start things on a host but not run our services."""
    from test_hostside_agent import oldest
    if subprocess.run([oldest(), "-c", "import sys; sys.exit(sys.version_info >= (3, 9))"]).returncode:
        pytest.skip("no Python older than 3.9 here")
    return oldest()


def test_an_old_python3_starts_things_and_a_newer_one_runs_them(ssh_host, lab_user, old_python):
    host = ssh_host(python3=old_python, bind=sys.base_prefix + ":/opt")
    host.run("sh", "-c", "mkdir -p ~/.local/bin; ln -s /opt/bin/python3.%d ~/.local/bin/" % sys.version_info[1])
    done = run(lab_user(host), "show(launch.ensure_all(specs(host)))\nprint(launch.far(launch.Place(ssh=host), 'services')[0]['version'])", host.name)
    assert tuple(map(int, done.ok().splitlines()[1].split("."))) >= (3, 9) and "too old" in done.stderr


def test_a_host_whose_only_python_is_too_old_is_one_sentence(ssh_host, lab_user, old_python):
    host = ssh_host(python3=old_python)
    done = run(lab_user(host), "launch.ensure_all(specs(host))", host.name)
    assert done.returncode != 0 and "there is no suitable Python on %s (found: " % host.name in done.stderr.splitlines()[-1]
    assert "too old): name a Python 3.9 or newer with 'python: /path" in done.stderr.splitlines()[-1]
    assert not (host.home / ".seamless" / "run").exists()


def test_a_host_without_python3_is_one_sentence(ssh_host, lab_user):
    host = ssh_host(bind="/bin/false:" + os.path.realpath("/usr/bin/python3"))
    done = run(lab_user(host), "launch.ensure_all(specs(host))", host.name)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and "ssh %s: " % host.name in last and "'python:' in the cluster file" in last


def test_a_read_only_home_is_gone_around_and_said(ssh_host, lab_user, tmp_path):
    (tmp_path / "home").mkdir()
    host = ssh_host(bind="%s:/home/tester:ro" % (tmp_path / "home"))
    user = lab_user(host)
    done = run(user, "c = launch.ensure(launch.ServiceSpec('hashserver', 'hashserver-t', ('/tmp/buffers', '--writable'), "
                     "place=launch.Place(ssh=host)))\nprint(info(c)['service'])", host.name)
    assert done.ok() == "hashserver\n"
    assert "/home/tester/.seamless cannot be written on %s: programs and their logs are kept in /tmp/seamless-" % host.name in done.stderr
    assert "hashserver-t" in user.run("seamless-service", "ps", host.name).ok()
    said = user.run("seamless-service", "uninstall", host.name).ok()
    assert "removed /tmp/seamless-" in said and host.run("ls", "/tmp").split() == ["buffers"]


def test_a_full_disk_is_one_sentence_with_the_path_and_nothing_is_left_running(ssh_host, lab_user, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k,mode=0777", "tmpfs", str(home)], check=True)
    try:
        host = ssh_host(bind="%s:/home/tester" % home)
        user = lab_user(host)
        done = run(user, "launch.ensure_all(specs(host))", host.name)
        last = done.stderr.splitlines()[-1]
        assert done.returncode != 0 and "/home/tester/.seamless/dist" in last and "No space left on device" in last and "make room there" in last
        assert dist(home) == []
        subprocess.run(["mount", "-o", "remount,size=20m", str(home)], check=True)
        assert all(entry[2] for entry in ensure(user, host.name))
        user.run("seamless-service", "stop", "--all", host.name).ok()
        filler = home / "filler"
        with pytest.raises(OSError), filler.open("wb") as file:
            while True:
                file.write(b"x" * (1 << 16))
                file.flush()
        done = run(user, "launch.ensure_all(specs(host))", host.name)
        last = done.stderr.splitlines()[-1]
        assert done.returncode != 0 and "No space left on device" in last and "make room there" in last
        assert "-m seamless_lite" not in host.run("ps", "ax")
        filler.unlink()
        assert all(entry[2] for entry in ensure(user, host.name))
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True)


@pytest.mark.parametrize("options", [dict(shell="/bin/tcsh", noise=True), dict(locked_down=True), dict(no_forwarding=True)],
                         ids=["noise", "locked down", "no forwarding"])
def test_services_on_an_awkward_account(ssh_host, lab_user, options):
    if not os.path.exists(options.get("shell", "/bin/sh")):
        pytest.skip("no %(shell)s here" % options)
    host = ssh_host(**options)
    user = lab_user(host)
    for _ in range(2):
        done = run(user, "print([info(c)['service'] for c in launch.ensure_all(specs(host))])", host.name)
        assert done.ok() == "['hashserver', 'database', 'jobserver']\n"
    user.run("seamless-service", "uninstall", host.name).ok()
    assert not (host.home / ".seamless").exists()


def test_uninstall_leaves_nothing_but_results_and_says_where_they_are(netns, lab_user):
    user, home = lab_user(netns), netns.home("h1")
    before = sorted(path.name for path in home.iterdir())
    ensure(user, "h1")
    netns.run("h1", "sh", "-c", "mkdir -p ~/.seamless/clusters-data/p/ab; head -c 12345 /dev/zero > ~/.seamless/clusters-data/p/ab/x")
    lines = user.run("seamless-service", "uninstall", "h1").ok().splitlines()
    assert sorted(line.rpartition("-")[0] for line in lines[:3]) == ["stopped database-t", "stopped hashserver-t", "stopped jobserver-t"]
    assert "kept /home/tester/.seamless/clusters-data on h1: 12.3 kB of stored results" in lines
    assert any(line.startswith("kept /home/tester/store/buffers on h1: ") for line in lines)
    assert lines[-1] == "/home/tester/.seamless on h1 still holds clusters-data"
    assert [line for line in netns.processes("h1") if "sshd" not in line] == []
    lines = user.run("seamless-service", "uninstall", "h1", "--data").ok().splitlines()
    assert lines == ["removed /home/tester/.seamless on h1"]
    assert sorted(path.name for path in home.iterdir()) == sorted(before + ["store"])
    wait_until(lambda: netns.processes("h1") == [], "the master has ended")
    assert user.processes() == [] and list((user.home / ".seamless/run/ssh").iterdir()) == []


def test_the_program_looks_stops_and_shows_logs_on_a_host(netns, lab_user):
    user = lab_user(netns)
    ensure(user, "h1")
    lines = user.run("seamless-service", "ps", "h1").ok().splitlines()
    assert lines[0].split() == ["KEY", "PID", "STATUS", "STARTED", "PYTHON", "ADDRESS"] and len(lines) == 4
    assert "the jobserver listens" in user.run("seamless-service", "logs", "jobserver-t", "h1").ok()
    assert user.run("seamless-service", "stop", "jobserver-t", "h1").ok().startswith("stopped jobserver-t-")
    done = user.run("seamless-service", "stop", "jobserver-t", "h1")
    assert done.returncode == 1 and done.stderr.startswith("seamless-service: no service with the key or name jobserver-t runs on h1; ")
    assert len(user.run("seamless-service", "stop", "--all", "h1").ok().splitlines()) == 2
    done = user.run("seamless-service", "ps", "h3")
    assert done.returncode == 1 and done.stderr.startswith("seamless-service: ssh h3: ") and done.stderr.count("\n") == 1
