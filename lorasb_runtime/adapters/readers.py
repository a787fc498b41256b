"""The beginning of one file, each way that a kind of file system gives it in one request.

A reader takes (file system, path, nbytes, seconds) and returns at most `nbytes` bytes. It must
not ask for a file's size or listing first: some file systems answer those from a cache.
"""

import os
from collections.abc import Callable
from typing import Any

import fsspec.asyn

from lorasb_runtime.adapters.failures import http_status

Reader = Callable[[Any, str, int, float], bytes]

PIECE = 1 << 16


def find_reader(fs: Any) -> Reader:
    """The reader for a file system; `read_range` is for all that are not special."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    special = {"file": read_local, "http": read_http, "hf": read_stream}
    return special.get(protocol, read_range)


def read_local(_: Any, path: str, nbytes: int, __: float) -> bytes:
    with open(path, "rb") as file:  # a buffer of `nbytes` would be far too large
        return file.read(min(nbytes, os.fstat(file.fileno()).st_size + 1))


def read_range(fs: Any, path: str, nbytes: int, seconds: float) -> bytes:
    """A ranged GET of S3 and its like."""
    more = {"timeout": seconds} if fs.async_impl else {}
    try:
        data: bytes = fs.cat_file(path, start=0, end=nbytes, **more)
    except OSError as error:
        if http_status(error) == 416:  # no such range: the file is empty
            return b""
        raise
    return data


def read_stream(fs: Any, path: str, nbytes: int, _: float) -> bytes:
    """Hugging Face's streaming file, the one that does not look into the listing cache.

    Its time limit is huggingface_hub's own (HF_HUB_DOWNLOAD_TIMEOUT).
    """
    try:
        with fs.open(path, "rb", block_size=0) as file:
            data: bytes = file.read(nbytes)
    except BaseException:
        fs.invalidate_cache()  # it also remembers that a repository was not there
        raise
    return data


def read_http(fs: Any, path: str, nbytes: int, seconds: float) -> bytes:
    """A plain GET that stops after `nbytes`: servers may ignore ranges, and caches must not."""

    async def get() -> bytes:
        session = await fs.set_session()
        headers = {**fs.kwargs.get("headers", {}), "Cache-Control": "no-cache"}
        options = {**fs.kwargs, "headers": headers}
        data = bytearray()
        async with session.get(fs.encode_url(path), **options) as response:
            response.raise_for_status()
            async for piece in response.content.iter_chunked(PIECE):
                data += piece
                if len(data) >= nbytes:
                    response.close()
                    break
        return bytes(data[:nbytes])

    found: bytes = fsspec.asyn.sync(fs.loop, get, timeout=seconds)
    return found
