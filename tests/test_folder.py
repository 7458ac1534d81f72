"""Buffers in memory and in a folder; the tests that every store must pass are in ``test_stores.py``."""
import contextlib
import errno
import gzip
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from seamless_lite import compressed, durable
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CacheMissError, CorruptBufferError, SeamlessError
from seamless_lite.folder import LEARN_S, Folder

DATA = b"some content\n"
CS = Checksum.of(DATA)
needs_zstd = pytest.mark.skipif(shutil.which("zstd") is None, reason="no program zstd")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def folder(directory):
    return Folder(directory)


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def damage(path):
    os.chmod(path, 0o644)
    data = path.read_bytes()
    path.write_bytes(b"X" + data[1:])


def test_the_layout_is_that_of_seamless(folder, directory):
    folder.put(DATA)
    assert files(directory) == [".HASHSERVER_PREFIX", CS[:2] + "/" + CS]
    assert (directory / ".HASHSERVER_PREFIX").read_bytes() == b"1\n"
    assert stat.S_IMODE((directory / CS[:2] / CS).stat().st_mode) == 0o444
    assert stat.S_IMODE((directory / CS[:2]).stat().st_mode) == 0o3775
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_store_made_in_a_shared_folder_is_shared(tmp_path):
    shared = tmp_path / "lab"
    shared.mkdir()
    shared.chmod(0o2770)
    Folder(shared / "project" / "STAGE-a").put(DATA)
    assert stat.S_IMODE((shared / "project").stat().st_mode) == 0o3775
    assert stat.S_IMODE((shared / "project" / "STAGE-a").stat().st_mode) == 0o3775


def test_looking_makes_no_folder(folder, directory):
    assert folder.get(CS) is None and folder.has([CS]) == [False]
    assert folder.path(CS) is None and folder.open(CS) is None and folder.length(CS) is None
    assert not directory.exists()


def test_a_flat_folder_stays_flat(directory):
    directory.mkdir()
    (directory / CS).write_bytes(DATA)
    folder = Folder(directory)
    other = folder.put(b"other")
    assert files(directory) == sorted([str(CS), str(other)])
    assert folder.get(CS) == DATA
    with pytest.raises(SeamlessError, match="layout flat: it cannot be used with the layout prefix"):
        Folder(directory, layout="prefix").put(b"more")


def test_a_flat_folder_can_be_asked_for(directory):
    Folder(directory, layout="flat").put(DATA)
    assert files(directory) == [str(CS)]


def test_readers_look_in_both_places(folder, directory):
    folder.put(b"other")
    (directory / CS).write_bytes(DATA)
    assert folder.get(CS) == DATA and folder.has([CS]) == [True] and folder.length(CS) == len(DATA)


def test_extra_folders_are_read_and_never_written(directory, tmp_path):
    Folder(tmp_path / "extra").put(DATA)
    before = files(tmp_path / "extra")
    folder = Folder(directory, extra_dirs=[str(tmp_path / "extra")])
    assert folder.get(CS) == DATA and folder.has([CS]) == [True] and folder.length(CS) == len(DATA)
    folder.put(b"other")
    assert files(tmp_path / "extra") == before


def spoil(path, problem):
    """Damage the file, or put something in its place that cannot be read, not even by root."""
    if problem == "is damaged":
        damage(path)
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("problem", ["is damaged", "Is a directory"])
@pytest.mark.parametrize("use", [Folder.get, Folder.open, Folder.path])
def test_what_is_of_no_use_in_an_extra_folder_is_ignored_by_every_process_and_stored_again(directory, tmp_path, use, problem, caplog):
    extra = tmp_path / "extra"
    Folder(extra).put(DATA)
    spoil(extra / CS[:2] / CS, problem)
    reader, other = [Folder(directory, extra_dirs=[extra]) for _ in range(2)]
    assert reader.has([CS]) == other.has([CS]) == [True], "nobody has read it"
    assert use(reader, CS) is None
    time.sleep(2 * LEARN_S)
    assert use(other, CS) is None and reader.get(CS) is None
    assert caplog.text.count("is ignored") == 1 and problem in caplog.text
    for folder in (reader, other, Folder(directory, extra_dirs=[extra])):
        assert folder.has([CS]) == [False] and folder.length(CS) is None
    assert files(extra) in ([".HASHSERVER_PREFIX"], [".HASHSERVER_PREFIX", CS[:2] + "/" + CS])
    other.put(DATA)
    assert use(reader, CS) is not None and reader.has([CS]) == [True]


