"""seamless-download: what gets out of a store, what stays of what was there, and what is refused."""
import gzip
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from seamless_lite import cmd_checksum, cmd_download, cmd_upload
from seamless_lite.celltypes import plain_dumps
from seamless_lite.checksum import Checksum
from seamless_lite.folder import Folder
from seamless_lite.hashserver import HashService
from seamless_lite.httpbase import Listen, start
from test_architecture import PACKAGE

PROGRAM = os.path.join(os.path.dirname(str(PACKAGE)), "bin", "seamless-download")
REAL = os.environ.get("SEAMLESS_REAL_VENV")
FILES = {"one": b"1\n", ".hidden": b"h\n", "sub/two": b"2\n", "sub/deep/three": b"1\n"}
INDEX = plain_dumps({name: Checksum.of(data) for name, data in FILES.items()})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with sidecars only, and ``../buffers``."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Folder("../buffers").put_many([b"alpha\n", INDEX, *FILES.values()])
    pathlib.Path("a.txt.CHECKSUM").write_text(sha(b"alpha\n"))
    pathlib.Path("d.CHECKSUM").write_text("# a comment\n%s\n" % sha(INDEX))
    pathlib.Path("d.INDEX").write_bytes(INDEX)
    return tmp_path / "here"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hashserver on ``buffers``, which ``SEAMLESS_REMOTE_CLIENTS`` names."""
    running = start(HashService(Folder(tmp_path / "buffers")), Listen(host="127.0.0.1", port=0))
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({"buffer": [{"remote_url": running.address}]}))
    yield running
    running.stop()


def sha(data):
    return hashlib.sha256(data).hexdigest()


def download(*words):
    return cmd_download.main(["--destination", "../buffers", *words])


def stored(data, suffix=""):
    return pathlib.Path("../buffers", sha(data)[:2], sha(data) + suffix)


def tree(top):
    """relative path -> content of all files."""
    return {str(path.relative_to(top)): path.read_bytes() for path in pathlib.Path(top).rglob("*") if path.is_file()}


# --- names --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["d", "d/", "d.INDEX", "d.CHECKSUM"])
def test_a_directory_is_written_as_its_index_says(name):
    assert download("a.txt", name) == 0
    assert tree("d") == FILES and pathlib.Path("a.txt").read_bytes() == b"alpha\n"


def test_a_checksum_becomes_a_file_or_a_directory_of_that_name():
    assert download(sha(b"alpha\n"), sha(INDEX)) == 0
    assert pathlib.Path(sha(b"alpha\n")).read_bytes() == b"alpha\n" and pathlib.Path(sha(INDEX)).read_bytes() == INDEX
    assert download("--directory", "-o", "e", sha(INDEX).upper()) == 0
    assert tree("e") == FILES and pathlib.Path("e.INDEX").read_bytes() == INDEX
    assert pathlib.Path("e.CHECKSUM").read_text() == sha(INDEX) + "\n"


def test_a_part_of_a_directory_comes_alone_and_has_no_sidecar():
    assert download("d/sub/two") == 0 and tree("d") == {"sub/two": b"2\n"}
    assert download("d/sub", "-o", "x") == 0 and tree("x") == {"two": b"2\n", "deep/three": b"1\n"}
    assert download("./d/sub/deep/") == 0 and tree("d") == {"sub/two": b"2\n", "sub/deep/three": b"1\n"}
    assert download(sha(INDEX) + "/one") == 0 and tree(sha(INDEX)) == {"one": b"1\n"}
    assert sorted(os.listdir()) == sorted(["a.txt.CHECKSUM", "d", "d.CHECKSUM", "d.INDEX", "x", sha(INDEX)])


def test_an_index_that_is_not_here_is_fetched_for_a_name_that_says_directory():
    os.unlink("d.INDEX")
    assert download("d/") == 0 and tree("d") == FILES and pathlib.Path("d.INDEX").read_bytes() == INDEX


def test_outputs_count_in_order_and_the_rest_keep_their_names():
    assert download("-o", "x/y", "a.txt", "d") == 0
    assert tree("x") == {"y": b"alpha\n"} and tree("d") == FILES


def test_index_writes_a_sidecar_for_each_file():
    assert download("--index", "-o", "e", "d") == 0
    assert tree("e") == {name + ".CHECKSUM": sha(data).encode() + b"\n" for name, data in FILES.items()}
    assert download("e/sub/two") == 0 and pathlib.Path("e/sub/two").read_bytes() == b"2\n"


def test_stdout_gets_the_bytes(capfdbinary):
    assert download("--stdout", "a.txt", sha(b"2\n"), "d/one") == 0 and capfdbinary.readouterr().out == b"alpha\n2\n1\n"
    assert download("--stdout", "d") == 1 and capfdbinary.readouterr().out == b""
    assert download("--stdout", "--index", "d") == 0 and capfdbinary.readouterr().out == INDEX
    assert download("--stdout", "--compression", "gz", "a.txt") == 0
    assert gzip.decompress(capfdbinary.readouterr().out) == b"alpha\n"


@pytest.mark.parametrize("words, code, sentence", [
    (["nothing"], 1, "no checksum"), (["d/none"], 1, "has no 'none'"), (["-o", "x", "-o", "y", "a.txt"], 2, "more --output"),
    (["--stdout", "-o", "x", "a.txt"], 2, "writes no files"), (["--incremental", "a.txt"], 2, "needs --hardlink"),
    (["--stage", "s", "a.txt"], 2, "reads no configuration"), (["--directory", "a.txt"], 1, "not the index of one"),
    (["--destination", "none", "a.txt"], 1, "no such folder"), (["-o", "x", "-o", "x", "a.txt", "d/one"], 1, "two different files")])
def test_mistakes_get_a_sentence(words, code, sentence, capfd):
    before = set(os.listdir())
    assert download(*words) == code
    err = capfd.readouterr().err
    assert sentence in err and err.count("\n") == 1 and set(os.listdir()) == before


@pytest.mark.parametrize("name", ["../out", "/tmp/seamless-out", "sub/../../out", "", ".", "a/./b"])
def test_an_index_that_leads_outside_is_refused(name, capfd, here):
    pathlib.Path("evil.INDEX").write_bytes(plain_dumps({"fine": sha(b"1\n"), name: sha(b"alpha\n")}))
    assert cmd_checksum.checksum_file(["evil.INDEX"]) == 0
    assert download("evil") == 1 and "outside" in capfd.readouterr().err
    assert not os.path.exists("evil") and not (here.parent / "out").exists() and not os.path.exists("/tmp/seamless-out")


def test_a_link_in_the_directory_does_not_lead_outside(here):
    (here.parent / "outside").mkdir()
    os.mkdir("d")
    os.symlink("../../outside", "d/sub")
    assert download("d") == 1 and not os.path.exists("d/one")
    assert download("--dest-rm", "d") == 0 and tree("d") == FILES and not os.listdir(here.parent / "outside")


# --- what is there already ----------------------------------------------------------------------------------

def test_what_is_here_is_kept_verified_or_replaced(capfd):
    pathlib.Path("a.txt").write_bytes(b"other content\n")
    assert download("a.txt") == download("--dest-skip", "a.txt") == 0
    assert pathlib.Path("a.txt").read_bytes() == b"other content\n" and "stays" in capfd.readouterr().err
    assert download("--dest-verify", "d", "a.txt") == 1
    assert pathlib.Path("a.txt").read_bytes() == b"other content\n" and not os.path.exists("d"), "written before all was verified"
    assert download("--dest-repair", "d", "a.txt") == 0 and pathlib.Path("a.txt").read_bytes() == b"alpha\n"
    assert download("--dest-verify", "d", "a.txt") == 0


def test_files_that_the_index_lacks_stop_it_or_are_removed(capfd):
    assert download("d") == 0
    os.makedirs("d/more/and")
    pathlib.Path("d/more/and/x").write_bytes(b"x")
    pathlib.Path("d/one").unlink()
    assert download("d") == 1 and "'more/and/x'; --dest-rm" in capfd.readouterr().err and not os.path.exists("d/one")
    assert download("--dest-rm", "d") == 0 and tree("d") == FILES and not os.path.exists("d/more")


def test_a_sidecar_never_names_other_content_than_the_file_has():
    pathlib.Path("x.CHECKSUM").write_text("0" * 64)
    pathlib.Path("x.INDEX").write_text("{}\n")
    assert download("-o", "x", "a.txt") == 0
    assert pathlib.Path("x.CHECKSUM").read_text().strip() == sha(b"alpha\n") and not os.path.exists("x.INDEX")


def test_sidecars_that_disagree_are_not_guessed_about(capfd):
    pathlib.Path("d.CHECKSUM").write_text(sha(b"alpha\n"))
    assert download("d") == 1 and "d.INDEX is not the index that d.CHECKSUM names" in capfd.readouterr().err


def test_a_file_does_not_become_a_directory_nor_the_reverse(capfd):
    pathlib.Path("d").write_bytes(b"")
    os.mkdir("a.txt")
    assert download("d") == 1 and download("a.txt") == 1 and "--output" in capfd.readouterr().err


def test_devices_are_written_to_and_not_replaced():
    assert download("-o", "/dev/null", "a.txt") == 0 and not os.path.isfile("/dev/null")


# --- links and compression ----------------------------------------------------------------------------------

def test_hard_links_share_the_stored_file_which_stays_protected():
    assert download("--hardlink", "a.txt", "d") == 0
    assert os.path.samefile("a.txt", stored(b"alpha\n")) and os.path.samefile("d/sub/two", stored(b"2\n"))
    assert os.stat("a.txt").st_mode & 0o777 == 0o444
    assert download("--hardlink", "--incremental", "--dest-verify", "a.txt", "d") == 0
    pathlib.Path("b").write_bytes(b"beta\n")
    assert download("--hardlink", "--dest-repair", "-o", "b", "a.txt") == 0 and os.path.samefile("b", stored(b"alpha\n"))
    assert not [path for path in os.listdir() if path.startswith(".")]


@pytest.mark.parametrize("option", ["--symlink", "--softlink"])
def test_symbolic_links_lead_into_the_store(option):
    assert download(option, "a.txt") == 0
    assert os.readlink("a.txt") == str(stored(b"alpha\n").resolve())


def test_a_damaged_buffer_is_neither_linked_nor_copied(capfd):
    stored(b"alpha\n").chmod(0o644)
    stored(b"alpha\n").write_bytes(b"ALPHA\n")
    for way in ("--hardlink", "--symlink", "--copy"):
        assert download(way, "a.txt") == 1 and not os.path.lexists("a.txt") and "damaged" in capfd.readouterr().err


def test_compression_is_real_and_gives_the_same_bytes_again():
    for suffix, unpack in (("gz", ["gzip", "-dc"]), ("zst", ["zstd", "-dc"])):
        assert download("--compression", suffix, "-o", "e", "d") == 0
        for name, data in FILES.items():
            assert subprocess.run(unpack, stdin=open("e/%s.%s" % (name, suffix), "rb"), stdout=subprocess.PIPE, check=True).stdout == data
        assert download("--compression", suffix, "--dest-verify", "-o", "e", "d") == 0
        assert download("--compression", suffix, "--dest-rm", "-o", "f", "d") == 0 and tree("e") == tree("f")
        assert cmd_checksum.checksum_index(["e"]) == 0 and pathlib.Path("e.INDEX").read_bytes() == INDEX
        for name in FILES:
            os.unlink("e/%s.%s" % (name, suffix))


def test_a_compressed_buffer_is_linked_in_its_own_form_only():
    pathlib.Path("z.gz").write_bytes(gzip.compress(b"zipped\n"))
    assert cmd_upload.main(["--destination", "../buffers", "--move", "z.gz"]) == 0
    assert download("--hardlink", "--compression", "gz", "z") == 0 and os.path.samefile("z.gz", stored(b"zipped\n", ".gz"))
    assert download("--hardlink", "z") == 0 and pathlib.Path("z").read_bytes() == b"zipped\n"
    os.unlink("z.gz")
    stored(b"zipped\n", ".gz").chmod(0o644)
    stored(b"zipped\n", ".gz").write_bytes(gzip.compress(b"ZIPPED\n"))
    assert download("--hardlink", "--compression", "gz", "z") == 1 and not os.path.lexists("z.gz"), "linked without being read"


# --- sources ------------------------------------------------------------------------------------------------

def test_what_is_there_is_written_and_what_is_missing_is_named(capfd):
    stored(b"2\n").unlink()
    assert download("d", "a.txt") == 1
    err = capfd.readouterr().err
    assert "d/sub/two" in err and sha(b"2\n") in err and "not in the store" in err
    assert tree("d") == {name: data for name, data in FILES.items() if data != b"2\n"} and os.path.exists("a.txt")


def test_several_folders_and_servers_are_asked_in_turn(here, server, monkeypatch):
    Folder("../more").put(b"2\n")
    stored(b"2\n").unlink()
    assert download("--destination", "../more", "d") == 0 and tree("d") == FILES
    clients = [{"remote_directory": str(here.parent / "more")}, {"remote_url": "http://127.0.0.1:9"}, {"remote_url": server.address}]
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({"buffer": clients}))
    assert cmd_download.main(["-o", "e", "d"]) == 0 and tree("e") == FILES
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({"buffer": [clients[0], {"remote_directory": str(here.parent / "buffers")}]}))
    assert cmd_download.main(["--hardlink", "-o", "f", "d"]) == 0 and os.path.samefile("f/one", stored(b"1\n"))
    assert cmd_download.main(["--hardlink", "--incremental", "--dest-verify", "-o", "f", "d"]) == 0


def test_a_server_sends_small_and_large_files(server, capfd):
    large = os.urandom(3000000)
    Folder("../buffers").put(large)
    assert cmd_download.main([sha(large), "a.txt", "d"]) == 0
    assert pathlib.Path(sha(large)).read_bytes() == large and tree("d") == FILES
    assert cmd_download.main(["--hardlink", "-o", "b", "a.txt"]) == 2 and "folder on this machine" in capfd.readouterr().err


def test_much_is_asked_about(server, monkeypatch, capfd):
    monkeypatch.setenv("SEAMLESS_MAX_DOWNLOAD_FILES", "3")
    assert cmd_download.main(["-n", "d"]) == 1 and "refused" in capfd.readouterr().err and not os.path.exists("d")
    assert cmd_download.main(["-y", "d"]) == 0 and tree("d") == FILES
    assert cmd_download.main(["-n", "d"]) == 0, "what is here is not downloaded again"


def test_the_storage_of_the_configuration_is_used(here, monkeypatch):
    monkeypatch.setenv("SEAMLESS_CACHE", str(here.parent / "cache"))
    pathlib.Path("n").write_bytes(b"new\n")
    assert cmd_upload.main(["--project", "p", "--move", "n"]) == 0 and not os.path.exists("n")
    assert cmd_download.main(["n"]) == 1 and cmd_download.main(["--project", "p", "n"]) == 0
    assert pathlib.Path("n").read_bytes() == b"new\n" and (here.parent / "cache" / "p").is_dir()


def test_a_killed_download_leaves_only_whole_files_and_can_be_repeated(here):
    datas = {"f%d" % n: b"%d\n" % n * 3000 for n in range(1000)}
    folder = Folder("../buffers")
    folder.put_many(datas.values())
    pathlib.Path("k.INDEX").write_bytes(plain_dumps({name: Checksum.of(data) for name, data in datas.items()}))
    command = [sys.executable, PROGRAM, "--destination", "../buffers", "-y", "k"]
    process = subprocess.Popen(command)
    end = time.monotonic() + 20
    while time.monotonic() < end and not (os.path.isdir("k") and len(os.listdir("k")) > 20):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    found = {name: data for name, data in tree("k").items() if not name.startswith(".")}
    assert found and all(datas[name] == data for name, data in found.items()) and not os.path.exists("k.CHECKSUM")
    leftover = pathlib.Path("k/.f1-0123abcd")
    leftover.write_bytes(b"half")
    pathlib.Path("k/.f2-0123abcd").write_bytes(b"half")
    os.utime(leftover, (time.time() - 7200,) * 2)
    assert subprocess.run(command, timeout=30).returncode == 0
    assert datas.items() <= tree("k").items() and not leftover.exists()


@pytest.mark.interop
@pytest.mark.skipif(not REAL, reason="SEAMLESS_REAL_VENV names no environment with the real package")
def test_what_the_real_one_uploads_ours_downloads_and_the_reverse(here):
    source = here.parent / "source"
    (source / "t" / "sub").mkdir(parents=True)
    for name, data in (("t/x", b"x\n"), ("t/sub/y", b"y\n"), ("t/.h", b"h"), ("plain", b"plain")):
        (source / name).write_bytes(data)
    (source / "z.gz").write_bytes(gzip.compress(b"zipped\n"))
    with open(source / "s.zst", "wb") as file:
        subprocess.run(["zstd", "-qc", "--stream-size=1"], input=b"s", stdout=file, check=True)
    real, ours = (lambda name: [os.path.join(REAL, "bin", "seamless-" + name)],
                  lambda name: [sys.executable, os.path.join(os.path.dirname(PROGRAM), "seamless-" + name)])
    for way in ("--copy", "--hardlink"):
        for number, (up, down) in enumerate(((real, ours), (ours, real))):
            buffers, target = here.parent / ("b%d%s" % (number, way)), here.parent / ("t%d%s" % (number, way))
            buffers.mkdir()
            target.mkdir()

            def run(command, cwd, *words):
                subprocess.run([*command, "--destination", str(buffers), *words], cwd=cwd, check=True, timeout=60)
            run(up("upload"), source, way, "t", "plain", "z.gz", "s.zst")
            for path in [*source.glob("*.CHECKSUM"), *source.glob("*.INDEX")]:
                path.rename(target / path.name)
            run(down("download"), target, "t", "plain", "z", "s")
            expected = {"x": b"x\n", "sub/y": b"y\n", ".h": b"h"}
            assert tree(target / "t") == expected and [(target / name).read_bytes() for name in ("plain", "z", "s")] == [b"plain", b"zipped\n", b"s"]


@pytest.mark.parametrize("index, sentence", [({"a": sha(b"1\n"), "a/b": sha(b"1\n")}, "names 'a' as a file and as a directory"),
                                             ({"\ud800": sha(b"1\n")}, "is not UTF-8"), ({"a\0b": sha(b"1\n")}, r"'a\x00b'")])
def test_an_index_that_cannot_be_a_directory_is_refused_before_anything_is_written(index, sentence, capfd):
    pathlib.Path("h.INDEX").write_text(json.dumps(index))
    assert download("h") == 1 and not os.path.lexists("h")
    assert sentence in capfd.readouterr().err


def test_a_link_that_dangles_is_replaced(here):
    (here / "a.txt").symlink_to("nowhere")
    assert download("a.txt") == 0 and (here / "a.txt").read_bytes() == b"alpha\n" and not os.path.lexists("nowhere")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_what_cannot_be_written_is_named_as_the_user_calls_it(here, capfd):
    assert download("-o", "/dev/full", "a.txt") == 1 and "'/dev/full' cannot be written: No space" in capfd.readouterr().err
    (here / "file").write_bytes(b"")
    assert download("-o", "file/x", "a.txt") == 1 and "'file/x' cannot be written" in capfd.readouterr().err


def test_a_source_that_is_dead_does_not_matter_even_if_it_is_the_one_to_write_to(server, monkeypatch, capfd):
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({"buffer": [
        {"remote_url": "http://127.0.0.1:9", "readonly": False}, {"remote_url": server.address}]}))
    assert cmd_download.main(["a.txt"]) == 0


def test_another_download_of_the_same_directory_may_finish_a_file_meanwhile(monkeypatch):
    download("d")
    pathlib.Path("d/.one-0123abcd").write_bytes(b"")
    lstat = os.lstat

    def gone(path, **options):
        if str(path).endswith("-0123abcd"):
            os.unlink(path)
        return lstat(path, **options)
    monkeypatch.setattr(cmd_download.os, "lstat", gone)
    assert download("d") == 0 and sorted(os.listdir("d")) == [".hidden", "one", "sub"]


def test_where_nothing_may_be_written_and_all_is_right_nothing_is_wrong(monkeypatch, capsys):
    assert download("d", "a.txt") == 0

    def refused(*args, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(cmd_download.placing, "write_aside", refused)
    assert download("d", "a.txt") == 0 and capsys.readouterr().err == ""
    pathlib.Path("d.INDEX").unlink()
    assert download("--directory", "d") == 1 and "cannot be written: Permission denied" in capsys.readouterr().err
