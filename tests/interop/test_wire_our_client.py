"""Our client on servers of Seamless 1.x, which ``SEAMLESS_REMOTE_CLIENTS`` names."""
import json
import os
import signal
import time

import pytest
from wire import Ledger, Servers, clients, wait_for

from seamless_lite.checksum import Checksum
from seamless_lite.database import DatabaseClient
from seamless_lite.errors import CorruptBufferError, SeamlessError, ServiceError
from seamless_lite.hashserver import HashserverClient

pytestmark = pytest.mark.interop
SCRIPT = '''
import json
import sys
import seamless_lite
import seamless_lite.config
seamless_lite.config.init()

@seamless_lite.direct
def join(a, b):
    with open("LEDGER", "a") as ledger:
        ledger.write("x")
    if b == 13:
        print("joining")
        raise ValueError("thirteen brings bad luck")
    return {"a": a, "b": [b]}

for argument in sys.argv[1:]:
    try:
        print(json.dumps(join("ä" * 100_000, int(argument))["b"]))
    except seamless_lite.JobError as error:
        print(json.dumps(str(error)))
'''


MANY = '''
tasks = [join("many", n) for n in range(100, 140)]
print(json.dumps([done.value["b"][0] for done in seamless_lite.parallel(tasks)]))
'''


SLOW = '''
import json, sys
import seamless_lite
import seamless_lite.config
seamless_lite.config.init()

@seamless_lite.delayed
def slow(seconds):
    import time
    with open("LEDGER", "a") as ledger:
        ledger.write("x")
    time.sleep(seconds)
    return seconds

task = slow(4)
print(task.construct(), flush=True)
try:
    print(task.run())
except seamless_lite.SeamlessError as error:
    print(type(error).__name__, flush=True)
'''


@pytest.fixture(scope="module")
def servers(real, tmp_path_factory):
    with Servers(real, tmp_path_factory.mktemp("wire") / "servers") as servers:
        yield servers


@pytest.fixture(scope="module")
def stores(servers):
    """Their hashserver and database."""
    return servers.stores("theirs")[:2]


@pytest.fixture(scope="module")
def jobserver(servers, stores):
    """Their jobserver, which uses their stores."""
    return servers.start("theirs", "jobserver", "--workers", "2", parameters=json.loads(clients(*stores)))


@pytest.fixture
def run(servers, stores, tmp_path):
    """Run one of our programs, or the script, with their stores (and jobserver)."""
    ledger = Ledger(tmp_path / "ledger")
    (tmp_path / "script.py").write_text(SCRIPT.replace("LEDGER", str(ledger)))
    (tmp_path / "many.py").write_text((SCRIPT.split("for argument")[0].replace("direct", "delayed") + MANY).replace("LEDGER", str(ledger)))

    def run(*command, who="ours", on=(), wait=True):
        return (servers.run if wait else servers.begin)(who, command, tmp_path, SEAMLESS_REMOTE_CLIENTS=clients(*stores, *on))
    (tmp_path / "slow.py").write_text(SLOW.replace("LEDGER", str(ledger)))
    run.folder, run.ledger = tmp_path, ledger
    return run


# ---- the stores

def test_buffers_of_all_sizes_go_up_and_come_back(stores):
    client = HashserverClient(stores[0].url)
    datas = [b"", b"small", *(b"%d" % n for n in range(50)), os.urandom(3 << 20)]
    checksums = client.put_many(datas)
    assert checksums == list(map(Checksum.of, datas))
    assert [client.get(checksum) for checksum in checksums] == datas
    assert client.lengths(checksums) == list(map(len, datas)) and client.has(checksums + ["0" * 64]) == [True] * len(datas) + [False]
    assert client.put_many(datas) == checksums
    assert client.get("0" * 64) is None and client.length("0" * 64) is None
    assert set(client.get_small(checksums, 10, 1 << 20)) == set(checksums)
    with client.open(checksums[-1]) as file:
        assert file.read() == datas[-1]


