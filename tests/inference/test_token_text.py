"""Every token can be read by itself, whatever bytes it holds."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from qwen_moe_jax.inference.token_text import readable, readable_tokens


def byte_level(*texts: str) -> tokenizers.Tokenizer:
    """As Qwen's: byte-level BPE, here with the merges that `texts` teach."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|im_start|>"])
    return tokenizer


def sentence_piece() -> tokenizers.Tokenizer:
    """As Mixtral's: pieces with ▁ for a space, and a piece for every byte that the vocabulary does not know."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def read(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    return list(readable_tokens(tokenizer, tokenizer.encode(text).ids))


def test_byte_level_pieces_and_spaces():
    assert read(byte_level("a the the the"), "a the\n\t") == ["a", "␣the", "↵", "⇥"]


def test_parts_of_a_character_are_shown_as_bytes():
    assert read(byte_level("x"), "é漢") == [r"‹\xc3›", r"‹\xa9›", r"‹\xe6›", r"‹\xbc›", r"‹\xa2›"]
    # A token that ends within a character: what is whole in it is shown as it is.
    tokenizer = byte_level("x")
    tokenizer.add_tokens(["Ã©æ"])
    assert readable_tokens(tokenizer, [tokenizer.token_to_id("Ã©æ")]) == (r"é‹\xe6›",)


def test_special_tokens_are_shown():
    assert read(byte_level("x"), "<|im_start|>x") == ["<|im_start|>", "x"]


def test_sentence_pieces_keep_their_space_and_show_their_bytes():
    assert read(sentence_piece(), "a a\né") == ["␣a", "␣a", "↵", r"‹\xc3›", r"‹\xa9›"]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[31m", "‹U+001B›[31m"),  # would colour the terminal
        ("a\u202eb", "a‹U+202E›b"),  # would turn the direction of what follows
        ("\u00a0", "‹U+00A0›"),
        ("naïve 漢", "naïve␣漢"),
        ("\udce4\udcbdx", r"‹\xe4\xbd›x"),
    ],
)
def test_nothing_is_unseen(text, shown):
    assert readable(text) == shown
