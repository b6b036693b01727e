"""A certificate authority for one cluster, and the certificates that it signs: EC P-256, in PEM. Writes no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from workers.errors import InvalidConfig
from workers.trust.parties import Party

_BEFORE = timedelta(days=1)
"""Certificates hold from the day before, as clocks differ."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, both in PEM."""

    cert: bytes
    key: bytes


class Authority:
    """What it signs is believed wherever `pair.cert` is. Raises InvalidConfig when the pair is none of an authority."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        try:
            self._cert = x509.load_pem_x509_certificate(pair.cert)
            key = serialization.load_pem_private_key(pair.key, None)
        except (ValueError, TypeError) as error:
            raise InvalidConfig("the authority's certificate or key cannot be read") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._cert.public_key():
            raise InvalidConfig("the authority's key does not belong to its certificate")
        self._key = key

    @staticmethod
    def make(days: int, now: datetime | None = None) -> Authority:
        """A new one, that holds for so many days."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _named(f"Baton authority {x509.random_serial_number():x}"[:40])
        cert = (
            _builder(name, name, key.public_key(), days, now or datetime.now(UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return Authority(_pair(cert, key))

    def issue(self, parties: Sequence[Party], days: int, now: datetime | None = None) -> Pair:
        """A certificate for one process, which is all of these parties."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(party.dns_name) for party in parties]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        subject, when = _named(parties[0].file_name), now or datetime.now(UTC)
        cert = (
            _builder(subject, self._cert.subject, key.public_key(), days, when)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(self._own_identifier(), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pair(cert, key)

    def _own_identifier(self) -> x509.AuthorityKeyIdentifier:
        """As the authority's certificate gives it: who has made that may have hashed the key in another way."""
        try:
            own = self._cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own.value)


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(cert: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        cert.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