def test_what_does_not_hash_to_its_name_is_refused(stores):
    client = HashserverClient(stores[0].url)
    with pytest.raises(CorruptBufferError):
        client._upload(Checksum("1" * 64), body=b"not that")
    assert not client.has(["1" * 64])[0]


def test_a_promised_buffer_is_not_there_yet(stores):
    name = Checksum.of(b"promised to them")
    assert stores[0].ask("PUT", "/promise/" + name)[0] == 202
    client = HashserverClient(stores[0].url)
    assert client.has([name]) == [False] and client.length(name) is None
    client.put(b"promised to them")
    assert client.has([name]) == [True] and client.get(name) == b"promised to them"


def test_results_are_put_and_got_and_are_not_put_twice(stores):
    client = DatabaseClient(stores[1].url)
    rows = [("%064x" % n, "%064x" % (n + 100), None) for n in range(1, 20)]
    client.put_many(rows)
    client.put_many(rows)
    assert client.get_many([row[0] for row in rows] + ["f" * 64]) == {row[0]: row[1] for row in rows}
    assert client.reverse(rows[0][1]) == [rows[0][0]]
    with pytest.raises(SeamlessError, match="cannot forget"):
        client.forget(rows[0][0])


def test_a_readonly_hashserver_of_theirs_is_named_so(servers, stores):
    """Their database does not start without --writable: it fails with a TypeError."""
    hashserver = HashserverClient(servers.start("theirs", "hashserver", servers.folder / "store-theirs").url)
    for write in (lambda: hashserver.put(b"new"), lambda: hashserver.put_many([b"newer", b"newest"])):
        with pytest.raises(SeamlessError, match="for reading only: start it with --writable"):
            write()


def test_a_command_runs_here_with_their_stores_and_is_a_hit_for_both(run):
    (run.folder / "in.txt").write_text("content\n")
    command = "seamless-run", "-i", "in.txt", "-c", "printf x >> %s; cat in.txt" % run.ledger
    for who in ("ours", "ours", "theirs"):
        done = run(*command, who=who)
        assert (done.returncode, done.stdout) == (0, "content\n"), done
    assert run.ledger.ran() == 1


def test_a_function_runs_here_with_their_stores_and_is_a_hit(run):
    for _ in range(2):
        done = run("script.py", "1")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[1]"), done
    assert run.ledger.ran() == 1


# ---- the jobserver

def test_functions_run_on_their_jobserver_and_are_recorded(run, stores, jobserver):
    for _ in range(2):
        done = run("script.py", "2", "3", on=[jobserver])
        assert (done.returncode, done.stdout) == (0, "[2]\n[3]\n"), done
    assert run.ledger.ran() == 2
    results = [json.loads(body) for status, body, _ in [stores[1].ask("GET", "/", {
        "type": "rev_transformations", "checksum": Checksum.of(_value(2))})]]
    record = json.loads(stores[1].ask("GET", "/", {"type": "metadata", "checksum": results[0][0]})[1])
    assert record["execution_mode"] == "remote" and record["remote_target"] == "jobserver"
    assert record["wall_time_seconds"] > 0 and record["memory_peak_bytes"] > 0


def _value(number):
    from seamless_lite.celltypes import serialize
    return serialize({"a": "ä" * 100_000, "b": [number]}, "mixed")


def test_a_command_with_files_and_variables_runs_on_their_jobserver(run, jobserver):
    (run.folder / "in.txt").write_text("content of a file\n")
    command = ("seamless-run", "-i", "in.txt", "--metavar", "CPUS=3", "-c",
               "printf x >> %s; mkdir out; cat in.txt > out/a; echo $CPUS > out/b; cat in.txt" % run.ledger)
    for who in ("ours", "ours", "theirs"):
        done = run(*command, who=who, on=[jobserver])
        assert (done.returncode, done.stdout) == (0, "content of a file\n"), done
    assert run.ledger.ran() == 1


def test_a_function_that_fails_there_is_run_once_and_its_traceback_is_shown_once(run, jobserver):
    done = run("script.py", "13", on=[jobserver])
    message = json.loads(done.stdout.splitlines()[-1])
    assert message.startswith("ValueError: thirteen") and message.count("Traceback") == 1 and "joining" in message, done
    assert run.ledger.ran() == 1


