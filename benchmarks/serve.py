"""The server with 16 clients beside its engine without HTTP, 85M parameters, bf16.

    python benchmarks/serve.py
    python benchmarks/serve.py --rounds 5

The load is benchmarks/generate.py's of 16 requests with prompts and lengths that differ. "engine" submits
them to the same `EngineLoop` from this process; "whole" and "streamed" send them over HTTP from another
process on the same machine, whose work counts against the server. Rounds are interleaved; a ratio is the
median over rounds of (the engine's seconds / the server's). Then a prompt of 10,000 tokens is sent, and short
ones while it is computed: their time to the first token, in the time that a chunk of the long one takes.
"""

import asyncio
import json
import multiprocessing
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from megatron_codec.errors import run_tool

LONG = 10_000  # tokens


@dataclass(frozen=True)
class Config:
    """Times the server beside its engine."""

    rounds: int = 3
    """Of each."""


def bodies(load, seed: int) -> list[dict]:
    """The requests of a load, as bodies of /v1/completions."""
    from benchmarks.generate import TOP_K, TOP_P

    return [
        {
            "prompt": prompt,
            "max_tokens": count,
            "ignore_eos": True,
            "top_k": TOP_K,
            "top_p": TOP_P,
            "seed": seed,
        }
        for prompt, count in zip(load.prompts, load.new_tokens, strict=True)
    ]


def without_http(loop, load, seed: int) -> float:
    """Seconds of the load without HTTP."""
    from megatron_codec.inference import Sampling

    prompts = [(body.pop("prompt"), Sampling(**body)) for body in bodies(load, seed)]
    started = time.perf_counter()
    requests = [loop.submit(prompt, sampling, lambda events: None) for prompt, sampling in prompts]
    for request in requests:
        request.finished.wait()
    return time.perf_counter() - started


def over_http(port: int, requests: list[dict]) -> float:
    """Seconds of requests sent at once; runs in another process, and does little but read."""

    async def send(body: dict) -> None:
        content = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += "Connection: close\r\n"
        writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status, last = await reader.readline(), b""
        while piece := await reader.read(65536):
            last = (last + piece)[-100:]
        assert b" 200 " in status and (not body["stream"] or b"[DONE]" in last), (status, last)
        writer.close()

    async def all_of_them() -> float:
        started = time.perf_counter()
        await asyncio.gather(*map(send, requests))
        return time.perf_counter() - started

    return asyncio.run(all_of_them())


def beside_a_long_prompt(port: int) -> tuple[float, list[float]]:
    """Seconds of a prompt of 10,000 tokens to its first token, and of short ones, one after the other, that
    are sent while it is computed; runs in another process."""

    async def first_token(prompt: list[int]) -> float:
        started = time.perf_counter()
        content = json.dumps({"prompt": prompt, "max_tokens": 1, "ignore_eos": True, "stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += "Connection: close\r\n"
        writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        while not (line := await reader.readline()).startswith(b"data: {"):
            assert line, "the answer ended before its first token"
        taken = time.perf_counter() - started
        writer.close()
        return taken

    async def both() -> tuple[float, list[float]]:
        long = asyncio.create_task(first_token([320, *(i * i % 251 for i in range(LONG - 1))]))
        await asyncio.sleep(0.2)
        waits: list[float] = []
        while not long.done():
            waits.append(await first_token([320, len(waits) % 256, *range(20)]))
        return await long, waits[:-1]  # the last one may have met no long prompt

    return asyncio.run(both())


def measure(config: Config) -> dict[str, float]:
    """Prints the table; returns the ratios."""
    from benchmarks.generate import Ours, loads
    from megatron_codec.inference.loop import EngineLoop
    from megatron_codec.inference.server.serve import SWITCH_SECONDS, listen, run
    from megatron_codec.inference.server.settings import ServerConfig

    engine = Ours().engine
    load = loads(engine.tokenizer.bos)["mixed"]
    loop, listener = EngineLoop(engine), listen("127.0.0.1", 0)
    port, stop = listener.getsockname()[1], asyncio.Event()
    sys.setswitchinterval(SWITCH_SECONDS)
    serving = asyncio.new_event_loop()
    server = run(loop, ServerConfig(Path("benchmark")), listener, stop)
    thread = threading.Thread(target=serving.run_until_complete, args=(server,), daemon=True)
    thread.start()
    kinds = ("engine", "whole", "streamed")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as client, tqdm(total=(config.rounds + 1) * len(kinds)) as bar:
        for number in range(config.rounds + 1):
            for kind in kinds:
                engine.scheduler.pool.forget_all()  # nothing runs now
                if kind == "engine":
                    taken = without_http(loop, load, number)
                else:
                    requests = [body | {"stream": kind == "streamed"} for body in bodies(load, number)]
                    taken = client.submit(over_http, port, requests).result()
                if number:
                    seconds[kind].append(taken)
                bar.update()
        engine.scheduler.pool.forget_all()
        long, waits = client.submit(beside_a_long_prompt, port).result()
    serving.call_soon_threadsafe(stop.set)
    thread.join()
    ratios: dict[str, float] = {}
    print(f"\n{load.title}")
    for kind in kinds:
        pairs = zip(seconds["engine"], seconds[kind], strict=True)
        ratios[kind] = round(statistics.median(engine / server for engine, server in pairs), 3)
        best = min(seconds[kind])
        print(
            f"  {kind:10} {load.tokens / best:8.0f} tokens/s {best:8.2f} s  {ratios[kind]:.2f} of the engine"
        )
    del ratios["engine"]
    chunk = long * engine.scheduler.prefill_chunk / LONG
    print(
        f"a prompt of {LONG:,} tokens takes {long:.2f} s beside {len(waits)} short ones, {chunk:.3f} s a "
        f"chunk; a short one waits {statistics.median(waits):.3f} s for its first token, "
        f"{max(waits):.3f} s at most"
    )
    ratios["longest wait in chunks"] = round(max(waits) / chunk, 2)
    return ratios


def main() -> None:
    print(json.dumps(measure(tyro.cli(Config, description=__doc__))))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run_tool(main)
