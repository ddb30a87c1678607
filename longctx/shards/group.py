"""The ranks that share one engine's sequences."""

import hashlib
from dataclasses import dataclass, field, replace

from longctx.engine.config import EngineConfig
from longctx.errors import ConfigError
from longctx.shards.plans import PlanChoice
from memory.layout import KVLayout
from parallel.gloo_group import GlooGroup


@dataclass(frozen=True, slots=True)
class ShardGroup:
    """All of them, and this one among them.

    ``node`` names the machine: ranks on one share its cores.
    """

    group: GlooGroup
    node: str
    choice: PlanChoice = field(default_factory=PlanChoice)
    timeout_s: float = 300.0  # longest wait for another rank

    def widen(self, config: EngineConfig) -> EngineConfig:
        """Of all ranks together: each computes ``max_batch_tokens`` of a step."""
        return replace(config, max_batch_tokens=self.group.world_size * config.max_batch_tokens)

    def count_on_node(self) -> int:
        """Ranks on this rank's machine; all ranks call it."""
        own = int.from_bytes(hashlib.blake2b(self.node.encode(), digest_size=7).digest(), "big")
        return self.group.gather_numbers([own], self.timeout_s).count([own])

    def agree_on_pages(self, layout: KVLayout, num_pages: int) -> int:
        """The fewest pages that any rank has room for; all ranks call it.

        Raises:
            ConfigError: if the ranks have unlike models.
        """
        digest = int(layout.digest(), 16) >> 1
        everyone = self.group.gather_numbers([num_pages, digest], self.timeout_s)
        if any(theirs != digest for _, theirs in everyone):
            raise ConfigError("the ranks of one worker have different models, KV dtypes, page sizes or attentions")
        return min(theirs for theirs, _ in everyone)
