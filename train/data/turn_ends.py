"""The tokens with which a chat template ends an assistant's turn, found in the learned tokens of conversations."""

from collections import Counter

import numpy as np
from tokenizers import Tokenizer

from train.data.chat import Turns


class TurnEnds:
    """Collects the last token of each assistant's turn, apart from white space after it.

    A turn ends with a token of its own if that is a special token, such as <|im_end|>, </s> or <|eot_id|>. Any other
    added token counts if every turn ends with it: some tokenizers do not mark theirs as special, but a turn may also
    end with the </tool_call> of its content.

    Attributes:
        found: how often each token ended a turn.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self.found: Counter[int] = Counter()

    def add(self, turns: Turns) -> None:
        """Counts the last token of every learned run of a conversation."""
        runs = np.flatnonzero(np.diff(np.concatenate([[0], turns.learned, [0]])))
        for start, stop in zip(runs[::2], runs[1::2], strict=True):
            last = int(stop) - 1
            while last > start and self._is_blank(int(turns.ids[last])):
                last -= 1
            self.found[int(turns.ids[last])] += 1

    def ids(self) -> list[int]:
        """The tokens that end turns, the most frequent first."""
        added = [token for token, _ in self.found.most_common() if token in self._added]
        return added if len(self.found) == 1 else [token for token in added if self._added[token].special]

    def notes(self) -> list[str]:
        """What the start of a run says about them; nothing without conversations."""
        if not self.found:
            return []
        names = [repr(self._tokenizer.id_to_token(token)) for token in self.ids()]
        if not names:
            return [
                "the chat template ends an assistant's turn without a token of its own: the exported model has no stop "
                "token for it"
            ]
        return [f"an assistant's turn ends with {' or '.join(names)}: a stop token of the exported model"]

    def _is_blank(self, token: int) -> bool:
        return token not in self._added and not self._tokenizer.decode([token], skip_special_tokens=False).strip()
