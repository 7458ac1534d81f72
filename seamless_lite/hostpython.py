"""Finds the Python for the services of this host: the one that was named, or the best there is.

``find`` asks all interpreters in the usual places at once what they are (version, which of the modules we are interested in
they could import) and remembers its choice, because asking takes a tenth of a second or more.  A choice counts
as long as the interpreter and the folders of its modules are unchanged.

Sent to other hosts as a part of ``hostagent``: it runs on Python 3.6.
"""
import contextlib
import glob
import json
import os
import subprocess
import time

from .conda import conda_roots, which
from .hostside import HostError

OLDEST = (3, 9)
NAMES = tuple("python3.%d" % minor for minor in range(13, OLDEST[1] - 1, -1)) + ("python3",)
PROBE_S = 10.0              # an interpreter that has not said by then what it is does not count
CHOICES = 50                # so many choices are remembered
#: What every service needs and an interpreter that was built by hand may lack.
BASE = ("_sqlite3", "zlib")
#: What services may need.
OFTEN = ("dask", "distributed", "dask_jobqueue", "numpy")
SYSTEM_FOLDERS = ("/usr/bin", "/usr/local/bin")
_PROBE = r"""
import sys
words = ["@@seamless", "%d.%d.%d" % sys.version_info[:3]]
if sys.version_info >= (3, 9):
    import importlib.util
    words += [" ".join(name for name in sys.argv[1:] if importlib.util.find_spec(name))]
    words += [path for path in sys.path if path.endswith("-packages")]
print("\n".join(words))
"""
# The scripts that a conda environment's packages want to be run on activation, and then the program itself.
_ACTIVATE = 'for script in "$CONDA_PREFIX"/etc/conda/activate.d/*.sh; do . "$script"; done; exec "$@"'


class Python:
    """An interpreter that answered: ``path``, ``version`` (a tuple), ``modules`` that it has, and its ``folders`` of modules."""

    def __init__(self, path, version, modules, folders):
        self.path, self.version, self.modules, self.folders = path, tuple(version), list(modules), list(folders)

    def __str__(self):
        return "%s (%s)" % (self.path, ".".join(map(str, self.version)))

    def lacks(self, needs):
        """Why it cannot be used, in a few words, or None."""
        if self.version < OLDEST:
            return "too old"
        missing = [name for name in BASE + tuple(needs) if name not in self.modules]
        return "without " + " and ".join(name.lstrip("_") for name in missing) if missing else None


def find(folder, python=None, conda=None, needs=(), wishes=(), asked=None):
    """What to start services with: ``argv`` (of the interpreter), ``env`` to be added, ``version``, and a ``note`` that says why.

    ``python`` is the path or name of an interpreter, ``conda`` the name or path of an environment; neither: the
    best one, which has the modules ``needs``, then the most of ``wishes``, and then is the newest.
    ``folder`` is where choices are remembered; who calls several times gives the same dict ``asked``, and the
    interpreters are asked only once.  Raises ``HostError``.
    """
    key = json.dumps([python, conda, list(needs), list(wishes), os.environ.get("PATH"), os.path.expanduser("~"), os.uname().nodename])
    known = _recall(folder).get(key)
    if isinstance(known, dict) and known.get("state") is not None and known["state"] == _state(known):
        return known
    if python and conda:
        raise HostError("both 'python: %s' and 'conda: %s' are given: remove one" % (python, conda))
    env = {}
    if conda:
        prefix = _conda_prefix(conda)
        env = _conda_environment(prefix, conda)
        chosen = _named(os.path.join(prefix, "bin", "python"), "the conda environment %s" % conda, needs, wishes)
        note = "uses Python %s of the conda environment %s" % (chosen, prefix)
    elif python:
        chosen = _named(which(os.path.expanduser(python)), "'python: %s'" % python, needs, wishes)
        note = "uses Python %s, as 'python: %s' says" % (chosen, python)
    else:
        chosen, note = _best(needs, wishes, {} if asked is None else asked)
    argv = [chosen.path]
    if env and glob.glob(os.path.join(env["CONDA_PREFIX"], "etc/conda/activate.d/*.sh")) and os.path.exists("/bin/bash"):
        argv = ["/bin/bash", "-c", _ACTIVATE, "seamless"] + argv
    choice = {"argv": argv, "env": env, "version": list(chosen.version), "path": chosen.path, "folders": chosen.folders, "note": note}
    choice["state"] = _state(choice)
    _remember(folder, key, choice)
    return choice


