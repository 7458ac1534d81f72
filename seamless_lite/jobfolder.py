"""The private folder of one shell job: inputs become files and variables, the file or folder RESULT becomes the
result (compat/bash.md section 6).

Inputs are copied (or reflinked), never linked: a job may write to its files, the store's must not change.
"""
import io
import json
import os
import re
import shutil
import stat
import typing as _t

from .celltypes import deserialize, plain_dumps, plain_loads, serialize
from .checksum import CHUNK, Checksum
from .compressed import compress, split_compression
from .errors import CelltypeError, JobError, SeamlessError
from .mixed import is_binary_buffer, load_numpy
from .transfer import read_many
from .transformation import Recipe
from .values import fetch, missing_error, store_value

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
MAX_VARIABLE = 1000         # characters; longer values are files only
SMALL_BYTES = 1 << 16       # a result file up to this is read and stored together with others
BATCH = 500
_TEXTS = frozenset(("text", "python", "ipython", "yaml"))
_FOLDERS = frozenset(("folder", "deepfolder"))


# --- inputs ------------------------------------------------------------------------------------------------

def write_inputs(recipe: Recipe, store, folder: str) -> _t.Dict[str, str]:
    """Write the pins into ``folder``; return the environment variables that short values become.

    Raises ``JobError`` for a pin that cannot be a file, ``CacheMissError`` for a missing buffer, ``OSError``.
    """
    variables: _t.Dict[str, str] = {}
    formats = recipe.extra.get("__format__") or {}
    for name, (celltype, _, checksum) in recipe.pins.items():
        if name == "code" or checksum is None:
            continue
        how = formats.get(name) or {}
        mode = (how.get("filesystem") or {}).get("mode")
        if mode == "directory" or celltype in _FOLDERS:
            base, suffix = split_compression(name) if mode == "directory" else (name, "")
            _write_folder(store, checksum, _target(folder, base), suffix, name)
        elif mode == "file":
            write_buffer(store, checksum, _target(folder, name), split_compression(name)[1], name)
        elif celltype == "bytes":
            write_buffer(store, checksum, _target(folder, name), "", name)
        else:
            content, variable = _file_of_value(name, fetch(store, checksum, _what(name)), celltype)
            with open(_target(folder, name), "wb") as file:
                file.write(content)
            if variable is not None and VARIABLE.match(name):
                variables[name] = variable
    return variables


