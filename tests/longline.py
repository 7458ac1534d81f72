"""A long line to a service: what goes in comes out later, and round trips, bytes and connections are counted.

It can be cut: all connections break off at once, after so many bytes more in one direction.
"""
import contextlib
import itertools
import queue
import socket
import threading
import time

_numbers = itertools.count()


class LongLine:
    """Listens at ``address``, a Unix socket in ``folder``, for the service at the Unix socket ``target``.

    ``turns``: how often a client began to speak after it had listened, which is the number of round trips, over all
    connections.
    """

    def __init__(self, folder, target, delay_s=0.025):
        path = "%s/line-%d" % (folder, next(_numbers))
        self.address, self.delay_s = "unix://" + path, delay_s
        self._target = target.replace("unix://", "")
        self._cut_after = {}                # direction -> bytes
        self._lock = threading.Lock()
        self._socks = set()
        self.reset()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen(100)
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self):
        self.turns = self.connections = self.cuts = 0
        self.bytes = {"up": 0, "down": 0}

    def cut_after(self, direction, n_bytes):
        """Break all connections when ``n_bytes`` more have gone "up" or "down"; once."""
        self._cut_after[direction] = self.bytes[direction] + n_bytes

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, far, last = self._listening.accept()[0], socket.socket(socket.AF_UNIX), ["down"]
                try:
                    far.connect(self._target)
                except OSError:
                    near.close()
                    continue
                self.connections += 1
                self._socks = self._socks | {near, far}
                for source, target, direction in ((near, far, "up"), (far, near, "down")):
                    line = queue.Queue()
                    threading.Thread(target=self._take, args=(source, line, direction, last), daemon=True).start()
                    threading.Thread(target=self._deliver, args=(target, line), daemon=True).start()

    def _take(self, source, line, direction, last):
        """Read, and put what was read on the way."""
        data = b"x"
        while data:
            try:
                data = source.recv(1 << 18)
            except OSError:
                data = b""
            with self._lock:
                if data and last[0] != direction:
                    last[0] = direction
                    self.turns += direction == "up"
                self.bytes[direction] += len(data)
                if self.bytes[direction] >= self._cut_after.get(direction, float("inf")):
                    self._cut(direction)
                    data = b""
            line.put((time.monotonic() + self.delay_s, data))

    @staticmethod
    def _deliver(target, line):
        data = b"x"
        while data:
            due, data = line.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                target.sendall(data)
            except OSError:
                data = b""
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _cut(self, direction):
        self._cut_after.pop(direction, None)
        self.cuts += 1
        self._break()

    def _break(self):
        socks, self._socks = self._socks, set()
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._break()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.close()
