"""The server before a real engine with a small trained model: answers are those of the engine alone."""

import base64
import json
import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.inference import Engine, Sampling
from megatron_codec.inference.loop import EngineLoop
from megatron_codec.inference.server.text import to_text
from tests.distributed.launch import running, running_tool
from tests.forks import run_tool
from tests.server.serving import serving, until
from tests.server.soak import soak

TOOL = "run_text_generation_server"
SETTINGS = {"temperature": 1.1, "top_k": 200, "top_p": 0.97, "n": 2, "max_tokens": 40}


@pytest.fixture(scope="module")
def alone(trained):
    """The engine without a server."""
    return Engine.load(trained.folder)


@pytest.fixture(scope="module")
def server(trained):
    with serving(EngineLoop(Engine.load(trained.folder), 4096), load=trained.folder) as running:
        yield running


@pytest.fixture(scope="module")
def stream(corpus, alone):
    return alone.codec.encode(Image.open(next(iter(sorted(corpus.pictures.iterdir())))))


def busy(server):
    statistics = server.loop.statistics()
    return statistics.waiting + statistics.running


def complete(server, **body):
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_prompt_that_returns_is_not_computed_again(server, alone, stream):
    prompt = alone.prompt_ids(stream, 0.75)
    first, again = (complete(server, prompt=prompt, max_tokens=3, seed=seed)["usage"] for seed in (1, 2))
    whole = (len(prompt) - 1) // 32 * 32
    assert whole and again["prompt_tokens_details"]["cached_tokens"] == whole
    assert first["prompt_tokens_details"]["cached_tokens"] <= whole


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_completions_are_those_of_the_engine(server, alone, stream, ratio):
    prompt = alone.prompt_ids(stream, ratio)
    expected = alone.generate([prompt], Sampling(seed=3, **SETTINGS))
    text = to_text(alone.tokenizer.decode(prompt))
    for form in (prompt, text):
        reply = complete(server, prompt=form, seed=3, **SETTINGS, return_token_ids=True, logprobs=2)
        for choice, completion in zip(reply["choices"], expected, strict=True):
            assert choice["token_ids"] == completion.token_ids
            assert choice["finish_reason"] == completion.finish_reason
            assert choice["text"] == to_text(completion.stream[len(alone.tokenizer.decode(prompt)) :])
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(completion.logprobs, abs=1e-5)
            for top, token in zip(
                choice["logprobs"]["top_logprobs"], choice["logprobs"]["tokens"], strict=True
            ):
                assert 2 <= len(top) <= 3 and token in top


def test_logprobs_of_a_prompt_are_those_of_sampling_it(server, alone):
    prompt = alone.prompt_ids()
    body = {"prompt": prompt, "temperature": 1, "seed": 1, "max_tokens": 20, "logprobs": 1}
    [made] = complete(server, **body, return_token_ids=True)["choices"]
    body |= {"prompt": prompt + made["token_ids"], "max_tokens": 0, "echo": True}
    [scored] = complete(server, **body)["choices"]
    new = len(made["token_ids"])
    assert scored["logprobs"]["tokens"][-new:] == made["logprobs"]["tokens"]
    assert scored["logprobs"]["token_logprobs"][-new:] == pytest.approx(
        made["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert scored["logprobs"]["token_logprobs"][0] is None
    body = {"prompts": [to_text(b"\xff\xd8")], "tokens_to_generate": 5, "logprobs": True, "add_BOS": True}
    reply = server.client.put("/api", json=body).json()
    assert len(reply["logprobs"][0]) == len(reply["tokens"][0]) - 1


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-6, 1e300])
def test_extreme_temperatures(server, alone, temperature):
    settings = {"seed": 1, "max_tokens": 10}
    [choice] = complete(
        server, prompt=alone.prompt_ids(), temperature=temperature, **settings, return_token_ids=True
    )["choices"]
    if temperature < 1:
        [greedy] = alone.generate([alone.prompt_ids()], Sampling(temperature=0, **settings))
        assert choice["token_ids"] == greedy.token_ids


def test_pictures_are_those_of_the_engine(server, alone, stream):
    codec = alone.codec
    assert isinstance(codec, JpegCodec)
    upload = codec.to_file(stream)
    prompt = alone.prompt_ids(codec.encode(codec.decode(stream)), 0.5)
    expected = alone.generate([prompt], Sampling(seed=5, n=3))
    response = server.client.post(
        "/v1/images/edits", files={"image": upload}, data={"seed": "5", "n": "3", "prompt_ratio": "0.5"}
    )
    assert response.status_code == 200, response.text
    for item, completion in zip(response.json()["data"], expected, strict=True):
        assert base64.b64decode(item["b64_json"]) == codec.to_file(completion.stream)
        assert item["valid"] == codec.check(completion.stream).valid


