"""The values that travel: ``Recipe``, ``Meta``, ``Request``, ``Job``, ``Outcome``.

``Recipe`` is exactly what is hashed: language, code, inputs and output.  ``Meta`` is what must not
change the identity: environment, time limit, scratch.  A ``Job`` is both, plus the small buffers that
go along with it; an ``Outcome`` is a result checksum or a ``Failure``.  All are frozen and have a JSON
form (``to_dict``/``from_dict``) in which absent fields have defaults and unknown fields are ignored,
so that programs of different age understand each other.  They are named tuples and no dataclasses, because every
``seamless-run`` that finds its result would pay 13 ms for importing those.

The buffer format of a recipe is that of compat/identity.md section 3.
"""
import base64
import functools
import typing as _t

from .celltypes import plain_dumps, plain_loads
from .checksum import Checksum
from .errors import SeamlessError, error_from_dict, error_to_dict

Pin = _t.Tuple[str, _t.Optional[str], _t.Optional[str]]     # celltype, subcelltype, checksum

#: Keys of a transformation dict that are part of the identity besides the pins.
IDENTITY_DUNDERS = ("__language__", "__output__", "__as__", "__format__", "__schema__")
#: Keys that Seamless drops before hashing; so are all that start with ``META__``.
DROPPED_DUNDERS = frozenset((
    "__meta__", "__env__", "__compilation__", "__record_probe__", "__code_checksum__", "__code_text__",
    "__compilers__", "__languages__", "__compiled__", "__header__", "__deps__"))
#: A buffer up to this many bytes travels inside the job or the outcome instead of through the store.
INLINE_BYTES = 1 << 16


class _RecipeFields(_t.NamedTuple):
    language: str
    pins: _t.Mapping[str, Pin]
    output: _t.Tuple[str, str, _t.Optional[str]] = ("result", "mixed", None)
    extra: _t.Mapping[str, object] = {}


class Recipe(_RecipeFields):
    """What is hashed: ``language``, ``pins`` (``code`` among them), ``output`` and ``extra`` dunders.

    ``pins`` maps a name to (celltype, subcelltype or None, checksum or None); ``output`` is
    (name, celltype, subcelltype or None); ``extra`` holds ``__format__``, ``__as__``, ``__schema__``.
    """

    def to_dict(self) -> dict:
        """The transformation dict, as Seamless 1.x writes it."""
        data: _t.Dict[str, object] = {"__language__": self.language, "__output__": list(self.output)}
        data.update(self.extra)
        data.update((name, list(pin)) for name, pin in self.pins.items())
        return data

    @classmethod
    def from_dict(cls, data: _t.Mapping) -> "Recipe":
        """Read a transformation dict; keys that Seamless drops before hashing are dropped here too.

        Raises ``SeamlessError`` for a key or pin that no transformation can have.
        """
        pins, extra = {}, {}
        for key, value in data.items():
            if key in ("__language__", "__output__") or key in DROPPED_DUNDERS or key.startswith("META__"):
                continue
            if key in IDENTITY_DUNDERS:
                if value and not _fits(key, value):
                    raise SeamlessError("the %s of the transformation does not give %s for each pin" % (
                        key, "a name" if key == "__as__" else "an object"))
                extra[key] = value
            elif key.startswith("__"):
                raise SeamlessError("the transformation has an unknown key %r" % key)
            elif not (isinstance(value, (list, tuple)) and len(value) == 3 and isinstance(value[0], str)):
                raise SeamlessError("pin %r of the transformation is not [celltype, subcelltype, checksum]" % key)
            else:
                pins[key] = (value[0], value[1], Checksum(value[2]) if value[2] is not None else None)
        try:
            language, output = data["__language__"], data["__output__"]
        except KeyError as exc:
            raise SeamlessError("the transformation has no %s" % exc) from None
        if not (isinstance(output, (list, tuple)) and len(output) > 1 and isinstance(output[0], str) and isinstance(output[1], str)):
            raise SeamlessError("the __output__ of the transformation is not [name, celltype, subcelltype]")
        return cls(language, pins, tuple(output), extra)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Recipe":
        """Read a transformation buffer."""
        value = plain_loads(data)
        if not isinstance(value, dict):
            raise SeamlessError("the buffer is not a transformation: it holds a %s" % type(value).__name__)
        return cls.from_dict(value)

    @functools.cached_property
    def buffer(self) -> bytes:
        """The transformation buffer; its checksum is the identity."""
        return plain_dumps(self.to_dict())

    @functools.cached_property
    def checksum(self) -> Checksum:
        """The identity of the computation."""
        return Checksum.of(self.buffer)

    def inputs(self) -> _t.List[Checksum]:
        """The checksums of all pins, the code included, each once."""
        return list(dict.fromkeys(pin[2] for pin in self.pins.values() if pin[2] is not None))


def _fits(key: str, value) -> bool:
    """Whether this value of an identity dunder can be read; of a schema that is not asked."""
    if key == "__as__":
        return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())
    return key != "__format__" or isinstance(value, dict) and all(
        isinstance(form, dict) and isinstance(form.get("filesystem") or {}, dict) for form in value.values())


