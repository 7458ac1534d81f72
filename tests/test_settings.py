"""What good configurations mean.  The broken ones are in test_broken_configurations.py."""
import json
import os
import subprocess
import sys
import textwrap

import pytest

from seamless_lite.clusters import is_this_machine
from seamless_lite.errors import ConfigurationError
from seamless_lite.settings import RemoteClient, load_settings

SEED_JOBSERVER = """\
local:
  ...
  frontends:
    - hostname: localhost
      hashserver:
        ...
      database:
        ...
      jobserver:
        network_interface: 127.0.0.1
        port_start: 55300
        port_end: 55399
"""
SEED_STAGES = """\
- project: my-project
- execution: process
- stage gpu:
  - cluster: gpu-cluster
  - execution: remote
  - remote: daskserver
"""
GPU_CLUSTER = """\
gpu-cluster:
  type: slurm
  frontends:
    - hostname: login.example.org
      hashserver: {bufferdir: ~/buffers/}
      database: {database_dir: /scratch/results}
      daskserver: {network_interface: 0.0.0.0, port_start: 60300, port_end: 60399}
"""
LOCAL = """\
local:
  workers: 3
  frontends:
    - hashserver: {bufferdir: /b}
      database: {database_dir: /d}
"""


class Place:
    """A home and a project folder; ``load`` reads the configuration in it."""

    def __init__(self, path):
        self.home = path / "home"
        self.work = path / "outer" / "work"
        self.work.mkdir(parents=True)
        (self.home / ".seamless").mkdir(parents=True)
        self.environ = {"HOME": str(self.home)}

    def clusters(self, content, name="clusters.yaml"):
        path = self.home / ".seamless" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))

    def project(self, content, folder=None, name="seamless.yaml"):
        ((folder or self.work) / name).write_text(textwrap.dedent(content))

    def profile(self, content, folder=None):
        self.project(content, folder, "seamless.profile.yaml")

    def load(self, **arguments):
        return load_settings(str(self.work), environ=self.environ, **arguments)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# --- the seed's document

def test_the_jobserver_block_of_the_document_works_as_printed(place):
    place.clusters(SEED_JOBSERVER)
    place.project("- project: my-project\n- execution: remote\n")
    settings = place.load()
    assert (settings.execution, settings.remote, settings.persistent) == ("remote", "jobserver", True)
    jobserver = settings.cluster.frontend_of("jobserver").jobserver
    assert (jobserver.network_interface, jobserver.port_range, jobserver.auth) == ("127.0.0.1", (55300, 55399), "hmac")
    assert settings.cluster.local and settings.cluster.frontends[0].is_local
    data = str(place.home / ".seamless" / "clusters-data" / "local")
    assert settings.buffer_directory == data + "/buffers/my-project"
    assert settings.database_file == data + "/database/my-project/seamless.db"
    assert settings.warnings == ()


def test_remote_is_the_default_where_a_jobserver_is_configured(place):
    place.clusters(SEED_JOBSERVER)
    place.project("- project: my-project\n")
    assert place.load().remote == "jobserver"


def test_the_two_stage_example_loads_in_both_stages(place):
    place.clusters(SEED_JOBSERVER)
    place.clusters(GPU_CLUSTER, "clusters/gpu.yaml")
    place.project(SEED_STAGES)
    default, gpu = place.load(), place.load(stage="gpu")
    assert (default.stage, default.execution, default.remote, default.cluster.name) == (None, "process", None, "local")
    assert (gpu.stage, gpu.execution, gpu.remote, gpu.cluster.name) == ("gpu", "remote", "daskserver", "gpu-cluster")
    assert default.stages == gpu.stages == ("gpu",)
    assert gpu.buffer_directory == "~/buffers/my-project/STAGE-gpu"
    assert gpu.database_directory == "/scratch/results/my-project/STAGE-gpu"
    assert not gpu.cluster.local and gpu.cluster.tunnel is None
    assert place.load() == default


def test_a_stage_block_is_checked_but_not_used_in_another_stage(place):
    place.project(SEED_STAGES)      # and no cluster of that name is defined
    assert place.load().cluster is None


# --- without configuration

def test_without_any_configuration_the_embedded_store_is_used(place):
    settings = place.load()
    store = str(place.home / ".seamless" / "cache" / "__TOPLEVEL__")
    assert settings.buffer_directory == settings.database_directory == store
    assert (settings.execution, settings.persistent, settings.cluster) == ("process", True, None)
    assert (settings.project, settings.files, settings.warnings) == ("__TOPLEVEL__", (), ())


