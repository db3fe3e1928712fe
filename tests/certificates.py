"""Certificates for tests: a folder a role from an authority of one's own (scripts/make_certificates.py)."""

from __future__ import annotations

from pathlib import Path

from scripts.make_certificates import Authority

__all__ = ["Authority", "folder_of", "renew"]


def folder_of(parent: Path, role: str, authority: Authority, days: float = 1.0) -> Path:
    """A new folder with tls.crt, tls.key and ca.crt."""
    folder = parent / f"{role}-{len(list(parent.iterdir()))}"
    authority.issue(folder, role, days)
    return folder


def renew(folder: Path, role: str, authority: Authority, *, also_trusting: Authority | None = None) -> None:
    """Replaces a folder's certificate, as cert-manager does some time before the old one expires."""
    authority.issue(folder, role, 1.0)
    if also_trusting is not None:
        pem = (folder / "ca.crt").read_bytes() + also_trusting.pem()
        (folder / "ca.crt").write_bytes(pem)
