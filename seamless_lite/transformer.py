"""``direct`` and ``delayed``: a function (or code text) that, when called, is a transformation.

    @delayed
    def add(a, b): return a + b
    add.celltypes.result = "int"        what inputs and result are stored as (default "mixed")
    add.modules.helper = helper         importable inside as ``.helper``, and bound as ``helper``
    add.globals.scale = 3               a name that the function may use
    add.meta = {"timeout_s": 60}        what does not change the identity
    add.local = True                    always run in this process
    add.scratch = True                  do not keep the bytes of the result

    add(1, 2)           a Transformation; with ``direct`` the value
"""
import typing as _t

from .celltypes import CELLTYPES
from .checksum import Checksum
from .errors import CelltypeError, FunctionError
from .function import build_recipe, python_code, string_code
from .handle import Transformation
from .surroundings import children
from .transformation import Meta

LANGUAGES = ("python", "bash")
#: Stands for the result of a dependency until that is known.
PLACEHOLDER = Checksum("0" * 64)


class Names:
    """Named settings of a transformer, read and written as attributes or items."""

    def __init__(self, what: str, check=lambda name, value: value):
        self.__dict__.update(_what=what, _check=check, _values={})

    def __setattr__(self, name, value):
        self._values[name] = self._check(name, value)

    def __getattr__(self, name):
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError("no %s %r has been set" % (self._what, name)) from None

    def __delattr__(self, name):
        self._values.pop(name, None)

    __setitem__ = __setattr__
    __delitem__ = __delattr__

    def __getitem__(self, name):
        return self._values[name]

    def __iter__(self):
        return iter(self._values)

    def __contains__(self, name):
        return name in self._values

    def update(self, values: _t.Mapping) -> None:
        """Set several at once."""
        for name, value in values.items():
            self[name] = value

    def __repr__(self):
        return "<%ss: %r>" % (self._what, self._values)


class Transformer:
    """A function whose calls are transformations; see the module's text for its settings.

    ``code`` is a function, another transformer, or code text in ``language`` ("python" or "bash").
    With ``direct`` a call returns the value, else a ``Transformation``.
    """

    def __init__(self, code, language: _t.Optional[str] = None, direct: bool = False):
        if isinstance(code, Transformer):
            code = code.__wrapped__
        if language not in (None,) + LANGUAGES:
            raise FunctionError("language is %r; one of %s" % (language, ", ".join(LANGUAGES)))
        self.__wrapped__ = code
        self._direct = direct
        self._refused: _t.Optional[FunctionError] = None
        if isinstance(code, str):
            self._code = string_code(code, language or "python")
        elif language not in (None, "python"):
            raise FunctionError("code in %s is given as text, not as a Python function" % language)
        else:
            self.__wrapped_function__ = code
            for name in ("__name__", "__qualname__", "__doc__", "__module__"):
                if hasattr(code, name):
                    setattr(self, name, getattr(code, name))
            try:            # now, while the file still is what was imported
                self._code = python_code(code)
            except FunctionError as exc:
                self._refused = exc     # an unusable function may be decorated, as long as nobody calls it
        self.celltypes = Names("celltype", _check_celltype)
        self.modules = Names("module")
        self.globals = Names("global")
        self.local = False
        self.scratch = False
        self._meta = Meta()

    @property
    def meta(self) -> dict:
        """What does not change the identity: ``timeout_s``, ``environment``, ``record``, ``label``."""
        return self._meta.to_dict()

    @meta.setter
    def meta(self, value: _t.Mapping):
        known = set(Meta._fields) - {"metavars", "children"}
        for name in value:
            if name not in known:
                raise FunctionError("meta has no %r; it has %s" % (name, ", ".join(sorted(known))))
        limit = value.get("timeout_s")
        if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
            raise FunctionError("meta['timeout_s'] is %r; it is a number of seconds above 0" % (limit,))
        self.local = bool(value.get("local", self.local))
        self.scratch = bool(value.get("scratch", self.scratch))
        self._meta = Meta.from_dict(value)

    @property
    def code(self) -> str:
        """The text that is hashed."""
        return self._checked_code().text

    def __call__(self, *args, **kwargs):
        transformation = self.transformation(*args, **kwargs)
        return transformation.run() if self._direct else transformation

    def transformation(self, *args, **kwargs) -> Transformation:
        """The ``Transformation`` of a call with these arguments.  Raises ``FunctionError``, ``CelltypeError``."""
        code = self._checked_code()
        arguments = code.bind(args, kwargs)
        dependencies = {name: value for name, value in arguments.items() if isinstance(value, Transformation)}
        for name in dependencies:
            arguments[name] = PLACEHOLDER
        recipe, buffers = build_recipe(code, arguments, self.celltypes._values, self.modules._values,
                                       self.globals._values)
        meta = self._meta
        if (meta.local, meta.scratch, meta.label) != (self.local, self.scratch, code.name):
            meta = meta._replace(local=self.local, scratch=self.scratch, label=meta.label or code.name)
        nested = children(self.globals._values)
        return Transformation(recipe, buffers, meta._replace(children=nested) if nested else meta, dependencies)

    def _checked_code(self):
        if self._refused is not None:
            raise self._refused
        return self._code

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        raise FunctionError("%s is a method: its instance is not an input that can be named by its content; "
                            "make it a function outside the class" % getattr(self, "__qualname__", "this transformer"))

    def __repr__(self):
        return "<%s %s>" % ("direct" if self._direct else "delayed", getattr(self, "__qualname__", "code"))


def direct(function, language: _t.Optional[str] = None) -> Transformer:
    """Decorator: a call computes the result, or finds it in the cache, and returns its value."""
    return Transformer(function, language, direct=True)


def delayed(function, language: _t.Optional[str] = None) -> Transformer:
    """Decorator: a call returns a ``Transformation``, to be run when and where you like."""
    return Transformer(function, language)


def _check_celltype(name, value):
    if value not in CELLTYPES:
        import difflib                      # only a mistake pays for it
        near = difflib.get_close_matches(str(value), sorted(CELLTYPES), 1, 0)
        raise CelltypeError("celltype of '%s' is %r, which is not a celltype; the nearest is '%s'"
                            % (name, value, near[0]))
    return value
