"""The answer to a prompt, while it is decoded."""

import dataclasses
from typing import TYPE_CHECKING

from qwen_moe_jax.inference.detokenize import TextStream

if TYPE_CHECKING:
    from qwen_moe_jax.inference.request import Chunk, Finish


@dataclasses.dataclass
class Answer:
    """A model's answer so far.

    Attributes:
        stream: makes text of the tokens, and looks for stop strings.
        text: without special tokens, and without the stop string that ended it.
        token_ids: with the stop token, or the token that completed a stop string, as in transformers.
        log_probs: of each token, in nats.
        finish_reason: "stop" (a stop token or string) or "length" (the requested number of tokens, or a full cache);
            None while it is decoded.
    """

    stream: TextStream
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: "Finish | None" = None

    def take(self, chunk: "Chunk") -> str:
        """Adds a chunk; returns the text that is new. What comes after the end is not taken."""
        if self.finish_reason is not None:
            return ""
        new = self.stream.push(chunk.token_ids)
        count = self.stream.num_tokens - len(self.token_ids)
        self.token_ids += chunk.token_ids[:count]
        self.log_probs += chunk.log_probs[:count]
        self.text += new
        if self.stream.stopped is not None:
            self.finish_reason = "stop"
        elif chunk.finished is not None:
            self.finish_reason = chunk.finished
            new += self.close()
        return new

    def close(self) -> str:
        """Ends an answer that gets no more tokens; returns the text that was held back."""
        rest = self.stream.finish()
        self.text += rest
        return rest
