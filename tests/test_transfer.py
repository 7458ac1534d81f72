"""Many buffers over a long line: how many messages it takes, and what a cut in the middle leaves behind."""
import contextlib
import hashlib
import io
import os
import subprocess
import sys
import threading
import time

import pytest

from longline import LongLine
from seamless_lite import transfer
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CorruptBufferError, SeamlessError, ServiceError
from seamless_lite.folder import Folder, MemoryBuffers
from seamless_lite.hashserver import HashserverClient, HashService, unframe
from seamless_lite.httpbase import Listen, start
from seamless_lite.layers import LayeredBuffers

SECRET = b"s" * 32


def make(n, size):
    """n buffers by checksum."""
    datas = [b"%d" % i + os.urandom(size) for i in range(n)]
    return {Checksum.of(data): data for data in datas}


class Far:
    """A hashserver at the other end of a long line."""

    def __init__(self, folder, stack, service=HashService, delay_s=0.005):
        self.folder = Folder(folder / "far")
        self.running = stack.enter_context(start(service(self.folder), Listen(socket_path=str(folder / "h")), secret=SECRET))
        self.line = stack.enter_context(LongLine(folder, self.running.address, delay_s))
        self.client = HashserverClient(self.line.address, SECRET)
        stack.callback(self.client.close)

    def files(self):
        """What lies in the folder, by name."""
        return {name: os.path.join(path, name) for path, _, names in os.walk(self.folder.directory) for name in names
                if not name.startswith(".")}


