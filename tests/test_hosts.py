"""Patience with hosts: what is tried again, for how long, what is said, and how many do it."""
import os
import threading
import time

import pytest

from seamless_lite import hosts
from seamless_lite.errors import ConfigurationError, DeadlineError, ServiceError


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(hosts, "PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(hosts, "TELL_S", (0.03, 0.05))


class Attempts:
    """Raises the given errors one after the other, and then returns "there"."""

    def __init__(self, *errors):
        self.errors, self.count = list(errors), 0

    def __call__(self):
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return "there"


def test_what_may_come_back_is_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(hosts, "TELL_S", (5.0, 5.0))
    attempts = Attempts(ServiceError("away"), DeadlineError("silent"))
    assert hosts.patiently("the host", attempts) == "there" and attempts.count == 3
    assert capsys.readouterr().err == ""
    attempts = Attempts()
    assert hosts.patiently("the host", attempts, ServiceError("failed before")) == "there" and attempts.count == 1


def test_waiting_is_said_after_a_while_and_now_and_then(capsys):
    hosts.patiently("the host", Attempts(*[ServiceError("away %d" % n) for n in range(12)]))
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 8 and all(line.startswith("seamless_lite: waiting for the host: away ") for line in lines)


def test_waiting_is_said_while_the_first_attempt_hangs(capsys):
    hosts.patiently("the host", lambda: time.sleep(0.3))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 7 and set(lines) == {"seamless_lite: waiting for the host: it does not answer"}


def test_it_is_given_up_in_the_end_with_the_last_words(monkeypatch):
    monkeypatch.setattr(hosts, "PATIENCE_S", 0.1)
    with pytest.raises(ServiceError, match=r"away \(tried for 0 s\)") as caught:
        hosts.patiently("the host", Attempts(*[ServiceError("away")] * 1000))
    assert caught.value.final


@pytest.mark.parametrize("error", [hosts.final(ServiceError("refused")), ConfigurationError("wrong")])
def test_what_waiting_cannot_change_is_raised_at_once(error):
    attempts = Attempts(error)
    with pytest.raises(type(error)):
        hosts.patiently("the host", attempts)
    assert attempts.count == 1


@pytest.mark.parametrize("error", [None, hosts.final(ServiceError("refused"))])
def test_many_threads_mend_once_and_get_the_same(error):
    begun, go, got = threading.Event(), threading.Event(), []
    count = []

    def attempt():
        count.append(1)
        begun.set()
        assert go.wait(20)
        if error:
            raise error
    mending = hosts.Mending("the host", attempt)

    def call():
        try:
            got.append(mending())
        except ServiceError as exc:
            got.append(exc)
    first = threading.Thread(target=call)
    first.start()
    assert begun.wait(20)
    others = [threading.Thread(target=call) for _ in range(5)]
    for thread in others:
        thread.start()
    go.set()
    for thread in [first] + others:
        thread.join(20)
    assert got == [error] * 6 and 1 <= len(count) <= 2      # two, if a thread was late


def test_a_forked_child_mends_for_itself_while_the_parent_is_at_it():
    inside, go = threading.Event(), threading.Event()
    mending = hosts.Mending("the host", lambda: (inside.set(), os.getpid() == parent and go.wait(20)))
    parent = os.getpid()
    thread = threading.Thread(target=mending)
    thread.start()
    assert inside.wait(20)
    child = os.fork()
    if child == 0:
        mending()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    go.set()
    thread.join(20)
