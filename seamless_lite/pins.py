"""``Pins``: what ``seamless-gc`` keeps whatever the limits say.

A pin is a small file in the folder ``.pins`` of the buffer folder, called like the checksum.  Its first line is what the user
called it, the others are the transformations that yield it.  So pins belong to the store and to all who share it; making
or removing one is one operation of the file system.
"""
import os
import typing as _t

from .checksum import Checksum, is_checksum
from .durable import FOLDER_MODE, MISSING, make_folder, sync_and_close, sync_folder
from .errors import SeamlessError


class Pin(_t.NamedTuple):
    """``name``: what the user gave; ``makers``: transformations that yield it; ``made_s``: when, in seconds since 1970."""
    checksum: Checksum
    name: str
    makers: _t.Tuple[Checksum, ...]
    made_s: float


class Pins:
    """The pins of the buffer folder ``directory``."""

    def __init__(self, directory: str):
        self._folder = os.path.join(directory, ".pins")

    def add(self, checksum: Checksum, name: str, makers: _t.Iterable[str] = ()) -> None:
        """Pin it; durable on return.  Raises ``SeamlessError``."""
        path, aside = os.path.join(self._folder, checksum), os.path.join(self._folder, ".%s" % os.urandom(8).hex())
        try:
            if make_folder(self._folder, FOLDER_MODE):
                sync_folder(os.path.dirname(self._folder))
            try:
                with open(aside, "x", encoding="utf-8", errors="backslashreplace") as file:
                    file.write("\n".join([" ".join(name.split()), *makers, ""]))
                    file.flush()
                    sync_and_close(file)
                os.replace(aside, path)
            except BaseException:
                os.unlink(aside)
                raise
            sync_folder(self._folder)
        except OSError as exc:
            raise SeamlessError("the pin %s cannot be written: %s" % (path, exc.strerror)) from exc

    def remove(self, checksum: Checksum) -> bool:
        """Remove the pin; False if there was none.  Raises ``SeamlessError``."""
        try:
            os.unlink(os.path.join(self._folder, checksum))
            sync_folder(self._folder)
        except MISSING:
            return False
        except OSError as exc:
            raise SeamlessError("the pin of %s cannot be removed: %s" % (checksum, exc.strerror)) from exc
        return True

    def list(self) -> _t.List[Pin]:
        """All pins, the oldest first.  Raises ``SeamlessError``, for what cannot be read may be a pin."""
        pins = []
        try:
            for name in filter(is_checksum, os.listdir(self._folder)):
                try:
                    with open(os.path.join(self._folder, name), encoding="utf-8", errors="replace") as file:
                        given, *makers = file.read().split("\n")
                        pins.append(Pin(Checksum(name), given, tuple(map(Checksum, filter(is_checksum, makers))),
                                        os.fstat(file.fileno()).st_mtime))
                except MISSING:
                    pass                    # removed just now
        except MISSING:
            pass                            # nothing was ever pinned
        except OSError as exc:
            raise SeamlessError("the pins in %s cannot be read: %s" % (self._folder, exc.strerror)) from exc
        return sorted(pins, key=lambda pin: (pin.made_s, pin.checksum))
