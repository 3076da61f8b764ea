# SPDX-License-Identifier: Apache-2.0
"""A QUIC server that writes its id into its connection ids, and says it to whoever asks.

tests.netns.quic_server ADDRESS[,ADDRESS...] PORT SERVER_ID CERTIFICATE KEY
"""

from __future__ import annotations

import asyncio
import os
import sys

from aioquic.asyncio.server import serve
from aioquic.quic import connection
from aioquic.quic.configuration import QuicConfiguration

from tests.packets.quic import connection_id

ALPN = "shunt-test"
NONCE_BYTES = 8


class Random:
    """Stands for module `os` in aioquic, which takes connection ids from there."""

    def __init__(self, server_id: bytes) -> None:
        self.server_id = server_id
        self.id_bytes = 1 + len(server_id) + NONCE_BYTES

    def urandom(self, size: int) -> bytes:
        if size != self.id_bytes:
            return os.urandom(size)
        return connection_id(self.server_id, nonce=os.urandom(NONCE_BYTES))


async def main(addresses: str, port: str, server_id: str, certificate: str, key: str) -> None:
    """Serve until killed."""
    source = Random(bytes.fromhex(server_id))
    setattr(connection, "os", source)  # noqa: B010  mypy knows it as a module
    configuration = QuicConfiguration(
        is_client=False, alpn_protocols=[ALPN], connection_id_length=source.id_bytes
    )
    configuration.load_cert_chain(certificate, key)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.write(server_id.encode())
        writer.write_eof()

    tasks = set()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(answer(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for address in addresses.split(","):  # answers are from the one that was asked
        await serve(address, int(port), configuration=configuration, stream_handler=begin)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
