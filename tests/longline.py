"""A long line to a service: what goes through comes out later, and round trips, bytes and connections are counted.

It can be cut: all connections break off at once, after so many bytes more in one direction.
"""
import asyncio
import threading
import time


class LongLine:
    """Listens at ``address``, a Unix socket in ``folder``, for the service at the Unix socket ``target``.

    ``turns``: how often a client began to speak after it had listened, which is the number of round trips, over all
    connections.
    """

    def __init__(self, folder, target, delay_s=0.025):
        self.address, self.delay_s = "unix://%s/line-%d" % (folder, time.monotonic_ns()), delay_s
        self._target = target.replace("unix://", "")
        self._cut_after = {}                # direction -> bytes
        self._writers = set()
        self.reset()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_unix_server(self._serve, self.address[7:], limit=1 << 20))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def reset(self):
        self.turns = self.connections = self.cuts = 0
        self.bytes = {"up": 0, "down": 0}

    def cut_after(self, direction, n_bytes):
        """Break all connections when ``n_bytes`` more have gone "up" or "down"; once."""
        self._cut_after[direction] = self.bytes[direction] + n_bytes

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(self._target, limit=1 << 20)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, far_writer}
        last = ["down"]
        try:
            await asyncio.gather(self._carry(reader, far_writer, "up", last), self._carry(far_reader, writer, "down", last))
        finally:
            self._writers -= {writer, far_writer}

    async def _carry(self, reader, writer, direction, last):
        line = asyncio.Queue()

        async def deliver():
            while True:
                due, data = await line.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                writer.write(data)
                try:
                    await writer.drain()
                except OSError:
                    break
            writer.close()
        delivering = asyncio.ensure_future(deliver())
        try:
            while True:
                data = await reader.read(1 << 18)
                if data and last[0] != direction:
                    last[0] = direction
                    self.turns += direction == "up"
                self.bytes[direction] += len(data)
                if self.bytes[direction] >= self._cut_after.get(direction, float("inf")):
                    self._cut(direction)
                    return
                line.put_nowait((time.monotonic() + self.delay_s, data))
                if not data:
                    return
        except OSError:
            line.put_nowait((0, b""))
        finally:
            await asyncio.wait([delivering])

    def _cut(self, direction):
        del self._cut_after[direction]
        self.cuts += 1
        for writer in self._writers:
            writer.transport.abort()

    def close(self):
        def stop():
            self._server.close()
            self._loop.stop()
        self._loop.call_soon_threadsafe(stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.close()
