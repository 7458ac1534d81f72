"""Fixtures that keep the tests honest: the real home directory and configuration are off limits."""
import itertools
import os
import pathlib
import signal
import sys

import pytest

pytest.register_assert_rewrite("labs", "far")
from labs import _netns, _netns_dask, _slurm, lab_user, netns, netns_dask, slurm, ssh_host     # noqa: E402, F401 (fixtures)

_numbers = itertools.count()
ROOT = pathlib.Path(__file__).resolve().parent.parent
# A shell starts what runs in its background with Ctrl-C ignored, and nohup a hang-up: children of the tests would inherit that.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def _homes(tmp_path_factory):
    """A folder of their own: pytest lists its folder for each new name, and there are thousands."""
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(autouse=True)
def home(_homes, monkeypatch):
    """An empty HOME; no SEAMLESS_* variable of the developer reaches a test."""
    path = _homes / ("home%d" % next(_numbers))
    path.mkdir()
    for name in [name for name in os.environ if name.startswith("SEAMLESS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("SEAMLESS_HOME", str(path / ".seamless"))
    return path
