"""`lorasb keys` as an operator runs it."""

import json
import subprocess
from pathlib import Path

import pytest
from serving import LORASB, lorasb

from lorasb_server.tenants.key_ring import KeyRing
from lorasb_server.tenants.keys_file import load_keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_the_command_line_makes_lists_and_revokes(file: Path) -> None:
    made = lorasb("keys", "create", file, "--tenant", "acme", "--role", "publish", "--label", "ci")
    key = made.stdout.strip()
    key_id = key.split("-")[1]
    assert KeyRing(file).identify(f"Bearer {key}").tenant == "acme"
    assert key_id in made.stderr and key not in made.stderr
    admin = json.loads(
        lorasb("keys", "create", file, "--role", "admin", "--expires", 2, "--json").stdout
    )
    assert (admin["tenant"], admin["role"], admin["label"]) == ("default", "admin", None)
    assert admin["key"].startswith(f"lsb-{admin['id']}-") and "hash" not in admin
    flags = ("--requests-per-minute", 9, "--tokens-per-day", 100)
    lorasb("keys", "quota", file, "--tenant", "acme", *flags)
    limits = ("--adapters", 2, "--tokens-per-day", "none", "--json")
    quota = json.loads(lorasb("keys", "quota", file, "--tenant", "acme", *limits).stdout)
    assert quota == {
        "tenant": "acme",
        "requests_per_minute": 9,
        "concurrent_requests": None,
        "adapters": 2,
        "tokens_per_day": None,
    }
    lorasb("keys", "share", file, "common")
    lorasb("keys", "share", file, "other")
    lorasb("keys", "unshare", file, "other")
    text = lorasb("keys", "list", file).stdout
    listed = json.loads(lorasb("keys", "list", file, "--json").stdout)
    assert [k["id"] for k in listed["keys"]] == [key_id, admin["id"]]
    assert listed["tenants"] == {"acme": {"requests_per_minute": 9, "adapters": 2}}
    assert listed["shared"] == ["common"]
    stored = json.loads(file.read_text())["keys"]
    for secret in (key.split("-")[2], admin["key"].split("-")[2], stored[0]["hash"]):
        assert secret not in text and secret not in json.dumps(listed)
    lorasb("keys", "revoke", file, key_id)
    assert [k.id for k in load_keys(file).keys] == [admin["id"]]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("list", "missing.json"), "missing.json: not found"),
        (("revoke", "missing.json", "0" * 12), "missing.json: not found"),
        (("create", "keys.json", "--role", "root"), "found 'root', expected one of infer, publish"),
        (("create", "keys.json", "--role", "infer"), "--tenant: expected one"),
        (("create", "keys.json", "--role", "infer", "--tenant", "a/b"), "found 'a/b'"),
        (("create", "keys.json", "--role", "admin", "--expires", "0"), "--expires: found 0"),
        (("create", "keys.json", "--role", "admin", "--expires", "nan"), "--expires: found nan"),
        (("quota", "keys.json", "--tenant", "a", "--adapters", "0"), "--adapters: found '0'"),
        (("quota", "keys.json", "--tenant", "a", "--adapters", "x"), "--adapters: found 'x'"),
        (("quota", "missing.json", "--tenant", "a"), "missing.json: not found"),
        (("share", "keys.json", "a/b"), "found 'a/b'"),
        (("create", "no/folder.json", "--role", "admin"), "folder.json: No such file"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    words: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    result = subprocess.run([*LORASB, "keys", *words], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and named in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
