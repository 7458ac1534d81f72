"""Stages whose stores are on different hosts: inputs and results cross by checksum, once, and both ways.

Other hosts are stand-ins here (``otherhost``), or other folders of this one.
"""
import json
import os

import pytest

from otherhost import OtherHosts
from seamless_lite import settings as settings_module
from seamless_lite import launch, services

CLUSTERS = """\
    here:
      frontends:
        - hostname: localhost
          hashserver: {bufferdir: ~/here/buffers}
          database: {database_dir: ~/here/results}
    gpu-cluster:
      frontends:
        - hostname: farhost
          hashserver: {bufferdir: ~/store/buffers}
          database: {database_dir: ~/store/results}
          jobserver: {}
    """
STAGES = """\
    - project: p
    - cluster: here
    - execution: process
    - stage gpu:
        - cluster: gpu-cluster
        - execution: remote
    """
#: A script's beginning: ``crossed`` lists what is carried between stores.
BEGIN = """\
import json, os, sys
import seamless_lite.config as config
from seamless_lite import Checksum, delayed, direct, parallel, transfer
crossed = []
def carry(names, source, target, who=None, carry=transfer.carry):
    found = carry(names, source, target, who)
    crossed.extend(found)
    return found
transfer.carry = carry
config.init()

@delayed
def part1(n):
    import os
    open(os.path.expanduser("~/ran"), "a").write("1")
    return "x" * n
@delayed
def part2(text, more):
    import os
    open(os.path.expanduser("~/ran"), "a").write("2")
    return [os.path.basename(os.path.expanduser("~")), text + more]
@delayed
def part3(pair):
    import os
    open(os.path.expanduser("~/ran"), "a").write("3")
    return [os.path.basename(os.path.expanduser("~")), pair[0], len(pair[1])]
"""


@pytest.fixture
def hosts(home, tmp_path):
    hosts = OtherHosts(tmp_path, home)
    hosts.configure(CLUSTERS, STAGES)
    yield hosts
    hosts.close()


@pytest.mark.slow
def test_a_workflow_goes_to_another_host_and_back_with_each_buffer_crossing_once(hosts):
    code = BEGIN + """
for turn in range(3):
    one = part1(3_000_000)
    one.compute()
    config.set_stage("gpu")
    two = part2(one, "!")
    two.compute()
    config.set_stage(None)
    print(json.dumps([part3(two).run(), len(crossed)]))
"""
    own = hosts.home.name
    lines = [json.loads(line) for line in hosts.python(code).splitlines()]
    assert lines == [[[own, "farhost", 3_000_001], 2]] * 3
    lines = [json.loads(line) for line in hosts.python(code).splitlines()]
    assert lines == [[[own, "farhost", 3_000_001], 0]] * 3, "another program finds all of it"
    assert (hosts.home / "ran").read_text() == "13" and (hosts.folder / "farhost/ran").read_text() == "2"


@pytest.mark.slow
def test_a_chain_whose_first_part_was_started_in_another_stage_and_small_values(hosts):
    code = BEGIN + """
ones = [part1(n) for n in range(1, 21)]
list(parallel(ones))
config.set_stage("gpu")
print([tf.value[1] for tf in parallel(part2(one, "!") for one in ones)] == ["x" * n + "!" for n in range(1, 21)], len(crossed))
print([tf.value[1] for tf in parallel(part2(one, "?") for one in ones)] == ["x" * n + "?" for n in range(1, 21)], len(crossed))
"""
    first, second = hosts.python(code).splitlines()
    assert first.startswith("True") and second == "True " + first.split()[1], "nothing crosses twice"


@pytest.mark.slow
def test_values_that_only_a_checksum_names_and_all_files_of_a_folder_cross(hosts):
    code = BEGIN + """
@delayed
def folder(n):
    return {"d/%d" % i: b"content %d" % i for i in range(n)}
folder.celltypes.result = "folder"
@delayed
def joined(files):
    return b"".join(files[name] for name in sorted(files)).decode()
joined.celltypes.files = "folder"
made = folder(5)
made.compute()
big = part1(2_000_000)
big.compute()
config.set_stage("gpu")
print(joined(made).run())
print(len(part2(Checksum(big.result_checksum), "?").run()[1]))
"""
    out = hosts.python(code).splitlines()
    assert out == ["".join("content %d" % i for i in range(5)), "2000001"]


