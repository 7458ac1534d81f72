"""The labs themselves: what the tests on real hosts rely on."""
import pytest

pytestmark = pytest.mark.ssh


def test_a_host_is_reached_by_the_users_own_ssh_and_the_checkout_is_hidden_there(netns, lab_user):
    user, before = lab_user(netns), netns.logins("h1")
    assert user.run("ssh", "h1", "hostname; id -un").ok() == "h1\ntester\n"
    assert netns.run("h1", "sh", "-c", "cd; python3 -c 'import seamless_lite' 2>&1 || echo absent").endswith("absent\n")
    assert netns.logins("h1") == before + 1
    assert user.python("import seamless_lite, os; print(os.environ['HOME'])").ok() == "%s\n" % user.home


def test_a_test_finds_its_hosts_as_if_no_other_had_run_before(netns, lab_user):
    assert netns.processes("h1") == [] and not (netns.home("h1") / "left").exists()
    user = lab_user(netns)
    user.run("ssh", "h1", "touch left; (sleep 300 >/dev/null 2>&1 </dev/null &)").ok()
    assert len(netns.processes("h1")) == 1 and (netns.home("h1") / "left").exists()
    netns("cut", "h1")
    netns.tidy()
    assert netns.processes("h1") == [] and not (netns.home("h1") / "left").exists()
    assert user.run("ssh", "h1", "echo back").ok() == "back\n"


def test_what_a_user_left_running_is_ended(netns, lab_user):
    user = lab_user(netns)
    user.run("ssh", "-o", "ControlMaster=yes", "-o", "ControlPath=%s/s" % user.home, "-o", "ControlPersist=60", "h1", "true").ok()
    assert user.processes()
    user.end()
    assert not user.processes()


def test_a_single_host_may_be_an_awkward_one(ssh_host, lab_user):
    host = ssh_host(shell="/bin/tcsh", noise=True)
    before = host.logins()
    done = lab_user(host).run("ssh", host.name, "echo here")
    assert done.ok().endswith("here\n") and done.ok() != "here\n"
    assert host.logins() == before + 1 and host.home.is_dir()
    assert host.run("id", "-un") == "tester\n"


def test_dask_is_on_the_hosts_that_are_to_have_it(netns_dask, lab_user):
    assert lab_user(netns_dask).run("ssh", "h2", "python3 -c 'import distributed; print(1)'").ok() == "1\n"


@pytest.mark.slurm
def test_slurm_runs_a_job(slurm, lab_user):
    assert lab_user(slurm).run("ssh", "ctl", "srun hostname").ok() in ("n1\n", "n2\n")
    assert slurm.jobs() == []


@pytest.mark.slurm
def test_slurm_is_put_in_order_after_a_test(slurm, lab_user):
    user = lab_user(slurm)
    user.run("ssh", "ctl", "touch left; sbatch --wrap 'sleep 300'; (sleep 300 >/dev/null 2>&1 </dev/null &)").ok()
    assert len(slurm.jobs()) == 1
    slurm("node", "n2", "kill")
    slurm.tidy()
    assert slurm.jobs() == [] and list(slurm.home.iterdir()) == []
    assert user.run("ssh", "ctl", "pgrep -u tester sleep; srun -N2 hostname").ok().split() in (["n1", "n2"], ["n2", "n1"])