def test_project_and_spawn_work_with_the_embedded_store(place):
    place.project("- project: p\n- subproject: a/b\n- execution: spawn\n")
    settings = place.load()
    assert settings.buffer_directory == str(place.home / ".seamless" / "cache" / "p" / "a" / "b")
    assert (settings.execution, settings.workers) == ("spawn", None)


def test_seamless_home_moves_clusters_and_store(place, tmp_path):
    place.environ["SEAMLESS_HOME"] = str(tmp_path / "elsewhere")
    assert place.load().buffer_directory == str(tmp_path / "elsewhere" / "cache" / "__TOPLEVEL__")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "clusters.yaml").write_text(SEED_JOBSERVER)
    settings = place.load(project="p")
    assert settings.buffer_directory == str(tmp_path / "elsewhere" / "clusters-data" / "local" / "buffers" / "p")


def test_empty_files_are_empty_lists(place):
    place.project("")
    place.profile("# nothing yet\n")
    place.clusters("")
    assert place.load().cluster is None


def test_persistent_false_keeps_nothing_on_disk(place):
    place.project("- persistent: false\n")
    settings = place.load()
    assert (settings.persistent, settings.buffer_directory, settings.database_file) == (False, None, None)
    place.clusters(SEED_JOBSERVER)
    assert place.load().cluster is None and place.load().execution == "process"


def test_a_run_without_files_does_not_import_yaml(place):
    code = ("import sys\nfrom seamless_lite.settings import load_settings\n"
            "load_settings(sys.argv[1], environ={'HOME': sys.argv[2]})\n"
            "print([name for name in ('yaml', 'difflib', 'socket', 'subprocess', 'tempfile') if name in sys.modules])")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run([sys.executable, "-c", code, str(place.work), str(place.home)], cwd=root,
                         stdout=subprocess.PIPE, universal_newlines=True, check=True, timeout=60)
    assert run.stdout == "[]\n"


# --- command files

def test_the_profile_comes_after_the_project_file_and_later_commands_win(place):
    place.project("- project: a\n- nparallel: 2\n- record: true\n- nparallel: 3\n")
    place.profile("- project: b\n")
    settings = place.load()
    assert (settings.project, settings.nparallel, settings.record) == ("b", 3, True)
    assert settings.files == (str(place.work / "seamless.yaml"), str(place.work / "seamless.profile.yaml"))


def test_parents_come_first_when_the_child_inherits(place):
    outer = place.work.parent
    place.project("- project: outer\n- subproject: s\n", outer)
    place.profile("- nparallel: 7\n- inherit_from_parent\n", outer)
    place.project("- project: root\n- record: true\n", outer.parent)
    place.project("- project: inner\n- inherit_from_parent: true\n")
    settings = place.load()
    assert (settings.project, settings.subproject, settings.nparallel, settings.record) == ("inner", "s", 7, True)
    place.project("- project: inner\n- inherit_from_parent: false\n")
    assert place.load().nparallel is None


def test_inheriting_from_a_folder_without_files_is_a_warning(place):
    place.project("- inherit_from_parent\n")
    assert place.load().warnings == (
        "%s:1: 'inherit_from_parent' finds nothing, as %s has no seamless.yaml"
        % (place.work / "seamless.yaml", place.work.parent),)


def test_stage_blocks_nest_and_are_spliced_in_place(place):
    place.project("""\
        - project: p
        - stage a:
            - project: pa
            - stage b:
                - record: true
        - nparallel: 5
        - stage  a:
            - nparallel: 6
        """)
    assert place.load(stage="a").project == "pa"
    assert (place.load(stage="a").nparallel, place.load(stage="b").nparallel, place.load().nparallel) == (6, 5, 5)
    assert place.load(stage="b").stages == ("a", "b")
    assert not place.load(stage="b").record, "a block inside of a block that is left out is left out too"


def test_a_line_of_three_dots_is_a_comment_anywhere(place):
    place.project("...\n- project: p\n  ...\n- nparallel: 2\n...\n")
    assert (place.load().project, place.load().nparallel) == ("p", 2)


def test_dates_numbers_in_quotes_and_bytes_order_marks_are_text(place):
    (place.work / "seamless.yaml").write_bytes(b"\xef\xbb\xbf- project: 2024-01-31\n- subproject: '123'\n")
    assert (place.load().project, place.load().subproject) == ("2024-01-31", "123")


@pytest.mark.parametrize("subproject", ["01", "a/ff", ".pins", "a/.quarantine", "0" * 64])
def test_a_subproject_is_not_called_like_something_in_the_store_of_its_project(place, subproject):
    with pytest.raises(ConfigurationError, match="'subproject' is .* choose another name"):
        place.load(project="p", subproject=subproject)
    assert place.load(project="p", subproject="0/1a1/g1/0A/a.").subproject == "0/1a1/g1/0A/a."