@pytest.mark.slow
def test_what_was_computed_before_any_configuration_crosses_too(hosts):
    code = BEGIN.replace("config.init()\n", "", 1) + """
one = part1(100_000)
one.compute()
config.set_stage("gpu")
print(len(part2(one, "!").run()[1]))
"""
    assert hosts.python(code) == "100001\n"


@pytest.mark.slow
def test_an_input_that_is_nowhere_is_a_sentence(hosts):
    code = BEGIN + """
one = part1(100_000)
one.compute()
path = os.path.expanduser("~/here/buffers/p/%s/%s" % (one.result_checksum[:2], one.result_checksum))
os.unlink(path)
config.close(); config.init()
config.set_stage("gpu")
try:
    part2(one, "!").run()
except Exception as exc:
    print(type(exc).__name__, str(exc.args[0]).count("in none of the stores"))
"""
    kind, count = hosts.python(code).split()
    assert kind in ("CacheMissError", "JobError") and int(count) == 1


@pytest.mark.slow
def test_two_stages_that_share_one_store_share_their_results(hosts):
    shared = CLUSTERS.replace("    here:\n", "    here:\n      share_stages: true\n")
    hosts.configure(shared, STAGES.replace("cluster: gpu-cluster\n        - execution: remote", "execution: spawn"))
    code = BEGIN + """
print(len(part1(100_000).run()))
config.set_stage("gpu")
print(len(part1(100_000).run()), len(crossed))
"""
    assert hosts.python(code).split() == ["100000", "100000", "0"]
    assert (hosts.home / "ran").read_text() == "1"
    hosts.configure(CLUSTERS, STAGES.replace("cluster: gpu-cluster\n        - execution: remote", "execution: spawn"))
    assert hosts.python(code).split() == ["100000", "100000", "0"]
    assert (hosts.home / "ran").read_text() == "11", "separate by default"


@pytest.mark.slow
def test_a_command_runs_in_a_stage_and_finds_what_another_stage_only_named(hosts):
    (hosts.work / "a.txt").write_text("b\na\n")
    assert hosts.run("--stage", "gpu", "-c", "sort a.txt; basename $HOME") == "a\nb\nfarhost\n"
    assert hosts.run("-c", "sort a.txt; basename $HOME") == "a\nb\n%s\n" % hosts.home.name
    hosts.run("-nd", "sort a.txt > sorted.txt")
    assert not (hosts.work / "sorted.txt").exists() and (hosts.work / "sorted.txt.CHECKSUM").exists()
    assert hosts.run("--stage", "gpu", "cat sorted.txt") == "a\nb\n"


# ---- where services run, and what they are told

def load(hosts, clusters, commands="- project: p\n- cluster: c\n- execution: remote\n", **arguments):
    hosts.configure(clusters, commands)
    return settings_module.load_settings(str(hosts.work), environ=hosts.env, **arguments)


SPLIT = """\
    c:
      frontends:
        - hostname: {stores}
          hashserver: {{bufferdir: ~/store/buffers{ports}}}
          database: {{database_dir: ~/store/results{ports}}}
        - hostname: {jobs}
          jobserver: {{}}
    """


@pytest.mark.slow
def test_a_jobserver_beside_the_stores_opens_them_and_gets_no_number_of_workers_from_the_client(hosts):
    settings = load(hosts, SPLIT.format(stores="farhost", jobs="farhost", ports=""))
    spec = services._spec(settings, "jobserver", {})
    assert spec.args == () and spec.place.ssh == "farhost"
    assert spec.parameters["stores"] == {"buffers": {"directory": "~/store/buffers/p", "address": None},
                                         "results": {"file": "~/store/results/p/seamless.db", "address": None}}


