"""Many streams over one pair of pipes: how one ssh carries everything where connections cannot be shared or forwarded.

The file runs at both ends.  At the far end it is a program of its own (so it imports nothing of ours and runs on
Python 3.6): it says ``MARK`` and then frames pass on its standard input and output until the input ends.
At the near end ``tunnel`` uses ``Link``.

A frame is a kind, the number of a channel, a length, and so many bytes.  The near end opens channels: OPEN says what
to connect there, as JSON ({"unix": path}, {"tcp": [host, port]} or {"run": argv}, a child whose standard input and
output the channel is).  DATA is for the socket at the other end, END says that no more will come, RESET
that the socket is gone (with a reason), ACK that so many bytes were taken.  No side sends more than ``WINDOW``
bytes that were not taken yet, so a slow reader holds up its own channel and nothing else.
"""
import collections
import contextlib
import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys

MARK = b"@seamless relay@"
WINDOW = 1 << 21
PIECE = 1 << 17
QUEUE = 1 << 20             # while so much waits for the pipe, nothing more is read from sockets
OPEN, DATA, END, RESET, ACK = range(5)
HEAD = struct.Struct(">BII")


class Channel:
    """One socket at our end and what is on its way to it."""

    def __init__(self, number, sock):
        sock.setblocking(False)
        self.number, self.sock = number, sock
        self.waiting = collections.deque()      # for the socket
        self.credit = WINDOW                    # what we may still send
        self.taken = 0                          # what the socket took, not yet acknowledged
        self.connecting = False
        self.read_all = False                   # the socket has no more for us
        self.ending = False                     # nothing more comes for the socket
        self.shut = False


