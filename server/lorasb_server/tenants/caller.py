"""Who asks: a tenant with a role, and which adapters that lets it see and change."""

from dataclasses import dataclass, field
from enum import StrEnum

from lorasb_runtime.adapters.names import DEFAULT_NAMESPACE, AdapterName, parse_name
from lorasb_server.tenants.errors import AdapterNotFoundError, ForbiddenError
from lorasb_server.tenants.quota import Quota


class Role(StrEnum):
    """In rising order; each may do what those before it may."""

    INFER = "infer"
    PUBLISH = "publish"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True)
class Caller:
    """One tenant under one role. `shared` are namespaces that everyone may read.

    A name without a namespace is in the tenant's own, and is shown without one.
    """

    tenant: str
    role: Role
    shared: frozenset[str] = frozenset()
    quota: Quota = field(default_factory=Quota)

    @property
    def namespaces(self) -> list[str] | None:
        """Those that it may read; None for all."""
        return None if self.role is Role.ADMIN else sorted({self.tenant, *self.shared})

    def require(self, role: Role) -> None:
        """Raises ForbiddenError for a lesser role."""
        if not self.role.includes(role):
            raise ForbiddenError(f"role: found {self.role.value!r}, expected {role.value!r}")

    def readable(self, text: str) -> AdapterName:
        """The adapter that `text` names to this caller.

        Raises AdapterNotFoundError for one that it may not see, InputError for no name at all.
        """
        name = parse_name(text, self.tenant)
        if self.namespaces is not None and name.namespace not in self.namespaces:
            raise AdapterNotFoundError(text)
        return name

    def writable(self, text: str) -> AdapterName:
        """As `readable`; raises ForbiddenError for what it may see and not change."""
        self.require(Role.PUBLISH)
        name = self.readable(text)
        if self.role is not Role.ADMIN and name.namespace != self.tenant:
            raise ForbiddenError(
                f"namespace {name.namespace!r} is shared: found role {self.role.value!r}, "
                "expected 'admin' to change it"
            )
        return name

    def shown(self, name: AdapterName) -> str:
        """`name` as this caller writes it."""
        return name.name if name.namespace == self.tenant else f"{name.namespace}/{name.name}"


def anyone() -> Caller:
    """Who everyone is on a server without keys."""
    return Caller(DEFAULT_NAMESPACE, Role.ADMIN)
