"""``explain``: why a transformation would run: what differs from the nearest earlier run.

Nothing is kept for this when things run, so it costs neither a hit nor a miss anything.  The result table lists what
has run, the last first; the store has the transformation buffer of each, whoever made it, also Seamless 1.x and
workers elsewhere.  Reading those takes about 20 us each on this machine; after ``SEARCH_S`` the search ends and says so.

Of all runs of the same function or program the nearest is the one with most inputs, and most of the code, in common;
of equal ones the last.
"""
import json
import os
import re
import time
import typing as _t

from . import differences
from .celltypes import DEEP
from .checksum import Checksum, is_checksum
from .errors import SeamlessError
from .references import is_deep_pin, recipe_of
from .resulttable import ResultTable
from .transformation import Outcome, Recipe

SEARCH_S = 10.0
#: So many different codes are looked at, those first whose runs have most inputs in common.
CODES = 1000
#: Words that the script around the user's command consists of.
_FRAME = frozenset(("RESULT", "STDOUT", "mkdir", "-p", "mv", "chmod", "+x", "export", "RESULT/"))
_OWN = re.compile(br"^(\(|\) > (RESULT|STDOUT)|mkdir -p RESULT/.*|mv .* RESULT/.*)\n", re.MULTILINE)
_WORD = re.compile(r"[^\s()<>|;&\"',=:]+")
_DEF = re.compile(r"def\s+(\w+)")
_PREFIX = re.compile(r"[0-9a-f]{2}\Z")


class Why(_t.NamedTuple):
    """Why something would run, or would not: ``hit`` if its result is known; ``lines`` say it to a person.

    ``nearest`` is the earlier run (its transformation) with which it was compared, None if there is none.
    """
    hit: bool
    transformation: _t.Optional[Checksum]
    nearest: _t.Optional[Checksum]
    lines: _t.Tuple[str, ...]

    def __str__(self):
        return "\n".join(self.lines)

    __repr__ = __str__


def explain(session, recipe: Recipe, buffers: _t.Mapping[Checksum, bytes] = {}, value: bool = True) -> Why:
    """Whether ``recipe`` has a result, and if not, why.  ``buffers``: those of its inputs that may not be in the store.

    Runs nothing, stores nothing.  With ``value`` the bytes of the result count too.
    """
    name = recipe.checksum
    hit = session.lookup(recipe, value)
    if hit is not None:
        return Why(True, name, None, ("hit: transformation %s has the result %s, so nothing would run" % (name, hit.result),))
    head = ["miss: transformation %s would run" % name]
    reason = _gone(session, recipe) or _elsewhere(session.settings, recipe)
    if reason:
        return Why(False, name, None, (*head, *reason))
    search = _Search(session, recipe, buffers)
    nearest, notes = search.nearest()
    if nearest is None:
        what = "function" if recipe.language == "python" else "command"
        return Why(False, name, None, (*head, "no earlier run of this %s was found %s" % (what, search.extent()), *notes))
    lines = _Comparison(session, recipe, nearest, buffers).lines()
    return Why(False, name, nearest.checksum, (
        *head, "what differs from the nearest earlier run, %s:" % nearest.checksum, *("  " + line for line in lines), *notes))


class Step(_t.NamedTuple):
    """One of several computations that wait for each other.  ``fill(results)``: the recipe, given the results of the others
    by their ``key``; None if one that it needs is missing.  ``keep``: the bytes of its result count too."""
    key: _t.Any
    session: _t.Any
    fill: _t.Callable[[_t.Mapping], _t.Optional[Recipe]]
    buffers: _t.Mapping[Checksum, bytes]
    keep: bool
    outcome: _t.Optional[Outcome]
    name: str


def explain_last(steps: _t.Sequence[Step]) -> Why:
    """``explain`` the last step; if others have to run first, those of them instead that could run at once."""
    results: _t.Dict[_t.Any, Checksum] = {}
    missing: _t.List[str] = []
    for step in steps:
        recipe = step.fill(results)
        if recipe is not None and step is steps[-1]:
            return explain(step.session, recipe, step.buffers, step.keep)
        outcome = step.outcome if step.outcome is not None or recipe is None else step.session.lookup(recipe, False)
        if outcome is not None:
            results[step.key] = outcome.result
        elif recipe is not None:
            missing += [step.name + ":", *("  " + line for line in explain(step.session, recipe, step.buffers, False).lines)]
    return Why(False, None, None, ("miss: %s would run, since it waits for results that are not there" % steps[-1].name, *missing))