def test_a_command_that_fails_there_is_run_once_and_its_stderr_is_shown_once(run, jobserver):
    done = run("seamless-run", "-c", "printf x >> %s; echo trouble >&2; exit 3" % run.ledger, on=[jobserver])
    assert done.returncode == 1 and done.stderr.count("\ntrouble\n") == 1, done
    assert "the command failed on the jobserver " + jobserver.url in done.stderr
    assert run.ledger.ran() == 1


def test_many_jobs_are_under_way_at_once(run, jobserver):
    done = run("many.py", on=[jobserver])
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == list(range(100, 140)), done
    assert run.ledger.ran() == 40


def test_ctrl_c_lets_go_of_a_job_there_and_nothing_is_recorded(run, jobserver):
    process = run("seamless-run", "-c", "printf x >> %s; sleep 4; echo late" % run.ledger, on=[jobserver], wait=False)
    run.ledger.await_one()
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not out and b"Traceback" not in err, err
    assert time.monotonic() - begun < 30
    time.sleep(4)                           # it is not killed over there, and ends
    done = run("seamless-run", "-c", "printf x >> %s; sleep 4; echo late" % run.ledger, on=[jobserver])
    assert (done.returncode, done.stdout) == (0, "late\n"), done
    assert run.ledger.ran() == 2


@pytest.mark.parametrize("who", ("ours", "theirs"))
def test_seamless_cancel_cancels_what_another_process_waits_for(run, stores, jobserver, who):
    """Theirs takes its jobserver only from a cluster definition, so that it is asked as it asks."""
    process = run("slow.py", on=[jobserver], wait=False)
    name = process.stdout.readline().decode().strip()
    run.ledger.await_one()
    if who == "ours":
        done = run("seamless-cancel", name, on=[jobserver])
        assert done.returncode == 0 and "canceled" in done.stdout, done
    else:
        assert json.loads(jobserver.ask("POST", "/cancel-transformation/" + name)[1])["canceled"] is True
    out, err = process.communicate(timeout=30)              # it is told when the job ends over there
    assert out.decode().split() == ["JobCancelledError"], (out, err)
    assert stores[1].ask("GET", "/", {"type": "transformation", "checksum": name})[0] == 404


def test_a_jobserver_that_dies_is_an_error_and_the_job_is_not_sent_again(run, servers, stores):
    mine = servers.start("theirs", "jobserver", parameters=json.loads(clients(*stores)))
    process = run("seamless-run", "-c", "printf x >> %s; sleep 30" % run.ledger, on=[mine], wait=False)
    run.ledger.await_one()
    os.killpg(mine.process.pid, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and mine.url.encode() in err and b"Traceback" not in err, err
    assert run.ledger.ran() == 1


def test_what_is_no_jobserver_is_named_in_one_sentence(run, stores):
    done = run("seamless-run", "-c", "echo nothing runs", on=[stores[1]])
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done
    assert stores[1].url in done.stderr


def test_their_servers_are_used_again_after_their_idle_exit(servers, real, tmp_path):
    """They stop when nobody asks, and our client then says which server it is that does not answer."""
    store = tmp_path / "store"
    store.mkdir()
    hashserver = servers.start("theirs", "hashserver", store, "--writable", timeout=2)
    client = HashserverClient(hashserver.url)
    checksum = client.put(b"kept")
    wait_for(lambda: hashserver.process.poll() is not None, "the idle exit", 30)
    with pytest.raises(ServiceError, match=hashserver.url):
        client.get(checksum)
    again = servers.start("theirs", "hashserver", store, "--writable")
    assert HashserverClient(again.url).get(checksum) == b"kept"


def test_one_of_our_own_jobservers_may_be_named_too(run, servers, stores):
    mine = servers.start("ours", "jobserver", "--workers", "1", parameters=json.loads(clients(*stores)))
    for _ in range(2):
        done = run("script.py", "77", on=[mine])
        assert (done.returncode, done.stdout) == (0, "[77]\n"), done
    assert run.ledger.ran() == 1
