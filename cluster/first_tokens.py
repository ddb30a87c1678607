"""The payload of a KV transfer's commit frame: the first tokens, as JSON."""

import json
from dataclasses import asdict

from longctx.messages import FirstTokens, TokenLogprob


def encode_first_tokens(first: FirstTokens) -> bytes:
    """Bytes for ``KVStream.commit``."""
    return json.dumps(asdict(first), separators=(",", ":")).encode()


def decode_first_tokens(payload: bytes) -> FirstTokens:
    """The inverse; raises ``ValueError`` if the payload is none of ours."""
    try:
        fields = json.loads(payload)
        logprobs = tuple(
            TokenLogprob(entry["token_id"], entry["logprob"], tuple((int(t), float(p)) for t, p in entry["top"]))
            for entry in fields["logprobs"]
        )
        token_ids = tuple(int(token_id) for token_id in fields["token_ids"])
        return FirstTokens(token_ids, logprobs, int(fields["seed"]), int(fields["num_cached_tokens"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the commit's payload is malformed: {error!r}") from error
