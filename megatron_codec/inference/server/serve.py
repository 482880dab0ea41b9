"""What tools/run_text_generation_server.py does: a checkpoint, an engine in its thread, and uvicorn in front.

SIGTERM or Ctrl-C: new requests get 503, running ones finish within the grace, exit 0. When the engine fails,
open requests get 503 and the process leaves with status 1, so that whatever supervises it starts a new one.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from megatron_codec.errors import UserError, raise_all
from megatron_codec.inference.engine import Engine
from megatron_codec.inference.loop import EngineLoop
from megatron_codec.inference.server.app import create_app
from megatron_codec.inference.server.service import Service
from megatron_codec.inference.server.settings import ServerConfig

logger = logging.getLogger(__name__)
# The engine's thread gives the interpreter's lock back at each of its many short calls, and waits this long
# for it where the server's thread has work; 5 ms, the default, is a step of a small model.
SWITCH_SECONDS = 0.0005
WATCH_SECONDS = 0.2  # between looks at the engine
LAST_ANSWERS_SECONDS = 5.0  # for sending what is done by then


def serve(config: ServerConfig) -> int:
    """Serves until a signal comes or the engine fails; returns the exit status.

    Under torchrun the first process serves, and the others compute what it tells them.

    Raises:
        UserError: no checkpoint, values out of range, or an address that cannot be listened on.
    """
    raise_all(list(config.faults()))
    leads = os.environ.get("RANK", "0") == "0"
    # The address before the model, whose loading takes long.
    listener = listen(config.host, config.port) if leads else None
    engine = Engine.load(config.load, config.engine)
    if listener is None:
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends them to all; the first one says when
            signal.signal(number, signal.SIG_IGN)
        engine.follow()
        return 0
    loop = EngineLoop(engine, config.max_requests)
    sys.setswitchinterval(SWITCH_SECONDS)
    # Every broken upload would be a line in the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    return asyncio.run(_with_signals(loop, config, listener))


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not listening yet. Raises UserError where that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host} --port {port}", f"cannot be listened on: {error}", "take another, or --port 0"
        ) from error
    return listener


async def _with_signals(loop: EngineLoop, config: ServerConfig, listener: socket.socket) -> int:
    stop, interrupts = asyncio.Event(), 0

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        stop.set()
        if interrupts == 2:
            _say("ending running requests now")
            loop.hurry()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    # A second SIGTERM says nothing new: torchrun sends one after the terminal's SIGINT.
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted)
    return await run(loop, config, listener, stop)


async def run(loop: EngineLoop, config: ServerConfig, listener: socket.socket, stop: asyncio.Event) -> int:
    """Serves until `stop` is set (0) or the engine fails (1)."""
    app = create_app(loop, config)
    service: Service = app.state.service
    options = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(LAST_ANSWERS_SECONDS),
        ws="none",
    )
    server = _Server(options)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        _announce(service, config, listener)
        while loop.healthy and not stop.is_set() and not serving.done():
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(stop.wait(), WATCH_SECONDS)
        service.closing = loop.healthy
        if service.closing:
            grace = f"{config.grace_seconds:g} s, or until a second Ctrl-C"
            _say(f"shutting down; running requests have {grace}")
        else:
            logger.error("the engine has failed: %s", loop.failure)
        # Answers go on meanwhile: the engine's thread is waited for in another one.
        well = await asyncio.to_thread(loop.stop, config.grace_seconds)
    finally:
        server.should_exit = True
        await serving
    return 0 if well else 1


def _announce(service: Service, config: ServerConfig, listener: socket.socket) -> None:
    engine, url = service.engine, _url(listener)
    parallel, cache = config.engine, service.loop.statistics().cache_total
    _say(f"serving {', '.join(service.names)} from {config.load} at {url}, its routes at {url}/docs")
    _say(
        f"codec {engine.codec.to_dict()}, context {engine.config.seq_length} tokens, "
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}, "
        f"cache of {cache} tokens; {engine.memory} a process"
    )
    if config.key is None and not listener.getsockname()[0].startswith(("127.", "::1")):
        _say("warning: whoever reaches this address can use it; give --api-key")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say(line: str) -> None:
    print(line, flush=True)


class _Server(uvicorn.Server):
    """uvicorn, with signals left to `serve`: it would stop listening at once, and exit as killed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield
