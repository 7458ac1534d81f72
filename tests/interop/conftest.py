"""The real Seamless 1.x beside ours: a virtual environment (``real``) and a store that both use (``lab``).

``SEAMLESS_REAL_VENV`` names an environment with the package ``seamless-suite``; else one is made with pip in a temp
folder, once per session.  Nothing of it is imported here: its programs and scripts run in processes of their own.
"""
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytest.register_assert_rewrite("real_seamless")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from real_seamless import SUITE, Lab, Real    # noqa: E402


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The real package: ``Real``.  Skips the test if there is none, and fails it where CI is set."""
    named = os.environ.get("SEAMLESS_REAL_VENV") or _venv_at_start
    if named:
        venv = pathlib.Path(named)
        if not (venv / "bin" / "seamless-run").exists():
            pytest.fail("SEAMLESS_REAL_VENV is %s, which holds no seamless-run" % venv)
        return Real(venv)
    say = pytest.fail if os.environ.get("CI") else pytest.skip
    python = _new_enough()
    if python is None:
        say("the real package needs Python %d.%d or newer, and there is none on PATH" % OLDEST)
    venv = tmp_path_factory.mktemp("real") / "venv"
    for command in ([python, "-m", "venv", str(venv)],
                    [str(venv / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", SUITE]):
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=INSTALL_S, env=_pip_environment)
        except subprocess.TimeoutExpired:
            say("the real package cannot be installed: %s took more than %d s" % (" ".join(command), INSTALL_S))
        if done.returncode:
            say("the real package cannot be installed: %s ended with %d: %s" % (
                " ".join(command), done.returncode, done.stdout.strip()[-500:]))
    return Real(venv)


def _new_enough():
    """The path of a Python that the real package runs with: this one, or one on PATH; None if there is none."""
    if sys.version_info >= OLDEST:
        return sys.executable
    found = (shutil.which("python3.%d" % minor) for minor in range(13, OLDEST[1] - 1, -1))
    return next((path for path in found if path), None)


# The fixture ``home`` hides SEAMLESS_* variables from every test.
_venv_at_start = os.environ.get("SEAMLESS_REAL_VENV")
# It changes HOME, too, where pip keeps its settings and what it has downloaded.
_pip_environment = dict(os.environ)
OLDEST = (3, 10)
INSTALL_S = 900


@pytest.fixture
def lab(real, tmp_path):
    """A store that both packages use, with the homes of two users; their servers are stopped afterwards."""
    with Lab(real, tmp_path / "lab") as made:
        yield made


@pytest.fixture(scope="module")
def shared_lab(real, tmp_path_factory):
    """As ``lab``, one for all tests of a module."""
    with Lab(real, tmp_path_factory.mktemp("shared") / "lab") as made:
        yield made
