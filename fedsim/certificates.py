"""The keys of a deployment: a folder for each process, with what that process must know and nothing of another's.

    superlink/   ca.crt, server.crt, server.key, exec.key, node-K.pub   what it shows, and whom it lets in
    serverapp/   ca.crt, exec.key                                       whom it believes, and that it may take work
    node-K/      ca.crt, node.key                                       whom it believes, and who it is

A SuperNode makes a fourth kind for itself and the process that takes its work: ``own``.
"""

import datetime
import ipaddress
import os
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsim import files

NAME = "fedsim deployment"
YEARS = 2


class Server(NamedTuple):
    """In PEM: the certificate of an authority, and a server's certificate and key, signed by it."""

    ca: bytes
    certificate: bytes
    key: bytes


def server(hosts: tuple[str, ...]) -> Server:
    """A server's key and certificate for ``hosts`` and 127.0.0.1. The authority's own key is used here, once, and not
    kept: nobody can sign a second server."""
    ca, leaf = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key: ec.EllipticCurvePrivateKey, *more: tuple[x509.ExtensionType, bool]) -> bytes:
        new = x509.CertificateBuilder(_named(NAME), _named(name), key.public_key(), x509.random_serial_number())
        new = new.not_valid_before(now - datetime.timedelta(hours=1))
        new = new.not_valid_after(now + datetime.timedelta(days=365 * YEARS))
        new = new.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), False)
        new = new.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        for extension, critical in more:
            new = new.add_extension(extension, critical)
        return new.sign(ca, SHA384()).public_bytes(Encoding.PEM)

    uses = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    signs = x509.KeyUsage(**{use: use in ("key_cert_sign", "crl_sign") for use in uses})
    names: list[x509.GeneralName] = [x509.DNSName(host) for host in hosts]
    names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    return Server(
        certificate(NAME, ca, (x509.BasicConstraints(ca=True, path_length=0), True), (signs, True)),
        certificate(
            hosts[0],
            leaf,
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.SubjectAlternativeName(names), False),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        ),
        leaf.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def make(folder: Path, nodes: int, hosts: tuple[str, ...] = ("localhost",)) -> None:
    """The folders of a SuperLink that answers as ``hosts``, of its ServerApps, and of ``nodes`` SuperNodes.

    What is there already stays, so that nodes can be added.
    """
    link = folder / "superlink"
    if not (link / "ca.crt").exists():
        new, secret = server(hosts), os.urandom(32)
        _write(folder / "serverapp", {"exec.key": secret, "ca.crt": new.ca})
        _write(link, {"exec.key": secret, "server.key": new.key, "server.crt": new.certificate, "ca.crt": new.ca})
    for node in range(nodes):
        if not (link / f"node-{node}.pub").exists():
            key = ec.generate_private_key(ec.SECP384R1())
            private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            _write(folder / f"node-{node}", {"node.key": private, "ca.crt": (link / "ca.crt").read_bytes()})
            public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            _write(link, {f"node-{node}.pub": public})


def own(folder: Path) -> None:
    """Between a SuperNode and the process that takes its work, both on one loopback: TLS, and a secret."""
    if not (folder / "ca.crt").exists():
        new = server(("localhost",))
        secret = os.urandom(32)
        _write(folder, {"exec.key": secret, "server.key": new.key, "server.crt": new.certificate, "ca.crt": new.ca})


def _named(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    """In the order given: who finds the last one finds them all."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, content in contents.items():
        files.write(folder / name, content, mode=0o600)
