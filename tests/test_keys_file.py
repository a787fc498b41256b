"""API keys, their file, and the ring of keys that a server keeps up with it."""

import hmac
import json
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError
from lorasb_server.tenants.api_key import new_key
from lorasb_server.tenants.caller import Role
from lorasb_server.tenants.errors import InvalidKeyError
from lorasb_server.tenants.key_ring import KeyRing
from lorasb_server.tenants.keys_file import edit_keys, load_keys, parse_keys
from lorasb_server.tenants.quota import Quota


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def add(file: Path, tenant: str = "acme", role: Role = Role.INFER, **more: Any) -> tuple[str, str]:
    """A new key in the file: its id and the key itself."""
    record, key = new_key(tenant, role, **more)
    edit_keys(file, lambda keys: keys.with_key(record), create=True)
    return record.id, key


def test_the_file_holds_no_key_and_is_its_owners_alone(file: Path) -> None:
    key_id, key = add(file, label="laptop")
    assert key.startswith(f"lsb-{key_id}-")
    secret = key.split("-")[2]
    assert len(bytes.fromhex(secret)) >= 32
    assert secret not in file.read_text() and key_id in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    _, other = add(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    first, second = load_keys(file).keys
    assert first.salt != second.salt and first.hash != second.hash
    assert first.matches(secret) and not second.matches(secret)
    assert second.matches(other.split("-")[2])
    assert list(file.parent.iterdir()) == [file]


def test_a_linked_file_stays_a_link(tmp_path: Path, file: Path) -> None:
    add(file)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    add(link)
    assert link.is_symlink() and len(load_keys(file).keys) == 2


def test_edits_at_the_same_time_lose_no_key(file: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from lorasb_server.tenants.caller import Role\n"
        "from lorasb_server.tenants.api_key import new_key\n"
        "from lorasb_server.tenants.keys_file import edit_keys\n"
        "for _ in range(10):\n"
        "    record, _key = new_key('acme', Role.INFER)\n"
        "    edit_keys(Path(sys.argv[1]), lambda keys: keys.with_key(record), create=True)\n"
    )
    with (
        subprocess.Popen([sys.executable, "-c", program, file]) as other,
        ThreadPoolExecutor(4) as threads,
    ):
        list(threads.map(lambda _: add(file), range(20)))
        assert other.wait(timeout=60) == 0
    assert len(load_keys(file).keys) == 30


def good(**changes: Any) -> dict[str, Any]:
    record, _ = new_key("acme", Role.INFER)
    return {**record.model_dump(mode="json"), **changes}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "the whole"),
        ("[]", "the whole"),
        ({"keys": []}, "format"),
        ({"format": "lorasb-basis"}, "format = 'lorasb-basis'"),
        ({"format_version": "2"}, "format_version = '2'"),
        ({"users": []}, "users"),
        ({"keys": [good(role="root")]}, "keys.0.role = 'root'"),
        ({"keys": [good(tenant="a/b")]}, "keys.0.tenant = 'a/b'"),
        ({"keys": [good(tenant="..")]}, "keys.0.tenant = '..'"),
        ({"keys": [good(hash="SECRET")]}, "keys.0.hash"),
        ({"keys": [good(key="SECRET")]}, "keys.0.key"),
        ({"keys": [good(salt="SECRET")]}, "keys.0.salt"),
        ({"keys": [good(created="2026-01-01T00:00:00")]}, "keys.0.created"),
        ({"keys": [good(id="0" * 12), good(id="0" * 12)]}, "found '000000000000' twice"),
        ({"tenants": {"acme": {"tokens": 5}}}, "tenants.acme.tokens"),
        ({"tenants": {"acme": {"adapters": 0}}}, "tenants.acme.adapters"),
        ({"tenants": {"acme": {"adapters": "5"}}}, "tenants.acme.adapters"),
        ({"shared": ["a/b"]}, "shared.0"),
    ],
)
def test_a_file_that_is_none_is_refused_and_no_secret_shown(content: Any, named: str) -> None:
    head = {"format": "lorasb-keys", "format_version": "1"}
    if isinstance(content, dict):
        content = json.dumps(content if content == {"keys": []} else {**head, **content})
    with pytest.raises(FileFormatError) as refused:
        parse_keys(content.encode(), "keys.json")
    assert str(refused.value).startswith("keys.json: found ") and named in str(refused.value)
    assert "SECRET" not in str(refused.value)
    parse_keys(json.dumps({**head, "keys": [good()]}).encode(), "keys.json")


