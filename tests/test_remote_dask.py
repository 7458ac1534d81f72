"""The user's document, with its daskserver on a host behind ssh."""
import json

import pytest

from far import BEGIN, CLUSTERS, DASKSERVER, nothing_left, pids

pytestmark = pytest.mark.ssh

STAGES = """\
- project: my-project
- execution: process
- stage gpu:
  - cluster: gpu-cluster
  - execution: remote
  - remote: daskserver
"""


@pytest.fixture
def user(netns_dask, lab_user):
    user = lab_user(netns_dask)
    user.configure(CLUSTERS, DASKSERVER)
    return user


def test_a_function_a_pipeline_and_a_driver_run_on_the_daskserver_behind_ssh(netns_dask, user):
    before = netns_dask.logins("h1")
    assert json.loads(user.python(BEGIN + "import json; print(json.dumps(where(1)))").ok()) == ["h1", 1]
    (user.work / "a.txt").write_text("one\ntwo\n")
    done = user.run("seamless-run", "sort -r a.txt | cat; hostname")
    assert done.ok() == "two\none\nh1\n"
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
print(json.dumps(driver(10)))
"""
    assert json.loads(user.python(code).ok()) == [["h1", i] for i in range(10)]
    assert netns_dask.logins("h1") == before + 1
    assert pids(netns_dask, "daskserver")
    nothing_left(user, netns_dask)


def test_a_client_needs_no_dask(netns_dask, user):
    code = BEGIN + "where(1); assert not {'dask', 'distributed'} & set(sys.modules); print('none')"
    assert user.python(code).ok() == "none\n"


def test_a_host_without_dask_is_one_sentence_that_says_what_to_install(netns, lab_user):
    user = lab_user(netns)
    user.configure(CLUSTERS, DASKSERVER)
    done = user.python(BEGIN + "where(1)")
    command = user.run("seamless-run", "echo", "x")
    for said in (done, command):
        assert said.returncode == 1
        assert "h1" in said.stderr.splitlines()[-1] and "pip install 'seamless_lite[dask]'" in said.stderr.splitlines()[-1], said
    assert "Traceback" not in command.stderr


def test_the_stages_of_the_users_document_move_from_here_to_the_daskserver_and_back(netns_dask, lab_user):
    user = lab_user(netns_dask)
    user.configure(CLUSTERS, STAGES)
    code = """
import os, sys, json
import seamless_lite.config
from seamless_lite import direct

seamless_lite.config.init()

@direct
def part1(n):
    import os
    with open(os.path.expanduser("~/mark1"), "a") as file:
        file.write("1")
    return {"host": os.uname().nodename, "data": list(range(n))}

@direct
def part2(given):
    import os
    with open(os.path.expanduser("~/mark2"), "a") as file:
        file.write("2")
    return {"host": os.uname().nodename, "before": given["host"], "sum": sum(given["data"])}

@direct
def part3(given):
    import os
    return [os.uname().nodename, given["before"], given["host"], given["sum"]]

for turn in range(2):
    one = part1(1000)
    seamless_lite.config.set_stage("gpu")
    two = part2(one)
    seamless_lite.config.set_stage(None)
    print(json.dumps(part3(two)))
"""
    own = json.loads(user.python("import json, os; print(json.dumps(os.uname().nodename))").ok())
    for _ in range(2):
        lines = user.python(code).ok().splitlines()
        assert [json.loads(line) for line in lines] == [[own, own, "h1", 499500]] * 2
    assert (user.home / "mark1").read_text() == "1" and (netns_dask.home("h1") / "mark2").read_text() == "2"
    (user.work / "a.txt").write_text("b\na\n")
    assert user.run("seamless-run", "--stage", "gpu", "sort a.txt; hostname").ok() == "a\nb\nh1\n"
    assert user.run("seamless-run", "sort a.txt; hostname").ok() == "a\nb\n%s\n" % own