def test_leaving_a_stage_leaves_nothing_behind(place):
    place.clusters(LOCAL)
    place.project("- project: p\n- stage s:\n  - project: q\n  - subproject: t\n  - nparallel: 4\n  - cluster:\n")
    before = place.load()
    assert (place.load(stage="s").project, place.load(stage="s").cluster) == ("q", None)
    assert place.load() == before and before.cluster.name == "local"


# --- arguments

def test_arguments_win_over_files(place):
    place.clusters(SEED_JOBSERVER)
    place.project("- project: p\n- subproject: s\n- execution: remote\n- node: n1\n")
    settings = place.load(project="q", execution="process", node="n2")
    assert (settings.project, settings.execution, settings.remote, settings.node) == ("q", "process", None, "n2")
    assert settings.subproject is None and place.load(subproject="t").subproject == "t"
    assert place.load(project="q", subproject="").subproject is None


def test_a_substage_changes_only_the_key_of_the_job_server(place):
    place.clusters(SEED_JOBSERVER)
    place.project("- project: P\n- subproject: a/b\n- stage s: []\n")
    one, two = place.load(stage="s", substage="x"), place.load(stage="s", substage="")
    assert one.buffer_directory == two.buffer_directory
    assert one.service_key("hashserver") == two.service_key("hashserver") == "hashserver-local-rw-P--a--b--STAGE-s"
    assert one.service_key("jobserver") == "jobserver-local-rw-P--a--b--STAGE-sSUBSTAGE-x"
    assert two.service_key("jobserver") == "jobserver-local-rw-P--a--b--STAGE-s"
    assert place.load(substage="x").substage is None
    assert place.load().service_key("database", "ro") == "database-local-ro-P--a--b"


def test_shared_stages_have_one_storage(place):
    place.clusters("local:\n  share_stages: true\n  frontends:\n    - {hashserver: , database: , jobserver: }\n")
    place.project("- project: p\n- stage s: []\n")
    assert place.load(stage="s").buffer_directory == place.load().buffer_directory
    assert place.load(stage="s").service_key("hashserver") == "hashserver-local-rw-p"
    assert place.load(stage="s").service_key("jobserver") == "jobserver-local-rw-p--STAGE-s"


# --- which cluster

def test_the_only_local_cluster_is_used_without_a_command(place):
    place.clusters(GPU_CLUSTER + LOCAL.replace("local:", "mine:"))
    place.project("- project: p\n")
    settings = place.load()
    assert (settings.cluster.name, settings.execution, settings.workers) == ("mine", "process", 3)
    assert settings.buffer_directory == "/b/p"


@pytest.mark.parametrize("extra, chosen", [("", None), ("local_cluster: b\n", "b"), (LOCAL, "local")])
def test_among_several_local_clusters_one_must_be_named(place, extra, chosen):
    place.clusters(LOCAL.replace("local:", "a:") + LOCAL.replace("local:", "b:") + extra)
    place.project("- project: p\n")
    cluster = place.load().cluster
    assert (cluster.name if cluster else None) == chosen


def test_local_cluster_drops_host_names(place):
    place.clusters("local_cluster: big\n" + GPU_CLUSTER.replace("gpu-cluster:", "big:\n  tunnel: true"))
    place.project("- project: p\n- execution: process\n")
    settings = place.load()
    assert settings.cluster.local and settings.cluster.frontends[0].hostname is None
    assert settings.buffer_directory == str(place.home / "buffers" / "p")


def test_spawn_takes_its_workers_from_this_machine(place):
    place.clusters("local_cluster: local\n" + LOCAL + GPU_CLUSTER.replace("type:", "workers: 99\n  type:"))
    place.project("- project: p\n- cluster: gpu-cluster\n- execution: spawn\n")
    assert place.load().workers == 3
    place.clusters("other:\n  workers: 8\n  frontends: [{hashserver: , database: }]\n", "clusters/other.yaml")
    place.project("- project: p\n- cluster: other\n- execution: spawn\n")
    assert place.load().workers == 8


def test_later_cluster_files_and_inline_clusters_replace_earlier_ones(place):
    place.clusters(LOCAL)
    for number in (5, 9, 3, 7, 8, 4, 6, 1):
        place.clusters(LOCAL.replace("/b", "/b%d" % number), "clusters/%d.yaml" % number)
    place.clusters("broken: [", "clusters/notes.txt")
    place.project("- project: p\n")
    assert place.load().buffer_directory == "/b9/p"
    place.profile("- clusters:\n" + textwrap.indent(LOCAL.replace("/b", "data/my buffers"), "    "))
    assert place.load().buffer_directory == str(place.work / "data" / "my buffers" / "p")


