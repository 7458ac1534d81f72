"""What travels to other hosts: the same bytes everywhere, as much as is needed and no more, also from a zip and under another name."""
import ast
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
import zlib

import pytest

from seamless_lite import _HOME, shipping
from test_architecture import GRAPH, PACKAGE, closure

#: Programs that are started on a host, and what user code may import there.
TRAVELLERS = ({"jobserver", "worker", "hashserver", "database", "hostside"} | {name for name in GRAPH if name.startswith("dask")}
              | {name for name in _HOME.values() if name} | {"config"})


def names(bundle):
    with zipfile.ZipFile(io.BytesIO(zlib.decompress(bundle.data))) as archive:
        return archive.namelist()


def other_python():
    found = [path for path in (shutil.which("python3.%d" % n, path=os.environ["PATH"] + ":/usr/bin") for n in range(9, 14))
             if path and subprocess.run([path, "-c", "import zlib"], stderr=subprocess.DEVNULL).returncode == 0]
    return found[0] if found else sys.executable


def run(code, path, python=sys.executable, **env):
    out = subprocess.run([python, "-c", code], env={"PATH": os.environ["PATH"], "PYTHONPATH": str(path), **env}, cwd="/",
                         stdout=subprocess.PIPE, check=True, timeout=60)
    return out.stdout.decode().strip()


def test_the_bundle_is_named_by_its_content_and_kept(home):
    first = shipping.bundle()
    assert hashlib.sha256(zlib.decompress(first.data)).hexdigest() == first.sha256
    (kept,) = (home / ".seamless" / "dist").iterdir()
    assert shipping.bundle() == first
    inode = kept.stat().st_ino
    assert shipping.bundle() == first and kept.stat().st_ino == inode
    kept.write_bytes(kept.read_bytes()[:-1])
    assert shipping.bundle() == first and kept.stat().st_ino != inode


@pytest.mark.slow
def test_every_python_makes_the_same_bundle(tmp_path):
    code = "from seamless_lite import shipping; print(shipping.bundle().sha256)"
    assert run(code, PACKAGE.parent, other_python(), SEAMLESS_HOME=str(tmp_path)) == shipping.bundle().sha256


def test_what_is_needed_travels_and_what_only_commands_need_stays():
    travels = {pathlib.PurePath(name).stem for name in names(shipping.bundle())}
    assert closure(*TRAVELLERS) | {"__init__"} <= travels
    needless = travels - closure(*TRAVELLERS) - {"__init__"}
    assert not needless, "add these to shipping.STAYS, or say in this test what imports them there: %s" % sorted(needless)
    assert shipping.STAYS <= set(GRAPH)


def test_all_that_is_sent_to_a_fresh_host_is_small():
    assert len(shipping.bundle().data) + len(shipping.agent()) < 400_000


def test_a_changed_source_makes_another_bundle(home, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "seamless_lite", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from seamless_lite import shipping; print(shipping.bundle().sha256)"
    first = run(code, tmp_path, HOME=str(home))
    assert first == shipping.bundle().sha256
    with (tmp_path / "seamless_lite" / "worker.py").open("a") as file:
        file.write("# more\n")
    assert run(code, tmp_path, HOME=str(home)) != first


def test_it_is_the_same_when_imported_from_a_zip_and_has_the_name_of_the_copy(home, tmp_path):
    code = ("import %(name)s.shipping as s; b = s.bundle(); import zlib, zipfile, io\n"
            "names = zipfile.ZipFile(io.BytesIO(zlib.decompress(b.data))).namelist()\n"
            "print(b.sha256, len(s.agent()) > 9000, sorted({name.rpartition('/')[0] for name in names}))")
    (tmp_path / "copy").mkdir()
    shutil.copytree(PACKAGE, tmp_path / "copy" / "seamless_lite", ignore=shutil.ignore_patterns("__pycache__"))
    archive = shutil.make_archive(str(tmp_path / "it"), "zip", tmp_path / "copy")
    assert run(code % {"name": "seamless_lite"}, archive, HOME=str(home)) == "%s True ['seamless_lite']" % shipping.bundle().sha256
    os.makedirs(tmp_path / "other" / "carried")
    (tmp_path / "other" / "carried" / "__init__.py").write_text("")
    os.rename(tmp_path / "copy" / "seamless_lite", tmp_path / "other" / "carried" / "thing")
    assert run(code % {"name": "carried.thing"}, tmp_path / "other", HOME=str(home)).endswith("True ['carried', 'carried/thing']")


def test_the_agent_is_one_text_that_needs_nothing_but_a_python(tmp_path):
    done = subprocess.run([other_python(), "-ISc", shipping.agent()], input=b'{"action": "services"}\n', stdout=subprocess.PIPE, cwd="/",
                          env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout.partition(b"@seamless@")[2]) == {"ok": []}


@pytest.mark.parametrize("name", shipping.AGENT)
def test_the_agent_is_written_for_the_oldest_python_that_hosts_have(name):
    text = (PACKAGE / (name + ".py")).read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 6))
    assert GRAPH[name][0] <= set(shipping.AGENT[:shipping.AGENT.index(name)])
    assert "removeprefix" not in text and "capture_output" not in text and "from __future__" not in text


def test_a_package_without_sources_says_that_it_cannot_travel(monkeypatch, tmp_path):
    monkeypatch.setattr(shipping, "__file__", str(tmp_path / "seamless_lite" / "shipping.py"))
    monkeypatch.setattr(shipping, "__loader__", None)
    with pytest.raises(shipping.ServiceError, match="cannot be sent to another host, its source .*signing.py|errors.py cannot be read"):
        shipping.agent()
