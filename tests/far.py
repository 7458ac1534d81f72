"""What the tests on other hosts share: a cluster on host h1, and looking at what is going on there.

``CLUSTERS``, and ``JOBSERVER`` or ``DASKSERVER``, configure a lab's user; ``far`` has a jobserver, ``gpu-cluster`` a daskserver (the block of
the user's document, with another hostname).
"""
import re

CLUSTERS = """\
far:
  frontends:
    - hostname: h1
      hashserver:
        bufferdir: ~/storage/buffers
      database:
        database_dir: ~/storage/results
      jobserver:
        network_interface: 127.0.0.1
        port_start: 55300
        port_end: 55399

gpu-cluster:
  frontends:
    - hostname: h1
      hashserver:
        bufferdir: ~/storage/buffers
      database:
        database_dir: ~/storage/results
      daskserver:
        network_interface: 0.0.0.0
        port_start: 60300
        port_end: 60399
"""
JOBSERVER = "- project: my-project\n- cluster: far\n- execution: remote\n"
DASKSERVER = "- project: my-project\n- cluster: gpu-cluster\n- execution: remote\n- remote: daskserver\n"
BACKENDS = {"jobserver": JOBSERVER, "daskserver": DASKSERVER}

#: The beginning of each script: a function that says on which host it ran.
BEGIN = """\
import os, sys, time
import seamless_lite.config
from seamless_lite import direct, delayed, parallel
seamless_lite.config.init()

@direct
def where(x):
    import os
    return [os.uname().nodename, x]

"""


def clusters_on(host, **keys):
    """``CLUSTERS`` with another host, and with more keys for each cluster: ``tunnel="false"``."""
    text = CLUSTERS.replace("hostname: h1", "hostname: " + host)
    return re.sub(r"(?m)^(\S+:)$", lambda m: "\n".join([m.group(1)] + ["  %s: %s" % item for item in keys.items()]), text)


def services(user, host="h1"):
    """What ``seamless-service ps`` lists on a host, without its first line, the names of the columns."""
    return user.run("seamless-service", "ps", host).ok().splitlines()[1:]


def received(lab, host="h1", way="in"):
    """Bytes that the network card of a host has received (``way="out"``: sent) so far."""
    line = next(line for line in lab.run(host, "cat", "/proc/net/dev").splitlines() if "eth0:" in line)
    return int(line.split(":")[1].split()[0 if way == "in" else 8])


def wait_for_traffic(running, lab, count, host="h1", way="in", timeout_s=60):
    """Wait until a program has brought ``count`` bytes more through the network card of a host."""
    before = received(lab, host, way)
    running.until(lambda: received(lab, host, way) - before > count, "%d bytes %s %s" % (count, way, host), timeout_s)


def lines_of(lab, name, host="h1"):
    """The lines of a file in the home folder on a host; none if there is no file."""
    path = lab.home(host) / name
    return path.read_text().splitlines() if path.exists() else []


def pids(lab, *words, host="h1"):
    """Pids, as that host counts them, of processes whose command line has all the words."""
    found = []
    for line in lab.processes(host):
        if all(word in line for word in words):
            found.append(int(line.split()[0]))
    return found


def kill(lab, numbers, host="h1"):
    """``kill -9`` processes on a host."""
    assert numbers
    lab.run(host, "kill", "-9", *map(str, numbers))


def nothing_left(user, lab, host="h1"):
    """``seamless-service uninstall`` leaves neither a process nor a file, but for the user's own data."""
    user.run("seamless-service", "uninstall", host).ok()
    assert [line for line in lab.processes(host) if "sshd: " not in line] == []     # other clients may be connected
    words = [word for name in ("storage*", "seamless*", ".ssh*", "mark*") for word in ("-not", "-path", "/home/tester/" + name)]
    left = lab.run(host, "find", "/home/tester", "/tmp", "/var/tmp", "/dev/shm", "-mindepth", "1",
                   "-user", "tester", *words).splitlines()
    assert left == []
