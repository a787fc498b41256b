"""Settings that are unknown, wrong or contradictory are refused in one line, by name."""

import sys
from pathlib import Path

import pytest
from conftest import Run
from fastapi import FastAPI

from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError
from lorasb_server.lifecycle import Lifecycle
from lorasb_server.run import run_server
from lorasb_server.settings import ListenConfig, Tls
from lorasb_server.settings.sources import read_settings


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        (
            "LORASB_MAX_QEUE",
            "1",
            "unknown variable LORASB_MAX_QEUE; did you mean LORASB_MAX_QUEUE?",
        ),
        ("LORASB_SOMETHING_ELSE", "", "unknown variable LORASB_SOMETHING_ELSE"),
        ("LORASB_SHOW_CONFIG", "1", "unknown variable LORASB_SHOW_CONFIG"),
        ("LORASB_PORT", "http", "LORASB_PORT: found 'http', input should be a valid integer"),
        ("LORASB_PORT", "65536", "LORASB_PORT: found '65536', input should be less than or equal"),
        ("LORASB_ALLOW_OPEN", "maybe", "LORASB_ALLOW_OPEN: found 'maybe', input should be a valid"),
        (
            "LORASB_KV_CACHE_GIB",
            "nan",
            "LORASB_KV_CACHE_GIB: found 'nan', input should be a finite",
        ),
        ("LORASB_LOG_FORMAT", "xml", "LORASB_LOG_FORMAT: found 'xml', input should be 'text' or"),
        ("LORASB_PIN", "[1", "LORASB_PIN: found '[1', value error, expected a list in JSON"),
        ("LORASB_ROOT_PATH", "llm/", "LORASB_ROOT_PATH: found 'llm/', string should match"),
        ("LORASB_CORS_ORIGIN", "https://a/,*", "LORASB_CORS_ORIGIN: found 'https://a/', string"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "a:4318", "OTLP_ENDPOINT: otlp-endpoint: found 'a:4318'"),
        ("LORASB_CONFIG", "gone.toml", "gone.toml: no such file"),
    ],
)
def test_a_wrong_variable_is_named(
    variable: str, value: str, complaint: str, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    status, out, err = command("serve", "--show-config")
    assert (status, out) == (2, "")
    assert err.startswith("lorasb: error: ") and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("max-qeue = 1", "unknown setting 'max-qeue'; did you mean max-queue?"),
        ("max_queue = 1", "unknown setting 'max_queue'; did you mean max-queue?"),
        ("config = 'x'", "unknown setting 'config'"),
        ("[engine]\nslots = 3", "engine: found {'slots': 3}, input should be 'torch'"),
        ("port = 'x'", "port: found 'x', input should be a valid integer"),
        ("slots = 1", "slots: found 1, input should be greater than or equal to 2"),
        ("pin = [1]", "pin: found 1, input should be a valid string"),
        ("max-queue = -1", "max-queue: found -1, input should be greater than or equal to 0"),
        ("port = ", "found no TOML ("),
    ],
)
def test_a_wrong_file_is_named(content: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "lorasb.toml"
    file.write_text(content)
    with pytest.raises(InputError) as refusal:
        read_settings({"config": str(file)})
    assert str(file) in str(refusal.value) and complaint in str(refusal.value)
    assert isinstance(refusal.value, FileFormatError) == ("TOML" in complaint)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="gone: no such file"):
        read_settings({"config": str(tmp_path / "gone")})
    with pytest.raises(InputError, match="cannot be read"):
        read_settings({"config": str(tmp_path)})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(FileFormatError, match="found no TOML"):
        read_settings({"config": str(tmp_path / "binary")})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "MODEL: expected one"),
        (("m", "--json"), "--json: only with --show-config"),
        (("m", "--ssl-keyfile", "k"), "--ssl-keyfile needs --ssl-certfile"),
        (("m", "--disk-cache-gib", "1"), "--disk-cache-gib needs --disk-cache"),
        (("m", "--pin", "a"), "--pin needs --basis"),
        (("m", "--vllm-arg", "seed=1"), "--vllm-arg: found 'seed=1' without --engine vllm"),
        (("m", "--engine", "vllm", "--merged", "a", "--basis", "b", "--adapters", "c"), "--merged"),
        (("m", "--request-timeout", "0"), "--request-timeout: found '0', input should be greater"),
        (("m", "--max-qeue", "1"), "No such option: --max-qeue"),
    ],
)
def test_flags_are_refused_in_one_line(
    words: tuple[str, ...], complaint: str, command: Run
) -> None:
    status, out, err = command("serve", *words)
    assert (status, out) == (2, "")
    assert err.startswith("lorasb: error: ") and complaint in err and err.count("\n") == 1


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    def load(lifecycle: Lifecycle) -> FastAPI:
        raise AssertionError("nothing is loaded for a server that cannot listen")

    empty = tmp_path / "empty.pem"
    empty.touch()
    for tls in (Tls(tmp_path / "gone.pem"), Tls(empty), Tls(empty, tmp_path / "key.pem")):
        with pytest.raises(InputError, match=f"TLS: cannot use {tls.certfile}"):
            run_server(load, ListenConfig(port=0, tls=tls))


def test_traces_need_their_extra(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lorasb_server.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    status, _, err = command("serve", "m", "--otlp-endpoint", "http://127.0.0.1:4318")
    assert status == 2 and "pip install 'lorasb[otel]'" in err and err.count("\n") == 1


def test_a_password_is_in_no_complaint(tmp_path: Path) -> None:
    file = tmp_path / "lorasb.toml"
    file.write_text("ssl-keyfile-password = 4711")
    with pytest.raises(InputError) as refusal:
        read_settings({"config": str(file)})
    assert "ssl-keyfile-password: input should be" in str(refusal.value)
    assert "4711" not in str(refusal.value)
