"""Run one recipe here: fetch its inputs, execute its code, store its result.

The only place, with ``shell``, where user code runs.  What goes wrong in user code becomes a ``JobError`` with
the user's own frames; what goes wrong around it (a missing input, a store that is gone) keeps its kind.

Python code prints to the standard output and error of this process: a worker points them at its log.
"""
import importlib
import os
import re
import traceback
import typing as _t

from .celltypes import plain_loads
from .checksum import Checksum
from .errors import ConfigurationError, FunctionError, JobCancelledError, JobError
from .sandbox import NoResult, Program, Sandbox, module_programs, programs
from .transformation import Meta, Recipe
from .values import exception_text, fetch, read_value, store_value

MAX_MESSAGE = 4000              # characters of an exception's text
MAX_TRACEBACK = 1 << 16         # characters of a traceback
_OURS = os.path.dirname(Program.run.__code__.co_filename)
_IMPORTING = (importlib.__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
_SHOWN = re.compile(r"<(.*) [0-9a-f]{8}>\Z")


def execute(recipe: Recipe, meta: Meta, store, *, log_fd: _t.Optional[int] = None, run_dir=None,
            cancelled=None) -> Checksum:
    """Run ``recipe`` and return the checksum of its result, which is in ``store`` then (with all its leaves).

    ``log_fd`` and ``run_dir`` are for shell jobs (see ``shell.run_shell``).  ``cancelled`` (like
    ``threading.Event``) is looked at before Python code starts, and all the time for shell jobs.  Python code
    cannot be stopped from outside: who sets ``meta.timeout_s`` has to run it in a process to kill.

    Raises ``JobError``, ``CacheMissError``, ``CelltypeError`` (an input), ``JobCancelledError``, ``DeadlineError``.
    """
    if cancelled is not None and cancelled.is_set():
        raise JobCancelledError("the job was cancelled before it started")
    if recipe.language == "bash":
        from .shell import run_shell        # a Python job does not pay for what runs commands
        return run_shell(recipe, meta, store, log_fd=log_fd, run_dir=run_dir, cancelled=cancelled)
    if recipe.language != "python":
        raise JobError("code in the language '%s' cannot be run here; one of python, bash" % recipe.language)
    _check_environment(meta)
    pin = recipe.pins.get("code")
    if pin is None or pin[2] is None:
        raise JobError("the transformation %s has no code" % recipe.checksum)
    try:
        program = programs.get(("code", pin[2]), lambda: _program(store, pin[2]))
    except (FunctionError, SyntaxError, UnicodeDecodeError) as exc:
        raise JobError("the code of the job cannot be used: %s" % exc) from None
    label = meta.label or program.name
    modules, inputs = _inputs(recipe, store, label)
    value = _run(program, recipe, label, Sandbox(recipe.checksum, modules, meta.children), inputs)
    return store_value(store, value, recipe.output[1], label)


def _check_environment(meta: Meta) -> None:
    name = meta.environment.get("conda_environment")
    if name and name not in (os.environ.get("CONDA_DEFAULT_ENV"), os.environ.get("CONDA_PREFIX")):
        raise ConfigurationError("a Python function runs in the environment of its worker, so it cannot move to the "
                                 "conda environment '%s': set 'conda: %s' for the service in the cluster file"
                                 % (name, name))


# --- inputs ------------------------------------------------------------------------------------------------

def _program(store, checksum) -> Program:
    return Program(fetch(store, checksum, "the code of the job").decode("utf-8"), "the code", checksum)


def _inputs(recipe: Recipe, store, label: str):
    """(programs of the modules, values of the other pins), by the names that the code sees."""
    modules: _t.Dict[str, dict] = {}
    inputs: _t.Dict[str, object] = {}
    seen_as = recipe.extra.get("__as__") or {}
    formats = recipe.extra.get("__format__") or {}
    for name, (celltype, sub, checksum) in recipe.pins.items():
        if name == "code":
            continue
        what = "the input '%s' of %s" % (name, label)
        as_name = seen_as.get(name, name)
        if sub == "module" and checksum is not None:
            modules[as_name] = programs.get((as_name, checksum), lambda: _module(store, as_name, checksum, what))
        elif checksum is None:
            inputs[as_name] = None
        else:
            if celltype == "mixed" and name in formats:
                celltype = formats[name].get("celltype", celltype)
            inputs[as_name] = read_value(store, fetch(store, checksum, what), celltype, sub, what)
    return modules, inputs


def _module(store, name, checksum, what) -> _t.Dict[str, Program]:
    try:
        return module_programs(name, plain_loads(fetch(store, checksum, what)), checksum)
    except (FunctionError, SyntaxError, KeyError, TypeError) as exc:     # the last two: not what a module looks like
        raise JobError("the module '%s' cannot be used: %s" % (name, exc)) from None


# --- running -----------------------------------------------------------------------------------------------

def _run(program: Program, recipe: Recipe, label: str, sandbox: Sandbox, inputs):
    """The value that the code makes.  Raises ``JobError``."""
    failure: BaseException
    with sandbox as namespace:
        try:
            program.register()
            namespace["__file__"] = program.file
            sandbox.import_modules()
            value = program.run(namespace, inputs, recipe.output[0])
            if value is not None:
                return value
            failure = JobError("the result of %s is None: return a value" % label)
        except KeyboardInterrupt:
            raise                           # somebody pressed Ctrl-C, or stops this worker
        except JobCancelledError:
            raise                           # of a nested transformation: this one was cancelled with it
        except NoResult:
            failure = JobError("%s never assigns '%s': assign its result to that name" % (label, recipe.output[0]))
        except BaseException as exc:        # whatever user code raises, SystemExit and GeneratorExit too
            failure = _user_error(exc)
    raise failure       # out here, so that it does not hold on to the user's frames and all their data


def _user_error(exc: BaseException) -> JobError:
    """The ``JobError`` for an exception of user code, with the frames that are not ours."""
    if isinstance(exc, SystemExit):
        message = "SystemExit: the code called exit(%s); return a result instead" % ("" if exc.code is None else exc.code)
    else:
        message = "%s: %s" % (type(exc).__name__, exception_text(exc))
    lines = traceback.TracebackException(type(exc), exc, exc.__traceback__)
    seen: _t.Set[int] = set()
    _clean(lines, seen)
    text = "".join(lines.format())
    if len(text) > MAX_TRACEBACK:
        text = text[:MAX_TRACEBACK // 2] + "\n  [...]\n" + text[-MAX_TRACEBACK // 2:]
    return JobError(message.rstrip(": ")[:MAX_MESSAGE], traceback=text)


def _clean(lines: _t.Optional[traceback.TracebackException], seen: _t.Set[int]) -> None:
    """Drop our frames and the import system's; call generated files by the name of the function."""
    if lines is None or id(lines) in seen:
        return
    seen.add(id(lines))
    kept = []
    for frame in lines.stack:
        shown = _SHOWN.match(frame.filename)
        if os.path.dirname(frame.filename) == _OURS or frame.filename in _IMPORTING:
            continue
        if shown:
            frame.line                      # read now, under the name that linecache knows
            frame.filename = shown.group(1)
        kept.append(frame)
    lines.stack[:] = kept
    _clean(lines.__cause__, seen)
    _clean(lines.__context__, seen)
    for inner in getattr(lines, "exceptions", None) or ():
        _clean(inner, seen)