@pytest.mark.slow
def test_a_jobserver_here_reaches_far_stores_through_the_connections_of_its_clients(hosts):
    hosts.configure(SPLIT.format(stores="farhost", jobs="localhost", ports=""), "- project: p\n- cluster: c\n- execution: remote\n")
    assert hosts.python(BEGIN + "print(part2('a', 'b').run())") == "['%s', 'ab']\n" % hosts.home.name
    assert hosts.services() == {"jobserver"} and hosts.services("farhost") == {"hashserver", "database"}
    assert hosts.python(BEGIN + "print(part2('a', 'b').run())") == "['%s', 'ab']\n" % hosts.home.name
    assert (hosts.home / "ran").read_text() == "2"


@pytest.mark.slow
@pytest.mark.parametrize("stores", ["localhost", "otherhost"])
def test_a_jobserver_that_cannot_reach_the_stores_is_one_sentence_with_file_and_line(hosts, stores):
    hosts.configure(SPLIT.format(stores=stores, jobs="farhost", ports=""), "- project: p\n- cluster: c\n- execution: remote\n")
    code, out, err = hosts.run("echo", "hi", check=False)
    err = err.splitlines()[-1]
    assert code == 1 and "clusters.yaml:1: the jobserver of cluster 'c' cannot reach its hashserver" in err and "auth: none" in err
    assert not hosts.services("farhost")


@pytest.mark.slow
def test_stores_on_a_third_host_are_used_by_their_address_if_they_ask_for_no_signature(hosts):
    settings = load(hosts, SPLIT.format(stores="otherhost", jobs="farhost", ports=", network_interface: 0.0.0.0, port_start: 57001, "
                                        "port_end: 57009, auth: none"))
    connections = {name: launch.Connection(name, "key", "unix:///here", None, 1, True, port=57003) for name in ("hashserver", "database")}
    assert services._spec(settings, "jobserver", connections).parameters["stores"] == {
        "buffers": {"address": "http://otherhost:57003", "auth": False}, "results": {"address": "http://otherhost:57003", "auth": False}}


DASK = """\
    c:
      type: slurm
      memory_per_core_property_name: mem_core
      default_queue: short
      queues:
        short: {cores: 2, walltime: "00:10:00", memory: 1GB}
        long: {TEMPLATE: short, walltime: "10:00:00", job_extra_directives: ["--x=1"]}
      frontends:
        - hostname: farhost
          hashserver: {bufferdir: ~/store/buffers}
          database: {database_dir: ~/store/results}
          daskserver: {network_interface: 0.0.0.0, port_start: 60300, port_end: 60399, python: /opt/python}
    """


@pytest.mark.slow
def test_the_daskserver_is_told_queue_and_node(hosts):
    settings = load(hosts, DASK, node="n1", queue="long")
    spec = services._spec(settings, "daskserver", {})
    assert spec.needs == ("dask", "distributed", "dask_jobqueue") and spec.place.python == "/opt/python"
    assert spec.parameters == {
        "stores": {"buffers": {"directory": "~/store/buffers/p", "address": None},
                   "results": {"file": "~/store/results/p/seamless.db", "address": None}},
        "record": False, "type": "slurm", "cluster": "c", "node": "n1", "memory_per_core_property_name": "mem_core", "workers": None,
        "queue": {"name": "long", "cores": 2, "walltime": "10:00:00", "memory": "1GB", "job_extra_directives": ("--x=1",)},
        "network_interface": "0.0.0.0", "ports": [60300, 60399], "pure": False}
    assert services._spec(load(hosts, DASK), "daskserver", {}).parameters["queue"]["walltime"] == "00:10:00"
    json.dumps(spec.parameters)


@pytest.mark.slow
def test_a_cluster_that_keeps_nothing_has_only_its_daskserver(hosts):
    settings = load(hosts, DASK, "- project: p\n- cluster: c\n- execution: remote\n- persistent: false\n")
    assert services.wanted(settings) == ["daskserver"]
    spec = services._spec(settings, "daskserver", {})
    assert spec.parameters["pure"] is True and spec.parameters["stores"] is None
    local = load(hosts, DASK.replace("farhost", "localhost").replace("type: slurm", "type: local"))
    assert services._spec(local, "daskserver", {}).needs == ("dask", "distributed")


