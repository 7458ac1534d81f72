"""seamless-upload: what gets into a store, how, and when a sidecar says so."""
import gzip
import hashlib
import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from seamless_lite import cmd_upload, placing
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CorruptBufferError
from seamless_lite.folder import Folder
from seamless_lite.hashserver import HashService
from seamless_lite.httpbase import Listen, start
from test_architecture import PACKAGE

PROGRAM = os.path.join(os.path.dirname(str(PACKAGE)), "bin", "seamless-upload")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "buffers").mkdir()
    (tmp_path / "a.txt").write_bytes(b"alpha\n")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"zipped\n"))
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "one").write_bytes(b"1\n")
    (tmp_path / "d" / "sub" / "two").write_bytes(b"2\n")
    return tmp_path


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hashserver that ``SEAMLESS_REMOTE_CLIENTS`` names; its folder."""
    folder = Folder(tmp_path / "far")
    running = start(HashService(folder), Listen(host="127.0.0.1", port=0))
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({"buffer": [{"readonly": False, "remote_url": running.address}]}))
    yield folder
    running.stop()


def sha(data):
    return hashlib.sha256(data).hexdigest()


def upload(*words):
    return cmd_upload.main(["--destination", "buffers", *words])


def stored(data, suffix=""):
    name = sha(data)
    return pathlib.Path("buffers", name[:2], name + suffix)


def test_files_and_directories_are_stored_and_named(here):
    assert upload("a.txt", "d/", "z.txt.gz", "a.txt.CHECKSUM") == 0
    folder = Folder("buffers")
    index = (here / "d.INDEX").read_bytes()
    assert (here / "a.txt.CHECKSUM").read_text() == sha(b"alpha\n") + "\n"
    assert (here / "d.CHECKSUM").read_text() == sha(index) + "\n" and json.loads(index) == {"one": sha(b"1\n"), "sub/two": sha(b"2\n")}
    for data in (b"alpha\n", b"1\n", b"2\n", index, b"zipped\n"):
        assert folder.get(sha(data)) == data
    assert stored(b"zipped\n", ".gz").read_bytes() == (here / "z.txt.gz").read_bytes()      # as Seamless 1.x stores it
    assert stored(b"alpha\n").stat().st_mode & 0o777 == 0o444


def test_no_arguments_no_work():
    assert upload() == 0


@pytest.mark.parametrize("modified", [False, True])
def test_a_zstd_file_that_seamless_1x_could_not_read_is_stored_plain(here, modified):
    options = ["--stream-size=2"] if not modified else []
    with open("y.txt.zst", "wb") as file:
        subprocess.run(["zstd", "-qc", *options], input=b"y\n", stdout=file, check=True)
    assert upload("y.txt.zst") == 0
    assert stored(b"y\n").exists() == modified and stored(b"y\n", ".zst").exists() != modified


def test_hard_links_share_the_file_and_keep_its_permissions(here):
    assert upload("--hardlink", "a.txt", "d", "z.txt.gz") == 0
    for name, buffer in (("a.txt", stored(b"alpha\n")), ("d/sub/two", stored(b"2\n")), ("z.txt.gz", stored(b"zipped\n", ".gz"))):
        assert os.path.samefile(name, buffer)
        assert os.stat(name).st_mode & 0o200, "the user's file became read-only"
    assert Folder("buffers").get(sha(b"zipped\n")) == b"zipped\n" and stored(b"zipped\n", ".BUFFERLENGTH").read_text() == "7"


def test_who_writes_to_a_linked_file_loses_the_buffer_but_nobody_is_lied_to(here):
    assert upload("--hardlink", "a.txt") == 0
    with open("a.txt", "ab") as file:
        file.write(b"more\n")
    assert Folder("buffers").get(sha(b"alpha\n")) is None


def test_symbolic_links_lead_to_the_absolute_path(here):
    assert upload("--symlink", "a.txt") == 0
    assert os.readlink(stored(b"alpha\n")) == str((here / "a.txt").resolve())
    assert upload("--symlink", "--move", "a.txt") == 2


def test_incremental_does_not_read_what_is_linked_unless_it_was_written_to(here, capfd):
    old = time.time() - 10
    os.utime("d/one", (old, old))
    assert upload("--hardlink", "d") == 0
    with open("d/sub/two", "ab") as file:           # in place: the store's copy is damaged too
        file.write(b"2\n")
    os.utime("d/sub/two", (time.time() + 5, time.time() + 5))
    with open("d/one", "r+b") as file:              # behind its back: the time says nothing
        file.write(b"9\n")
    os.utime("d/one", (old, old))
    assert upload("--hardlink", "--incremental", "d") == 0
    index = json.loads((here / "d.INDEX").read_bytes())
    assert index["sub/two"] == sha(b"2\n2\n"), "it was written to after its sidecar, and yet not read"
    assert index["one"] == sha(b"1\n"), "it was read"
    assert upload("--incremental", "d") == 2


def test_what_is_stored_is_trusted_verified_or_repaired(here, capfd):
    assert upload("a.txt") == 0
    buffer = stored(b"alpha\n")
    buffer.chmod(0o644)
    buffer.write_bytes(b"ALPHA\n")
    assert upload("a.txt") == upload("--dest-skip", "a.txt") == 0 and buffer.read_bytes() == b"ALPHA\n"
    assert upload("--dest-verify", "a.txt") == 1
    assert "--dest-repair" in capfd.readouterr().err and buffer.read_bytes() == b"ALPHA\n"
    assert upload("--dest-repair", "a.txt") == 0 and buffer.read_bytes() == b"alpha\n"
    assert upload("--dest-verify", "a.txt") == 0


def test_originals_go_only_when_all_is_stored(here):
    (here / "d" / "link").symlink_to(here / "buffers")
    os.chmod("buffers", 0o500)
    if os.geteuid():
        assert upload("--move", "a.txt", "d") == 1 and (here / "a.txt").exists() and (here / "d" / "one").exists()
    os.chmod("buffers", 0o700)
    assert upload("--move", "nothing", "a.txt") == 1 and (here / "a.txt").exists()
    assert upload("-mv", "a.txt", "d") == 0
    assert not (here / "a.txt").exists() and os.listdir("d") == ["link"] and (here / "d.INDEX").exists()
    assert os.listdir("buffers")


def test_what_only_somebody_elses_store_has_is_stored_before_it_goes(here, server, monkeypatch):
    Folder("buffers").put(b"alpha\n")
    clients = json.loads(os.environ["SEAMLESS_REMOTE_CLIENTS"])
    clients["buffer"].append({"remote_directory": str(here / "buffers")})
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps(clients))
    assert cmd_upload.main(["--move", "a.txt"]) == 0 and server.get(sha(b"alpha\n")) == b"alpha\n"


def test_moved_hard_links_belong_to_the_store_alone(here):
    inode = os.stat("a.txt").st_ino
    assert upload("--move", "--hardlink", "a.txt") == 0
    assert not (here / "a.txt").exists() and stored(b"alpha\n").stat().st_ino == inode
    assert stored(b"alpha\n").stat().st_mode & 0o777 == 0o444


def test_plain_and_compressed_of_one_name_must_agree(here, capfd):
    (here / "z.txt").write_bytes(b"other\n")
    assert upload("z.txt", "z.txt.gz") == 1 and "z.txt.CHECKSUM" in capfd.readouterr().err
    assert not (here / "z.txt.CHECKSUM").exists()


@pytest.mark.parametrize("words, code, sentence", [
    (["nothing"], 1, "No such file"), (["pipe"], 1, "neither a file nor a directory"), (["."], 1, "is in the directory"),
    (["--project", "p", "a.txt"], 2, "reads no configuration"), (["--copy", "--hardlink", "a.txt"], 2, "not allowed with"),
    (["--destination", "missing", "a.txt"], 1, "no such folder")])
def test_mistakes_get_a_sentence(words, code, sentence, capfd):
    os.mkfifo("pipe")
    assert upload(*words) == code and sentence in capfd.readouterr().err


def test_a_store_that_keeps_nothing_or_cannot_link_is_refused(here, monkeypatch, capfd, server):
    assert cmd_upload.main(["--hardlink", "a.txt"]) == 2 and "folder on this machine" in capfd.readouterr().err
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({"buffer": [{"remote_directory": str(here / "buffers")}]}))
    assert cmd_upload.main(["a.txt"]) == 1 and "read-only" in capfd.readouterr().err
    assert not (here / "a.txt.CHECKSUM").exists()


def test_many_files_go_to_a_server_and_its_damage_is_repaired(here, server):
    for n in range(300):
        (here / "d" / ("f%d" % n)).write_bytes(b"%d" % n)
    (here / "big").write_bytes(os.urandom(3000000))
    assert cmd_upload.main(["-y", "d", "big", "z.txt.gz"]) == 0
    names = list(json.loads((here / "d.INDEX").read_bytes()).values()) + [Checksum.of_file("big"), sha(b"zipped\n"), sha((here / "d.INDEX").read_bytes())]
    assert all(server.has(names)) and server.get(sha(b"zipped\n")) == b"zipped\n"
    path = pathlib.Path(server.forms(names[0])[""])
    path.chmod(0o644)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert cmd_upload.main(["-y", "--dest-repair", "d"]) == 0 and Folder(server.directory).get(names[0]) is not None


def test_much_is_asked_about(here, server, monkeypatch, capfd):
    monkeypatch.setenv("SEAMLESS_MAX_UPLOAD_SIZE", "1 kB")
    (here / "big").write_bytes(bytes(1001))
    assert cmd_upload.main(["-n", "big"]) == 1 and "refused" in capfd.readouterr().err and not (here / "big.CHECKSUM").exists()
    assert cmd_upload.main(["-y", "big"]) == 0
    assert cmd_upload.main(["-n", "big"]) == 0, "what is stored is not uploaded again"
    monkeypatch.setenv("SEAMLESS_MAX_UPLOAD_SIZE", "1 x")
    assert cmd_upload.main(["a.txt"]) == 2


def test_a_file_that_changes_after_it_was_read_is_noticed(here):
    """Between reading and storing there is the question: it changes while that waits for an answer."""
    master, slave = pty.openpty()
    environment = dict(os.environ, SEAMLESS_MAX_UPLOAD_FILES="0")
    for way, change, is_stored in (("--copy", b"longer than before\n", False), ("--hardlink", b"ALPHA\n", False), ("--copy", b"ALPHA\n", True)):
        if is_stored:                               # then it is not read again for storing
            Folder("buffers").put(b"alpha\n")
            (here / "d" / "new").write_bytes(b"new\n")
        process = subprocess.Popen([sys.executable, PROGRAM, "--destination", "buffers", way, "--move", "d", "a.txt"], stdin=slave,
                                   stderr=subprocess.PIPE, env=environment)
        text = b""
        while b"(y/[n])?" not in text:
            assert select.select([process.stderr], [], [], 20)[0]
            text += os.read(process.stderr.fileno(), 1000)
        (here / "a.txt").write_bytes(change)
        os.write(master, b"y\n")
        text += process.communicate(timeout=20)[1]
        assert process.returncode == 1 and b"changed" in text, text
        assert (here / "a.txt").read_bytes() == change and not (here / "a.txt.CHECKSUM").exists()
        assert sha(change) not in str(list(pathlib.Path("buffers").rglob("*"))) and Folder("buffers").has([sha(b"alpha\n")]) == [is_stored]
        (here / "a.txt").write_bytes(b"alpha\n")
    os.close(master)
    os.close(slave)


def test_a_linked_file_is_verified_when_its_time_says_nothing(here):
    sources = placing.Sources()
    sources.add_top("a.txt", False)
    source = sources.read["a.txt"]._replace(signature=None)
    (here / "a.txt").write_bytes(b"ALPHA\n")
    with pytest.raises(CorruptBufferError, match="changed"):
        placing.link(Folder("buffers"), [source], False, False, lambda done: None)
    assert not [path for path in pathlib.Path("buffers").rglob("*") if sha(b"alpha\n") in path.name]


@pytest.mark.slow
def test_a_killed_upload_leaves_only_whole_buffers_and_can_be_repeated(here):
    for n in range(1500):
        (here / "d" / ("f%d" % n)).write_bytes(b"%d\n" % n * 50)
    command = [sys.executable, PROGRAM, "--destination", "buffers", "-y", "-q", "d"]
    process = subprocess.Popen(command)
    end = time.monotonic() + 20
    while time.monotonic() < end and not any(pathlib.Path("buffers").rglob("*/*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert not (here / "d.CHECKSUM").exists() and not (here / "d.INDEX").exists()
    for path in pathlib.Path("buffers").glob("??/*"):
        assert len(path.name) != 64 or Checksum.of_file(path) == path.name
    assert subprocess.run(command, timeout=30).returncode == 0
    assert all(Folder("buffers").has(json.loads((here / "d.INDEX").read_bytes()).values()))


def test_two_uploads_at_once_agree(here):
    for n in range(100):
        (here / "d" / ("f%d" % n)).write_bytes(b"%d\n" % n)
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(upload("-y", "-q", "d"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert codes == [0, 0, 0] and not [path for path in pathlib.Path(".").rglob("*-????????")]


@pytest.mark.parametrize("words", [(), ("--dest-skip",), ("--dest-verify",), ("--hardlink",)])
def test_what_the_store_only_points_to_is_stored_before_it_is_moved(here, words):
    assert upload("--symlink", "a.txt", "d", "z.txt.gz") == 0 and stored(b"alpha\n").is_symlink()
    assert upload("--move", *words, "a.txt", "d", "z.txt.gz") == 0
    assert not (here / "a.txt").exists() and not (here / "d").exists()
    assert [Folder("buffers").get(sha(data)) for data in (b"alpha\n", b"1\n", b"zipped\n")] == [b"alpha\n", b"1\n", b"zipped\n"]


def test_a_damaged_buffer_is_repaired_before_the_original_goes(here):
    assert upload("a.txt") == 0
    stored(b"alpha\n").chmod(0o644)
    stored(b"alpha\n").write_bytes(b"alphx\n")
    assert upload("--move", "a.txt") == 0
    assert not (here / "a.txt").exists() and Folder("buffers").get(sha(b"alpha\n")) == b"alpha\n"


def test_the_store_itself_is_not_uploaded(here, capfd):
    assert upload("a.txt") == 0
    assert upload("--move", str(stored(b"alpha\n"))) == upload("--move", str(stored(b"alpha\n").parent)) == 1
    assert stored(b"alpha\n").exists() and "is a part of the store" in capfd.readouterr().err
    (here / "link").symlink_to(stored(b"alpha\n").absolute())              # as seamless-download --symlink makes it
    assert upload("--move", "link") == 0 and stored(b"alpha\n").exists() and not (here / "link").is_symlink()


def test_links_that_lead_nowhere_are_left_out(here):
    for name, target in (("dangling", "nowhere"), ("loop", "loop"), ("through-a-file", "one/x")):
        (here / "d" / name).symlink_to(target)
    assert upload("d") == 0
    assert sorted(json.loads((here / "d.INDEX").read_bytes())) == ["one", "sub/two"]


def test_a_file_that_changes_while_it_is_stored_is_named(here, monkeypatch, capfd):
    push = cmd_upload.transfer.push

    def write_before(*arguments, **keywords):
        (here / "d" / "one").write_bytes(b"changed\n")
        return push(*arguments, **keywords)
    monkeypatch.setattr(cmd_upload.transfer, "push", write_before)
    assert upload("d") == 1
    assert "'d' changed during the upload" in capfd.readouterr().err and not (here / "d.CHECKSUM").exists()


def test_a_server_that_keeps_its_damage_is_not_said_to_be_repaired(here, server, monkeypatch, capfd):
    assert cmd_upload.main(["a.txt"]) == 0
    name = sha(b"alpha\n")
    path = pathlib.Path(server.directory, name[:2], name)
    path.chmod(0o644)
    path.write_bytes(b"alphx\n")
    monkeypatch.setattr(Folder, "_set_aside", lambda self, path, checksum: None)        # as the server of Seamless 1.x does
    assert cmd_upload.main(["--dest-repair", "a.txt"]) == 1
    assert "keeps its damaged buffer" in capfd.readouterr().err


def test_a_working_folder_that_is_gone_gets_a_sentence(here, monkeypatch, capfd):
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    try:
        assert cmd_upload.main(["a.txt"]) == cmd_upload.main(["--destination", ".", "a.txt"]) == 1
    finally:
        os.chdir(str(here))
    assert capfd.readouterr().err.count("does not exist any more") == 2


def test_of_a_link_only_the_link_is_moved(here, capfd):
    (here / "link").symlink_to("d")
    (here / "to-file").symlink_to("a.txt")
    assert upload("--move", "link", "to-file") == 0
    assert not os.path.lexists("link") and not os.path.lexists("to-file")
    assert (here / "d" / "one").exists() and (here / "a.txt").exists() and Folder("buffers").get(sha(b"1\n")) == b"1\n"


@pytest.mark.parametrize("option", ["--move", "--dest-verify", "--dest-repair"])
def test_a_stored_buffer_that_cannot_be_read_gets_a_sentence(here, capfd, option):
    stored(b"alpha\n").mkdir(parents=True)              # reading it is an error, also for root
    assert upload(option, "a.txt") == 1 and (here / "a.txt").exists()
    assert "the stored buffer %s cannot be read" % sha(b"alpha\n") in capfd.readouterr().err