# --- the same transformation -----------------------------------------------------------------------------

def _gone(session, recipe: Recipe) -> _t.List[str]:
    """What became of the result of this very transformation, if it ran, or began to."""
    result = session.stores.results.get(recipe.checksum)
    store = session.store
    if result is None:
        several = session.stores.results.irreproducible(recipe.checksum)
        if several:
            return ["it is irreproducible, and so runs each time: it gave %d results, among them %s" % (
                len(several), ", ".join(several[-3:]))]
        if not store.has([recipe.checksum])[0]:
            return []
        return ["this very transformation is in the store, but has no result: it failed, was interrupted, was undone "
                "(--undo), or was only uploaded"]
    data = store.get(result) if recipe.output[1] in DEEP and store.has([result])[0] else None
    if data is None:
        return ["it ran before, and its result is %s, but the bytes of that are not in the store any more: they were deleted "
                "or damaged, or it ran with --scratch" % result]
    entries = differences.entries(data)
    gone = [path for (path, leaf), there in zip(entries.items(), store.has(entries.values())) if not there]
    return ["it ran before, and its result is %s, but %d of the %d parts of that are not in the store any more: %s"
            % (result, len(gone), len(entries), differences.listed(gone))]


def _elsewhere(settings, recipe: Recipe) -> _t.List[str]:
    """Other projects and stages of this cluster that have the result, as far as they are on this machine."""
    found = []
    for place, file in _other_places(settings):
        table = ResultTable(file, writable=False)
        try:
            if table.get(recipe.checksum) is not None:
                found.append(place)
        except SeamlessError:
            pass                            # somebody else's table need not be readable
        finally:
            table.close()
    return ["the same transformation has a result in %s; storage is not shared between projects and stages"
            % "; in ".join(found)] if found else []


def _other_places(settings) -> _t.Iterator[_t.Tuple[str, str]]:
    """(what to call it, file) of the result tables beside that of ``settings``."""
    if settings is None or settings.database_file is None or settings.cluster is not None and not settings.cluster.local:
        return
    top = settings.database_directory
    for _ in settings.storage_parts():
        top = os.path.dirname(top)
    until = time.monotonic() + SEARCH_S
    for folder, subfolders, files in os.walk(top):
        subfolders[:] = sorted(name for name in subfolders if not _PREFIX.match(name))      # those hold buffers
        if "seamless.db" in files and folder != settings.database_directory:
            parts = os.path.relpath(folder, top).split(os.sep)
            stage = parts.pop()[6:] if parts[-1].startswith("STAGE-") else None
            yield ("project '%s'%s" % (":".join([parts[0], "/".join(parts[1:])]) if parts[1:] else parts[0],
                                       ", stage '%s'" % stage if stage else ""), os.path.join(folder, "seamless.db"))
        if time.monotonic() > until:
            return


# --- the nearest earlier run -----------------------------------------------------------------------------

