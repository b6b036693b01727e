"""Turns the name of a repository on the Hugging Face Hub or on ModelScope into a folder on this host: downloaded once, resumed when it was
interrupted.

What is taken are weights as safetensors, and files of configuration and tokenizer: nothing that could be run. HF_TOKEN, HF_ENDPOINT,
HF_HOME and HF_HUB_OFFLINE are huggingface_hub's own, as MODELSCOPE_API_TOKEN, MODELSCOPE_ENDPOINT and MODELSCOPE_CACHE are
modelscope_hub's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workers.errors import InvalidConfig

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "*.jinja", "*_tokens*.json"]
_UNWANTED = ["*/*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.py"]
"""Also what stands in folders: other formats of the same weights."""


@dataclass(frozen=True, slots=True)
class HubConfig:
    """Where a worker.model that is no folder is taken from."""

    source: Literal["huggingface", "modelscope"] = "huggingface"
    """The hub that is asked."""
    revision: str = ""
    """A branch, tag or commit; empty: main, on ModelScope master."""
    cache_folder: str = ""
    """Where downloads are kept; empty: the hub's own place."""


def is_repository(model: str) -> bool:
    """OWNER/NAME, and no path that is there."""
    return _REPOSITORY.fullmatch(model) is not None and not Path(model).exists() and ".." not in model


def fetch(repository: str, config: HubConfig) -> str:
    """The folder with the checkpoint, with a bar that shows its progress. Raises InvalidConfig."""
    from_hub = _from_modelscope if config.source == "modelscope" else _from_hugging_face
    try:
        return from_hub(repository, config)
    except _NotToBeHad as error:
        raise InvalidConfig(
            f"cannot download the model {repository!r}: {error}; --model also takes the path of a checkpoint folder"
        ) from error


class _NotToBeHad(Exception):
    """Says why."""


def _from_hugging_face(repository: str, config: HubConfig) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        _bound_silence(huggingface_hub)  # which reads the environment: proxies, authorities
        return huggingface_hub.snapshot_download(
            repository,
            revision=config.revision or None,
            cache_dir=config.cache_folder or None,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except errors.GatedRepoError:
        why = "its owner gives it to those who have agreed to terms: agree on its page, and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "there is no such repository for who asks: is the name right, or HF_TOKEN missing?"
    except errors.RevisionNotFoundError:
        why = f"it has no revision {config.revision!r}"
    except errors.LocalEntryNotFoundError:
        why = "it is not in the cache, and the hub does not answer or HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError as error:
        why = f"the hub answered with HTTP {getattr(error.response, 'status_code', '?')}"
    except (
        Exception
    ) as error:  # of its HTTP library, which is another one from version to version, and of what reads its answers
        why = _in_short(error)
    raise _NotToBeHad(why)


def _from_modelscope(repository: str, config: HubConfig) -> str:
    try:
        from modelscope_hub import HubApi, errors
    except ImportError as error:
        raise _NotToBeHad(
            "ModelScope needs the package modelscope-hub: pip install 'baton-serve[modelscope]'"
        ) from error

    def download(is_offline: bool) -> str:
        found = HubApi().download_repo(
            repository,
            "model",
            revision=config.revision or None,
            cache_dir=config.cache_folder or None,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            local_files_only=is_offline,
        )
        return str(found)

    try:
        return download(is_offline=False)
    except errors.NotExistError:
        why = "there is no such repository or revision for who asks: are the names right, or MODELSCOPE_API_TOKEN missing?"
    except (errors.AuthenticationError, errors.PermissionDeniedError):
        why = "its owner gives it to some only: set MODELSCOPE_API_TOKEN"
    except errors.NetworkError as error:
        try:
            return download(is_offline=True)
        except errors.HubError:
            why = f"it is not in the cache, and ModelScope does not answer: {_in_short(error)}"
    except Exception as error:
        why = _in_short(error)
    raise _NotToBeHad(why)


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _bound_silence(hub: Any) -> None:
    """A hub that says nothing for HF_HUB_DOWNLOAD_TIMEOUT is not waited for: some calls of the library have no limit of their own."""
    first = hub.get_session()
    hooks, kind = first.event_hooks["request"], type(first)

    def bound(request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        bounds = dict.fromkeys(("connect", "read", "write", "pool"), float(hub.constants.HF_HUB_DOWNLOAD_TIMEOUT))
        request.extensions["timeout"] = bounds | {name: limit for name, limit in limits.items() if limit is not None}

    if not any(getattr(hook, "__name__", "") == bound.__name__ for hook in hooks):
        hub.set_client_factory(
            lambda: kind(event_hooks={"request": [*hooks, bound]}, follow_redirects=True, timeout=None)
        )
