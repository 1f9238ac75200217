"""The HTTP client: every status is an answer, no answer is an OSError, nothing goes through a proxy."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from escala import http_client


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent; /NUMBER with that status."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
        sent = {"method": self.command, "body": body, "headers": dict(self.headers)}
        self.send_response(int(self.path.strip("/") or 200))
        self.end_headers()
        self.wfile.write(json.dumps(sent).encode())

    do_GET = do_PUT = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_is_sent(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    plain = http_client.request(address, timeout_seconds=5).json()
    assert (plain["method"], plain["body"]) == ("GET", "")
    assert not {"Authorization", "Content-Type"} & plain["headers"].keys()
    sent = http_client.request(address, method="PUT", token="t", payload={"a": 1}, timeout_seconds=5).json()
    assert (sent["method"], json.loads(sent["body"])) == ("PUT", {"a": 1})
    assert (sent["headers"]["Authorization"], sent["headers"]["Content-Type"]) == (
        "Bearer t",
        "application/json",
    )


@pytest.mark.parametrize("status", [200, 204, 401, 404, 500])
def test_every_status_is_an_answer(address: str, status: int) -> None:
    answer = http_client.request(f"{address}/{status}", timeout_seconds=5)
    assert (answer.status, answer.succeeded) == (status, status < 300)
    assert status == 204 or answer.json()["method"] == "GET"


@pytest.mark.parametrize(
    "said", [None, b"", b"no HTTP\r\n\r\n", b"HTTP/1.1 500 no\r\nContent-Length: 9\r\n\r\nx"]
)
def test_no_answer_is_an_os_error(said: bytes | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1 << 16)
                peer.sendall(said or b"")

        if said is None:
            server.close()
        else:
            threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(OSError):  # noqa: PT011  its kinds are many, and nobody tells them apart
            http_client.request(url, timeout_seconds=5)