def test_a_file_of_an_extra_folder_that_was_repaired_is_seen_again(directory, tmp_path):
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / CS).mkdir()
    folders = [Folder(directory, extra_dirs=[tmp_path / "extra"]), Folder(directory, writable=False, extra_dirs=[tmp_path / "extra"])]
    assert [folder.get(CS) for folder in folders] == [None, None] and [folder.has([CS]) for folder in folders] == [[False], [False]]
    (tmp_path / "extra" / CS).rmdir()
    (tmp_path / "extra" / CS).write_bytes(DATA)
    assert [folder.has([CS]) for folder in folders] == [[True], [True]] and [folder.get(CS) for folder in folders] == [DATA, DATA]


def test_a_folder_that_is_only_read_remembers_what_is_damaged(directory):
    Folder(directory).put(DATA)
    damage(directory / CS[:2] / CS)
    before, folder = files(directory), Folder(directory, writable=False)
    assert folder.has([CS]) == [True] and folder.get(CS) is None and folder.has([CS]) == [False] and files(directory) == before


def compress(path, suffix):
    if suffix == ".gz":
        path.write_bytes(gzip.compress(DATA))
    else:
        path.write_bytes(subprocess.run(["zstd", "-q", "-c"], input=DATA, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("suffix", [".gz", pytest.param(".zst", marks=needs_zstd)])
def test_a_compressed_buffer_is_read_as_its_content(folder, directory, suffix):
    directory.mkdir()
    stored = directory / (CS + suffix)
    compress(stored, suffix)
    assert folder.has([CS]) == [True] and folder.get(CS) == DATA and folder.length(CS) == len(DATA)
    with folder.open(CS) as file:
        assert file.read() == DATA
    assert folder.path(CS) is None
    (directory / (CS + ".BUFFERLENGTH")).write_text("4711")
    assert folder.length(CS) == 4711
    folder.put(DATA)
    assert not (directory / CS).exists(), "it is there already"
    stored.write_bytes(stored.read_bytes()[:-4])
    assert folder.get(CS) is None and not stored.exists()


def test_zstd_without_a_program_gets_a_sentence(folder, directory, monkeypatch):
    directory.mkdir()
    (directory / (CS + ".zst")).write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr(compressed, "ZSTD_MODULES", ())
    with pytest.raises(CacheMissError, match="install the program zstd"):
        folder.get(CS)


@pytest.mark.parametrize("suffix", [".gz", pytest.param(".zst", marks=needs_zstd)])
def test_a_compressed_upload_is_checked_and_its_length_noted(folder, directory, tmp_path, suffix):
    source = tmp_path / ("source" + suffix)
    compress(source, suffix)
    with pytest.raises(CorruptBufferError):
        folder.put_stream(Checksum.of(b"else"), [source.read_bytes()], suffix)
    with pytest.raises(CorruptBufferError):
        folder.put_stream(CS, [source.read_bytes()[:-5]], suffix)
    with pytest.raises(CorruptBufferError):
        folder.put_stream(CS, [b"no such thing"], suffix)
    assert [name for name in files(directory) if CS in name] == []
    assert folder.put_stream(CS, [source.read_bytes()], suffix) is True
    assert folder.put_stream(CS, [DATA]) is False
    assert (directory / CS[:2] / (CS + ".BUFFERLENGTH")).read_bytes() == b"%d" % len(DATA)
    assert folder.get(CS) == DATA


def test_the_plain_form_replaces_the_note_of_the_length(folder, directory):
    folder.put(b"other")
    (directory / CS[:2]).mkdir(exist_ok=True)
    (directory / CS[:2] / (CS + ".BUFFERLENGTH")).write_text("13")
    folder.put(DATA)
    assert not (directory / CS[:2] / (CS + ".BUFFERLENGTH")).exists()


@pytest.mark.parametrize("use", [Folder.get, Folder.open, Folder.path])
def test_a_damaged_buffer_is_moved_aside_and_can_be_stored_again(directory, use, caplog):
    Folder(directory).put(DATA)
    stored = directory / CS[:2] / CS
    damage(stored)
    folder = Folder(directory)
    assert use(folder, CS) is None
    assert "was damaged" in caplog.text and str(stored) in caplog.text
    assert folder.has([CS]) == [False]
    folder.put(DATA)
    assert folder.get(CS) == DATA


def test_damage_in_a_read_only_folder_is_a_miss(directory, caplog):
    Folder(directory).put(DATA)
    damage(directory / CS[:2] / CS)
    assert Folder(directory, writable=False).get(CS) is None
    assert "is ignored" in caplog.text
    assert (directory / CS[:2] / CS).exists()


def test_a_truncated_buffer_is_replaced_by_the_next_put(folder, directory):
    folder.put(DATA)
    os.chmod(directory / CS[:2] / CS, 0o644)
    os.truncate(directory / CS[:2] / CS, 3)
    folder.put(DATA)
    assert folder.get(CS) == DATA


def test_a_damaged_copy_does_not_hide_a_good_one(folder, directory):
    folder.put(DATA)
    damage(directory / CS[:2] / CS)
    (directory / CS).write_bytes(DATA)
    assert folder.get(CS) == DATA


def test_damage_after_the_first_read_is_seen_by_path(folder, directory):
    folder.put(DATA)
    assert folder.path(CS) == str(directory / CS[:2] / CS)
    time.sleep(0.02)
    damage(directory / CS[:2] / CS)
    assert folder.path(CS) is None


@pytest.mark.parametrize("lock", [".LOCK", CS[:2] + "/.LOCK", CS[:2] + "/" + CS + ".LOCK"])
def test_a_reader_waits_for_a_lock(folder, directory, lock):
    folder.put(b"other")
    (directory / CS[:2]).mkdir(exist_ok=True)
    (directory / lock).write_bytes(b"")
    found = []
    reader = threading.Thread(target=lambda: found.append(folder.get(CS)))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()
    (directory / CS[:2] / CS).write_bytes(DATA)
    reader.join(10)
    assert found == [DATA]


def test_an_old_lock_is_ignored(folder, directory):
    folder.put(b"other")
    (directory / ".LOCK").write_bytes(b"")
    os.utime(directory / ".LOCK", (time.time() - 200, time.time() - 200))
    assert folder.get(CS) is None


def test_the_wait_for_a_lock_has_an_end(directory):
    folder = Folder(directory, lock_timeout_s=0.2)
    folder.put(b"other")
    (directory / ".LOCK").write_bytes(b"")
    future = time.time() + 1000            # a clock that differs, as on network file systems
    os.utime(directory / ".LOCK", (future, future))
    assert folder.get(CS) is None


def test_what_is_there_is_not_written_again(folder, directory):
    folder.put(DATA)
    before = (directory / CS[:2] / CS).stat().st_ino
    folder.put(DATA)
    folder.put_many([DATA, DATA])
    assert (directory / CS[:2] / CS).stat().st_ino == before


def test_a_failed_batch_leaves_nothing(folder, directory):
    def datas():
        yield b"one"
        yield b"two"
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError):
        folder.put_many(datas())
    assert files(directory) in ([], [".HASHSERVER_PREFIX"])


def test_a_cut_stream_leaves_nothing(folder, directory):
    def pieces():
        yield DATA[:5]
        raise ConnectionResetError(errno.ECONNRESET, "gone")
    with pytest.raises(ConnectionResetError):
        folder.put_stream(CS, pieces())
    with pytest.raises(CorruptBufferError, match="does not hash to " + CS):
        folder.put_stream(CS, [DATA[:5]])
    assert files(directory) in ([], [".HASHSERVER_PREFIX"])


def test_the_temporary_files_of_a_killed_writer_are_removed_after_a_day(folder, directory):
    code = ("import sys, os, signal; from seamless_lite.folder import Folder\n"
            "def pieces():\n yield b'x'; os.kill(os.getpid(), signal.SIGKILL)\n"
            "Folder(sys.argv[1]).put_stream('%s', pieces())" % CS)
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
    assert subprocess.run([sys.executable, "-c", code, str(directory)], env=env).returncode == -signal.SIGKILL
    (directory / CS[:2]).mkdir(exist_ok=True)
    (directory / CS[:2] / (CS + "-notes.txt")).write_text("not ours")
    left = [name for name in files(directory) if "-" in name and "notes" not in name]
    assert len(left) == 2           # the marker's and the buffer's
    assert folder.remove_stale() == 0
    yesterday = time.time() - 25 * 3600
    for name in files(directory):
        os.utime(directory / name, (yesterday, yesterday))
    assert folder.remove_stale() == 2
    assert files(directory) == [CS[:2] + "/" + CS + "-notes.txt"]


def test_a_moved_file_is_renamed_into_the_store(folder, directory, tmp_path):
    source = tmp_path / "result"
    source.write_bytes(DATA)
    inode = source.stat().st_ino
    assert folder.put_file(source, move=True) == CS
    assert not source.exists()
    stored = directory / CS[:2] / CS
    assert stored.stat().st_ino == inode and stat.S_IMODE(stored.stat().st_mode) == 0o444


@pytest.mark.parametrize("kind", ["hard link", "symbolic link"])
def test_a_file_that_others_could_still_write_is_copied(folder, directory, tmp_path, kind):
    original = tmp_path / "original"
    original.write_bytes(DATA)
    source = tmp_path / "link"
    (os.link if kind == "hard link" else os.symlink)(original, source)
    assert folder.put_file(source, move=True) == CS
    assert original.read_bytes() == DATA
    assert (directory / CS[:2] / CS).stat().st_ino != original.stat().st_ino


def test_a_wrong_file_is_not_moved(folder, tmp_path):
    source = tmp_path / "result"
    source.write_bytes(b"else")
    with pytest.raises(CorruptBufferError):
        folder.put_file(source, CS, move=True)
    assert source.read_bytes() == b"else" and folder.has([CS]) == [False]


def test_names_that_are_not_utf8_are_read(folder, tmp_path):
    source = os.fsencode(str(tmp_path)) + b"/caf\xe9 '\"$;\n"
    with open(source, "wb") as file:
        file.write(DATA)
    assert folder.put_file(os.fsdecode(source)) == CS


def test_a_folder_opened_for_reading_refuses_to_write(directory):
    with pytest.raises(SeamlessError, match="open for reading only"):
        Folder(directory, writable=False).put(DATA)


def test_a_folder_that_cannot_be_made_gets_a_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SeamlessError, match="the buffer folder .* cannot be written"):
        Folder(tmp_path / "file" / "store").put(DATA)


