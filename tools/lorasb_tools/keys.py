"""`lorasb keys`: who may use a server, how much, and what everyone may read."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import typer

from lorasb_runtime.errors import InputError
from lorasb_tools.report import JSON_FLAG, emit, note

app = typer.Typer(help="API keys, quotas and shared namespaces, in a file for serve --api-keys.")

FILE = typer.Argument(help="The keys file.")
LIMIT = "a number, or none to lift the limit."


@app.command()
def create(
    file: Path = typer.Argument(help="The keys file; made where there is none."),
    role: str = typer.Option(..., help="infer, publish or admin; each includes the former."),
    tenant: str | None = typer.Option(
        None, help="Whose key: also the namespace of its adapters. An admin's default: default."
    ),
    label: str | None = typer.Option(None, help="A note of your own, kept with the key."),
    expires: float | None = typer.Option(None, help="Days until it expires; by default never."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Make a new key and print it: this once, as only a salted hash of it is stored."""
    from lorasb_runtime.adapters.names import DEFAULT_NAMESPACE
    from lorasb_server.tenants.api_key import new_key
    from lorasb_server.tenants.caller import Role
    from lorasb_server.tenants.keys_file import edit_keys

    if role not in list(Role):
        raise InputError(f"role: found {role!r}, expected one of {', '.join(Role)}")
    if tenant is None and role != Role.ADMIN:
        raise InputError(f"--tenant: expected one for role {role!r}; only an admin's has a default")
    owner = DEFAULT_NAMESPACE if tenant is None else tenant
    record, key = new_key(owner, Role(role), expires=_in_days(expires), label=label)
    edit_keys(file, lambda keys: keys.with_key(record), create=True)
    note(f"key {record.id} for tenant {owner}, role {role}; it is shown this once")
    emit({"key": key, **_public(record)}, key, as_json)


@app.command("list")
def list_keys(file: Path = FILE, as_json: bool = JSON_FLAG) -> None:
    """Show the keys (not the secrets), the tenants' quotas and the shared namespaces."""
    from lorasb_server.tenants.keys_file import load_keys

    found = load_keys(file)
    keys = [_public(key) for key in found.keys]
    tenants = {t: q.model_dump(exclude_none=True) for t, q in found.tenants.items()}
    lines = [
        f"{k['id']}  {k['tenant']:<24} {k['role']:<8} created {k['created']}  "
        f"{'expires ' + k['expires'] if k['expires'] else 'never expires'}  {k['label'] or ''}"
        for k in keys
    ] or ["no keys"]
    lines += [f"quota of {tenant}: {_in_words(quota)}" for tenant, quota in tenants.items()]
    lines += [f"shared: {namespace}" for namespace in found.shared]
    result = {"keys": keys, "tenants": tenants, "shared": list(found.shared)}
    emit(result, "\n".join(line.rstrip() for line in lines), as_json)


@app.command()
def revoke(
    file: Path = FILE,
    key_id: str = typer.Argument(help="The key's id, as list shows it."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Remove a key; running servers refuse it within seconds."""
    from lorasb_server.tenants.keys_file import edit_keys

    edit_keys(file, lambda keys: keys.without_key(key_id))
    emit({"id": key_id, "revoked": True}, f"revoked {key_id}", as_json)


@app.command()
def quota(
    file: Path = FILE,
    tenant: str = typer.Option(..., help="Whose quota."),
    requests_per_minute: str | None = typer.Option(None, help=f"Requests a minute: {LIMIT}"),
    concurrent_requests: str | None = typer.Option(None, help=f"Requests at once: {LIMIT}"),
    adapters: str | None = typer.Option(None, help=f"Adapters in its namespace: {LIMIT}"),
    tokens_per_day: str | None = typer.Option(
        None, help=f"Prompt and completion tokens a UTC day: {LIMIT}"
    ),
    as_json: bool = JSON_FLAG,
) -> None:
    """Change the limits that are given, leave the others, and show what then holds."""
    from lorasb_runtime.adapters.names import parse_namespace
    from lorasb_server.tenants.keys_file import Keys, edit_keys

    owner = parse_namespace(tenant)
    given = {
        "requests_per_minute": requests_per_minute,
        "concurrent_requests": concurrent_requests,
        "adapters": adapters,
        "tokens_per_day": tokens_per_day,
    }
    limits = {name: _limit(name, text) for name, text in given.items() if text is not None}

    def change(keys: Keys) -> Keys:
        return keys.with_quota(owner, keys.quota(owner).model_copy(update=limits))

    result = edit_keys(file, change).quota(owner).model_dump()
    emit({"tenant": owner, **result}, f"quota of {owner}: {_in_words(result)}", as_json)


@app.command()
def share(
    file: Path = FILE,
    namespace: str = typer.Argument(help="The namespace whose adapters everyone may use."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Let every tenant list and use a namespace's adapters; others than its own change nothing."""
    from lorasb_runtime.adapters.names import parse_namespace
    from lorasb_server.tenants.keys_file import edit_keys

    name = parse_namespace(namespace)
    edit_keys(file, lambda keys: keys.with_shared(name))
    emit({"namespace": name, "shared": True}, f"shared {name}", as_json)


@app.command()
def unshare(
    file: Path = FILE,
    namespace: str = typer.Argument(help="The namespace to take back."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Undo share."""
    from lorasb_server.tenants.keys_file import edit_keys

    edit_keys(file, lambda keys: keys.without_shared(namespace))
    emit({"namespace": namespace, "shared": False}, f"no longer shared: {namespace}", as_json)


def _in_days(days: float | None) -> datetime | None:
    if days is None:
        return None
    try:
        if not days > 0:
            raise ValueError
        return datetime.now(UTC) + timedelta(days=days)
    except (ValueError, OverflowError):
        raise InputError(f"--expires: found {days:g}, expected a number of days") from None


def _limit(name: str, text: str) -> int | None:
    from pydantic import ValidationError

    from lorasb_server.tenants.quota import Quota

    if text == "none":
        return None
    try:
        Quota.model_validate({name: int(text)})
    except (ValueError, ValidationError):
        flag = f"--{name.replace('_', '-')}"
        raise InputError(f"{flag}: found {text!r:.40}, expected a number from 1, or none") from None
    return int(text)


def _in_words(limits: dict[str, Any]) -> str:
    words = [f"{name.replace('_', ' ')} {n}" for name, n in limits.items() if n is not None]
    return ", ".join(words) or "no limits"


def _public(key: Any) -> dict[str, Any]:
    """A key's record without what only the server needs."""
    shown: dict[str, Any] = key.model_dump(mode="json", exclude={"salt", "hash"})
    return shown
