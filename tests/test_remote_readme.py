"""The examples of the README for other hosts, as printed but for the name of the host."""
import json

import pytest

from far import nothing_left
from labs import ROOT, need
from test_readme import blocks

pytestmark = pytest.mark.ssh

WHERE = """
import json
import seamless_lite.config
from seamless_lite import direct
seamless_lite.config.init()
@direct
def where(n):
    import os
    return [os.uname().nodename, n]
print(json.dumps(where(1)))
"""


def configured(user, key, host):
    """Configure ``user`` with the README's cluster that has the line ``key``, and the ``seamless.yaml`` after it."""
    found = blocks("yaml")
    at = next(n for n, text in enumerate(found) if key in text)
    user.configure(found[at].replace("login.example.org", host), found[at + 1])
    return user


def test_on_another_host(netns, lab_user):
    user = configured(lab_user(netns), "far:", "h1")
    commands = next(text for text in blocks("sh") if "uninstall" in text).replace("login.example.org", "h1")
    done = user.run("bash", "-ec", commands.replace("seamless-", "%s %s/bin/seamless-" % (user.python_exe, ROOT)))
    lines = done.ok().splitlines()
    assert lines[0] == "h1" and "jobserver" in done.stdout and lines[-1].startswith("removed ")
    nothing_left(user, netns)


def test_dask(netns_dask, lab_user):
    need("bokeh")
    user = configured(lab_user(netns_dask), "mycluster:", "h1")
    assert json.loads(user.python(WHERE).ok()) == ["h1", 1]
    link = user.python(next(text for text in blocks("python") if "dashboard_link" in text)).ok()
    assert link.startswith("http://127.0.0.1:")
    nothing_left(user, netns_dask)


def test_stages(netns_dask, lab_user):
    user = configured(lab_user(netns_dask), "mycluster:", "h1")
    user.configure(project=next(text for text in blocks("yaml") if "stage gpu" in text))
    text = next(text for text in blocks("python") if "set_stage" in text).splitlines()
    code = WHERE + "print(json.dumps(where(2)))\n".join(line + "\n" for line in text[1:]) + "print(json.dumps(where(3)))\n"
    hosts = [json.loads(line) for line in user.python(code).ok().splitlines()]
    own = hosts[0][0]
    assert own != "h1" and hosts[1:] == [["h1", 2], [own, 3]]
    assert user.run("seamless-run", "--stage", "gpu", "hostname").ok() == "h1\n"


@pytest.mark.slurm
def test_slurm(slurm, lab_user):
    user = configured(lab_user(slurm), "hpc:", "ctl")
    assert json.loads(user.python(WHERE).ok())[0] in ("n1", "n2")
    assert user.run("seamless-run", "--queue", "long", "hostname").ok() in ("n1\n", "n2\n")
    user.run("seamless-service", "uninstall", "ctl").ok()
    assert slurm.jobs() == []
