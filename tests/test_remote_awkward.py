"""Awkward hosts, from nothing to a result: each works, or ends with the words of ssh or the host and what to do."""
import glob
import os
import subprocess

import pytest

from far import JOBSERVER, clusters_on
from labs import need, run

pytestmark = pytest.mark.ssh


def user_of(host, lab_user, name=None):
    user = lab_user(host)
    user.configure(clusters_on(name or host.name), JOBSERVER)
    return user


def works(user):
    (user.work / "a.txt").write_text("b\na\n")
    done = user.run("seamless-run", "sort a.txt; uname -n")
    assert done.ok() == "a\nb\n%s\n" % user.lab.name
    return done


@pytest.mark.parametrize("shell", ["dash", "tcsh", "csh", "fish", "zsh"])
def test_a_login_shell_that_is_not_bash_and_start_up_files_that_print(shell, ssh_host, lab_user):
    need(program=shell)
    host = ssh_host(shell="/usr/bin/" + shell, noise=True)
    before = host.logins()
    works(user_of(host, lab_user))
    assert host.logins() == before + 1


@pytest.mark.parametrize("options", [
    {"noise": True}, {"no_tty": True}, {"no_pip": True}, {"no_forwarding": True}, {"sshd_option": "MaxSessions 1"},
    {"sshd_option": "AllowStreamLocalForwarding no"}, {"sshd_option": "MaxStartups 1:100:1"}, {"ro_tmp": True}, {"locked_down": True},
    {"user": "root"}], ids=str)
def test_a_host_with_restrictions_works_after_one_authentication(options, ssh_host, lab_user):
    host = ssh_host(**options)
    before = host.logins()
    works(user_of(host, lab_user))
    assert host.logins() == before + 1


def sentence(user, *words):
    done = user.run("seamless-run", "hostname", timeout_s=60)
    assert done.returncode == 1 and done.stdout == "", done
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 4, done
    for word in words:
        assert word in done.stderr, done


def test_a_host_key_that_was_not_accepted(ssh_host, lab_user):
    host = ssh_host()
    user = user_of(host, lab_user)
    known = os.path.join(host.info["dir"], "known_hosts")
    os.rename(known, known + ".away")
    sentence(user, "Host key verification failed", "ssh %s" % host.name)


def test_a_key_that_is_refused(ssh_host, lab_user):
    host = ssh_host()
    sentence(user_of(host, lab_user, "nobody@" + host.name), "Permission denied", "ssh nobody@%s" % host.name)


def test_a_host_that_runs_only_its_own_command(ssh_host, lab_user):
    host = ssh_host(forced_command="echo only backups here")
    sentence(user_of(host, lab_user), "only backups here")


def test_a_host_that_does_not_exist(ssh_host, lab_user):
    sentence(user_of(ssh_host(), lab_user, "nowhere.invalid"), "nowhere.invalid", "Could not resolve hostname")


def test_a_host_without_python(ssh_host, lab_user, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty") / "file"
    empty.touch()
    there = {os.path.realpath(path) for path in glob.glob("/usr/bin/python*") + glob.glob("/usr/local/bin/python*")}
    host = ssh_host(bind=["%s:%s" % (empty, path) for path in there])
    assert "Permission denied" in lab_user(host).run("ssh", host.name, "python3").stderr
    sentence(user_of(host, lab_user), "no python3", host.name)


def test_a_host_whose_python_is_too_old(ssh_host, lab_user):
    old = next((path for path in ("/root/.pyenv/versions/3.6.15/bin/python3", "/usr/bin/python3.6", "/usr/bin/python3.7",
                                  "/usr/bin/python3.8") if os.path.exists(path)), None)
    if old is None:
        pytest.skip("there is no old Python here")
    sentence(user_of(ssh_host(python3=old), lab_user), "3.9", "python:")


@pytest.fixture
def full_disk(tmp_path_factory):
    """A file system of 256 kB."""
    folder = tmp_path_factory.mktemp("disk")
    if os.geteuid():
        pytest.skip("mounting needs root")
    run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=777", "none", str(folder)]).ok()
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(full_disk, ssh_host, lab_user):
    host = ssh_host(bind="%s:/mnt" % full_disk, env="SEAMLESS_HOME=/mnt/seamless")
    sentence(user_of(host, lab_user), "/mnt/seamless", "No space left")


def test_a_home_that_is_read_only(ssh_host, lab_user):
    host = ssh_host()
    host.run("chmod", "555", "/home/tester", root=True)
    user = user_of(host, lab_user)
    sentence(user, "/home/tester/storage", "write permission")
    user.configure(clusters_on(host.name).replace("~/storage", "/var/tmp/storage"), JOBSERVER)
    works(user)


def test_a_tmp_where_nothing_may_be_executed(ssh_host, lab_user):
    host = ssh_host()
    host.run("mount", "-o", "remount,noexec", "/tmp", root=True)
    works(user_of(host, lab_user))


def test_an_old_connection_of_the_user_is_used_if_the_configuration_says_so(ssh_host, lab_user):
    host = ssh_host()
    user = user_of(host, lab_user, host.name + "-mux")
    before = host.logins()
    user.run("ssh", host.name + "-mux", "true").ok()
    works(user)
    assert host.logins() == before + 1