def test_the_grammar(server, alone):
    prompt = alone.prompt_ids()
    body = {"prompt": prompt, "seed": 4, "n": 3, "temperature": 2, "return_token_ids": True}
    for constrain in (None, True, False):
        expected = alone.generate([prompt], Sampling(seed=4, n=3, temperature=2, constrain=constrain))
        choices = complete(server, **body, constrain=constrain, return_removed=True)["choices"]
        for choice, completion in zip(choices, expected, strict=True):
            assert choice["token_ids"] == completion.token_ids
            assert choice["removed"] == pytest.approx(completion.removed, abs=1e-5)
            assert choice["redrawn"] == completion.redrawn
            assert alone.codec.check(completion.stream).valid == (constrain is not False)
    for bad, message in (
        ([5, 6, 7], "prompt: byte 0 of its stream"),
        ([1, alone.tokenizer.eos], "token id"),
    ):
        response = server.client.post("/v1/completions", json={"prompt": bad, "max_tokens": 2})
        assert response.status_code == 400 and message in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "prompt"
    response = server.client.post("/v1/completions", json=body | {"constrain": True, "ignore_eos": True})
    assert response.status_code == 400 and response.json()["error"]["param"] == "constrain"
    metrics = server.client.get("/metrics").text
    for name in ("constrained_tokens_total", "removed_probability_total"):
        assert float(re.search(rf"\nmegatron_codec_{name} (\S+)", metrics)[1]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(server, alone, stream):
    body = {"prompt": alone.prompt_ids(), "ignore_eos": True, "n": 8, "stream": stream}
    before = server.loop.statistics().finished.get("cancelled", 0)
    if stream:
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        # It leaves when the request is being served, however long a busy machine takes until then.
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            until(lambda: busy(server) > 0)
    until(lambda: busy(server) == 0)
    assert server.loop.statistics().cache_used == 0
    until(lambda: server.loop.statistics().finished.get("cancelled", 0) == before + 8)


def run_soak(server, alone, count, seed=0):
    contexts = [alone.prompt_ids(), [5, 6, 7], [alone.tokenizer.bos], list(range(60))]
    keys = [(tuple(prompt), seed) for prompt in contexts for seed in range(8)]
    settings = SETTINGS | {"constrain": False}
    samplings = [Sampling(seed=seed, **settings) for _, seed in keys]
    made = alone.generate([prompt for prompt, _ in keys], samplings)
    n = SETTINGS["n"]
    expected = {key: [c.token_ids for c in made[i * n : (i + 1) * n]] for i, key in enumerate(keys)}
    counts = soak(server.url, expected, alone.config.seq_length, count, settings, seed)
    until(lambda: busy(server) == 0)
    assert server.loop.statistics().cache_used == 0
    return counts


def test_a_hundred_clients(server, alone):
    assert sum(run_soak(server, alone, 100).values()) == 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_clients(server, alone):
    for seed in range(3):
        print(run_soak(server, alone, 1000, seed))


@contextmanager
def started(checkpoint, output, *flags, count=1, launcher=None):
    """A server of `count` processes: these, its address, and what gives all that the first one printed."""
    arguments = ["--load", str(checkpoint), "--port", "0", *flags]
    by_itself = running_tool(TOOL, arguments, count, output)
    with (
        running([[*launcher, f"tools/{TOOL}.py", *arguments]], output) if launcher else by_itself as processes
    ):

        def printed():
            return (output / "output-0.txt").read_text()

        until(lambda: "serving" in printed() or processes[0].poll() is not None, 60)
        found = re.search(r"at (http://\S+),", printed())
        assert found, printed()
        yield processes, found.group(1), printed


def ask_for_long(url, prompt):
    """Asks for long samples; returns a future of the answer as soon as they are being made."""
    body = {"prompt": prompt, "seed": 1, "n": 4, "ignore_eos": True, "return_token_ids": True}
    future = ThreadPoolExecutor().submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
    until(lambda: "requests_running 1.0" in httpx.get(f"{url}/metrics").text, 20)
    return future


def test_sigterm_lets_requests_finish_and_exits_with_0(trained, alone, tmp_path):
    with started(trained.folder, tmp_path, "--served-model-name", "mine") as ([process], url, printed):
        answer = ask_for_long(url, alone.prompt_ids())
        process.send_signal(signal.SIGTERM)
        reply = answer.result().json()
        expected = alone.generate([alone.prompt_ids()], Sampling(seed=1, n=4, ignore_eos=True))
        assert [choice["token_ids"] for choice in reply["choices"]] == [c.token_ids for c in expected]
        assert reply["model"] == "mine"
        assert process.wait(20) == 0, printed()
        assert "shutting down" in printed()


def test_two_processes_serve_and_leave_when_one_dies(trained, alone, tmp_path):
    flags = ["--tensor-model-parallel-size", "2"]
    with started(trained.folder, tmp_path, *flags, count=2) as ([process, other], url, printed):
        prompt = alone.prompt_ids()
        body = {"prompt": prompt, "seed": 2, **SETTINGS, "return_token_ids": True}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        expected = alone.generate([prompt], Sampling(seed=2, **SETTINGS))
        assert [choice["token_ids"] for choice in reply["choices"]] == [c.token_ids for c in expected]
        answer = ask_for_long(url, prompt)
        other.kill()
        assert answer.result().status_code == 503, answer.result().text
        assert process.wait(30) == 1, printed()


@pytest.mark.slow
def test_all_processes_leave_after_sigterm(trained, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    flags = ["--pipeline-model-parallel-size", "2"]
    with started(trained.folder, tmp_path, *flags, launcher=torchrun) as ([process], url, printed):
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "constrain": False}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert "shutting down" in printed()
        assert "the engine has failed" not in printed()


@pytest.mark.parametrize("flags", [["--load", "nothing"], ["--load", "nothing", "--port", "70000"]])
def test_mistakes_of_the_command_line(flags):
    done = run_tool(TOOL, *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