def test_null_takes_the_cluster_away(place):
    place.clusters(LOCAL)
    place.project("- cluster: null\n")
    assert place.load().cluster is None and place.load().project == "__TOPLEVEL__"


@pytest.mark.parametrize("name, local", [
    (None, True), ("localhost", True), ("LOCALHOST", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True),
    ("[::1]", True), (os.uname().nodename, True), (os.uname().nodename.split(".")[0], True),
    ("example.org", False), ("127.example.org", False), ("0.0.0.0", False), ("localhost.example.org", False)])
def test_names_of_this_machine_need_no_ssh(name, local):
    assert is_this_machine(name) is local


def test_an_ssh_name_of_another_host_makes_a_frontend_remote(place):
    place.clusters("c:\n  frontends:\n    - {hostname: localhost, ssh_hostname: me@far, hashserver: , database: }\n")
    place.project("- project: p\n- cluster: c\n")
    settings = place.load()
    assert not settings.cluster.local
    assert settings.buffer_directory == "~/.seamless/clusters-data/c/buffers/p"


def test_services_may_sit_on_several_frontends(place):
    place.clusters("""\
        c:
          frontends:
            - hostname: files
              hashserver: {bufferdir: /b, python: /opt/py, auth: none}
              database: {database_dir: /d, conda: env}
            - hostname: jobs
              hashserver: {bufferdir: /other}
              jobserver: {}
        """)
    place.project("- project: p\n- cluster: c\n")
    cluster = place.load().cluster
    hosts = [cluster.frontend_of(service).hostname for service in ("hashserver", "database", "jobserver")]
    assert hosts == ["files", "files", "jobs"]
    assert cluster.frontend_of("daskserver") is None
    files = cluster.frontends[0]
    assert (files.hashserver.directory, files.hashserver.python, files.hashserver.auth) == ("/b", "/opt/py", "none")
    assert (files.database.directory, files.database.conda) == ("/d", "env")
    assert cluster.frontends[1].jobserver.port_range is None


# --- back ends and queues

def test_remote_chooses_between_two_back_ends(place):
    place.clusters(SEED_JOBSERVER + "      daskserver:\n")
    place.project("- project: p\n- remote: daskserver\n")
    assert place.load().remote == "daskserver"
    assert place.load(execution="process").remote is None


def test_remote_without_a_back_end_runs_here_and_says_so(place):
    place.clusters(LOCAL)
    place.project("- project: p\n- execution: remote\n")
    settings = place.load()
    assert (settings.execution, settings.remote) == ("process", None)
    assert settings.warnings[0].startswith(str(place.work / "seamless.yaml") + ":2: 'execution' is 'remote', but ")


def test_pure_dask_needs_neither_project_nor_storage(place):
    place.clusters("c:\n  type: slurm\n  frontends: [{daskserver: }]\n  queues: {short: {cores: 2}}\n")
    place.project("- cluster: c\n- persistent: false\n")
    settings = place.load()
    assert (settings.remote, settings.queue, settings.buffer_directory) == ("daskserver", "short", None)
    assert settings.service_key("daskserver") == "pure-daskserver-c-short"


QUEUES = """\
  default_queue: long
  queues:
    base:
      walltime: 12:00:00
      memory: 16GB
      worker-threads: 1
      job_script_prologue: |
        module load x
        export A=1
      job-extra-directives: [--mail=none, 5]
      interactive: true
    short:
      TEMPLATE: base
      cores: 4
      memory: 2000
      walltime:
    long:
      TEMPLATE: short
      exclusive: true
      extra_dask_config: {distributed: {worker: [1, two]}}
      dask_resources: {GPU: 1.5}
"""


def test_queues_inherit_every_key_from_their_template(place):
    place.clusters(GPU_CLUSTER + QUEUES)
    place.project("- project: p\n- cluster: gpu-cluster\n- node: n1\n")
    settings = place.load()
    assert settings.queue == "long" and settings.node == "n1"
    queues = settings.cluster.queues
    assert (queues["base"].walltime, queues["base"].memory, queues["base"].exclusive) == ("12:00:00", "16GB", False)
    assert (queues["short"].walltime, queues["short"].memory, queues["short"].cores) == (None, "2000", 4)
    long = queues["long"]
    assert (long.cores, long.worker_threads, long.interactive, long.exclusive) == (4, 1, True, True)
    assert long.job_script_prologue == ("module load x", "export A=1")
    assert long.job_extra_directives == ("--mail=none", "5")
    assert long.extra_dask_config == {"distributed": {"worker": [1, "two"]}} and long.dask_resources == {"GPU": 1.5}
    assert place.load(queue="short").queue == "short"


