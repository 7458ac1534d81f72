"""Where conda is on this machine.  Runs nothing.

Sent to other hosts as a part of ``hostagent``: it runs on Python 3.6.
"""
import os

#: Where conda is usually installed.
CONDA_ROOTS = ("~/miniconda3", "~/miniforge3", "~/mambaforge", "~/anaconda3", "~/micromamba", "/opt/conda", "/opt/miniconda3",
               "/opt/miniforge3", "/opt/anaconda3", "/usr/local/miniconda3", "/usr/local/anaconda3")


def conda_script():
    """The file that a shell sources before ``conda activate``, of the conda in use if there is one; None if there is no conda."""
    scripts = (os.path.join(root, "etc", "profile.d", "conda.sh") for root in _conda_places())
    return next(filter(os.path.exists, scripts), None)


def conda_roots():
    """Folders in which a conda is installed, the one in use first."""
    return [root for root in _conda_places() if os.path.isdir(os.path.join(root, "conda-meta"))]


def _conda_places():
    """Where a conda may be."""
    roots = [os.environ.get("CONDA_ROOT"), os.environ.get("MAMBA_ROOT_PREFIX")]
    for program in (os.environ.get("CONDA_EXE"), which("conda"), which("mamba")):
        if program:
            roots.append(os.path.dirname(os.path.dirname(os.path.realpath(program))))
    return list(dict.fromkeys(filter(None, roots + [os.path.expanduser(root) for root in CONDA_ROOTS])))


def which(name):
    """The path of the program ``name``, or None."""
    if "/" in name:
        return name
    paths = (os.path.join(folder, name) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder)
    return next((path for path in paths if os.access(path, os.X_OK)), None)