@contextlib.contextmanager
def limited_files(size):
    """No file can grow over ``size`` bytes: the nearest to a full disk that needs no root."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit, size", [(100_000, 1_000_000), (10, 100)])
def test_a_write_that_fails_half_way_is_a_sentence_and_leaves_nothing(folder, directory, limit, size):
    folder.put(DATA)
    before = files(directory)
    with limited_files(limit), pytest.raises(SeamlessError, match="the buffer folder .* cannot be written"):
        folder.put_many([b"small", bytes(size)])
    assert files(directory) == before


@pytest.mark.skipif(os.geteuid() == 0 or sys.platform != "linux", reason="needs a user who is not root")
def test_a_folder_without_permission_is_a_sentence(folder, directory):
    directory.mkdir(mode=0o500)
    with pytest.raises(SeamlessError, match="ask its owner for write permission"):
        folder.put(DATA)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_a_sentence_with_its_cure(folder, directory):
    folder.put(b"other")
    from seamless_lite.storing import Batch
    with pytest.raises(SeamlessError, match="No space left on device.*free some space"):
        with Batch(folder), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")


def test_threads_that_store_the_same_buffers_end_with_one_of_each(folder, directory):
    datas = [b"%d" % i for i in range(20)]
    barrier, errors = threading.Barrier(6), []

    def store():
        barrier.wait()
        try:
            folder.put_many(datas)
        except Exception as exc:
            errors.append(exc)
    threads = [threading.Thread(target=store) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(files(directory)) == 21
    assert all(folder.get(hashlib.sha256(data).hexdigest()) == data for data in datas)


def test_a_folder_that_was_removed_is_made_again(folder, directory):
    folder.put(DATA)
    shutil.rmtree(directory)
    folder.put(DATA)
    assert folder.get(CS) == DATA and (directory / ".HASHSERVER_PREFIX").exists()


def test_what_one_folder_cannot_give_another_may(tmp_path):
    name = Checksum.of(DATA)
    (tmp_path / "first" / name[:2] / name).mkdir(parents=True)              # reading it is an error, also for root
    Folder(tmp_path / "second").put(DATA)
    assert Folder(tmp_path / "first", extra_dirs=[tmp_path / "second"]).get(name) == DATA
    with pytest.raises(SeamlessError, match="cannot be read: Is a directory"):
        Folder(tmp_path / "first").get(name)


def test_a_length_does_not_wait_for_a_lock(folder, directory, monkeypatch):
    folder.put(b"other")
    (directory / ".LOCK").write_bytes(b"")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    assert folder.length(CS) is None and folder.lengths([CS]) == [None]


def test_it_is_asked_once_for_many_missing_buffers_whether_some_are_being_deleted(folder, directory, monkeypatch):
    asked = []
    monkeypatch.setattr(folder, "_is_collecting", lambda: asked.append(1))
    assert folder.has([Checksum.of(b"%d" % n) for n in range(10)]) == [False] * 10 and len(asked) == 1


def test_a_use_that_cannot_be_noted_is_not_tried_each_time(folder, directory, monkeypatch):
    folder.put(DATA)
    path = directory / CS[:2] / CS
    os.utime(path, (1e9, 1e9))
    tried = []

    def refuse(*arguments, **options):
        tried.append(1)
        raise PermissionError(errno.EPERM, "somebody else's")
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(durable, "last_use", lambda status: 1e9)
    assert folder.has([CS, CS]) == [True, True] == folder.has([CS, CS]) and len(tried) == 1