def test_an_incomplete_queue_may_serve_as_a_template_but_not_be_used(place):
    place.clusters(GPU_CLUSTER + QUEUES)
    place.project("- project: p\n- cluster: gpu-cluster\n")
    with pytest.raises(ConfigurationError, match="the queue 'base' has no 'cores'"):
        place.load(queue="base")


def test_changing_the_cluster_clears_the_queue(place):
    place.clusters(GPU_CLUSTER + QUEUES)
    place.clusters((GPU_CLUSTER + QUEUES).replace("gpu-cluster:", "other:"), "clusters/other.yaml")
    place.project("- project: p\n- cluster: gpu-cluster\n- queue: short\n- cluster: gpu-cluster\n"
                  "- stage s:\n  - cluster: other\n")
    assert (place.load().queue, place.load(stage="s").queue) == ("short", "long")


def test_a_dask_cluster_without_queues_works_with_defaults(place):
    place.clusters(SEED_JOBSERVER.replace("jobserver", "daskserver"))
    place.project("- project: p\n")
    assert (place.load().remote, place.load().queue) == ("daskserver", None)


def test_anchors_and_merge_keys_are_understood(place):
    place.clusters("""\
        a: &a
          workers: 2
          frontends: [{hashserver: , database: }]
        b:
          <<: *a
          workers: 5
        """)
    place.project("- project: p\n- cluster: b\n")
    assert place.load().workers == 5 and place.load().cluster.frontends[0].hashserver is not None


# --- environment

def test_seamless_cache_stands_for_all_files(place, tmp_path):
    place.project("this is: [broken\n")
    place.clusters("so is: [this\n")
    place.environ["SEAMLESS_CACHE"] = " ~/my cache "
    settings = place.load(stage="s")
    store = str(place.home / "my cache" / "__TOPLEVEL__" / "STAGE-s")
    assert settings.buffer_directory == settings.database_directory == store
    assert (settings.execution, settings.persistent, settings.cluster, settings.files) == ("process", True, None, ())
    assert place.load(project="P", execution="spawn").buffer_directory == str(place.home / "my cache" / "P")
    assert settings.service_key("hashserver") == "hashserver-__SEAMLESS_CACHE__-rw-__TOPLEVEL__--STAGE-s"
    place.environ["SEAMLESS_CACHE"] = "  "
    with pytest.raises(ConfigurationError):
        place.load()


def test_remote_clients_are_read_from_the_environment(place):
    place.environ["SEAMLESS_REMOTE_CLIENTS"] = json.dumps({
        "database": [{"readonly": False, "url": "ignored", "remote_url": "http://a:1/"}],
        "buffer": [{"remote_url": "http://a:2", "remote_directory": "~/b"}, {"remote_directory": "/c"}]})
    settings = place.load()
    assert settings.remote_clients == (
        RemoteClient("database", False, "http://a:1"),
        RemoteClient("hashserver", True, "http://a:2", str(place.home / "b")),
        RemoteClient("hashserver", True, None, "/c"))
    assert (settings.buffer_directory, settings.cluster, settings.execution) == (None, None, "process")


def test_settings_are_frozen(place):
    with pytest.raises(AttributeError):
        place.load().project = "other"


def test_loading_changes_neither_folder_nor_environment(place):
    before, folder = dict(os.environ), os.getcwd()
    place.clusters(SEED_JOBSERVER)
    place.load(project="p")
    assert dict(os.environ) == before and os.getcwd() == folder
    assert sorted(os.listdir(place.home / ".seamless")) == ["clusters.yaml"]


def test_a_home_that_is_the_root_of_the_file_system_gives_no_double_slash(tmp_path):
    settings = load_settings(str(tmp_path), environ={"HOME": "/"})
    assert settings.buffer_directory == "/.seamless/cache/__TOPLEVEL__"
    assert load_settings(str(tmp_path), environ={"HOME": "/", "SEAMLESS_CACHE": "//x"}).buffer_directory == "/x/__TOPLEVEL__"


def test_without_pyyaml_a_configuration_file_is_one_sentence(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "seamless.yaml").write_text("- project: p\n")
    with pytest.raises(ConfigurationError, match="pip install PyYAML"):
        load_settings(str(tmp_path), environ={"HOME": str(tmp_path)})
