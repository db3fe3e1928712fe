"""Mutual TLS between pools, from certificate files that are read again whenever they may have changed.

A folder holds tls.crt, tls.key and ca.crt: what cert-manager writes into a secret, and scripts/make_certificates.py
into a folder. Both sides show a certificate and check the other's against ca.crt. Addresses are given out as replicas
start, so peers know one another by role instead: a certificate bears the DNS name `tandem-router`, `tandem-primary` or
`tandem-drafter`. Primaries serve routers, and drafters serve primaries. An open connection is not checked again when
its certificates expire.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tandem_serve.errors import ConfigError, PermissionDenied

CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"
ROUTER, PRIMARY, DRAFTER = "tandem-router", "tandem-primary", "tandem-drafter"  # DNS names in certificates

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Files:
    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes


class PeerTls:
    """What one process shows its peers, and whom it believes. Any thread."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError: a file is missing or unreadable, or the key is another certificate's."""
        self._folder = Path(folder)
        self._files = self._read()

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server: clients must show a certificate. Every handshake uses the files as they are at that moment."""
        served = self.current()

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            found = self.current()
            if found is served:
                return None
            served = found
            return _configuration(found)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(served),
            newer,  # type: ignore[arg-type]  # None is for "nothing new"; the stubs do not know
            require_client_authentication=True,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For one channel, from the files as they are now; they are not read again for its reconnections."""
        files = self.current()
        return grpc.ssl_channel_credentials(files.authority, files.key, files.certificate)

    def current(self) -> _Files:
        """The newest whole set of files: another object once they have changed.

        A set that is broken or half-written is logged, and the one before it stays in use.
        """
        try:
            found = self._read()
        except ConfigError as error:
            logger.error("certificates not renewed, those read before stay in use: %s", error)
            return self._files
        if found != self._files:
            self._files = found
            logger.info("certificates in %s renewed", self._folder)
        return self._files

    def _read(self) -> _Files:
        paths = [self._folder / name for name in (CERTIFICATE, KEY, AUTHORITY)]
        try:
            files = _Files(*(path.read_bytes() for path in paths))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(paths[0], paths[1], password="")  # with none, it would ask on the terminal
            context.load_verify_locations(paths[2])
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"TLS files in {self._folder}: {error}") from error
        return files


def require_client(context: grpc.ServicerContext | grpc.aio.ServicerContext[Any, Any], name: str) -> None:
    """Raises PermissionDenied unless the certificate of a call's client bears a role's name.

    Only for servers with TLS: in plain text nobody has a name.
    """
    shown = context.auth_context().get("x509_subject_alternative_name", ())
    names = [each.decode() for each in shown if isinstance(each, bytes)]
    if name not in names:
        raise PermissionDenied(f"this is for {name} alone, the certificate is {', '.join(names) or 'nameless'}'s")


def expect_server(name: str) -> tuple[str, str]:
    """The channel option that has the server's certificate checked for a role's name instead of the address."""
    return "grpc.ssl_target_name_override", name


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.authority)
