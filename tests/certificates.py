"""Self-signed certificates for tests, made by the ``openssl`` command."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of PEM files."""

    certificate: str
    key: str

    @property
    def overrides(self) -> tuple[str, str]:
        """Of the configuration."""
        return f"server.tls_certificate={self.certificate}", f"server.tls_key={self.key}"


def make_certificate(folder: Path, host: str, *, passphrase: str = "") -> Certificate:
    """A certificate for ``host``, a name or an address, that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command")
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificate(str(folder / "certificate.pem"), str(folder / "key.pem"))
    kind = "IP" if host.replace(".", "").isdigit() else "DNS"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", f"/CN={host}"]
    words += ["-addext", f"subjectAltName={kind}:{host}", "-keyout", made.key, "-out", made.certificate]
    words += ["-passout", f"pass:{passphrase}"] if passphrase else ["-nodes"]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    return made
