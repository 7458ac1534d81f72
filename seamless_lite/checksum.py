"""``Checksum``: the name of some bytes.

A checksum is SHA-256 over the raw bytes, as 64 lowercase hex digits: no salt, no length, no type
(compat/identity.md section 1), so equal bytes have one name whatever they stand for.
"""
import hashlib
import os

from .errors import ChecksumError

HEX = frozenset("0123456789abcdef")
CHUNK = 1 << 20


def is_checksum(text) -> bool:
    """True for a ``str`` of 64 hexadecimal digits, upper or lower case."""
    return isinstance(text, str) and len(text) == 64 and HEX.issuperset(text.lower())


class Checksum(str):
    """64 lowercase hex digits; upper case is accepted and normalised.

    Raises ``ChecksumError`` (a ``ValueError``) for anything else.
    """
    __slots__ = ()

    def __new__(cls, text):
        if isinstance(text, Checksum):
            return text
        if isinstance(text, bytes) and len(text) == 32:
            text = text.hex()
        if not is_checksum(text):
            raise ChecksumError("%.80r is not a checksum: a checksum is 64 hexadecimal digits" % (text,))
        return str.__new__(cls, text.lower())

    @classmethod
    def of(cls, data) -> "Checksum":
        """The checksum of ``data`` (bytes-like)."""
        return str.__new__(cls, hashlib.sha256(data).hexdigest())

    @classmethod
    def of_file(cls, path) -> "Checksum":
        """The checksum of the content of the file ``path``, read in pieces.  Raises ``OSError``."""
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise") and os.fstat(file.fileno()).st_size > CHUNK:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            piece = memoryview(bytearray(CHUNK))
            while True:
                n = file.readinto(piece)
                if not n:
                    return str.__new__(cls, digest.hexdigest())
                digest.update(piece[:n])

    def hex(self) -> str:
        """The 64 digits as a plain ``str``."""
        return str(self)
