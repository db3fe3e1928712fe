"""A certificate authority of one's own, and a folder of certificates for each pool: for tests and trials.

    python scripts/make_certificates.py certificates
    python scripts/make_certificates.py certificates        # again: new certificates from the same authority

writes certificates/{router,primary,drafter}/{tls.crt,tls.key,ca.crt} and the authority itself, certificates/ca. A pool
takes its folder as `tls_folder`, a plain process as --tls-folder. In Kubernetes cert-manager does this (k8s/).
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROLES = ("router", "primary", "drafter")
CLOCK_SKEW = timedelta(hours=1)  # between the machines that read a certificate


@dataclass(frozen=True)
class Authority:
    """Signs certificates."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(cls, name: str = "tandem-serve test authority", days: float = 3650) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, name, key.public_key(), days).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        return cls(key, builder.sign(key, hashes.SHA256()))

    @classmethod
    def of(cls, folder: Path) -> Authority:
        """The one in a folder, made there first where there is none."""
        if not (folder / "tls.crt").is_file():
            authority = cls.new()
            _write(folder, authority.key, authority.certificate, authority.certificate)
            return authority
        key = serialization.load_pem_private_key((folder / "tls.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(key, x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes()))

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, folder: Path, role: str, days: float) -> None:
        """Writes a role's certificate with its key. `days` may be negative: one that has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"tandem-{role}"
        issuer = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        builder = _builder(name, str(issuer), key.public_key(), days).add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False
        )
        _write(folder, key, builder.sign(self.key, hashes.SHA256()), self.certificate)


def _builder(name: str, issuer: str, key: ec.EllipticCurvePublicKey, days: float) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW + min(timedelta(days=days), timedelta()))
        .not_valid_after(now + timedelta(days=days))
    )


def _write(
    folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, authority: x509.Certificate
) -> None:
    """Each file at once, the key first: a reader in between finds a pair that does not match, and keeps the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    _replace(folder / "tls.key", key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    _replace(folder / "tls.crt", certificate.public_bytes(pem))
    _replace(folder / "ca.crt", authority.public_bytes(pem))


def _replace(file: Path, content: bytes) -> None:
    fresh = file.with_name(f".{file.name}.new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
        handle.write(content)
    fresh.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--days", type=float, default=90.0, help="how long the certificates are good for")
    arguments = parser.parse_args()
    authority = Authority.of(arguments.folder / "ca")
    for role in ROLES:
        authority.issue(arguments.folder / role, role, arguments.days)
    print(f"certificates for {', '.join(ROLES)} in {arguments.folder}; the authority's key is {arguments.folder}/ca")


if __name__ == "__main__":
    main()
