"""API keys: who may use a router. Hashes in a file, which is read again when it changes.

One line a key: a name for people, then the SHA-256 of the key in hex; `#` starts a comment. Keys are 256 random bits
(new_key), which is why a plain hash is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from tandem_serve.errors import ConfigError, Unauthenticated
from tandem_serve.serving.openai_errors import error_response

OPEN_PATHS = frozenset({"/health"})
_LINE = re.compile(r"(?P<name>[\w.-]{1,64})\s+(?P<hash>[0-9a-f]{64})")

logger = logging.getLogger(__name__)


def new_key() -> str:
    return f"tandem-{secrets.token_urlsafe(32)}"


def key_line(name: str, key: str) -> str:
    """A key as it stands in the file.

    Raises:
        ConfigError: the name is none.
    """
    line = f"{name} {_hash(key)}"
    if not _LINE.fullmatch(line):
        raise ConfigError(f"{name!r} cannot name a key: letters, digits, _, . and -, at most 64")
    return line


class ApiKeys:
    """The keys of a file. A file that breaks later is logged, and the keys read before stay valid.

    Does not tell keys apart: every one may do everything.
    """

    def __init__(self, file: str | Path) -> None:
        """Raises ConfigError: the file is missing, or a line of it makes no sense."""
        self._file = Path(file)
        self._stamp = _stamp(self._file)
        self._hashes = _read(self._file)

    def check(self, authorization: str | None) -> None:
        """Raises Unauthenticated unless `authorization`, a header's value, is `Bearer` and one of the keys."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("an API key is needed: authorization: Bearer KEY")
        given = _hash(key.strip())
        known = [hmac.compare_digest(given, each) for each in self._current()]  # all of them: no clue in the time taken
        if not any(known):
            raise Unauthenticated("the API key is not one of this cluster's")

    def _current(self) -> list[str]:
        try:
            stamp = _stamp(self._file)
            if stamp != self._stamp:
                self._stamp = stamp
                self._hashes = _read(self._file)
                logger.info("%d API keys read from %s", len(self._hashes), self._file)
        except ConfigError as error:
            logger.error("API keys not read again, those read before stay valid: %s", error)
        return self._hashes


class RequireApiKey:
    """ASGI middleware: 401 for whatever comes without a key, except health."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN_PATHS:
            headers = dict(scope["headers"])
            try:
                self._keys.check(headers.get(b"authorization", b"").decode("latin-1"))
            except Unauthenticated as error:
                app = error_response(error)
        await app(scope, receive, send)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, int, int]:
    """Changes with the file, also where a secret's folder is swapped for another."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    hashes = []
    for number, line in enumerate(lines, 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = _LINE.fullmatch(content)
        if found is None:  # the line may be a key in clear: not to be shown
            raise ConfigError(
                f"{file}, line {number}: not a name and a SHA-256 in hex; `tandem-serve keys new` makes one"
            )
        hashes.append(found["hash"])
    return hashes