# --- asking interpreters ------------------------------------------------------------------------------------

def probe(paths, modules):
    """The ``Python`` of each of ``paths`` that answers.  Asks all at once."""
    asked, end = [], time.monotonic() + PROBE_S
    for path in paths:
        with contextlib.suppress(OSError):
            asked.append((path, subprocess.Popen([path, "-c", _PROBE] + list(modules), stdin=subprocess.DEVNULL, cwd="/",
                                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)))
    found = []
    for path, child in asked:
        try:
            out = child.communicate(timeout=max(end - time.monotonic(), 0.1))[0]
        except subprocess.TimeoutExpired:
            child.kill()
            out = child.communicate()[0]
        words = out.decode("utf-8", "replace").partition("@@seamless\n")[2].splitlines()
        if words:
            version = tuple(int(number) for number in words[0].split("."))
            found.append(Python(path, version, words[1].split() if words[1:] else [], words[2:]))
    return found


def _named(path, what, needs, wishes):
    """The interpreter that was asked for.  Raises ``HostError`` if it will not do."""
    node = os.uname().nodename
    if path is None or not os.path.exists(path):
        raise HostError("%s: there is no such interpreter on %s%s" % (what, node, ": %s does not exist" % path if path else ""))
    found = probe([path], BASE + tuple(needs) + tuple(wishes))
    if not found:
        raise HostError("%s: %s on %s does not run as a Python interpreter" % (what, path, node))
    lack = found[0].lacks(needs)
    if lack:
        raise HostError("%s: %s on %s is %s: %s" % (what, found[0], node, lack, _cure(found, needs)))
    return found[0]


def _best(needs, wishes, asked):
    """(the best interpreter, why).  Raises ``HostError`` if there is none."""
    modules = set(BASE + OFTEN + tuple(needs) + tuple(wishes))
    if not modules <= asked.get("modules", set()):
        asked.update(modules=modules, found=probe(_candidates(), sorted(modules)))
    found = asked["found"]
    useful = [python for python in found if not python.lacks(needs)]
    if not useful:
        seen = ", ".join("%s %s" % (python, python.lacks(needs)) for python in found) or "none at all"
        raise HostError("there is no suitable Python on %s (found: %s): %s" % (os.uname().nodename, seen, _cure(found, needs)))
    best = max(useful, key=lambda python: (sum(name in python.modules for name in wishes), python.version[:2]))
    having = [name for name in tuple(needs) + tuple(wishes) if name in best.modules]
    others = ["%s%s" % (python, " " + python.lacks(needs) if python.lacks(needs) else "") for python in found if python is not best]
    note = "chose Python %s%s%s" % (best, ", which has " + " and ".join(having) if having else "",
                                    ", among " + ", ".join(others) if others else ", the only one found")
    return best, note


def _cure(found, needs):
    if all(python.version < OLDEST for python in found):
        return ("name a Python 3.%d or newer with 'python: /path/to/python3' or 'conda: ENVIRONMENT' in the cluster file, or "
                "install one there" % OLDEST[1])
    if "dask" in needs:
        return ("install it there (pip install 'seamless_lite[%s]'), or name a Python that has it with 'python:' or 'conda:' in the "
                "cluster file" % ("hpc" if "dask_jobqueue" in needs else "dask"))
    return "name another one with 'python: /path/to/python3' or 'conda: ENVIRONMENT' in the cluster file"


