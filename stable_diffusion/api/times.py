"""Points in time as responses write them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated

from pydantic import Field

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


def time_at(seconds: float) -> Time:
    """`seconds` since 1970 in ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
