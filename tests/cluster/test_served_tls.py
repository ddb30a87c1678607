"""``longctx serve`` with a certificate and a file of keys, as an operator of several tenants runs it."""

import httpx
import pytest
from openai import AuthenticationError, DefaultHttpxClient, OpenAI

from tests.certificates import make_certificate
from tests.cli_server import launch, run_longctx, wait_until

pytestmark = pytest.mark.slow


def test_https_and_a_key_file(tmp_path):
    made = make_certificate(tmp_path / "tls", "127.0.0.1")
    key_file = f"server.api_key_file={tmp_path / 'keys'}"
    keys = {}
    for name in ("alice", "bob"):
        done = run_longctx("keys", "add", f"name={name}", key_file)
        assert done.returncode == 0, done.stderr
        keys[name] = done.stdout.strip()
    overrides = (*made.overrides, key_file, "server.key_requests_per_minute=10", "cluster=colocated")
    with launch(tmp_path, *overrides, key=keys["alice"], ca=made.certificate) as server:
        server.wait_until_ready()
        assert f"{server.url}/v1;" in server.output()
        answer = server.post("/v1/completions", prompt="import ", max_tokens=4)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-ratelimit-remaining-requests"] == "9"
        with DefaultHttpxClient(verify=server.verify) as trusting:
            bob = OpenAI(base_url=f"{server.url}/v1", api_key=keys["bob"], max_retries=0, http_client=trusting)
            chunks = bob.completions.create(model="demo", prompt="import ", max_tokens=4, stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks)
            assert run_longctx("keys", "remove", "name=bob", key_file).returncode == 0

            def is_refused() -> bool:
                try:
                    bob.models.list()
                except AuthenticationError:
                    return True
                return False

            wait_until(is_refused, 10)
        ask = ("status", f"server.port={server.port}", f"server.api_keys=[{server.key}]")
        for trust in ((f"server.tls_ca={made.certificate}",), made.overrides):
            done = run_longctx(*ask, *trust)
            assert done.returncode == 0, done.stderr
            assert "decode-0" in done.stdout
        assert run_longctx(*ask).returncode == 1  # http
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")  # not signed by a CA that is known
        assert "bob" not in server.output()
        assert server.stop() == 0
