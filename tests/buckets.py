"""An S3 service on 127.0.0.1 and a plain HTTP server, for tests of remote stores."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "adapters"
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_service() -> Iterator[str]:
    """Yields host:port of an S3 service with one empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        make_bucket(f"{host}:{port}")
        yield f"{host}:{port}"
        drop_bucket(f"{host}:{port}")  # all services in one process have the same buckets
    finally:
        server.stop()


def make_bucket(address: str) -> None:
    client = _client(address)
    client.create_bucket(Bucket=BUCKET)
    client.close()


def drop_bucket(address: str) -> None:
    """Remove the bucket with all that is in it."""
    client = _client(address)
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)
    client.close()


@contextmanager
def plain_http(folder: Path) -> Iterator[str]:
    """Yields host:port of a server that gives files of `folder` and no index pages."""
    handler = functools.partial(_Files, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Files(SimpleHTTPRequestHandler):
    def list_directory(self, path: object) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _client(address: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://{address}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
