"""A host that has only python3 and sshd, used like a new user would: a jobserver behind ssh."""
import json
import shutil
import time

import pytest

from labs import ROOT
from far import BEGIN, CLUSTERS, JOBSERVER, clusters_on, nothing_left, pids, received, services

pytestmark = pytest.mark.ssh

FUNCTION = BEGIN + "import json; print(json.dumps(where(int(sys.argv[1]))))\n"


@pytest.fixture
def user(netns, lab_user):
    user = lab_user(netns)
    user.configure(CLUSTERS, JOBSERVER)
    return user


def test_a_bare_account_runs_a_function_and_a_command_remembers_them_and_is_left_clean(netns, user):
    before = netns.logins("h1")
    assert user.python(FUNCTION, 1).ok() == '["h1", 1]\n'
    (user.work / "a.txt").write_text("one\ntwo\n")
    (user.work / "b.txt").write_text("x\ny\n")
    pipeline = ("seamless-run", "paste a.txt b.txt | sort -k2 | uniq -c; hostname")
    first = user.run(*pipeline)
    assert first.ok().split() == ["1", "one", "x", "1", "two", "y", "h1"]
    assert first.stderr == ""
    ran = user.run("seamless-service", "ps", "h1").ok()
    assert all(service in ran for service in ("hashserver", "database", "jobserver"))
    kinds = [pids(netns, "." + service) for service in ("hashserver", "database", "jobserver")]
    assert all(kinds)
    assert netns.logins("h1") == before + 1             # one authentication for all of this
    user.run("seamless-service", "stop", "--all", "h1").ok()
    assert not any(pids(netns, "." + service) for service in ("hashserver", "database", "jobserver"))
    assert user.run(*pipeline).ok() == first.stdout     # the cache is on h1: its services come back for it
    nothing_left(user, netns)
    assert user.run(*pipeline).ok() == first.stdout     # and all is there again for who needs it


def test_output_files_and_failures_are_as_on_this_machine(user):
    (user.work / "a.txt").write_text("b\na\n")
    user.run("seamless-run", "sort", "a.txt", ">", "sorted.txt").ok()
    assert (user.work / "sorted.txt").read_text() == "a\nb\n"
    failed = user.run("seamless-run", "-c", "echo no >&2; exit 7")
    assert (failed.returncode, failed.stderr.splitlines()[0]) == (7, "no")
    wrong = user.python(BEGIN + "@direct\ndef f():\n    raise KeyError('here')\nf()\n")
    assert wrong.returncode == 1 and "KeyError: 'here'" in wrong.stderr


def test_a_function_that_asks_for_others_runs_them_on_the_same_host(user):
    code = BEGIN + """
@delayed
def child(i):
    import os
    return [os.uname().nodename, i]

@direct
def driver(n):
    return [child(i).run() for i in range(n)]
driver.globals.child = child
import json
print(json.dumps(driver(20)))
"""
    assert json.loads(user.python(code).ok()) == [["h1", i] for i in range(20)]


def test_a_hundred_tasks_at_once(user):
    code = BEGIN + """
@delayed
def square(i):
    return i * i
assert [tf.value for tf in parallel(square(i) for i in range(100))] == [i * i for i in range(100)]
print("done")
"""
    assert user.python(code).ok() == "done\n"


def test_without_a_tunnel_the_signed_protocol_goes_over_the_network(netns, lab_user):
    user = lab_user(netns)
    direct = clusters_on("h1", tunnel="false")
    for service, ports in (("bufferdir: ~/storage/buffers", 55000), ("database_dir: ~/storage/results", 55100)):
        direct = direct.replace(service, "%s\n        network_interface: 0.0.0.0\n        port_start: %d\n        port_end: %d"
                                % (service, ports, ports + 99))
    user.configure(direct.replace("127.0.0.1", "0.0.0.0"), JOBSERVER)
    assert user.python(FUNCTION, 1).ok() == '["h1", 1]\n'
    said = user.run("seamless-init").ok()
    assert said.count("http://h1:55") == 3, said
    netns("firewall", "h1", "--allow", "22")
    blocked = user.start_python(FUNCTION, 2)
    time.sleep(2)
    assert blocked.process.poll() is None                       # there is no other way than the one that was asked for
    netns("restore")
    assert blocked.finish(60).ok() == '["h1", 2]\n'


def test_two_users_laptops_start_the_same_cluster_at_once_and_share_it(netns, lab_user):
    users = [lab_user(netns) for _ in range(2)]
    for user in users:
        user.configure(CLUSTERS, JOBSERVER)
    running = [user.start_python(FUNCTION, 5) for user in users]
    assert [one.finish(60).ok() for one in running] == ['["h1", 5]\n'] * 2
    for service in ("hashserver", "database"):
        assert len(pids(netns, ".%s" % service)) == 1
    # the jobserver has workers, which are other programs; it is one too
    assert len([line for line in services(users[0]) if "jobserver" in line]) == 1
    assert services(users[0]) == services(users[1])


def test_another_version_is_not_disturbed_and_both_go_on_side_by_side(netns, user, lab_user):
    assert user.python(FUNCTION, 1).ok() == '["h1", 1]\n'
    other_source = user.home.parent / "newer"
    shutil.copytree(ROOT / "seamless_lite", other_source / "seamless_lite", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("jobserver", "hashserver", "database"):
        with open(other_source / "seamless_lite" / (name + ".py"), "a") as file:
            file.write("\n# another version\n")
    other = lab_user(netns, pythonpath=str(other_source))
    other.configure(CLUSTERS, JOBSERVER)
    before = {service: pids(netns, "." + service) for service in ("hashserver", "database", "jobserver")}
    assert other.python(FUNCTION, 2).ok() == '["h1", 2]\n'
    after = {service: pids(netns, "." + service) for service in ("hashserver", "database", "jobserver")}
    assert all(set(before[service]) < set(after[service]) for service in before)
    assert user.python(FUNCTION, 3).ok() == '["h1", 3]\n'
    assert other.python(FUNCTION, 1).ok() == '["h1", 1]\n'
    assert len([path for path in (netns.home("h1") / ".seamless/dist").iterdir() if path.is_dir()]) == 2
    nothing_left(user, netns)


def test_a_second_program_starts_nothing_and_sends_no_source(netns, user):
    user.python(FUNCTION, 1).ok()
    before = received(netns)
    user.python(FUNCTION, 2).ok()
    assert received(netns) - before < 150_000                   # the source has twice as many bytes; some are the session's
    assert "started" not in user.run("seamless-init").ok()
