"""Which Python is chosen on a host: real interpreters where they are at hand, and scripts that answer like some otherwise."""
import json
import os
import subprocess
import sys
import time

import pytest

from seamless_lite import conda as conda_module, hostpython
from seamless_lite.hostside import HostError

BASE = "_sqlite3 zlib"


@pytest.fixture
def place(tmp_path, monkeypatch, home):
    """A host with an empty PATH and home: ``place(name, version, modules)`` puts an interpreter on PATH, and returns its path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(hostpython, "SYSTEM_FOLDERS", ())
    for name in [name for name in os.environ if name.startswith(("CONDA", "MAMBA"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(conda_module, "CONDA_ROOTS", ("~/miniconda3",))

    def make(name, version="3.11.2", modules="", where=folder, body=None):
        path = where / name
        os.makedirs(path.parent, exist_ok=True)
        path.write_text("#!/bin/sh\necho noise\n%s\n" % (body or "printf '@@seamless\\n%s\\n%s\\n'" % (version, BASE + " " + modules)))
        path.chmod(0o755)
        return str(path)
    return make


def find(tmp_path, **arguments):
    os.makedirs(tmp_path / "dist", exist_ok=True)
    return hostpython.find(str(tmp_path / "dist"), **arguments)


def test_the_newest_is_chosen_and_said_with_the_others(place, tmp_path):
    old, new, ancient = place("python3.9", "3.9.2"), place("python3.12", "3.12.1"), place("python3", "3.6.8")
    found = find(tmp_path)
    assert found["argv"] == [new] and found["version"] == [3, 12, 1]
    assert found["note"] == "chose Python %s (3.12.1), among %s (3.9.2), %s (3.6.8) too old" % (new, old, ancient)


def test_what_is_needed_counts_more_than_what_is_wished_and_that_more_than_the_version(place, tmp_path):
    newest, wished = place("python3.13", "3.13.0"), place("python3.12", "3.12.1", "numpy")
    needed, both = place("python3.10", "3.10.1", "dask distributed"), place("python3.9", "3.9.2", "dask distributed numpy")
    asked = {}
    assert find(tmp_path)["argv"] == [newest]
    assert find(tmp_path, wishes=("numpy",), asked=asked)["argv"] == [wished]
    assert find(tmp_path, needs=("dask", "distributed"), asked=asked)["argv"] == [needed]
    found = find(tmp_path, needs=("dask", "distributed"), wishes=("numpy",))
    assert found["argv"] == [both] and "which has dask and distributed and numpy" in found["note"] and "without dask" in found["note"]


def test_one_that_hangs_crashes_or_lacks_what_every_service_needs_does_not_count(place, tmp_path, monkeypatch):
    monkeypatch.setattr(hostpython, "PROBE_S", 0.5)
    place("python3.13", body="exec sleep 60")
    place("python3.12", body="kill -9 $$")
    poor = place("python3.11", body="printf '@@seamless\\n3.11.1\\nzlib\\n'")
    good = place("python3.10", "3.10.1")
    begin = time.monotonic()
    found = find(tmp_path)
    assert found["argv"] == [good] and "%s (3.11.1) without sqlite3" % poor in found["note"] and time.monotonic() - begin < 20


def test_nothing_suitable_is_one_sentence_with_what_was_found_and_the_cure(place, tmp_path):
    with pytest.raises(HostError, match=r"no suitable Python on .* \(found: none at all\): name a Python 3.9 or newer with 'python: "):
        find(tmp_path)
    old = place("python3", "3.6.8")
    with pytest.raises(HostError, match=r"\(found: %s \(3.6.8\) too old\): name a Python 3.9 or newer with 'python: /path" % old):
        find(tmp_path)
    place("python3.11", "3.11.2", "numpy")
    for needs, extra in ((("dask", "distributed"), "dask"), (("dask", "dask_jobqueue"), "hpc")):
        with pytest.raises(HostError) as caught:
            find(tmp_path, needs=needs)
        assert "(3.11.2) without dask and" in str(caught.value) and "pip install 'seamless_lite[%s]'" % extra in str(caught.value)
        assert "'python:'" in str(caught.value)


def test_an_interpreter_under_several_names_is_asked_once_and_environments_are_told_apart(place, tmp_path, home):
    path = place("python3.11")
    os.symlink(path, tmp_path / "bin" / "python3")
    os.link(path, tmp_path / "bin" / "python3.10")
    environment = place("python3.9", "3.9.1", where=home / "venv" / "bin")
    (home / "venv" / "pyvenv.cfg").write_text("")
    os.symlink(path, home / "venv" / "bin" / "python3")
    pyenv = place("python3.12", "3.12.0", where=home / ".pyenv" / "versions" / "3.12.0" / "bin")
    assert hostpython._candidates() == [path, pyenv]
    os.environ["PATH"] += os.pathsep + str(home / "venv" / "bin")
    assert hostpython._candidates() == [path, environment, pyenv]


def test_the_choice_is_remembered_until_the_interpreter_or_its_modules_change(place, tmp_path):
    packages = tmp_path / "lib" / "site-packages"
    packages.mkdir(parents=True)
    counter = tmp_path / "counter"
    answer = "echo x >> %s; printf '@@seamless\\n3.11.2\\n%s\\n%s\\n'" % (counter, BASE, packages)
    path = place("python3.11", body=answer)
    for _ in range(3):
        assert find(tmp_path)["argv"] == [path]
    assert counter.read_text() == "x\n"
    (packages / "numpy").mkdir()
    find(tmp_path)
    assert counter.read_text() == "x\n" * 2
    place("python3.11", body=answer + " #")
    find(tmp_path)
    assert counter.read_text() == "x\n" * 3
    (tmp_path / "dist" / "pythons.json").write_text("[1]")
    find(tmp_path, wishes=("numpy",))
    assert counter.read_text() == "x\n" * 4
    os.unlink(path)
    with pytest.raises(HostError):
        find(tmp_path)


def test_the_one_that_is_named_is_used_or_the_reason_is_one_sentence(place, tmp_path, home):
    place("python3.13", "3.13.0")
    named, old = place("mine", "3.9.1", where=home / "venv"), place("python3.8", "3.8.1")
    for name in (named, "~/venv/mine"):
        found = find(tmp_path, python=name)
        assert found["argv"] == [named] and found["note"] == "uses Python %s (3.9.1), as 'python: %s' says" % (named, name)
    assert find(tmp_path, python="python3.13")["version"] == [3, 13, 0]
    for name, sentence in (("/no/python", "'python: /no/python': there is no such interpreter on .*: /no/python does not exist"),
                           ("nosuchpython", "'python: nosuchpython': there is no such interpreter"), ("~", "does not run as a Python interpreter"),
                           (old, r"\(3.8.1\) on .* is too old: name a Python 3.9 or newer")):
        with pytest.raises(HostError, match=sentence):
            find(tmp_path, python=name)
    with pytest.raises(HostError, match="without dask"):
        find(tmp_path, python=named, needs=("dask",))
    with pytest.raises(HostError, match="both 'python: a' and 'conda: b' are given: remove one"):
        find(tmp_path, python="a", conda="b")


@pytest.fixture
def conda(place, home):
    """A conda in the home folder, with two environments; not on PATH."""
    root = home / "miniconda3"
    for prefix in (root, root / "envs" / "sci", home / "elsewhere" / "far"):
        place("python", "3.11.5", "numpy", where=prefix / "bin")
        (prefix / "conda-meta").mkdir()
    (home / ".conda").mkdir()
    (home / ".conda" / "environments.txt").write_text("%s\n%s\n" % (root, home / "elsewhere" / "far"))
    return root


def test_a_conda_environment_is_found_by_name_or_path_and_comes_first(conda, tmp_path, home):
    for name, prefix in (("sci", conda / "envs" / "sci"), ("base", conda), ("far", home / "elsewhere" / "far"),
                         (str(conda / "envs" / "sci"), conda / "envs" / "sci"), ("~/elsewhere/far", home / "elsewhere" / "far")):
        found = find(tmp_path, conda=name)
        assert found["argv"] == [str(prefix / "bin" / "python")] and found["env"]["CONDA_PREFIX"] == str(prefix)
        assert found["env"]["PATH"] == str(prefix / "bin") + os.pathsep + os.environ["PATH"] and found["env"]["CONDA_DEFAULT_ENV"] == name
        assert "of the conda environment %s" % prefix in found["note"]


def test_what_a_conda_environment_wants_to_be_set_is_set(conda, tmp_path):
    prefix = conda / "envs" / "sci"
    (prefix / "conda-meta" / "state").write_text(json.dumps({"env_vars": {"MY_SETTING": "its value"}}))
    (prefix / "etc/conda/activate.d").mkdir(parents=True)
    (prefix / "etc/conda/activate.d/one.sh").write_text("export FROM_SCRIPT=\"$CONDA_PREFIX/x\"\n")
    (prefix / "bin/python").write_text("#!/bin/sh\nif [ \"$1\" = -c ]; then printf '@@seamless\\n3.11.5\\n%s\\n'; else "
                                       "echo \"$MY_SETTING|$FROM_SCRIPT|$*\"; fi\n" % BASE)
    found = find(tmp_path, conda="sci")
    out = subprocess.run(found["argv"] + ["-m", "it s"], env=dict(os.environ, **found["env"]), stdout=subprocess.PIPE)
    assert out.stdout.decode() == "its value|%s/x|-m it s\n" % prefix


def test_a_conda_environment_that_is_missing_is_one_sentence(conda, tmp_path, place, home):
    with pytest.raises(HostError, match="no conda environment nosuch on .*looked for: .*envs/nosuch.*correct 'conda:'"):
        find(tmp_path, conda="nosuch")
    os.rename(conda, home / "hidden")
    with pytest.raises(HostError, match="environment nosuch is not on .*, where no conda is found either"):
        find(tmp_path, conda="nosuch")


def test_a_conda_that_is_not_in_a_usual_place_is_found_by_its_program(conda, home, tmp_path, monkeypatch):
    os.rename(conda, home / "strange")
    (home / "strange/condabin").mkdir()
    (home / "strange/condabin/conda").write_text("")
    (home / "strange/condabin/conda").chmod(0o755)
    monkeypatch.setenv("CONDA_EXE", str(home / "strange/condabin/conda"))
    assert find(tmp_path, conda="sci")["argv"] == [str(home / "strange/envs/sci/bin/python")]
    monkeypatch.delenv("CONDA_EXE")
    os.symlink(home / "strange/condabin/conda", tmp_path / "bin" / "conda")
    assert conda_module.conda_roots() == [str(home / "strange")]


def test_real_interpreters_answer(tmp_path):
    (found,) = hostpython.probe([sys.executable, "/bin/false", "/no/such"], ["_sqlite3", "zlib", "no_such_module"])
    assert found.version == sys.version_info[:3] and found.modules == ["_sqlite3", "zlib"] and found.folders and found.lacks(()) is None
