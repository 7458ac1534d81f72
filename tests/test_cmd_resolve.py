"""``seamless-resolve`` and ``seamless-fingertip`` as a user meets them."""
import json
import os
import stat

import pytest

from seamless_lite import cmd_resolve, cmd_run
from seamless_lite.checksum import Checksum
from seamless_lite.folder import Folder
from seamless_lite.resulttable import ResultTable


class Shell:
    """Types commands; ``store`` and ``results`` are where they keep things."""

    def __init__(self, folder, captured):
        self.folder, self._captured = folder, captured
        self.store, self.results = Folder(folder / "cache" / "__TOPLEVEL__"), ResultTable(folder / "cache" / "__TOPLEVEL__" / "seamless.db")

    def __call__(self, main, *argv, code=0):
        self._captured.readouterr()
        found = main([str(word) for word in argv])
        out, err = self._captured.readouterr()
        assert found == code, err
        assert b"Traceback" not in err
        return out, err.decode()

    def scratch(self, command):
        """Run it so; returns the checksum of what it printed, and that of the transformation."""
        data, _ = self(cmd_run.main, "--scratch", "-c", command)
        result = Checksum.of(data)
        assert not self.store.has([result])[0]
        return result, self.results.reverse(result)[0]


@pytest.fixture
def shell(tmp_path, capfdbinary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEAMLESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("alpha\n")
    return Shell(tmp_path, capfdbinary)


def test_a_stored_buffer_is_written_byte_for_byte(shell):
    for data in (b"no end of line", b"\xff\x00\r\n\n", b"", os.urandom(1 << 21)):
        checksum = shell.store.put(data)
        (shell.folder / "x.CHECKSUM").write_text(checksum + "\n")
        for main in (cmd_resolve.resolve, cmd_resolve.fingertip):
            assert shell(main, checksum) == (data, "")
            assert shell(main, "--output", "out", "x.CHECKSUM", "--project", "__TOPLEVEL__") == (b"", "")
            assert (shell.folder / "out").read_bytes() == data
            (shell.folder / "out").unlink()


def test_a_result_goes_through_links_and_into_pipes_and_not_over_what_is_protected(shell):
    checksum = shell.store.put(b"content")
    (shell.folder / "link").symlink_to("target")
    shell(cmd_resolve.resolve, checksum, "--output", "link")
    assert (shell.folder / "link").is_symlink() and (shell.folder / "target").read_bytes() == b"content"
    os.mkfifo(shell.folder / "pipe")
    reader = os.open(shell.folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    shell(cmd_resolve.resolve, checksum, "--output", "pipe")
    assert os.read(reader, 100) == b"content" and stat.S_ISFIFO((shell.folder / "pipe").stat().st_mode)
    os.close(reader)
    if os.geteuid():
        (shell.folder / "target").chmod(0o444)
        assert "write-protected" in shell(cmd_resolve.resolve, checksum, "--output", "target", code=1)[1]


def test_a_large_file_that_is_no_checksum_is_not_read_to_its_end(shell):
    with open(shell.folder / "sparse", "wb") as file:
        file.truncate(1 << 40)
    assert "does not hold a checksum" in shell(cmd_resolve.resolve, "sparse", code=2)[1]


def test_what_is_nowhere_is_one_sentence_and_exit_code_1(shell):
    nowhere = Checksum.of(b"nowhere")
    for main in (cmd_resolve.resolve, cmd_resolve.fingertip):
        out, err = shell(main, nowhere, "--output", "out", code=1)
        assert out == b"" and "buffer %s is in none of the stores" % nowhere in err and len(err.splitlines()) == 1
        assert not (shell.folder / "out").exists()
    stored = shell.store.put(b"here")
    assert "cannot be written: No such file or directory" in shell(cmd_resolve.resolve, stored, "--output", "no/out", code=1)[1]
    assert shell(cmd_resolve.resolve, stored, "--stage", "x", code=1)
    assert "neither a checksum" in shell(cmd_resolve.resolve, "missing.CHECKSUM", code=2)[1]


def test_a_scratch_result_is_made_again_and_is_scratch_still(shell):
    result, transformation = shell.scratch("tr a-z A-Z < a.txt; echo ran | tee -a %s/runs > /dev/null" % shell.folder)
    err = shell(cmd_resolve.resolve, result, code=1)[1]
    assert "transformation %s made it" % transformation in err and "seamless-fingertip" in err
    assert shell(cmd_resolve.fingertip, result)[0] == b"ALPHA\n"
    assert (shell.folder / "runs").read_text() == "ran\nran\n" and not shell.store.has([result])[0]


def test_of_a_file_of_a_result_the_command_that_wrote_it_runs_again(shell):
    shell(cmd_run.main, "-c", "tr a-z A-Z < a.txt > r.txt")
    os.unlink(shell.store.path(Checksum.of(b"ALPHA\n")))
    assert "seamless-fingertip may make it again" in shell(cmd_resolve.resolve, "r.txt.CHECKSUM", code=1)[1]
    assert shell(cmd_resolve.fingertip, "r.txt.CHECKSUM")[0] == b"ALPHA\n"


def test_something_else_is_an_error_and_the_result_of_the_command_stays(shell):
    (shell.folder / "now").write_text("one")
    result, transformation = shell.scratch("sh -c 'cat %s/now'" % shell.folder)
    (shell.folder / "now").write_text("two")
    out, err = shell(cmd_resolve.fingertip, result, code=1)
    assert out == b"" and transformation in err and result in err and Checksum.of(b"two") in err
    assert "--metavar" in err and "conda environment" in err
    assert shell.results.get(transformation) == result and not shell.results.irreproducible(transformation)
    assert not any(shell.store.has([result, Checksum.of(b"two")]))


def test_the_clients_of_the_environment_are_used(shell, monkeypatch):
    data = b"through the environment"
    checksum = shell.store.put(data)
    monkeypatch.delenv("SEAMLESS_CACHE")
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({"buffer": [{"remote_directory": str(shell.store.directory)}], "database": []}))
    for main in (cmd_resolve.resolve, cmd_resolve.fingertip):
        assert shell(main, checksum)[0] == data
