"""Many clients at once before the scripted engine: no wrong answer, and nothing left behind."""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_codec.inference import Sampling
from tests.server.scripted import CONTEXT, ScriptedLoop, script
from tests.server.serving import serving
from tests.server.soak import soak

SETTINGS = {"n": 2, "max_tokens": 80}
EXPECTED = {
    ((prompt, 2, 3), seed): [
        script((prompt, 2, 3), Sampling(seed=seed, **SETTINGS), sample)[0] for sample in range(2)
    ]
    for prompt in range(20)
    for seed in range(20)
}


def metric(server, name):
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                return sample.value
    raise KeyError(name)


def run(server, count, seed=0):
    counts = soak(server.url, EXPECTED, CONTEXT, count, SETTINGS, seed)
    for _ in range(100):
        if server.loop.open_requests == 0:
            break
        time.sleep(0.05)
    assert server.loop.open_requests == 0
    assert server.client.get("/health").status_code == 200
    return counts


def test_a_hundred_clients():
    with serving(ScriptedLoop(token_seconds=0.002)) as server:
        assert len(run(server, 100)) == 7


@pytest.mark.slow
def test_a_thousand_clients():
    with serving(ScriptedLoop(token_seconds=0.002), max_requests=4096) as server:
        sizes = []
        for seed in range(5):
            print(run(server, 1000, seed))
            sizes.append(metric(server, "process_resident_memory_bytes"))
        print(sizes)
        assert sizes[-1] < 1.1 * sizes[1]  # the first round fills pools and caches