class Meta(_t.NamedTuple):
    """What does not change the identity.

    ``metavars``: environment variables of a shell job (``--metavar``); ``environment``: the ``__env__``
    object (``{"conda_environment": ...}``); ``scratch``: the result's bytes are not kept; ``local``: run in
    the calling process whatever the configuration says; ``timeout_s``: seconds that the job may run;
    ``record``: write a full execution record; ``label``: how to call the job in messages; ``children``: this
    for the transformers among the function's globals, by name; ``fresh``: run although a result is known, and
    record none; ``job_folder``: only write the command and its inputs to this new folder on the executing side;
    ``strict``: fail rather than wait for the same job that runs with other variables or another environment;
    ``again``: a result is recorded, whose bytes are gone.
    """
    metavars: _t.Mapping[str, str] = {}
    environment: _t.Mapping[str, object] = {}
    scratch: bool = False
    local: bool = False
    timeout_s: _t.Optional[float] = None
    record: bool = False
    label: str = ""
    children: _t.Mapping[str, _t.Mapping[str, object]] = {}
    fresh: bool = False
    job_folder: str = ""
    strict: bool = False
    again: bool = False

    def to_dict(self) -> dict:
        """The fields that differ from their defaults."""
        default = Meta()
        return {name: value for name, value in self._asdict().items() if value != getattr(default, name)}

    @classmethod
    def from_dict(cls, data: _t.Mapping) -> "Meta":
        """Read ``to_dict``'s form; unknown fields are ignored."""
        return cls(**{name: data[name] for name in cls._fields if name in data})


class Job(_t.NamedTuple):
    """One recipe to run.  ``buffers`` holds small inputs that may not be in the store yet."""
    recipe: Recipe
    meta: Meta = Meta()
    buffers: _t.Mapping[str, bytes] = {}

    @property
    def checksum(self) -> Checksum:
        """The identity of the recipe, and so the id of the job."""
        return self.recipe.checksum

    def to_dict(self) -> dict:
        """The JSON form; ``checksum`` is there for the receiver to check what it got."""
        return {"checksum": self.checksum, "transformation": self.recipe.to_dict(), "meta": self.meta.to_dict(),
                "buffers": {cs: base64.b64encode(data).decode("ascii") for cs, data in self.buffers.items()}}

    @classmethod
    def from_dict(cls, data: _t.Mapping) -> "Job":
        """Read ``to_dict``'s form.  Raises ``SeamlessError`` if the checksum is not that of the recipe."""
        recipe = Recipe.from_dict(data["transformation"])
        if recipe.checksum != data["checksum"]:
            raise SeamlessError("the job calls itself %s, but its transformation is %s"
                                % (data["checksum"], recipe.checksum))
        return cls(recipe, Meta.from_dict(data.get("meta", {})),
                   {Checksum(cs): base64.b64decode(text) for cs, text in data.get("buffers", {}).items()})


class Request(_t.NamedTuple):
    """A recipe that shall be looked up or run: see ``Session.run`` for what the fields mean."""
    recipe: Recipe
    meta: Meta = Meta()
    buffers: _t.Mapping[Checksum, bytes] = {}
    value: bool = True


class Outcome(_t.NamedTuple):
    """How a job ended: ``result`` (a checksum) or ``error`` (the JSON form of an exception), never both.

    ``buffer`` holds the result's bytes when they are few, or when they are kept nowhere else (scratch);
    ``logs`` the end of what the job printed; ``runtime`` seconds and bytes used
    (``wall_time_seconds cpu_time_user_seconds cpu_time_system_seconds memory_peak_bytes``);
    ``cached`` is true when nothing ran.
    """
    result: _t.Optional[Checksum] = None
    error: _t.Optional[_t.Mapping[str, object]] = None
    buffer: _t.Optional[bytes] = None
    logs: str = ""
    runtime: _t.Mapping[str, float] = {}
    cached: bool = False

    @classmethod
    def failure(cls, error: BaseException, logs: str = "", **fields) -> "Outcome":
        """The outcome of a job that ended with ``error``."""
        return cls(error=error_to_dict(error), logs=logs, **fields)

    def exception(self) -> _t.Optional[SeamlessError]:
        """The exception to raise, or None if there is a result."""
        return None if self.error is None else error_from_dict({"logs": self.logs, **self.error})

    def to_dict(self) -> dict:
        """The JSON form."""
        data: _t.Dict[str, object] = {"result": self.result} if self.error is None else {"error": dict(self.error)}
        if self.buffer is not None:
            data["buffer"] = base64.b64encode(self.buffer).decode("ascii")
        for name in ("logs", "runtime", "cached"):
            if getattr(self, name):
                data[name] = getattr(self, name)
        return data

    @classmethod
    def from_dict(cls, data: _t.Mapping) -> "Outcome":
        """Read ``to_dict``'s form."""
        error, buffer = data.get("error"), data.get("buffer")
        if error is None and not data.get("result"):
            raise SeamlessError("the outcome of a job has neither a result nor an error")
        return cls(Checksum(data["result"]) if error is None else None, error,
                   base64.b64decode(buffer) if buffer is not None else None,
                   data.get("logs", ""), data.get("runtime", {}), bool(data.get("cached")))