class _Search:
    """Looks for the nearest earlier run of ``recipe``."""

    def __init__(self, session, recipe: Recipe, buffers: _t.Mapping[Checksum, bytes]):
        self.session, self.recipe, self.buffers = session, recipe, buffers
        self.wanted = {name: list(pin) for name, pin in recipe.pins.items()}
        self.code = (recipe.pins.get("code") or (None, None, None))[2]
        self.seen, self.is_late = 0, False

    def extent(self) -> str:
        """How far was looked."""
        return "(runs looked at: %s%d)" % ("the latest " if self.is_late else "", self.seen)

    def nearest(self) -> _t.Tuple[_t.Optional[Recipe], _t.List[str]]:
        """The nearest one or None, and what else there is to say."""
        best: _t.Dict[str, tuple] = {}      # code -> (inputs in common, minus age, transformation), the best of that code
        known = self.transformations()
        if known is None:
            return None, ["the database is one of Seamless 1.x, which cannot list what has run"]
        language = json.dumps(self.recipe.language).encode()
        for age, (name, data) in enumerate(known):
            if language not in data:
                continue
            pins = _pins(data, self.recipe.language)
            code = pins and pins.get("code", (0, 0, None))[2]
            if not is_checksum(code):
                continue
            common = sum(pins.get(key) == pin for key, pin in self.wanted.items() if key != "code")
            total = len(pins.keys() | self.wanted.keys()) - 1
            new = (common / (total or 1), -age, name)
            if code not in best or new > best[code]:
                best[code] = new
            if code == self.code and common == total - 1:
                break                       # one input differs: there can be nothing nearer
        chosen = self.choose(best)
        notes = ["only the latest %d runs were looked at, in %d s" % (self.seen, SEARCH_S)] if self.is_late else []
        return (recipe_of(self.session.supply.get(chosen)) if chosen else None), notes

    def transformations(self) -> _t.Optional[_t.Iterator[_t.Tuple[str, bytes]]]:
        """(checksum, buffer) of what has run, the last first, as long as there is time; None if that cannot be listed."""
        results = self.session.stores.results
        page = results.recent()
        return None if page is None else self._each(results, page)

    def _each(self, results, page):
        until = time.monotonic() + SEARCH_S
        while page:
            names = [Checksum(name) for _, name in page if is_checksum(name)]
            far = self.session.supply.get_many(names) if self.session.store.remote else None
            for n, name in enumerate(names):
                self.is_late = time.monotonic() > until
                if self.is_late:
                    return
                self.seen += 1
                data = self.session.store.peek(name) if far is None else far.get(name)
                if data is not None:
                    yield name, data
            page = results.recent(page[-1][0])

    def choose(self, best: _t.Mapping[str, tuple]) -> _t.Optional[Checksum]:
        """The transformation with the code, among those that are of the same function or command, that is nearest."""
        mine = self.text(self.code)
        ranked = sorted(best, key=lambda code: (code == self.code, best[code]), reverse=True)[:CODES]
        if self.session.store.remote:
            self.session.supply.get_many(ranked)        # all are in memory then
        scores = []
        for code in ranked:
            common, age, name = best[code]
            likeness = 1.0 if code == self.code else _likeness(mine, self.text(code), self.recipe.language, common > 0)
            if likeness is not None:
                scores.append((common + likeness, age, name))
        return Checksum(max(scores)[2]) if scores else None

    def text(self, checksum) -> str:
        data = self.buffers.get(checksum)
        try:
            return (self.session.supply.get(Checksum(checksum)) if data is None else data).decode("utf-8", "replace")
        except SeamlessError:
            return ""


def _pins(data: bytes, language: str) -> _t.Optional[_t.Dict[str, list]]:
    """The pins in a transformation buffer, unchecked; None if it is something else, or in another language."""
    try:
        value = json.loads(data)
        if value.pop("__language__") == language:
            return {key: pin for key, pin in value.items() if not key.startswith("__") and isinstance(pin, list) and len(pin) == 3}
    except (ValueError, AttributeError, KeyError, TypeError):
        pass                                # a damaged row may name anything
    return None


def _likeness(one: str, other: str, language: str, shares: bool) -> _t.Optional[float]:
    """How much two texts have in common, 0 to 1; None if they are not of the same function or command.

    ``shares``: the two runs have inputs in common.
    """
    words = [[word for word in _WORD.findall(text) if word not in _FRAME] for text in (one, other)]
    if not all(words):
        return None
    sets = [set(found) for found in words]
    likeness = 2 * len(sets[0] & sets[1]) / (len(sets[0]) + len(sets[1]))
    if language == "python":
        names = [match and match.group(1) for match in map(_DEF.search, (one, other))]
        same = names[0] == names[1] if any(names) else likeness >= 0.5
    else:
        same = words[0][0] == words[1][0] and (likeness >= 0.3 or shares)
    return likeness if same or likeness >= 0.7 and shares else None


# --- what differs ----------------------------------------------------------------------------------------