def _candidates():
    """Interpreters in the usual places, each once."""
    folders = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder.startswith("/")]
    folders += SYSTEM_FOLDERS + (os.path.expanduser("~/.local/bin"),)
    folders += sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin")))
    folders += [os.path.join(root, "bin") for root in conda_roots()]
    seen, found = set(), []
    for folder in folders:
        for name in NAMES:
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK):
                # the link in an environment is another interpreter than what it points to
                environment = os.path.exists(os.path.join(os.path.dirname(folder), "pyvenv.cfg"))
                status = os.stat(path)
                real = os.path.dirname(folder) if environment else (status.st_dev, status.st_ino)
                if real not in seen:
                    seen.add(real)
                    found.append(path)
    return found


# --- conda ------------------------------------------------------------------------------------------------

def _conda_prefix(name):
    """The folder of the environment.  Raises ``HostError``."""
    if "/" in name or name.startswith("~"):
        prefixes = [os.path.abspath(os.path.expanduser(name))]
    else:
        roots = conda_roots()
        prefixes = roots if name in ("base", "root") else []
        folders = [folder for folder in os.environ.get("CONDA_ENVS_PATH", "").split(os.pathsep) if folder]
        folders += [os.path.join(root, "envs") for root in roots] + [os.path.expanduser("~/.conda/envs")]
        prefixes = prefixes + [os.path.join(folder, name) for folder in folders]
        with contextlib.suppress(OSError), open(os.path.expanduser("~/.conda/environments.txt")) as file:
            prefixes += [line.strip() for line in file if os.path.basename(line.strip()) == name]
        if not roots and not any(map(os.path.isdir, prefixes)):
            raise HostError("the conda environment %s is not on %s, where no conda is found either: install it, set CONDA_EXE in your "
                            "shell's start-up file there, or give the path of the environment" % (name, os.uname().nodename))
    for prefix in prefixes:
        if os.path.isdir(prefix):
            return prefix
    raise HostError("there is no conda environment %s on %s (looked for: %s): make it, or correct 'conda:' in the cluster file"
                    % (name, os.uname().nodename, ", ".join(prefixes) or "none"))


def _conda_environment(prefix, name):
    """What ``conda activate`` would set."""
    path = os.pathsep.join([os.path.join(prefix, "bin"), os.environ.get("PATH", os.defpath)])
    env = {"PATH": path, "CONDA_PREFIX": prefix, "CONDA_DEFAULT_ENV": name, "CONDA_SHLVL": "1"}
    with contextlib.suppress(OSError, ValueError), open(os.path.join(prefix, "conda-meta", "state"), encoding="utf-8") as file:
        values = json.load(file).get("env_vars", {})
        env.update((key, value) for key, value in values.items() if isinstance(value, str))
    return env


# --- remembered choices -----------------------------------------------------------------------------------

def _choices_file(folder):
    return os.path.join(folder, "pythons.json")


def _recall(folder):
    with contextlib.suppress(OSError, ValueError), open(_choices_file(folder), encoding="utf-8") as file:
        value = json.load(file)
        return value if isinstance(value, dict) else {}
    return {}


def _remember(folder, key, choice):
    choices = dict(list(_recall(folder).items())[-CHOICES:])
    choices.pop(key, None)
    choices[key] = choice
    aside = "%s.%d.tmp" % (_choices_file(folder), os.getpid())
    with contextlib.suppress(OSError):              # then the next one asks again
        try:
            with open(aside, "w", encoding="utf-8") as file:
                json.dump(choices, file)
            os.replace(aside, _choices_file(folder))
        finally:
            if os.path.exists(aside):
                os.unlink(aside)


def _state(choice):
    """Changes when the interpreter does, or when modules are installed or removed; None if it is gone."""
    try:
        interpreter = os.stat(choice["path"])
        folders = [os.stat(folder).st_mtime_ns for folder in choice["folders"] if os.path.isdir(folder)]
    except (OSError, KeyError, TypeError):
        return None
    return [interpreter.st_ino, interpreter.st_size, interpreter.st_mtime_ns] + folders
