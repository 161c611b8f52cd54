"""Small tokenizers of every kind that checkpoints come with, trained on a few lines."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog. It's here, and it isn't there.",
    "naïve café, coöperate; 你好，世界。 你好吗？ Привет мир! 👍🏽 👩‍👩‍👧 नमस्ते",
    "stop here. stops there, stopped everywhere; STOP\n\nstop\n",
]


def byte_level() -> tokenizers.Tokenizer:
    """As Qwen's: byte-level BPE, two special tokens, one that is added and not special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Mixtral's: pieces with ▁ for a space, a piece for every byte, <s> put before a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + bytes_, show_progress=False)
    ascii_lines = ["".join(c for c in line if c.isascii() and c != "\n") for line in LINES]
    tokenizer.train_from_iterator(ascii_lines, trainer)
    # Training made the byte pieces special; in checkpoints they belong to the vocabulary alone.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """As T5's: Unigram pieces with ▁ before every word, unknown characters lost."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """As BERT's: ## for what goes on, spaces put between words and taken away before punctuation."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


KINDS = {kind.__name__: kind() for kind in (byte_level, byte_fallback, metaspace, word_piece)}
