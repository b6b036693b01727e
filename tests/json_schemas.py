"""Makes JSON schemas at random, of the kinds that APIs and agents send; each has values, and none that must be long."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("id", "name", "kind", "größe", "items", "a b", 'quo"te', "x/y", "日本", "tags", "count", "$ref_", "unit")
_PATTERNS = ("[a-z]{2,6}", "[A-Z]{3}-[0-9]{2,4}", "red|green|blue", "[a-f0-9]{8}", r"\d{1,3}\.\d{2}", "a|b|cd")
_FORMATS = ("date", "date-time", "time", "uuid", "ipv4", "email")


class SchemaMaker:
    """One schema after the other from one seed."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._shared: dict[str, Any] = {}

    def schema(self) -> dict[str, Any]:
        """A schema whose root is mostly an object; parts may refer to $defs beside it."""
        self._shared = {}
        root = self._object(3) if self._dice.random() < 0.8 else self._any(3)
        if self._shared:
            root = {**root, "$defs": self._shared}
        if self._dice.random() < 0.2:
            root |= {"title": "T", "description": "What it is."}
        return root

    def _any(self, depth: int) -> dict[str, Any]:
        leaves = (self._string, self._integer, self._number, self._enum, self._constant, self._small)
        inner = (self._object, self._array, self._tuple, self._either, self._reference, self._map)
        if depth == 0 or self._dice.random() < 0.5:
            return self._dice.choice(leaves)()
        return self._dice.choice(inner)(depth - 1)

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._dice.sample(_NAMES, self._dice.randint(0, 5))
        made: dict[str, Any] = {"type": "object", "properties": {name: self._any(max(0, depth - 1)) for name in names}}
        made["required"] = [name for name in names if self._dice.random() < 0.7]
        if self._dice.random() < 0.9:
            made["additionalProperties"] = False
        return made

    def _map(self, depth: int) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self._any(depth)}

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._dice.randint(0, 2)
        return {
            "type": "array",
            "items": self._any(depth),
            "minItems": least,
            "maxItems": least + self._dice.randint(0, 3),
        }

    def _tuple(self, depth: int) -> dict[str, Any]:
        parts = [self._any(depth) for _ in range(self._dice.randint(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}

    def _either(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth) for _ in range(self._dice.randint(1, 3))]}

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"part{len(self._shared)}"
        self._shared[name] = {}
        self._shared[name] = self._any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _string(self) -> dict[str, Any]:
        match self._dice.randrange(4):
            case 0:
                return {"type": "string", "pattern": f"^({self._dice.choice(_PATTERNS)})$"}
            case 1:
                return {"type": "string", "format": self._dice.choice(_FORMATS)}
            case 2:
                return {"type": ["string", "null"], "maxLength": self._dice.randint(0, 8)}
            case _:
                least = self._dice.randint(0, 3)
                return {"type": "string", "minLength": least, "maxLength": least + self._dice.randint(0, 12)}

    def _integer(self) -> dict[str, Any]:
        low = self._dice.randint(-500, 500)
        kind = self._dice.random()
        if kind < 0.2:
            return {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": self._dice.choice((2, 5, 10))}
        if kind < 0.5:
            return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + self._dice.randint(2, 900)}
        return {"type": "integer", "minimum": low, "maximum": low + self._dice.randint(0, 2000)}

    def _number(self) -> dict[str, Any]:
        low = round(self._dice.uniform(-50, 50), 2)
        return {"type": "number", "minimum": low, "maximum": round(low + self._dice.uniform(1, 100), 2)}

    def _enum(self) -> dict[str, Any]:
        values: list[Any] = ["a", "b/c", 'q"', "ü", 1, -2.5, None, True, [1, "x"], {"k": [False]}]
        return {"enum": self._dice.sample(values, self._dice.randint(1, 5))}

    def _constant(self) -> dict[str, Any]:
        return {"const": self._dice.choice(["fixed", 7, None, False, {"a": 1}, [], "日"])}

    def _small(self) -> dict[str, Any]:
        return {"type": self._dice.choice(["boolean", "null", ["boolean", "null"]])}
