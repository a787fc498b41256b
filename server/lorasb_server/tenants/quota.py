"""What a tenant may use; None is no limit."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Limit = Annotated[int, Field(ge=1, le=10**15)]


class Quota(BaseModel):
    """Limits of one tenant, all its keys together.

    adapters counts names in its namespace; tokens_per_day prompt and completion tokens from one
    UTC midnight to the next.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    requests_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    adapters: Limit | None = None
    tokens_per_day: Limit | None = None
