"""A server in a thread of the tests, over real HTTP on a free port."""

import asyncio
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from megatron_codec.inference.server.serve import listen, run
from megatron_codec.inference.server.settings import ServerConfig


@dataclass
class Serving:
    """A running server: its address, engine, and a client."""

    url: str
    loop: object
    client: httpx.Client
    stop: object
    result: list


@contextmanager
def serving(loop, **settings):
    """Runs a server in front of `loop`; ends it afterwards, which has to take no more than the grace."""
    config = ServerConfig(**{"load": Path("runs/checkpoint"), "grace_seconds": 5} | settings)
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    started, result, handles = threading.Event(), [], []

    async def main():
        stop = asyncio.Event()
        handles.extend([asyncio.get_running_loop(), stop])
        started.set()
        result.append(await run(loop, config, listener, stop))

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    started.wait()
    event_loop, stop = handles

    def end():
        if thread.is_alive():
            event_loop.call_soon_threadsafe(stop.set)

    transport = httpx.HTTPTransport(retries=5)  # until it listens
    with httpx.Client(base_url=url, timeout=60, transport=transport) as client:
        headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        client.headers.update(headers)
        for _ in range(100):
            try:
                client.get("/health")
                break
            except httpx.ConnectError:
                threading.Event().wait(0.05)
        try:
            yield Serving(url, loop, client, end, result)
        finally:
            end()
            thread.join(30)
            assert not thread.is_alive(), "the server does not end"


def until(condition, seconds=30.0):
    """Waits for a condition. Returns how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it does not happen"
        time.sleep(0.002)
    return time.monotonic() - started
