"""How the server behaves: keys, metrics, leaving clients, limits of time, shutting down, a failing engine."""

import json
import socket
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_codec.errors import UserError
from megatron_codec.inference import EngineConfig
from megatron_codec.inference.server.serve import listen
from megatron_codec.inference.server.settings import API_KEY_VARIABLE, ServerConfig
from tests.server.scripted import ScriptedLoop
from tests.server.serving import serving, until

LONG = {"prompt": [1], "ignore_eos": True}


def in_thread(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    return thread, results


def test_the_key_guards_every_route_but_health_and_the_page():
    with serving(ScriptedLoop(), api_key="secret") as server:
        paths = server.client.get("/openapi.json").json()["paths"]
        assert len(paths) >= 10
        routes = [(method.upper(), path) for path, operations in paths.items() for method in operations]
        routes += [("GET", "/docs"), ("GET", "/docs/swagger-ui.css"), ("GET", "/openapi.json")]
        routes += [("GET", "/nothing")]
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "\xff"},
        ):
            with httpx.Client(
                base_url=server.url, headers={k: v.encode("latin-1") for k, v in headers.items()}
            ) as c:
                for method, path in routes:
                    response = c.request(method, path.replace("{name}", "x"))
                    if path in ("/health", "/"):
                        assert response.status_code == 200
                    elif path == "/page/{name}":
                        assert response.status_code == 404
                    else:
                        assert response.status_code == 401, path
                        assert response.headers["www-authenticate"] == "Bearer"
                        assert response.json()["error"]["type"] == "authentication_error"
        assert server.client.post("/v1/completions", json={"prompt": [1], "max_tokens": 1}).status_code == 200
        assert server.client.get("/docs").status_code == 200


def test_the_key_may_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(API_KEY_VARIABLE, "of the environment")
    assert ServerConfig(tmp_path).key == "of the environment"
    assert ServerConfig(tmp_path, api_key="of the command line").key == "of the command line"
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    assert ServerConfig(tmp_path).key is None


def test_metrics(server):
    server.client.post("/v1/completions", json={"prompt": [1], "max_tokens": 5, "n": 2, "ignore_eos": True})
    server.client.post("/v1/completions", json={"prompt": [-1]})
    server.client.post("/v1/images/generations", json={"seed": 1})
    server.client.post("/v1/images/generations", json={"seed": 1, "max_tokens": 2})
    server.client.get("/somewhere/else")
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }

    def value(name, **labels):
        return values[(f"megatron_codec_{name}", *sorted(labels.items()))]

    assert value("http_requests_total", route="/v1/completions", status="200") == 1
    assert value("http_requests_total", route="/v1/completions", status="400") == 1
    assert value("http_requests_total", route="other", status="404") == 1
    assert value("http_request_seconds_count", route="/v1/completions") == 2
    assert value("time_to_first_token_seconds_count") == 4
    assert value("time_per_token_seconds_count") == 4
    assert value("samples_total", reason="length") == 3
    assert value("samples_total", reason="stop") == 1
    assert value("pictures_total", valid="yes") == 1
    assert value("pictures_total", valid="no") == 1
    assert value("engine_healthy") == 1
    assert value("requests_running") == value("requests_waiting") == 0
    assert value("generated_tokens_total") > 10
    assert value("cache_total_tokens") == 10_000
    assert all(family.documentation for family in families.values())