@pytest.mark.slow
def test_queue_is_an_option_of_commands(hosts):
    hosts.configure(DASK, "- project: p\n- cluster: c\n- execution: remote\n")
    code, _, err = hosts.run("--queue", "shrt", "echo", "hi", check=False)
    assert code == 1 and "'queue' is 'shrt'" in err and "short" in err


# ---- one host elsewhere

FAR = """\
    far:
      frontends:
        - hostname: farhost
          hashserver: {bufferdir: ~/store/buffers}
          database: {database_dir: ~/store/results}
          jobserver: {}
    """


def far(hosts, execution):
    hosts.configure(FAR, "- project: p\n- cluster: far\n- execution: %s\n" % execution)


@pytest.mark.slow
def test_a_hit_on_another_host_needs_only_the_stores(hosts):
    far(hosts, "remote")
    (hosts.work / "a.txt").write_text("b\na\n")
    assert hosts.run("sort", "a.txt") == "a\nb\n"
    assert hosts.services("farhost") == {"hashserver", "database", "jobserver"}
    hosts.kill("farhost")
    assert hosts.run("sort", "a.txt") == "a\nb\n"
    assert hosts.services("farhost") == {"hashserver", "database"}
    assert hosts.run("-c", "sort -r a.txt") == "b\na\n"
    assert hosts.services("farhost") == {"hashserver", "database", "jobserver"}


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["process", pytest.param("spawn", marks=pytest.mark.slow)])
def test_jobs_run_here_and_everything_is_kept_there(hosts, execution):
    far(hosts, execution)
    code = BEGIN + "print(part2('a', 'b' * 100_000).run()[0])\n"
    assert hosts.python(code) == hosts.home.name + "\n"
    assert hosts.services("farhost") == {"hashserver", "database"} and not hosts.services()
    far(hosts, "remote")
    assert hosts.python(code) == hosts.home.name + "\n", "found there"
    assert (hosts.home / "ran").read_text() == "2" and not (hosts.folder / "farhost/ran").exists()


@pytest.mark.slow
def test_workers_here_get_through_when_the_stores_died_meanwhile(hosts):
    far(hosts, "spawn")
    code = BEGIN + """
@delayed
def slow(x):
    import os, time
    open(os.path.expanduser("~/began"), "w").close()
    while not os.path.exists(os.path.expanduser("~/go")):
        time.sleep(0.01)
    return "y" * 200_000
import threading, time, signal
tf = slow(1).start()
while not os.path.exists(os.path.expanduser("~/began")):
    time.sleep(0.01)
import glob
for path in glob.glob(os.path.join(os.environ["FAR"], ".seamless/run/*.json")):
    os.kill(json.load(open(path))["pid"], signal.SIGKILL)
open(os.path.expanduser("~/go"), "w").close()
print(len(tf.value))
"""
    hosts.env["FAR"] = str(hosts.folder / "farhost")
    assert hosts.python(code) == "200000\n"


@pytest.mark.slow
def test_result_folders_come_in_batches_and_unchanged_files_stay(hosts):
    far(hosts, "remote")
    (hosts.work / "d").mkdir()
    for i in range(300):
        (hosts.work / "d" / str(i)).write_text("content %d\n" % i)
    command = ("-i", "d", "-cp", "out", "-c", "mkdir out; cp d/* out/; truncate -s 2000000 out/large")
    hosts.run(*command)
    out = hosts.work / "out"
    assert len(list(out.iterdir())) == 301 and (out / "299").read_text() == "content 299\n" and (out / "large").stat().st_size == 2_000_000
    before = (out / "7").stat().st_mtime_ns
    (out / "8").write_text("changed")
    hosts.run(*command)
    assert (out / "8").read_text() == "content 8\n" and (out / "7").stat().st_mtime_ns == before
    assert not [name for name in os.listdir(hosts.work) if name.startswith(".out")]
