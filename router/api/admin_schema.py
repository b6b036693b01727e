"""The JSON bodies that operators send, field by field."""

from __future__ import annotations

from typing import Annotated

from pydantic import StrictBool, StrictStr, WithJsonSchema

from router.api.schema import Body, Number
from workers.status import Role


class RoleBody(Body):
    role: Annotated[StrictStr, WithJsonSchema({"enum": list(Role)})]
    force: StrictBool | None = None
    pin: StrictBool | None = None


class PinBody(Body):
    pin: StrictBool = True


class KeyBody(Body):
    id: StrictStr
    tenant: StrictStr
    sha256: StrictStr
    expires_s: Number | None = None


class KeyEndBody(Body):
    expires_s: Number | None = None


class DrainBody(Body):
    drain: StrictBool = True
    force: StrictBool | None = None
