"""Many clients at once, some of whom leave, send nonsense or ask for too much; other answers are compared.

`soak` takes the address of a server and, for each prompt and seed, the token ids that the engine gives alone.
"""

import asyncio
import json
import random
import resource
from collections import Counter
from contextlib import suppress

import httpx

MALFORMED = [
    b"",
    b"{",
    b'{"prompt": "\xff"}',
    b'{"prompt": [1], "temperature": NaN}',
    b'{"prompt": [1], "n": 0}',
    b'{"prompt": ' + b"[" * 3000 + b"}",
]
Expected = dict[tuple[tuple[int, ...], int], list[list[int]]]  # of a prompt and seed, the ids of its samples


def soak(url: str, expected: Expected, context: int, count: int, settings: dict, seed: int = 0) -> Counter:
    """Sends `count` requests at once. Returns how many of each kind there were; a wrong answer raises."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * count + 200)), hard))
    return asyncio.run(_soak(url, expected, context, count, settings, seed))


async def _soak(url, expected, context, count, settings, seed) -> Counter:
    rng = random.Random(seed)
    kinds = ["whole", "streamed", "left", "left streaming", "malformed", "oversized", "picture"]
    chosen = rng.choices(kinds, [25, 25, 15, 15, 10, 5, 5], k=count)
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        keys = list(expected)
        results = await asyncio.gather(
            *(
                _one(client, kind, random.Random(rng.random()), keys, expected, context, settings)
                for kind in chosen
            )
        )
    assert all(results)
    return Counter(chosen)


async def _one(client, kind, rng, keys, expected, context, settings) -> bool:
    await asyncio.sleep(rng.random() * 0.5)
    prompt, seed = rng.choice(keys)
    body = settings | {"prompt": list(prompt), "seed": seed, "return_token_ids": True}
    route = "/v1/completions"
    if kind == "malformed":
        headers = {"content-type": "application/json"}
        response = await client.post(route, content=rng.choice(MALFORMED), headers=headers)
        return response.status_code == 400
    if kind == "oversized":
        response = await client.post(route, json=body | {"prompt": [1] * rng.randrange(context, 5 * context)})
        return response.status_code == 400
    if kind == "picture":
        response = await client.post("/v1/images/generations", json={"seed": seed})
        return response.status_code == 200
    if kind == "left":
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.post(route, json=body), rng.random() * 0.5)
        return True
    if kind == "whole":
        response = await client.post(route, json=body)
        assert response.status_code == 200, response.text
        ids = [choice["token_ids"] for choice in response.json()["choices"]]
    else:
        ids = [[] for _ in expected[prompt, seed]]
        chunks = rng.randrange(20)
        async with client.stream("POST", route, json=body | {"stream": True}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    [choice] = json.loads(line.removeprefix("data: "))["choices"]
                    ids[choice["index"]] += choice["token_ids"]
                chunks -= 1
                if kind == "left streaming" and chunks < 0:
                    return True
    assert ids == expected[prompt, seed], f"another answer than alone, {kind}"
    return True