class _Comparison:
    """Says what differs between the earlier run ``old`` and ``new``."""

    def __init__(self, session, new: Recipe, old: Recipe, buffers: _t.Mapping[Checksum, bytes]):
        self.session, self.new, self.old, self.buffers = session, new, old, buffers
        self.is_shell = new.language != "python"

    def lines(self) -> _t.List[str]:
        """One or more lines for each difference."""
        new, old = self.new.pins, self.old.pins
        lines = self.code()
        added = {name: new[name] for name in new if name not in old}
        removed = {name: old[name] for name in old if name not in new}
        for name, pin in list(added.items()):
            former = next((other for other, was in removed.items() if was == pin), None)
            if former is not None:
                lines.append("%s: is called '%s' now" % (self.title(former, self.old), name))
                del removed[former], added[name]
        for name in new:
            if name in old and name != "code" and new[name] != old[name]:
                lines += self.pin(name)
        lines += ["%s: is new (%s)" % (self.title(name, self.new), self.shown(pin)) for name, pin in added.items()]
        lines += ["%s: is not there any more (was %s)" % (self.title(name, self.old), self.shown(pin)) for name, pin in removed.items()]
        if self.old.output != self.new.output:
            names = {"bytes": "the output", "deepfolder": "files"} if self.is_shell else {}
            lines.append("result: was %s, is %s" % tuple(names.get(recipe.output[1], recipe.output[1]) for recipe in (self.old, self.new)))
        return lines or ["only %s" % ", ".join(sorted(key.strip("_") for key in self.old.extra.keys() | self.new.extra.keys()))]

    def code(self) -> _t.List[str]:
        old, new = (recipe.pins["code"][2] for recipe in (self.old, self.new))
        if old == new:
            return []
        texts = [self.read(old), self.read(new)]
        if self.is_shell and None not in texts:         # the user's own lines, if something differs in those
            own = [_OWN.sub(b"", text) for text in texts]
            texts = own if own[0] != own[1] else texts
        return _changed_text("code", *texts)

    def pin(self, name: str) -> _t.List[str]:
        """What differs in one input that both have."""
        old, new = self.old.pins[name], self.new.pins[name]
        title = self.title(name, self.new)
        if old[:2] != new[:2]:
            was, now = (self.title(name, recipe).split(" ")[0] if self.is_shell else pin[1] or pin[0]
                        for recipe, pin in ((self.old, old), (self.new, new)))
            if was != now:
                return ["%s: was %s, is %s" % (title if self.is_shell else title + ", celltype", was, now)]
        if new[1] == "module":
            texts = [_module_text(self.read(pin[2])) for pin in (old, new)]
            if None not in texts and texts[0] != texts[1]:
                return _changed_text(title, *texts)
        lines = ["%s: was %s, is %s" % (title, self.shown(old), self.shown(new))]
        if is_deep_pin(self.new, name) and is_deep_pin(self.old, name):
            parts = [self.read(pin[2]) for pin in (old, new)]
            if None not in parts:
                lines += ["  " + line for line in differences.of_entries(*map(differences.entries, parts))]
        return lines

    def title(self, name: str, recipe: Recipe) -> str:
        """How the user calls an input."""
        celltype, subcelltype, _ = recipe.pins[name]
        if subcelltype == "module":
            return "globals" if name == "main" else "module '%s'" % name
        kind = {"str": "variable", "bytes": "file"}.get(celltype, "input") if self.is_shell else "argument"
        return "%s '%s'" % ("directory" if self.is_shell and is_deep_pin(recipe, name) else kind, name)

    def shown(self, pin) -> str:
        """A value if it is short, else a short checksum."""
        celltype, subcelltype, checksum = pin
        if checksum is None:
            return "None"
        data = self.read(checksum, 4096) if celltype not in DEEP and subcelltype is None else None
        text = None if data is None else differences.short_value(data, celltype)
        return differences.short(checksum) if text is None else text

    def read(self, checksum: Checksum, largest: int = 1 << 24) -> _t.Optional[bytes]:
        """The bytes, if they are there and not too many."""
        data = self.buffers.get(checksum)
        if data is None:
            data = self.session.supply.held(checksum)
        if data is None:
            data = self.session.store.get_small([checksum], largest, largest).get(checksum)
        return data if data is not None and len(data) <= largest else None


def _module_text(data: _t.Optional[bytes]) -> _t.Optional[str]:
    try:
        code = json.loads(data or b"")["code"]
        return code if isinstance(code, str) else "\n".join("# %s\n%s" % (name, code[name]["code"]) for name in sorted(code))
    except (ValueError, LookupError, TypeError):
        return None


def _changed_text(title: str, old, new) -> _t.List[str]:
    """The lines that differ between two texts (str, or bytes of one; None: not available)."""
    if old is None or new is None:
        return ["%s: differs, but %s text is not in the store any more" % (title, "the earlier" if old is None else "its")]
    old, new = (text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in (old, new))
    return [title + ":"] + ["  " + line for line in differences.of_lines(old, new)]
