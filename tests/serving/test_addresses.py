"""Which address is asked, through which proxy, and what is no endpoint of corank."""

from __future__ import annotations

import socket

import pytest

from features.errors import CorankError
from serving.client import NoEndpointError, RankingClient
from serving.deploy import start
from serving.ports import endpoint_url
from serving.settings import ServingConfig, ServingSettings
from tests.servers import http_server


def test_client_and_start_explain_themselves(settings: ServingSettings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with RankingClient(f"http://127.0.0.1:{port}") as client, pytest.raises(CorankError, match="corank serve"):
            client.healthz()
        taken.listen()
        with pytest.raises(CorankError, match=f"cannot listen on 127.0.0.1:{port}"):
            start(settings, port=port)


def own_address() -> str:
    """This machine's address of the network, as others reach it; on a machine without any, loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


OWN_ADDRESS = own_address()


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:{}"),
        ("0.0.0.0", "http://127.0.0.1:{}"),
        ("::1", "http://[::1]:{}"),
        ("::", "http://[::1]:{}"),
        ("localhost", "http://localhost:{}"),
        (OWN_ADDRESS, f"http://{OWN_ADDRESS}:{{}}"),
    ],
)
def test_this_machines_own_endpoint_is_asked_without_a_proxy(proxies: None, host: str, url: str) -> None:
    with http_server(host, '{"status": "ok"}') as (asked, port):
        assert endpoint_url(host, port) == url.format(port)
        with RankingClient(endpoint_url(host, port)) as client:
            assert client.healthz() == {"status": "ok"}
    assert asked == ["/healthz"]


def test_an_address_of_ipv6_may_be_written_as_in_a_url() -> None:
    assert ServingConfig(host="[::1]").host == "::1"


def test_other_machines_are_asked_through_the_proxy(monkeypatch: pytest.MonkeyPatch, proxies: None) -> None:
    with pytest.raises(CorankError, match="variables that name a proxy"):
        RankingClient("http://models.example:8000")  # of socks5, a package that is not installed
    for name in ("all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name)
    with http_server("127.0.0.1", '{"status": "ok"}') as (asked, port):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        with RankingClient("http://models.example:8000") as client:
            assert client.healthz() == {"status": "ok"}
    assert asked == ["http://models.example:8000/healthz"]


@pytest.mark.parametrize("answer", ["<html>", "[1]", '{"error": "of another kind"}'])
def test_what_is_no_endpoint_of_corank_is_said_so(answer: str) -> None:
    with (
        http_server("127.0.0.1", answer) as (_, port),
        RankingClient(f"http://127.0.0.1:{port}") as client,
        pytest.raises(NoEndpointError, match="this is no endpoint of corank"),
    ):
        client.model()


def test_an_address_that_is_none_is_said_so() -> None:
    with pytest.raises(CorankError, match="Correct the address"):
        RankingClient("http://::1:8000")
    with RankingClient("localhost:8000") as client, pytest.raises(CorankError, match="unsupported protocol"):
        client.healthz()
