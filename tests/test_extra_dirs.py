"""A colleague's folder and seamless.db, added to a cluster definition: read, never written."""
import hashlib
import os
import pathlib
import subprocess
import sys

import pytest

from seamless_lite import config, delayed
from seamless_lite.errors import ConfigurationError
from seamless_lite.httpbase import Listen, start
from seamless_lite.settings import load_settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLUSTER = """\
mine:
  frontends:
    - hostname: localhost
      hashserver:
        bufferdir: {store}
        extra_dirs: {extra}
      database:
        database_dir: {store}
        extra_dirs: {extra}
      jobserver: {{}}
"""


class Folders:
    """A colleague's store with one result, and a working folder whose cluster reads it."""

    def __init__(self, home, path):
        self.home, self.theirs, self.store, self.work = home, path / "theirs", path / "mine", path / "work"
        self.ledger = path / "ledger"
        self.work.mkdir()
        self.command = "echo ran >> %s; sort a.txt" % self.ledger
        (self.work / "a.txt").write_text("b\na\n")
        assert self.run(SEAMLESS_CACHE=str(self.theirs)).stdout == b"a\nb\n"
        self.before = self.state()
        self.configure("[%s]" % (self.theirs / "__TOPLEVEL__"))

    def configure(self, extra, execution="process"):
        (self.home / ".seamless").mkdir(exist_ok=True)
        (self.home / ".seamless/clusters.yaml").write_text(CLUSTER.format(store=self.store, extra=extra))
        (self.work / "seamless.yaml").write_text("- project: p\n- execution: %s\n" % execution)

    def run(self, *options, **env):
        return subprocess.run([sys.executable, str(ROOT / "bin/seamless-run"), *options, "-i", "a.txt", "-c", self.command], cwd=self.work,
                              env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)

    def state(self):
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(self.theirs.rglob("*")) if path.is_file()}

    def spoil(self, data):
        """Damage the colleague's buffer with this content."""
        name = hashlib.sha256(data).hexdigest()
        path = self.theirs / "__TOPLEVEL__" / name[:2] / name
        path.chmod(0o644)
        path.write_bytes(b"X" + data[1:])
        self.before = self.state()

    def runs(self):
        return self.ledger.read_text().count("ran")

    def settings(self):
        return load_settings(str(self.work), environ=os.environ)


@pytest.fixture
def folders(home, tmp_path):
    (tmp_path / "f").mkdir()
    yield Folders(home, tmp_path / "f")
    config.close()
    subprocess.run([sys.executable, str(ROOT / "bin/seamless-service"), "stop", "--all"], stdout=subprocess.DEVNULL, timeout=60)


def test_a_result_of_a_colleague_cannot_be_forgotten_and_that_is_said(folders):
    done = folders.run("--undo")
    assert done.returncode == 1 and b"stays known: it is in a store that is only read" in done.stderr
    assert folders.run().stdout == b"a\nb\n" and folders.runs() == 1 and folders.state() == folders.before


@pytest.mark.parametrize("execution", ["process", "remote"])
def test_a_result_of_a_colleague_is_a_hit(folders, execution):
    folders.configure("[%s]" % (folders.theirs / "__TOPLEVEL__"), execution)
    done = folders.run()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\nb\n", b"")
    assert folders.runs() == 1 and not folders.store.exists()
    folders.command += " | cat"
    assert folders.run().stdout == b"a\nb\n" and folders.runs() == 2
    assert folders.state() == folders.before, "the colleague's store was written"
    assert (folders.store / "p/seamless.db").exists()


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["process", "remote"])
def test_what_is_damaged_at_a_colleagues_is_made_and_uploaded_again(folders, execution):
    folders.configure("[%s]" % (folders.theirs / "__TOPLEVEL__"), execution)
    folders.spoil(b"a\nb\n")
    done = folders.run()
    assert (done.returncode, done.stdout, folders.runs()) == (0, b"a\nb\n", 2) and done.stderr.count(b"is damaged; it is ignored") == 1
    done = folders.run()
    assert (done.returncode, done.stdout, done.stderr, folders.runs()) == (0, b"a\nb\n", b"", 2), "it was not stored"
    folders.spoil(b"b\na\n")
    folders.command += " | cat"
    folders.run()                           # if it fails, then only once
    assert folders.run().stdout == b"a\nb\n" and folders.runs() == 3
    assert folders.state() == folders.before, "the colleague's store was written"


def test_a_function_takes_a_colleagues_buffer_as_input_in_a_jobserver(folders):
    from seamless_lite.folder import Folder
    checksum = Folder(str(folders.theirs / "__TOPLEVEL__")).put(b"their data")
    folders.configure("[%s]" % (folders.theirs / "__TOPLEVEL__"), "remote")
    config.init(workdir=str(folders.work))

    @delayed
    def length(data):
        return len(data)
    length.celltypes.data = "bytes"
    assert length(checksum).run() == 10


def test_the_services_answer_from_the_extra_folders_too(folders):
    from seamless_lite import database, hashserver, services
    from seamless_lite.folder import Folder
    from seamless_lite.resulttable import ResultTable
    settings = folders.settings()
    args = {spec.service: spec.args for spec in (services._spec(settings, name, {}) for name in ("hashserver", "database"))}
    extra = str(folders.theirs / "__TOPLEVEL__")
    assert args["hashserver"][-2:] == ("--extra-dirs", extra) and args["database"][-2:] == ("--extra-files", extra + "/seamless.db")
    [(transformation, result)] = ResultTable(extra + "/seamless.db").query('SELECT "checksum", "result" FROM "transformation"')
    folders.store.mkdir()
    running = [start(hashserver.HashService(Folder(str(folders.store), extra_dirs=[extra])), Listen(host="127.0.0.1", port=0)),
               start(database.DatabaseService(ResultTable(str(folders.store / "seamless.db")), [ResultTable(extra + "/seamless.db", False)]),
                     Listen(host="127.0.0.1", port=0))]
    try:
        client = database.DatabaseClient(running[1].address)
        assert client.get(transformation) == result and client.get_many([transformation]) == {transformation: result}
        assert client.reverse(result) == [transformation] and client.get("0" * 64) is None
        buffers = hashserver.HashserverClient(running[0].address)
        assert buffers.get(result) == b"a\nb\n"
        folders.spoil(b"a\nb\n")
        assert buffers.has([result]) == [True] and buffers.get(result) is None
        assert buffers.has([result]) == [False] and buffers.get_small([result], 100, 100) == {} and buffers.length(result) is None
        assert buffers.put(b"a\nb\n") == result and buffers.get(result) == b"a\nb\n"
    finally:
        for server in running:
            server.stop()


def test_a_damaged_table_of_a_colleague_is_left_out(folders, caplog):
    (folders.theirs / "__TOPLEVEL__/seamless.db").write_bytes(b"no table" * 1000)
    done = folders.run()
    assert done.stdout == b"a\nb\n" and folders.runs() == 2
    assert done.stderr.decode().startswith("left out for 60 s: the result table %s" % (folders.theirs / "__TOPLEVEL__"))


def test_a_folder_that_is_not_there_is_a_warning_and_one_that_cannot_be_an_error(folders):
    folders.configure("[/no/such/folder]")
    (warning,) = folders.settings().warnings
    assert warning.endswith("correct it, or remove the line") and "reads from /no/such/folder too" in warning
    folders.configure("/one/string")
    assert folders.settings().extra("hashserver") == ["/one/string"]
    folders.configure("['/a;b']")
    with pytest.raises(ConfigurationError, match=r"clusters.yaml:6: 'extra_dirs' names the folder '/a;b'"):
        folders.settings()
