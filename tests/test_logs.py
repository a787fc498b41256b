"""What an exception says of a request stays out of the log; all else is told."""

import io
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from fake_engine import FakeEngine, served

from lorasb_runtime.errors import EngineError
from lorasb_server.app import create_app
from lorasb_server.logs import JsonLines, TextLines, set_up_logs
from lorasb_server.settings import ServerConfig

SECRET = "Xylophone-Quagmire"


@pytest.fixture(params=[TextLines, JsonLines])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """All that is logged, in each of the forms."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(level)
    root.removeHandler(handler)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_after", [0, 3])
def test_a_failure_is_told_without_what_it_says(
    stream: bool, fail_after: int, engine: FakeEngine, log: io.StringIO
) -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as cause:
        engine.error = ValueError(f"cannot digest {SECRET}")
        engine.error.__cause__ = cause
    engine.fail_after = fail_after
    body = {"model": "pico", "prompt": SECRET, "stream": stream}
    headers = {"X-Request-Id": "failing"}
    with served(create_app(engine, None, ServerConfig("pico"))) as url:
        response = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
        assert response.status_code == (200 if stream and fail_after else 500)
        assert "internal error" in response.text and SECRET not in response.text
        assert response.headers["x-request-id"] == "failing"
    assert SECRET not in log.getvalue()
    for told in ("ValueError", "KeyError", "fake_engine.py", "failing"):
        assert told in log.getvalue()


def test_other_failures_are_told_in_full(log: io.StringIO) -> None:
    text = "out of memory"  # a traceback quotes the source, where no request is
    try:
        raise EngineError(text)
    except EngineError:
        logging.getLogger("lorasb_runtime.engines").exception("a step failed")
        logging.getLogger("asyncio").exception("Task failed\nwith %s", SECRET)
    ours, _, others = log.getvalue().partition("Task failed")
    assert "a step failed" in ours and "out of memory" in ours
    assert "EngineError" in others
    assert SECRET not in others and "out of memory" not in others


def test_json_lines_are_one_object_each() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "two\nlines %s", ("é",), None)
    record.facts = {"status": 200}
    line = json.loads(JsonLines().format(record))
    assert line["time"].endswith("Z")
    del line["time"]
    assert line == {"level": "warning", "logger": "x", "message": "two", "status": 200}
    assert "\n" not in JsonLines().format(record)


def test_the_level_is_that_of_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        set_up_logs("text", "debug")
        logging.getLogger("lorasb_server.x").debug("ours")
        logging.getLogger("botocore").debug("theirs")
        set_up_logs("text", "error")
        logging.getLogger("lorasb_server.x").warning("too much")
        logging.getLogger("botocore").warning("too much")
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
        for name in ("lorasb_runtime", "lorasb_server", "lorasb_tools"):
            logging.getLogger(name).setLevel(logging.NOTSET)
    assert capsys.readouterr().err == "DEBUG lorasb_server.x: ours\n"