class Link:
    """The frames of one pair of pipes.  ``run`` is the only thread that touches it."""

    def __init__(self, incoming, outgoing):
        self.incoming, self.outgoing = incoming, outgoing
        for fd in (incoming, outgoing):
            os.set_blocking(fd, False)
        self.channels = {}
        self.watched = {}           # further descriptors to wait for -> what to call
        self._received = bytearray()
        self._queue, self._queued = collections.deque(), 0

    def run(self):
        """Until the other end is gone."""
        try:
            while self._turn():
                pass
        finally:
            for channel in list(self.channels.values()):
                channel.sock.close()
            self.channels.clear()

    def add(self, number, sock, opening=None):
        """A new channel; at the near end with what the other end shall connect."""
        channel = self.channels[number] = Channel(number, sock)
        if opening is not None:
            self.send(OPEN, number, json.dumps(opening).encode("ascii"))
        return channel

    def opened(self, number, what):
        """The other end wants a channel: connect it, or say why not."""
        self.send(RESET, number, b"this end opens nothing")

    def refused(self, number, reason):
        """The other end could not connect a channel, or lost it."""

    def send(self, kind, number, data=b"", length=None):
        """Queue a frame."""
        self._queue.append(HEAD.pack(kind, number, len(data) if length is None else length))
        if data:
            self._queue.append(data)
        self._queued += HEAD.size + len(data)

    def _turn(self):
        poll, by_fd, room = select.poll(), {}, self._queued < QUEUE
        poll.register(self.incoming, select.POLLIN)
        if self.outgoing != self.incoming or self._queue:
            poll.register(self.outgoing, (select.POLLOUT if self._queue else 0)
                          | (select.POLLIN if self.outgoing == self.incoming else 0))
        for fd in self.watched:
            poll.register(fd, select.POLLIN)
        for channel in self.channels.values():
            want = select.POLLOUT if channel.waiting or channel.connecting else 0
            if room and channel.credit > 0 and not channel.read_all and not channel.connecting:
                want |= select.POLLIN
            if want:
                by_fd[channel.sock.fileno()] = channel
                poll.register(channel.sock, want)
        for fd, event in poll.poll():
            if fd in self.watched:
                self.watched[fd]()
            elif fd in by_fd:
                if by_fd[fd].number in self.channels:
                    self._serve(by_fd[fd], event)
            else:
                if fd == self.outgoing and event & ~select.POLLIN:
                    if not event & select.POLLOUT and fd != self.incoming or not self._flush():
                        return False
                if fd == self.incoming and event & ~select.POLLOUT and not self._receive():
                    return False
        return True

    # --- the pipes ---

    def _flush(self):
        try:
            while self._queue:
                pieces = [self._queue[n] for n in range(min(len(self._queue), 32))]
                sent = os.writev(self.outgoing, pieces)
                self._queued -= sent
                while sent:
                    piece = self._queue.popleft()
                    if len(piece) > sent:
                        self._queue.appendleft(memoryview(piece)[sent:])
                    sent -= min(sent, len(piece))
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _receive(self):
        try:
            data = os.read(self.incoming, 1 << 18)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._received += data
        start, view = 0, memoryview(self._received)
        while len(view) - start >= HEAD.size:
            kind, number, length = HEAD.unpack_from(view, start)
            end = start + HEAD.size + (length if kind != ACK else 0)
            if len(view) < end:
                break
            self._frame(kind, number, length, bytes(view[start + HEAD.size:end]))
            start = end
        view.release()
        del self._received[:start]
        return bool(data)

    def _frame(self, kind, number, length, data):
        if kind == OPEN:
            self.opened(number, json.loads(data.decode("ascii")))
            return
        channel = self.channels.get(number)
        if channel is None:
            return                      # closed here, and the other end does not know yet
        if kind == DATA:
            channel.waiting.append(data)
        elif kind == ACK:
            channel.credit += length
        elif kind == END:
            channel.ending = True
        elif kind == RESET:
            self.refused(number, data.decode("utf-8", "replace"))
            self._drop(channel)
            return
        if kind != ACK and not channel.connecting:
            self._deliver(channel)

    # --- the sockets ---

    def _serve(self, channel, event):
        if channel.connecting:
            error = channel.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self.reset(channel, os.strerror(error))
                return
            channel.connecting = False
        if event & ~select.POLLIN and not self._deliver(channel):
            return
        if event & ~select.POLLOUT and not channel.read_all:
            self._take(channel)

    def _take(self, channel):
        """Read from the socket for the other end."""
        try:
            data = channel.sock.recv(min(PIECE, channel.credit)) if channel.credit > 0 else None
        except BlockingIOError:
            return
        except OSError as exc:
            self.reset(channel, exc.strerror)
            return
        if data:
            channel.credit -= len(data)
            self.send(DATA, channel.number, data)
        elif data is not None:
            channel.read_all = True
            self.send(END, channel.number)
            self._finish(channel)

    def _deliver(self, channel):
        """Give the socket what waits for it; False if the channel is gone."""
        try:
            while channel.waiting:
                sent = channel.sock.send(channel.waiting[0])
                channel.taken += sent
                if sent == len(channel.waiting[0]):
                    channel.waiting.popleft()
                else:
                    channel.waiting[0] = memoryview(channel.waiting[0])[sent:]
        except BlockingIOError:
            pass
        except OSError as exc:
            self.reset(channel, exc.strerror)
            return False
        if channel.taken >= WINDOW // 4:
            self.send(ACK, channel.number, length=channel.taken)
            channel.taken = 0
        return self._finish(channel)

    def _finish(self, channel):
        """Pass on the end of the stream; forget the channel when both directions ended.  False if it is gone."""
        if channel.ending and not channel.waiting and not channel.shut:
            channel.shut = True
            with contextlib.suppress(OSError):
                channel.sock.shutdown(socket.SHUT_WR)
        if channel.shut and channel.read_all:
            self._drop(channel)
            return False
        return True

    def reset(self, channel, reason):
        """Give the channel up and tell the other end."""
        self.send(RESET, channel.number, str(reason).encode("utf-8"))
        self._drop(channel)

    def _drop(self, channel):
        if self.channels.pop(channel.number, None):
            channel.sock.close()


class Far(Link):
    """The end that connects what the near end asks for."""

    def __init__(self, incoming, outgoing):
        Link.__init__(self, incoming, outgoing)
        self._children = []

    def opened(self, number, what):
        self._children = [child for child in self._children if child.poll() is None]
        try:
            if "run" in what:
                ours, theirs = socket.socketpair()
                with theirs:
                    self._children.append(subprocess.Popen(what["run"] or [sys.executable, "-ISc", LOADER], stdin=theirs, stdout=theirs))
                self.add(number, ours)
            elif "unix" in what:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(0.3)        # it takes no time unless the service hangs, and all others wait meanwhile
                sock.connect(what["unix"])
                self.add(number, sock)
            else:
                family, kind, _, _, where = socket.getaddrinfo(what["tcp"][0], what["tcp"][1], 0, socket.SOCK_STREAM)[0]
                sock = socket.socket(family, kind)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setblocking(False)
                error = sock.connect_ex(where)
                if error not in (0, errno.EINPROGRESS):
                    raise OSError(error, os.strerror(error))
                self.add(number, sock).connecting = True
        except OSError as exc:
            self.send(RESET, number, str(exc.strerror or exc).encode("utf-8"))


#: How a Python program comes through its standard input, which stays open behind it.
LOADER = "import sys;i=sys.stdin.buffer;exec(i.read(int(i.readline())))"


def main():
    """The far end, until standard input ends."""
    os.write(1, b"\n" + MARK)
    Far(0, 1).run()


if __name__ == "__main__":
    main()
