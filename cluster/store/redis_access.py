"""Who a client of Redis says it is: user, and password from a file, which is read anew for each connection."""

from __future__ import annotations

from redis.credentials import CredentialProvider

from cluster.secret_files import read_secret


class FileCredentials(CredentialProvider):
    """A password that is changed in the file is used from the next connection on."""

    def __init__(self, username: str, password_file: str) -> None:
        self._username = username
        self._password_file = password_file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """AUTH's arguments. Raises InvalidConfig when the file cannot be used any more."""
        password = read_secret(self._password_file, "store.password_file")
        return (self._username, password) if self._username else (password,)
