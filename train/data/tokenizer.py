"""The tokenizer of a run: copied from a Hub folder, or a byte-level BPE trained on the text; and its Hub files."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.text_files import read_text

# The special tokens of a tokenizer that is trained here.
SPECIAL_TOKENS = END_OF_TEXT, _, MESSAGE_END = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

#: Its chat template: ChatML with Qwen's forms of tools, tool calls, tool responses and thoughts. Thoughts of earlier
#: turns are kept, so that a conversation is one document. The `generation` tags mark the assistant's tokens for
#: transformers and TRL; this trainer does not need them.
CHAT_TEMPLATE = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8")

# The files of a tokenizer in a Hub folder. special_tokens_map.json is read in old folders only.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip

# Qwen's pre-tokenization pattern, which splits text into words before the BPE: a word takes the last of the spaces
# before it, line ends and the indentation after them are one piece, and each digit is a piece.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer, its chat templates included, from one Hub folder to another."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with Qwen's word pattern and three special tokens; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files with which transformers' AutoTokenizer opens the folder, its chat template included."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def name_turn_ends(folder: Path, turn_ends: Sequence[str]) -> None:
    """Names the tokens that end an assistant's turn in the tokenizer_config.json of a Hub folder.

    The first becomes `eos_token`, as in Qwen's chat models, and the previous one stays as a special token and, where
    there is none, as `pad_token`. A chat template that writes `eos_token` keeps it: then the others are special tokens.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    own = _text(config.get("eos_token"))
    new = [token for token in turn_ends if token != own]
    if not new:
        return
    template = "".join(read_text(path) for path in folder.rglob("*.jinja")) + json.dumps(
        config.get("chat_template", "")
    )
    if "eos_token" not in template:
        config["eos_token"] = turn_ends[0]
        if own is not None:
            config.setdefault("pad_token", own)
            new = [own, *turn_ends[1:]]
    special = config.get("additional_special_tokens") or []
    known = {_text(token) for token in special}
    config["additional_special_tokens"] = [*special, *(token for token in new if token not in known)]
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
