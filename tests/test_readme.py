"""What the README and the user's document print works as printed."""
import os
import pathlib
import re
import subprocess
import sys

import pytest

from seamless_lite.settings import load_settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The code blocks of the README in one language."""
    return re.findall(r"^```%s\n(.*?)^```$" % language, README, re.S | re.M)


def run(folder, *command, **kwargs):
    env = dict(os.environ, PYTHONPATH=str(ROOT), PATH=os.pathsep.join([str(ROOT / "bin"), os.path.dirname(sys.executable),
                                                                     os.environ["PATH"]]))
    return subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=90, **kwargs)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("x\ny\n")
    (tmp_path / "numbers.txt").write_text("1\n2\n6\n")
    return tmp_path


def test_the_first_commands_work_in_a_shell(folder):
    commands = next(block for block in blocks("sh") if "uniq -c" in block)
    done = run(folder, "bash", "-e", "-c", commands)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split("\n") == ["      1 one\tx", "      1 two\ty"] * 2 + [""]
    assert (folder / "sorted.txt").read_text() == "two\none\n" and (folder / "sorted.txt.CHECKSUM").exists()


def test_the_first_script_works(folder):
    (folder / "script.py").write_text(next(block for block in blocks("python") if "def mean" in block))
    done = run(folder, sys.executable, "script.py")
    assert done.stdout.decode().split("\n")[:3] == ["3.0", "6", str([2 * i for i in range(10)])], done.stderr.decode()


def test_the_configurations_load(home, folder):
    clusters, simple, far, use_far, dask, use_dask, slurm, use_slurm, stages, opened, colleague = blocks("yaml")
    (home / ".seamless").mkdir()
    (home / ".seamless/clusters.yaml").write_text(clusters)
    (folder / "seamless.yaml").write_text(simple)
    settings = load_settings(str(folder), environ=os.environ)
    assert (settings.execution, settings.remote, settings.warnings) == ("remote", "jobserver", ())
    assert settings.buffer_directory == str(home / "seamless/buffers/my-project")
    before, _, after = clusters.partition("      hashserver:\n")
    (home / ".seamless/clusters.yaml").write_text(before + opened + after[after.index("      database:"):])
    assert load_settings(str(folder), environ=os.environ).cluster.frontends[0].hashserver.auth == "none"
    for definition, project, remote in ((far, use_far, "jobserver"), (dask, use_dask, "daskserver"), (slurm, use_slurm, "daskserver")):
        (home / ".seamless/clusters.yaml").write_text(definition)
        (folder / "seamless.yaml").write_text(project)
        settings = load_settings(str(folder), environ=os.environ)
        assert (settings.remote, settings.cluster.frontends[0].hostname) == (remote, "login.example.org")
    assert settings.queue == "short"
    (home / ".seamless/clusters.yaml").write_text(dask)
    (folder / "seamless.yaml").write_text(stages)
    assert load_settings(str(folder), environ=os.environ).execution == "process"
    assert load_settings(str(folder), stage="gpu", environ=os.environ).remote == "daskserver"
    (home / ".seamless/clusters.yaml").write_text(colleague)
    (folder / "seamless.yaml").write_text("- project: p\n")
    assert load_settings(str(folder), environ=os.environ).extra("database") == ["/home/anna/seamless/results/her-project/seamless.db"]


def test_the_family_of_commands_works_as_printed(folder):
    commands = next(block for block in blocks("sh") if "seamless-export" in block)
    done = run(folder, "bash", "-e", "-c", commands)
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "equal" in out and (folder / "a.txt.CHECKSUM").exists() and (folder / "sorted.tar").stat().st_size > 1000
    assert (folder / "first.txt").read_text() == "two\n" and (folder / "reverse.txt").read_text() == "two\none\n"


def test_every_command_is_in_the_readme_and_the_readme_has_no_others():
    from seamless_lite.__main__ import COMMANDS
    table = README[README.index("## The commands"):README.index("```sh\nseamless-run sort -r a.txt\n")]
    named = set(re.findall(r"`(?:seamless)?-([a-z-]+)", table)) | {"service-" + name for name in ("ps",)}
    missing = [name for name in COMMANDS if name not in named and name.replace("service-", "", 1) not in named]
    assert not missing, missing


SEED_CLUSTERS = """\
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
SEED_PROJECT = "- project: my-project\n- execution: remote\n"
SEED_STAGES = """\
- project: my-project
- execution: process
- stage gpu:
  - cluster: gpu-cluster
  - execution: remote
  - remote: daskserver
"""


def test_the_users_document_works_as_printed_with_its_placeholders(home, folder):
    (home / ".seamless").mkdir()
    (home / ".seamless/clusters.yaml").write_text(SEED_CLUSTERS)
    (folder / "seamless.yaml").write_text(SEED_PROJECT)
    try:
        started = run(folder, "seamless-init")
        assert started.stdout.decode().count("started") == 3, started.stderr.decode()
        port = int(re.search(r"jobserver +started +http://127.0.0.1:(\d+)", started.stdout.decode()).group(1))
        assert 55300 <= port <= 55399
        assert run(folder, "seamless-init").stdout.decode().count("runs") == 3
        assert run(folder, "seamless-run", "--local", "sort", "a.txt").stdout == b"one\ntwo\n"
        assert run(folder, "seamless-run", "sort", "-r", "a.txt").stdout == b"two\none\n"
    finally:
        run(folder, sys.executable, "-c", "from seamless_lite import launch\nfor r in launch.services(): launch.stop(r)")


def test_the_stages_of_the_users_document_load(home, folder):
    (home / ".seamless").mkdir()
    (home / ".seamless/clusters.yaml").write_text(
        SEED_CLUSTERS + SEED_CLUSTERS.replace("local:", "gpu-cluster:").replace("jobserver", "daskserver"))
    (folder / "seamless.yaml").write_text(SEED_STAGES)
    settings = load_settings(str(folder), stage="gpu", environ=os.environ)
    assert (settings.cluster.name, settings.execution, settings.remote) == ("gpu-cluster", "remote", "daskserver")
    assert load_settings(str(folder), environ=os.environ).execution == "process"


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted(path.name for path in (ROOT / "bin").iterdir() if path.suffix != ".sh"))
def test_each_program_is_installed_runs_through_a_link_and_says_how_it_is_used(program, tmp_path):
    assert "bin/" + program in (ROOT / "setup.cfg").read_text()
    (tmp_path / "link").symlink_to(ROOT / "bin" / program)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "link", "--help"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and b"usage: " in done.stdout


def test_an_unknown_command_of_the_package_lists_those_there_are(tmp_path):
    done = run(tmp_path, sys.executable, "-m", "seamless_lite", "rnu")
    assert done.returncode == 2 and b"rnu" in done.stderr and b"jobserver" in done.stderr