def test_models_and_page(server):
    reply = server.client.get("/v1/models").json()
    assert reply["object"] == "list"
    assert [model["id"] for model in reply["data"]] == ["checkpoint", "jpeglm"]
    assert server.client.get("/v1/models/jpeglm").json()["codec"]["name"] == "jpeg"
    plain = {"dtype": None, "weight_dtype": None, "canonical": False, "in_range": False}
    assert {name: reply["data"][0][name] for name in plain} == plain
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<!doctype html>" in page.text
    other = {"dtype": "bfloat16", "weight_dtype": "int8", "canonical": True, "in_range": True}
    settings = {"served_model_name": ("mine", "other"), "engine": EngineConfig(**other)}
    with serving(ScriptedLoop(), **settings) as named:
        said = named.client.get("/v1/models").json()["data"][0]
        assert {name: said[name] for name in ("id", *other)} == {"id": "mine"} | other
        for model in ("mine", "other", "checkpoint", "jpeglm", None):
            body = {"prompt": [1], "max_tokens": 1, "model": model}
            reply = named.client.post("/v1/completions", json=body).json()
            assert reply["model"] == (model or "mine")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "body", "requests"),
    [
        ("/v1/completions", LONG | {"n": 3}, 1),
        ("/v1/completions", LONG | {"prompt": [[1], [2], [3]]}, 3),
        ("/v1/images/generations", {"n": 2, "ignore_eos": True}, 1),
        ("/api", {"prompts": ["\u2801"], "tokens_to_generate": 399}, 1),
    ],
)
def test_a_client_that_leaves_frees_its_requests(slow_server, route, body, requests, stream):
    loop, address = slow_server.loop, slow_server.url.removeprefix("http://").split(":")
    content = json.dumps(body | {"stream": stream}).encode()
    head = (
        f"POST {route} HTTP/1.1\r\nHost: {':'.join(address)}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(head.encode() + content)
        until(lambda: loop.open_requests == requests)
        if stream and route != "/api":
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert loop.open_requests == requests
    # Within one step, of 10 ms, where they would take 4 s; the rest is for a busy machine.
    assert until(lambda: loop.open_requests == 0) < 2


def test_a_client_that_leaves_while_it_sends(slow_server, caplog):
    host, port = slow_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 99\r\n\r\n{")
    assert slow_server.client.get("/health").status_code == 200
    assert not caplog.records  # it is no error of the server's


def test_too_many_open_requests():
    with serving(ScriptedLoop(token_seconds=0.01, max_requests=2)) as server:
        threads = [in_thread(lambda: server.client.post("/v1/completions", json=LONG)) for _ in range(2)]
        until(lambda: server.loop.open_requests == 2)
        for body in (LONG, LONG | {"stream": True}):
            response = server.client.post("/v1/completions", json=body)
            assert response.status_code == 429 and response.headers["retry-after"]
            assert response.json()["error"]["type"] == "rate_limit_error"
        for thread, results in threads:
            thread.join()
            assert results[0].status_code == 200
        # all prompts of a request or none
        assert server.client.post("/v1/completions", json=LONG | {"prompt": [[1]] * 3}).status_code == 429
        until(lambda: server.loop.open_requests == 0)


def test_the_time_of_a_request():
    with serving(ScriptedLoop(token_seconds=0.01), request_seconds=0.3) as server:
        response = server.client.post("/v1/completions", json=LONG)
        assert response.status_code == 408 and response.headers["x-should-retry"] == "false"
        response = server.client.post("/v1/images/generations", json={"ignore_eos": True})
        assert response.status_code == 408
        with server.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == 408
        assert lines[-1] == "data: [DONE]"
        until(lambda: server.loop.open_requests == 0)

        def slowly():
            for _ in range(20):
                yield b" "
                time.sleep(0.05)

        headers = {"content-type": "application/json"}
        assert server.client.post("/v1/completions", content=slowly(), headers=headers).status_code == 408


def test_max_tokens_of_the_server():
    with serving(ScriptedLoop(), max_tokens=30) as server:
        for prompt, expected in (([1], 30), ([1] * 380, 20)):
            body = {"prompt": prompt, "ignore_eos": True}
            reply = server.client.post("/v1/completions", json=body).json()
            assert reply["usage"]["completion_tokens"] == expected


def test_shutting_down_lets_requests_finish():
    with serving(ScriptedLoop(token_seconds=0.005)) as server:
        body = LONG | {"max_tokens": 300}
        thread, results = in_thread(lambda: server.client.post("/v1/completions", json=body))
        until(lambda: server.loop.open_requests == 1)
        server.stop()
        until(lambda: server.client.get("/health").status_code == 503)
        response = server.client.post("/v1/completions", json=body)
        assert response.status_code == 503 and response.headers["retry-after"]
        assert server.client.get("/metrics").status_code == 200
        thread.join()
        assert results[0].status_code == 200
        assert results[0].json()["usage"]["completion_tokens"] == 300
    assert server.result == [0]


def test_shutting_down_cancels_what_takes_longer_than_the_grace():
    with serving(ScriptedLoop(token_seconds=0.05), grace_seconds=0.3) as server:
        thread, results = in_thread(lambda: server.client.post("/v1/completions", json=LONG))
        until(lambda: server.loop.open_requests == 1)
        server.stop()
        thread.join()
        assert results[0].status_code == 503
    assert server.result == [0]


def test_a_failing_engine():
    with serving(ScriptedLoop(token_seconds=0.01)) as server:
        thread, results = in_thread(lambda: server.client.post("/v1/completions", json=LONG))
        with server.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as streamed:
            until(lambda: server.loop.open_requests == 2)
            server.loop.fail(RuntimeError("a process died"))
            lines = [line for line in streamed.iter_lines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == 503
        thread.join()
        assert results[0].status_code == 503
        assert "a process died" not in results[0].text
        until(lambda: server.result)
    assert server.result == [1]


def test_one_failed_request_harms_no_other():
    with serving(ScriptedLoop(token_seconds=0.005)) as server:
        thread, results = in_thread(
            lambda: server.client.post("/v1/completions", json=LONG | {"max_tokens": 100})
        )
        other, others = in_thread(lambda: server.client.post("/v1/completions", json=LONG | {"prompt": [2]}))
        until(lambda: server.loop.open_requests == 2)
        [request] = [request for request, _ in server.loop._open.values() if request.prompt == (2,)]
        request.fail(ValueError("of this one"))
        other.join()
        assert others[0].status_code == 500
        thread.join()
        assert results[0].status_code == 200
        assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"port": 70000}, ["--port"]),
        ({"max_n": 0, "grace_seconds": -1.0}, ["--max-n", "--grace-seconds"]),
        ({"request_seconds": float("nan")}, ["--request-seconds"]),
        ({"api_key": "k\u00e9y"}, ["--api-key"]),
    ],
)
def test_faults_of_the_command_line(settings, names, tmp_path):
    faults = [str(fault) for fault in ServerConfig(tmp_path, **settings).faults()]
    assert len(faults) == len(names)
    assert all(fault.startswith(name) for fault, name in zip(faults, names, strict=True))


def test_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be listened on"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 0)
