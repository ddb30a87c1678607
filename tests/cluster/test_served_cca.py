"""CCA behind the endpoint: sizes by request."""

import httpx
import pytest

from longctx.attention.config import AttentionConfig
from tests.local_server import MODEL_NAME, check_error, serve
from tests.tiny_checkpoints import make_checkpoint

CCA = AttentionConfig(name="cca", group_size=4, window=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


def test_a_request_may_name_its_sizes(folder):
    body = {"model": MODEL_NAME, "prompt": "The sky is " * 12, "max_tokens": 12, "temperature": 0}

    def ask(client, attention):
        fields = body if attention is None else body | {"attention": attention}
        answer = client.post("/v1/completions", json=fields)
        return answer.raise_for_status().json()["choices"][0]["text"]

    with serve(folder) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        dense = ask(client, None)
    with serve(folder, method=CCA) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert ask(client, {"window": 1024}) == dense
        assert ask(client, {"group_size": 1, "window": 1}) == ask(client, {"group_size": None, "window": 512}) == dense
        assert ask(client, {}) == ask(client, None) != dense
        refused = client.post("/v1/completions", json=body | {"attention": {"group_size": 16}})
        assert "attention.window=8" in check_error(refused, 400, param="attention", code=None)
        assert server.engine.stats().num_pages_used == 0