def _target(folder: str, name: str) -> str:
    """The path for a pin, its parents made.  Refuses what would lie outside the folder."""
    parts = name.split("/")
    if not name or name.startswith("/") or ".." in parts or "\0" in name:
        raise JobError("the input '%s' cannot be a file of the job: its path must be relative and without '..'" % name)
    path = os.path.normpath(os.path.join(folder, name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def _what(name: str) -> str:
    return "the input '%s' of the job" % name


def _write_folder(store, checksum, target: str, suffix: str, name: str) -> None:
    index = plain_loads(fetch(store, checksum, _what(name)))
    made, files = set(), {}
    os.makedirs(target, exist_ok=True)
    for path, leaf in index.items():
        full = os.path.normpath(os.path.join(target, path))
        if not full.startswith(target + os.sep) or "\0" in path:
            raise JobError("the folder '%s' has a file '%s', which would lie outside of it" % (name, path))
        parent = os.path.dirname(full)
        if parent not in made:
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
        files.setdefault(Checksum(leaf), []).append((full + suffix, "%s/%s" % (name, path)))
    for leaf, data in read_many(store, files) if store.remote else dict.fromkeys(files).items():
        for full, label in files[leaf]:
            write_buffer(store, leaf, full, suffix, label, data)


def write_buffer(store, checksum, target: str, suffix: str, name: str, data: _t.Optional[bytes] = None) -> None:
    """Write a buffer to the file ``target``, compressed if ``suffix`` says so; never held in memory as a whole.

    ``data`` are its bytes if the caller has them.
    """
    path = store.path(checksum) if data is None else None
    source = (io.BytesIO(data) if data is not None else open(path, "rb", buffering=0) if path is not None
              else store.open(checksum))
    if source is None:
        raise missing_error(checksum, _what(name))
    with source, open(target, "wb") as out:
        if suffix:
            try:
                compress(source, out, suffix)
            except SeamlessError as exc:
                raise JobError("the input '%s' cannot be compressed: %s" % (name, exc)) from None
        else:
            if path is not None:
                _copy_range(source.fileno(), out.fileno())
            shutil.copyfileobj(source, out, CHUNK)      # the rest, if any


def _copy_range(source: int, target: int) -> None:
    """Let the kernel copy (on some file systems that shares the blocks); stops early where it cannot."""
    if not hasattr(os, "copy_file_range"):
        return
    try:
        while os.copy_file_range(source, target, 1 << 30):
            pass
    except OSError:
        pass        # another file system, an old kernel: the caller copies what is missing


def _file_of_value(name: str, data: bytes, celltype: str) -> _t.Tuple[bytes, _t.Optional[str]]:
    """(content of the file, value of the variable or None) for a pin that is not a file already."""
    try:
        value = deserialize(data, celltype)
    except CelltypeError as exc:
        raise CelltypeError("the input '%s' of the job: %s" % (name, exc)) from None
    if isinstance(value, (list, dict)):
        try:
            return json.dumps(value).encode(), None
        except TypeError:
            raise JobError("the input '%s' holds arrays inside a dict or list, which cannot be one file for a "
                           "command: pass each as an input" % name) from None
    if isinstance(value, (str, bool, int, float)):
        text = str(value)
        content = (text if text.endswith("\n") else text + "\n").encode("utf-8")
        short = len(text) <= MAX_VARIABLE and "\0" not in text
        return content, text.rstrip("\n") if short else None
    if value is None:
        return b"None\n", None
    if isinstance(value, bytes):
        return bytes(value), None
    raw = value.dtype == "uint8" and value.ndim == 1 or value.dtype.kind == "S" and value.ndim == 0
    return value.tobytes() if raw else serialize(value, "binary"), None


# --- result ------------------------------------------------------------------------------------------------

def store_result(store, path: str, celltype: str) -> Checksum:
    """Store what the job left at ``path`` (which must exist) as ``celltype``; large files are never loaded.

    Raises ``JobError`` if it is not what the job should have left.
    """
    if os.path.isdir(path):
        files = dict(_walk(path))
        if not files:
            raise JobError("the folder RESULT of the job is empty")
        if celltype in _FOLDERS:
            return _store_folder(store, files)
        value = {name: _guess(_read(file), celltype) for name, file in files.items()}
    elif not os.path.isfile(path):
        raise JobError("RESULT is neither a file nor a folder")         # a FIFO: reading it could wait for ever
    elif celltype == "bytes":
        return _put_file(store, path)
    elif celltype in _FOLDERS:
        raise JobError("the job left a file RESULT, but its result has the celltype '%s': make RESULT a folder"
                       % celltype)
    else:
        value = _guess(_read(path), celltype)
    return store_value(store, value, celltype, "the job")


def _store_folder(store, files: _t.Mapping[str, str]) -> Checksum:
    index: _t.Dict[str, Checksum] = {}
    small = []
    for name, path in files.items():
        if os.path.getsize(path) > SMALL_BYTES:
            index[name] = _put_file(store, path)
        else:
            small.append(name)
    for start in range(0, len(small), BATCH):           # one sync per file would take minutes for 10,000
        names = small[start:start + BATCH]
        index.update(zip(names, store.put_many(_read(files[name]) for name in names)))
    try:
        return store.put(plain_dumps(index))
    except CelltypeError:
        odd = next(name for name in index if not name.isprintable())
        raise JobError("the name of the result file %r is not UTF-8: give it another name" % odd) from None


def _put_file(store, path: str) -> Checksum:
    status = os.lstat(path)
    # What has another name (a link) would stay in the job's hands if it were moved into the store.
    return store.put_file(path, move=stat.S_ISREG(status.st_mode) and status.st_nlink == 1)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _guess(data: bytes, celltype: str):
    """The value in a file for which the recipe wants a celltype that is not bytes."""
    if celltype in _TEXTS:
        return data
    if not data:
        raise JobError("the file RESULT of the job is empty, which is no value of the celltype '%s'" % celltype)
    if is_binary_buffer(data):
        return deserialize(data, "mixed")
    try:
        return plain_loads(data)
    except CelltypeError:
        pass                # no JSON, so it is text
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return load_numpy().frombuffer(data, "uint8")


def _walk(top: str) -> _t.Iterator[_t.Tuple[str, str]]:
    """(relative path, path) of all files below ``top``; links are followed, but not in circles."""
    def walk(folder, prefix, above):
        for entry in os.scandir(folder):
            name = prefix + entry.name
            try:
                status = entry.stat()
            except OSError as exc:
                raise JobError("RESULT/%s cannot be read: %s" % (name, exc.strerror)) from None
            if stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity not in above:
                    yield from walk(entry.path, name + "/", above | {identity})
            elif stat.S_ISREG(status.st_mode):
                yield name, entry.path
            else:
                raise JobError("RESULT/%s is neither a file nor a folder" % name)

    status = os.stat(top)
    return walk(top, "", frozenset({(status.st_dev, status.st_ino)}))


# --- the end -----------------------------------------------------------------------------------------------

def remove_folder(folder: str) -> None:
    """Remove the job's folder, also where the job took away its own permissions."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.isdir(folder):
        os.chmod(folder, 0o700)
        for parent, names, _ in os.walk(folder):
            for name in names:
                path = os.path.join(parent, name)
                if not os.path.islink(path):
                    os.chmod(path, 0o700)
        shutil.rmtree(folder, ignore_errors=True)