def test_the_ring_knows_its_keys_and_no_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soon = datetime.now(UTC) + timedelta(days=1)
    key_id, key = add(file, role=Role.PUBLISH, expires=soon)
    other_id, other = add(file, "beta")
    edit_keys(file, lambda keys: keys.with_shared("common").with_quota("acme", Quota(adapters=3)))
    time = datetime.now(UTC)
    ring = KeyRing(file, now=lambda: time)
    caller = ring.identify(f"Bearer {key}")
    assert (caller.tenant, caller.role, caller.quota) == ("acme", Role.PUBLISH, Quota(adapters=3))
    assert caller.namespaces == ["acme", "common"]
    assert ring.identify(f"bearer  {other} ").tenant == "beta"
    compared: list[str] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append(a), compare(a, b))[1])
    wrong = [
        f"lsb-{key_id}-{other.split('-')[2]}",
        f"lsb-{other_id}-{key.split('-')[2]}",
        f"lsb-{'0' * 12}-{key.split('-')[2]}",
        f"sk-{key_id}-{key.split('-')[2]}",
        f"{key}0",
        key[:-1],
        f"lsb-{key_id}-",
        "lsb",
        "none",
        "\u00fc",
    ]
    for text in wrong:
        with pytest.raises(InvalidKeyError, match="Incorrect API key provided"):
            ring.identify(f"Bearer {text}")
    assert len(compared) == len(wrong)  # also where the id is unknown
    for header in (None, "", key, f"Basic {key}"):
        with pytest.raises(InvalidKeyError, match="Bearer"):
            ring.identify(header)
    time = soon
    with pytest.raises(InvalidKeyError, match="expired"):
        ring.identify(f"Bearer {key}")


def test_the_ring_keeps_up_with_the_file_and_survives_a_bad_one(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NotFoundError, match="not found"):
        KeyRing(file)
    key_id, key = add(file)
    ring = KeyRing(file)
    _, later = add(file, "beta")
    with pytest.raises(InvalidKeyError):
        ring.identify(f"Bearer {later}")
    ring.reload()
    assert ring.identify(f"Bearer {later}").tenant == "beta"
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(whole[:-9]), file.unlink):
        caplog.clear()
        damage()
        for _ in range(3):
            ring.reload()
        assert ring.identify(f"Bearer {key}").tenant == "acme"
        assert [r.levelname for r in caplog.records] == ["ERROR"]
        assert key.split("-")[2] not in caplog.text
    file.write_bytes(whole)
    edit_keys(file, lambda keys: keys.without_key(key_id))
    ring.reload()
    with pytest.raises(InvalidKeyError):
        ring.identify(f"Bearer {key}")
    assert ring.identify(f"Bearer {later}").tenant == "beta"


def test_keys_that_cannot_be_are_refused() -> None:
    for tenant, label in (("a/b", None), ("", None), ("versions", None), ("a", "x\x1b[2J")):
        with pytest.raises(InputError, match="label" if label else "tenant"):
            new_key(tenant, Role.INFER, label=label)


def test_roles_include_those_before() -> None:
    reach = {role: [other.value for other in Role if role.includes(other)] for role in Role}
    assert reach == {
        Role.INFER: ["infer"],
        Role.PUBLISH: ["infer", "publish"],
        Role.ADMIN: ["infer", "publish", "admin"],
    }


def test_a_key_given_for_its_id_is_not_repeated(file: Path) -> None:
    _, key = add(file)
    with pytest.raises(NotFoundError) as refused:
        edit_keys(file, lambda keys: keys.without_key(key))
    assert key[8:] not in str(refused.value)
