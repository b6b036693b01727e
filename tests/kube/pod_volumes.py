"""Volumes of a pod as folders of this machine, with the owners and modes that kubelet gives them."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Object = dict[str, Any]


def make_volume(folder: Path, memory: Path, volume: Object, data: Mapping[tuple[str, str], Object], group: int) -> Path:
    """A new folder in `folder`, or in `memory` for what is to be kept in memory. `data` has ConfigMaps and Secrets by kind and name."""
    if "emptyDir" in volume:
        # No quota holds it to its sizeLimit.
        place = (memory if volume["emptyDir"].get("medium") == "Memory" else folder) / volume["name"]
        place.mkdir()
        os.chown(place, 0, group)
        place.chmod(0o2777)
        return place
    place = folder / volume["name"]
    place.mkdir()
    if "configMap" in volume:
        own, key, mode = volume["configMap"], ("ConfigMap", volume["configMap"]["name"]), 0o644
    elif "secret" in volume:
        own, key, mode = volume["secret"], ("Secret", volume["secret"]["secretName"]), 0o644
    else:
        raise AssertionError(f"the pod runner does not know the volume {volume}")
    contents = data[key]
    items = own.get("items") or [{"key": name, "path": name} for name in contents]
    for item in items:
        text = contents[item["key"]]
        file = place / item["path"]
        file.write_bytes(base64.b64decode(text) if key[0] == "Secret" else text.encode())
        os.chown(file, 0, group)
        file.chmod(own.get("defaultMode", mode))
    return place


def make_claim(folder: Path, group: int) -> Path:
    """The disk of a claim: there as long as the claim is."""
    if not folder.exists():
        folder.mkdir(parents=True)
        os.chown(folder, 0, group)
        folder.chmod(0o2775)
    return folder
