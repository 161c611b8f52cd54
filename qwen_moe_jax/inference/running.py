"""A request from its submission to its end, as an engine keeps it."""

import dataclasses

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.inference.request import PromptLogProbs, Request, TopTokens


@dataclasses.dataclass(kw_only=True)
class Running:
    """A request from its submission to its end.

    Attributes:
        number: that `submit` returned.
        request: as it was submitted.
        config: its own, with a seed where it samples and `max_new_tokens` set.
        tokens: prompt and output.
        slot: that it has, or None while it waits.
        read: tokens that are in the cache.
        decodes: whether its prompt is read, but for the last token, which decoding begins with.
        begun: whether it was given what is known of its text already.
        blocks, digests: of the cache, and of the full ones (`inference.blocks`); the first `known` are known to others.
        borders: numbers of tokens after which a copy of its state is wanted.
        cached: tokens of the prompt that were not read, when it began; None before.
        log_probs, top: of the prompt's tokens, as far as they were read, where they are asked for.
    """

    number: int
    request: Request
    config: GenerationConfig
    tokens: list[int]
    slot: int | None = None
    read: int = 0
    decodes: bool = False
    begun: bool = False
    blocks: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    known: int = 0
    borders: set[int] = dataclasses.field(default_factory=set)
    cached: int | None = None
    log_probs: list[float] = dataclasses.field(default_factory=list)
    top: list[TopTokens] = dataclasses.field(default_factory=list)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def generated(self) -> int:
        """Tokens that were decoded."""
        return len(self.tokens) - self.prompt

    @property
    def left(self) -> int:
        """Tokens that it may still generate."""
        return self.config.max_new_tokens - self.generated

    @property
    def unread(self) -> int:
        """Tokens to read before it decodes: all but the last."""
        return len(self.tokens) - 1 - self.read

    @property
    def salt(self) -> str:
        """What the keys and values of its tokens depend on besides them."""
        return self.request.adapter or ""

    def is_late(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return self.request.deadline is not None and self.request.deadline <= now

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        asked = self.request.prompt_logprobs is not None and self.generated == 0
        return asked and len(self.log_probs) < self.prompt - 1

    def prompt_log_probs(self) -> PromptLogProbs | None:
        """Those of its prompt, where they were asked for."""
        if self.request.prompt_logprobs is None:
            return None
        return PromptLogProbs(log_probs=tuple(self.log_probs), top=tuple(self.top))