@pytest.fixture
def far(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Far(tmp_path, stack)


def write(folder, buffers):
    folder.mkdir()
    for name, data in buffers.items():
        (folder / name).write_bytes(data)
    return {name: str(folder / name) for name in buffers}


# ---- how many messages

@pytest.mark.slow
def test_thousands_of_small_files_are_pushed_in_batches_of_megabytes_after_one_question(far, tmp_path):
    files = write(tmp_path / "files", make(3000, 4000))         # 12 MB
    assert transfer.push(far.client, {}, files) == 3000
    assert far.line.turns == 1 + 6 and far.line.connections <= 1 + transfer.LANES
    assert set(far.files()) == set(files)
    far.line.reset()
    assert transfer.push(far.client, {}, files) == 0
    assert far.line.turns == 1 and far.line.bytes["up"] < 3000 * 80


def test_large_files_go_side_by_side_each_in_one_message(far, tmp_path):
    buffers = make(4, 2_000_000)
    assert transfer.push(far.client, {}, write(tmp_path / "files", buffers)) == 4
    assert far.line.turns == 1 + 4 and 1 < far.line.connections <= 1 + transfer.LANES
    assert all(far.folder.get(name) == data for name, data in buffers.items())


def test_buffers_in_memory_are_pushed_with_the_files(far, tmp_path):
    small, large = make(10, 100), make(1, 1_500_000)
    assert transfer.push(far.client, {**small, **large}, write(tmp_path / "files", make(5, 10))) == 16
    assert far.line.turns == 3
    assert all(far.folder.has([*small, *large]))


def test_many_buffers_are_read_in_batches_and_large_ones_are_left_to_open(far):
    buffers = make(2000, 3000)
    far.folder.put_many(buffers.values())
    [large] = far.folder.put_many([bytes(3 << 20)])
    lost = Checksum.of(b"lost")
    found = dict(transfer.read_many(far.client, [*buffers, large, lost, large]))
    assert found == {**buffers, large: None, lost: None}
    assert far.line.turns == 1 + 3                              # how long they are; 6 MB
    assert dict(transfer.read_many(far.client, [])) == {}


def test_what_does_not_fit_into_one_answer_comes_with_the_next(far):
    buffers = make(12, 900_000)
    far.folder.put_many(buffers.values())
    assert dict(transfer.read_many(far.client, buffers)) == buffers
    assert far.line.turns == 1 + 6


def test_reading_stays_only_a_few_batches_ahead_of_its_use(far, monkeypatch):
    monkeypatch.setattr(transfer, "BATCH_BYTES", 10_000)
    buffers = make(100, 1000)
    far.folder.put_many(buffers.values())
    reading = transfer.read_many(far.client, buffers)
    next(reading)
    time.sleep(0.2)
    assert far.line.turns <= 1 + 1 + transfer.LANES
    assert len(dict(reading)) == 99
    stopped = transfer.read_many(far.client, buffers)
    next(stopped)
    stopped.close()
    wait = time.monotonic() + 10
    while any(thread.name == "seamless-transfer" for thread in threading.enumerate()):
        assert time.monotonic() < wait
        time.sleep(0.01)


@pytest.mark.parametrize("source_kind", ["memory", "folder", "far"])
@pytest.mark.parametrize("target_kind", ["memory", "folder", "far"])
def test_buffers_are_carried_from_any_store_to_any_other(source_kind, target_kind, tmp_path):
    buffers = {**make(20, 500), **make(1, 1_200_000)}
    with contextlib.ExitStack() as stack:
        stores = []
        for name, kind in (("a", source_kind), ("b", target_kind)):
            (tmp_path / name).mkdir()
            stores.append(MemoryBuffers() if kind == "memory" else Folder(tmp_path / name / "here") if kind == "folder"
                          else Far(tmp_path / name, stack, delay_s=0).client)
        source, target = stores
        source.put_many(buffers.values())
        assert set(transfer.carry([*buffers, Checksum.of(b"lost")], source, target)) == set(buffers)
        assert all(target.get(name) == data for name, data in buffers.items())


def test_a_store_of_several_layers_is_read_in_batches_too(far):
    near, buffers = MemoryBuffers(), make(10, 100)
    first, *rest = buffers
    near.put(buffers[first])
    far.folder.put_many(buffers[name] for name in rest)
    both = LayeredBuffers(near, [far.client])
    assert both.remote and dict(transfer.read_many(both, buffers)) == buffers
    assert both.lengths([first, rest[0], Checksum.of(b"lost")]) == [len(buffers[first]), len(buffers[rest[0]]), None]
    assert transfer.push(both, make(3, 10)) == 3


class Old(HashService):
    """A hashserver of Seamless 1.x: it knows nothing of batches."""

    def __init__(self, folder):
        super().__init__(folder)
        self.routes = [route for route in self.routes if route[0] != "POST"]


def test_a_hashserver_without_batches_is_used_one_by_one(tmp_path):
    buffers = make(5, 100)
    with contextlib.ExitStack() as stack:
        far = Far(tmp_path, stack, Old, delay_s=0)
        assert transfer.push(far.client, buffers) == 5
        assert dict(transfer.read_many(far.client, buffers)) == dict.fromkeys(buffers)
        assert transfer.carry(buffers, far.client, MemoryBuffers()) == list(buffers)


def test_pushing_takes_some_megabytes_of_memory_whatever_the_whole_amounts_to(tmp_path):
    code = """if 1:
        import hashlib, os, resource, sys
        from seamless_lite import transfer
        from seamless_lite.checksum import Checksum
        from seamless_lite.hashserver import HashserverClient
        files = {Checksum(name): os.path.join(sys.argv[1], name) for name in os.listdir(sys.argv[1])}
        client = HashserverClient(sys.argv[2], b"s" * 32)
        transfer.push(client, {}, dict([files.popitem()]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        transfer.push(client, {}, files)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    data = os.urandom(1 << 20)
    write(tmp_path / "files", {hashlib.sha256(b"%d" % i + data[5:]).hexdigest(): b"%d" % i + data[5:] for i in range(80)})
    with start(HashService(Folder(tmp_path / "far")), Listen(socket_path=str(tmp_path / "h")), secret=SECRET) as running:
        out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "files"), running.address], check=True, timeout=60,
                             stdout=subprocess.PIPE, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert int(out.stdout) < 48 << 10


# ---- what goes wrong

@pytest.mark.slow
@pytest.mark.parametrize("size, n", [(3000, 1000), (5_000_000, 1)])
def test_an_upload_that_is_cut_off_is_repeated_and_nothing_half_lies_under_a_name(far, tmp_path, size, n):
    buffers = make(n, size)
    far.line.cut_after("up", 2_000_000)
    seen = []
    broken = far.line._cut

    def cut(direction):
        seen.append({name for name, path in far.files().items() if len(name) == 64 and Checksum.of_file(path) != name})
        broken(direction)
    far.line._cut = cut
    assert transfer.push(far.client, {}, write(tmp_path / "files", buffers)) == n
    assert far.line.cuts == 1 and seen == [set()]
    assert {name: Checksum.of_file(path) for name, path in far.files().items()} == {name: name for name in buffers}


def test_a_download_that_is_cut_off_is_repeated(far):
    buffers = make(1000, 3000)
    far.folder.put_many(buffers.values())
    [large] = far.folder.put_many([os.urandom(3_000_000)])
    far.line.cut_after("down", 1_000_000)
    assert dict(transfer.read_many(far.client, buffers)) == buffers
    far.line.cut_after("down", 1_000_000)
    with far.client.open(large) as file:
        assert Checksum.of(file.read()) == large
    far.line.cut_after("down", 1_000_000)
    file = io.BytesIO()
    assert far.client.download(large, file) and Checksum.of(file.getvalue()) == large
    assert far.line.cuts == 3
    assert not far.client.download(Checksum.of(b"lost"), io.BytesIO())


@pytest.mark.parametrize("size", [10, 2_000_000])
def test_a_file_that_changed_is_refused(far, tmp_path, size):
    [(name, data)] = make(1, size).items()
    (tmp_path / "file").write_bytes(data[:-1] + b"?")
    with pytest.raises(CorruptBufferError, match="changed"):
        transfer.push(far.client, {}, {name: str(tmp_path / "file")})
    assert far.files() == {}


def test_the_first_error_ends_a_push(far, tmp_path):
    files = write(tmp_path / "files", make(30, 1_100_000))
    for name in list(files)[10:]:
        os.unlink(files[name])
    files = {name: path for name, path in files.items() if os.path.exists(path)}
    far.running.stop()
    with pytest.raises(ServiceError):
        transfer.push(far.client, {}, files)


class Liar(HashService):
    """Its folder has other bytes than it says."""

    def get_batch(self, request):
        return super().get_batch(request).replace(b"truth", b"a lie")


def test_what_comes_in_a_batch_is_verified(tmp_path):
    with start(Liar(Folder(tmp_path / "far")), Listen(socket_path=str(tmp_path / "h"))) as running:
        client = HashserverClient(running.address)
        name = client.put(b"the truth")
        with pytest.raises(CorruptBufferError, match="sent something else"):
            client.get_small([name], 100, 100)
        client.close()


def test_the_limits_of_a_batch_hold(far):
    names = far.folder.put_many([b"1234567890", b"123456", b"12", b""])
    lost = Checksum.of(b"lost")
    for store in (far.client, far.folder):
        assert store.get_small([*names, lost, names[2]], 6, 7) == {names[0]: None, names[1]: b"123456", names[2]: None, names[3]: b""}
        assert store.get_small(names, 0, 0) == {**dict.fromkeys(names), names[3]: b""}
    assert far.client.get_small([], 6, 7) == {}


@pytest.mark.parametrize("body", [[], {"checksums": [], "largest": 1}, {"checksums": [], "largest": 1, "total": -1},
                                  {"checksums": [], "largest": True, "total": 1}])
def test_a_wrong_request_for_a_batch_is_refused(far, body):
    with pytest.raises(SeamlessError, match="JSON object|numbers of bytes"):
        far.client.request("POST", "/get", json=body)


def test_a_batch_of_what_is_no_checksum_is_refused(far):
    for checksums in (["x"], None, {}):
        assert far.client.request("POST", "/get", json={"checksums": checksums, "largest": 1, "total": 1}).status == 400


def test_a_batch_to_be_stored_names_no_buffer_without_its_bytes(far):
    name = Checksum.of(b"x")
    with pytest.raises(SeamlessError, match="does not hash"):
        far.client.request("POST", "/put", body=b"%s -\n" % name.encode())
    assert list(unframe(b"%s -\n%s 1\nx" % (name.encode(), name.encode()))) == [(name, None), (name, b"x")]
