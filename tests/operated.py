"""What tests of an operated server need: certificates, and a look at its log and its spans."""

import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trustme
from collector import Collector
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from fake_engine import wait_until
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PASSWORD = "of the key"


@dataclass(frozen=True)
class Operated:
    """A running server: `api` has key and certificates, and asks at the proxy's path."""

    url: str
    api: httpx.Client
    trusting: ssl.SSLContext
    log: Path
    collector: Collector

    def lines(self, request_id: str) -> list[dict[str, Any]]:
        """What was logged about a request, which is told after its answer has gone."""

        def about() -> list[dict[str, Any]]:
            logged = [json.loads(line) for line in self.log.read_text().splitlines()]
            return [line for line in logged if line.get("request_id") == request_id]

        wait_until(lambda: any("status" in line for line in about()))
        return about()

    def span(self, request_id: str) -> Span:
        wait_until(lambda: self.collector.span(request_id) is not None)
        span = self.collector.span(request_id)
        assert span is not None
        return span


def certificates(folder: Path) -> ssl.SSLContext:
    """Files for the server, whose key has a password; gives what its client trusts and shows."""
    authority = trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client.example")
    for number, blob in enumerate(server.cert_chain_pems):
        blob.write_to_path(str(folder / "cert.pem"), append=number > 0)
    key = load_pem_private_key(server.private_key_pem.bytes(), None)
    encryption = BestAvailableEncryption(PASSWORD.encode())
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    (folder / "key.pem").write_bytes(encrypted)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    client.configure_cert(trusting)
    return trusting
