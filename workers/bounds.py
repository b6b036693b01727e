"""Types of settings with the bounds that their readers check (cluster.settings); they need nothing but the standard library's typing."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Seconds = Annotated[float, Gt(0)]
"""A time that must pass."""
Delay = Annotated[float, Ge(0)]
"""A time that may be none at all."""
Port = Annotated[int, Ge(0), Lt(65536)]
"""A TCP port; 0: any free one."""
Text = Annotated[str, MinLen(1)]
Share = Annotated[float, Gt(0), Le(1)]
