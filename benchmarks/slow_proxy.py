"""A proxy on loopback that waits before it hands on each request, as the way to a bucket takes time.

    python -m benchmarks.slow_proxy PORT SERVER_PORT DELAY_S

It tells whoever connects and asks `COUNT` how many requests there were.
"""

from __future__ import annotations

import asyncio
import socket
import sys

_BLOCK_BYTES = 1 << 20
_COUNT = b"COUNT"
_METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ", b"PATCH ")


class Proxy:
    """Hands on bytes. A request begins where the client sends after the server has answered (HTTP/1.1)."""

    def __init__(self, server_port: int, delay_s: float) -> None:
        self._server_port, self._delay_s = server_port, delay_s
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client."""
        first = await reader.read(_BLOCK_BYTES)
        if first == _COUNT:
            writer.write(str(self.requests).encode())
            await writer.drain()
            writer.close()
            return
        to_read, to_write = await asyncio.open_connection("localhost", self._server_port)
        turn = {"is_new": True}

        async def requests() -> None:
            data = first
            while data:
                if turn["is_new"]:
                    turn["is_new"] = False
                    self.requests += data.startswith(_METHODS)  # a body that the server has asked for is none
                    await asyncio.sleep(self._delay_s)
                to_write.write(data)
                await to_write.drain()
                data = await reader.read(_BLOCK_BYTES)
            to_write.close()

        async def answers() -> None:
            while data := await to_read.read(_BLOCK_BYTES):
                turn["is_new"] = True
                writer.write(data)
                await writer.drain()
            writer.close()

        await asyncio.gather(requests(), answers(), return_exceptions=True)


async def main(port: int, server_port: int, delay_s: float) -> None:
    """Serves until the process ends."""
    server = await asyncio.start_server(Proxy(server_port, delay_s).serve, "localhost", port)
    await server.serve_forever()


def requests(port: int) -> int:
    """How many requests the proxy at this port has handed on."""
    with socket.create_connection(("localhost", port)) as asked:
        asked.sendall(_COUNT)
        return int(asked.recv(100))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
