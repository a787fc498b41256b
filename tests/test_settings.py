"""Settings: one name in three places, one order among them, nothing unknown, nothing unread."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from lorasb_server.settings import Settings
from lorasb_server.settings.declared import flag_of, key_of, variable_of
from lorasb_server.settings.shown import as_table
from lorasb_server.settings.sources import read_settings

ROOT = Path(__file__).parent.parent
# For each setting a value that is not its default, as it is written in the file.
VALUES: dict[str, Any] = {
    "model": "m",
    "basis": "b.safetensors",
    "adapters": "s3://bucket/store",
    "pack": "p.safetensors",
    "merged": "alice",
    "served_model_name": "shown",
    "host": "::1",
    "port": 0,
    "allow_open": True,
    "api_keys": "keys.json",
    "ssl_certfile": "cert.pem",
    "ssl_keyfile": "key.pem",
    "ssl_keyfile_password": "hush-hush",
    "ssl_ca_certs": "ca.pem",
    "cors_origin": ["https://a.example", "*"],
    "root_path": "/llm/v2",
    "refresh": 0.5,
    "stale": 0.0,
    "store_timeout": 5.0,
    "disk_cache": "cache",
    "disk_cache_gib": 1.5,
    "pin": ["alice", "team/bob"],
    "slots": 7,
    "engine": "vllm",
    "vllm_arg": ["enforce-eager", "seed=3"],
    "device": "cuda:1",
    "dtype": "float16",
    "max_model_len": 99,
    "max_num_seqs": 3,
    "max_batched_tokens": 44,
    "kv_cache_gib": 0.25,
    "prefix_cache_gib": 0.0,
    "max_queue": 0,
    "request_timeout": 12.5,
    "drain_timeout": 0.0,
    "log_format": "json",
    "log_level": "error",
    "otlp_endpoint": "http://127.0.0.1:4318",
}
# What goes with it, where a setting is not allowed alone.
WITH: dict[str, dict[str, Any]] = {
    "adapters": {"basis": "b"},
    "pack": {"basis": "b"},
    "merged": {"basis": "b", "adapters": "s"},
    "pin": {"basis": "b"},
    "vllm_arg": {"engine": "vllm"},
    "disk_cache_gib": {"disk_cache": "c"},
    **{
        f"ssl_{name}": {"ssl_certfile": "c"} for name in ("keyfile", "keyfile_password", "ca_certs")
    },
}


# Not together with the others, or not as a flag.
LEFT_OUT = ("model", "allow_open", "merged", "pin", "ssl_keyfile_password")


def as_flag(value: Any) -> Any:
    """As typer gives it."""
    return value if isinstance(value, bool | list) else str(value)


def as_variable(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def as_toml(values: dict[str, Any]) -> str:
    return "\n".join(f"{key_of(name)} = {json.dumps(value)}" for name, value in values.items())


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_is_the_same_by_flag_variable_and_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    company = WITH.get(name, {})
    by_flag = read_settings({name: as_flag(VALUES[name]), **company})
    file = tmp_path / "lorasb.toml"
    file.write_text(as_toml({name: VALUES[name]}))
    by_file = read_settings({"config": str(file), **company})
    monkeypatch.setenv(variable_of(name), as_variable(VALUES[name]))
    by_variable = read_settings(company)
    value = getattr(by_flag.settings, name)
    assert value != Settings.model_fields[name].default
    assert value == getattr(by_file.settings, name) == getattr(by_variable.settings, name)
    found = [sourced.origins[name] for sourced in (by_flag, by_file, by_variable)]
    assert found == [flag_of(name), str(file), variable_of(name)]


def test_every_setting_is_tried() -> None:
    assert {*VALUES, "config"} == set(Settings.model_fields)


def test_a_variable_may_be_a_list_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASB_ENGINE", "vllm")
    monkeypatch.setenv("LORASB_VLLM_ARG", '["a={\\"b\\": 1, \\"c\\": 2}", "d"]')
    assert read_settings({}).settings.vllm_arg == ('a={"b": 1, "c": 2}', "d")


def test_flags_win_over_variables_over_the_file_over_defaults(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lorasb.toml"
    four = ("slots", "max_queue", "max_num_seqs", "port")
    file.write_text(as_toml({name: 10 for name in four[:3]} | {"cors-origin": ["https://x"]}))
    monkeypatch.setenv("LORASB_CONFIG", str(file))
    monkeypatch.setenv("LORASB_MAX_QUEUE", "20")
    monkeypatch.setenv("LORASB_MAX_NUM_SEQS", "20")
    monkeypatch.setenv("LORASB_DTYPE", "")  # an empty variable is none
    words = ("--max-num-seqs", 30, "--no-allow-open", "--json")
    status, out, _ = command("serve", "--show-config", *words)
    assert status == 0
    shown = json.loads(out)
    assert [shown[key_of(name)]["value"] for name in four] == [10, 20, 30, 8000]
    assert shown["slots"]["from"] == str(file)
    assert shown["max-queue"]["from"] == "LORASB_MAX_QUEUE"
    assert shown["max-num-seqs"]["from"] == "--max-num-seqs"
    assert shown["port"]["from"] == shown["dtype"]["from"] == "default"
    assert shown["allow-open"] == {"value": False, "from": "--allow-open"}
    assert shown["config"] == {"value": str(file), "from": "LORASB_CONFIG"}


def test_opentelemetrys_own_variable_counts_where_ours_is_not_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://theirs:4318")
    sourced = read_settings({})
    assert sourced.settings.otlp_endpoint == "http://theirs:4318"
    assert sourced.origins["otlp_endpoint"] == "OTEL_EXPORTER_OTLP_ENDPOINT"
    monkeypatch.setenv("LORASB_OTLP_ENDPOINT", "http://ours:4318")
    assert read_settings({}).settings.otlp_endpoint == "http://ours:4318"


def test_what_is_shown_is_a_settings_file_and_no_secret(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[str] = []
    for name, value in VALUES.items():
        match value:
            case _ if name in LEFT_OUT:
                continue
            case list():
                words += [word for entry in value for word in (flag_of(name), entry)]
            case _:
                words += [flag_of(name), str(value)]
    monkeypatch.setenv("LORASB_SSL_KEYFILE_PASSWORD", "hush-hush")
    status, out, err = command("serve", "m", "--show-config", *words)
    assert status == 0, err
    assert "hush-hush" not in out
    file = tmp_path / "shown.toml"
    file.write_text(out)
    again = read_settings({"config": str(file)}).settings
    kept = {n: as_flag(v) for n, v in VALUES.items() if n == "model" or n not in LEFT_OUT}
    settings = read_settings(kept).settings
    hidden = {"config", "ssl_keyfile_password"}
    assert again.model_dump(exclude=hidden) == settings.model_dump(exclude=hidden)
    _, out, _ = command("serve", "m", "--show-config", "--json", *words)
    assert json.loads(out)["ssl-keyfile-password"]["value"] == "(set, not shown)"
    assert json.loads(out).keys() == {key_of(name) for name in Settings.model_fields}


def test_the_environment_is_read_in_one_place() -> None:
    reading = re.compile(r"\benviron\b|\bgetenv\b|EnvSettingsSource\(|envvar=")
    packages = ("lorasb_runtime", "server/lorasb_server", "tools/lorasb_tools")
    found = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if reading.search(path.read_text())
    }
    # But for what runs in vLLM's own processes, which are told by their environment alone.
    ours = {path for path in found if not path.startswith("lorasb_runtime/engines/vllm/")}
    assert ours == {"server/lorasb_server/settings/sources.py"}


def test_the_server_listens_before_torch_is_imported_and_without_traces() -> None:
    look = "import sys, lorasb_server.run as run; print([m for m in MODULES if m in sys.modules])"
    look = look.replace("MODULES", "('torch', 'transformers', 'opentelemetry')")
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_doc_has_every_setting_as_it_is() -> None:
    doc = (ROOT / "docs" / "configuration.md").read_text()
    assert as_table() in doc, f"docs/configuration.md should have:\n{as_table()}"
    example = doc.partition("```toml\n")[2].partition("```")[0]
    assert tomllib.loads(example).keys() <= {key_of(name) for name in Settings.model_fields}
