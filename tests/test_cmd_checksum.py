"""seamless-checksum, -file and -index: names of files and directories, and the sidecars that hold them."""
import gzip
import hashlib
import io
import os

import pytest

from seamless_lite import cmd_checksum, compressed
from seamless_lite.errors import CorruptBufferError, SeamlessError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"alpha\n")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"zipped\n"))
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "empty").mkdir()
    (tmp_path / "d" / "one").write_bytes(b"1\n")
    (tmp_path / "d" / ".hidden.gz").write_bytes(gzip.compress(b"2\n"))
    (tmp_path / "d" / "sub" / "three").write_bytes(b"3\n")
    return tmp_path


def sha(data):
    return hashlib.sha256(data).hexdigest()


INDEX = b'{\n  ".hidden": "%s",\n  "one": "%s",\n  "sub/three": "%s"\n}\n' % tuple(sha(data).encode() for data in (b"2\n", b"1\n", b"3\n"))


def test_the_checksum_is_that_of_the_decompressed_content(capfd):
    assert cmd_checksum.checksum(["a.txt", "z.txt.gz", "d/"]) == 0
    assert capfd.readouterr().out.split() == [sha(b"alpha\n"), sha(b"zipped\n"), sha(INDEX)]


def test_a_checksum_file_has_the_name_without_compression(here):
    assert cmd_checksum.checksum_file(["z.txt.gz", "a.txt"]) == 0
    assert (here / "z.txt.CHECKSUM").read_text() == sha(b"zipped\n") + "\n"
    assert (here / "a.txt.CHECKSUM").read_text() == sha(b"alpha\n") + "\n"


def test_an_index_lists_all_files_but_no_empty_directory(here):
    assert cmd_checksum.checksum_index(["d/"]) == 0
    assert (here / "d.INDEX").read_bytes() == INDEX and (here / "d.CHECKSUM").read_text() == sha(INDEX) + "\n"
    (here / "d.CHECKSUM").unlink()
    assert cmd_checksum.checksum_file(["d.INDEX"]) == 0
    assert (here / "d.CHECKSUM").read_text() == sha(INDEX) + "\n" and (here / "d.INDEX").exists()


@pytest.mark.parametrize("function, name, word", [
    (cmd_checksum.checksum, "nothing", "No such file"), (cmd_checksum.checksum_file, "d", "seamless-checksum-index"),
    (cmd_checksum.checksum_index, "a.txt", "not a directory"), (cmd_checksum.checksum, "pipe", "neither a file nor a directory"),
    (cmd_checksum.checksum, "bad.gz", "not whole gzip data")])
def test_what_cannot_be_read_gets_a_sentence(here, capfd, function, name, word):
    os.mkfifo("pipe")
    (here / "bad.gz").write_bytes(b"no gzip")
    assert function([name]) == 1
    out, err = capfd.readouterr()
    assert not out and word in err and err.count("\n") == 1


def test_an_old_sidecar_is_replaced_and_a_stale_index_goes(here):
    (here / "a.txt.CHECKSUM").write_text("0" * 64)
    (here / "a.txt.INDEX").write_text("{}\n")
    assert cmd_checksum.checksum_file(["a.txt"]) == 0
    assert (here / "a.txt.CHECKSUM").read_text() == sha(b"alpha\n") + "\n" and not (here / "a.txt.INDEX").exists()
    assert not [name for name in os.listdir() if name.startswith(".")]


# --- compressed.py ------------------------------------------------------------------------------------------

def ways():
    """The modules that are here, and the program, which is asked when there is no module."""
    found = []
    for name in compressed.ZSTD_MODULES:
        try:
            compressed.importlib.import_module(name)
            found.append((name,))
        except ImportError:
            pass
    return found + [()]


@pytest.mark.parametrize("modules", ways())
@pytest.mark.parametrize("suffix", [".zst", ".gz"])
@pytest.mark.parametrize("data", [b"", b"a", b"y" * 255, b"y" * 256, b"y" * 70000, os.urandom(200000) + bytes(3000000)], ids=len)
def test_what_is_compressed_is_whole_or_noticed(here, monkeypatch, modules, suffix, data):
    monkeypatch.setattr(compressed, "ZSTD_MODULES", modules)
    path = str(here / ("f" + suffix))

    def write(raw):
        with open(path, "wb") as file:
            file.write(raw)
        return path
    with open(path, "wb") as file:
        compressed.compress(io.BytesIO(data), file, suffix)
    with open(path, "rb") as file:
        raw = file.read()
    assert b"".join(compressed.pieces(path, suffix)) == data
    if suffix == ".zst":
        assert compressed.zstd_size(path) == len(data)      # or Seamless 1.x would refuse it
    else:
        assert raw[4:8] == bytes(4)                         # no time
    assert b"".join(compressed.pieces(write(raw + raw), suffix)) == data + data
    for bad in (raw[:-1], raw + b"more", raw[:len(raw) // 2]):
        with pytest.raises(CorruptBufferError):
            list(compressed.pieces(write(bad), suffix))


def test_without_anything_for_zstd_there_is_a_sentence(here, monkeypatch):
    monkeypatch.setattr(compressed, "ZSTD_MODULES", ())
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(SeamlessError, match="install the program zstd"), open("x.zst", "wb") as file:
        compressed.compress(io.BytesIO(b"x"), file, ".zst")
