"""Streamed text is the text of all tokens, in chunks of any size; stop strings are found as by `str.find`."""

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.detokenize import Detokenizer, StopMatch, StopStrings, TextStream
from qwen_moe_jax.inference.tokenizer import decode, encode
from tests.inference.tokenizer_kinds import KINDS

SCRIPTS = st.text(st.sampled_from("ab  \n.,'stop你好ñéе́न्👍🏽👩‍\ufffd\u200d\u0301")) | st.text(max_size=20)
CUTS = st.lists(st.integers(0, 5), max_size=40)


def pieces(sequence, cuts):
    """The sequence in pieces of the given sizes, then one by one."""
    start = 0
    for cut in cuts:
        yield sequence[start : start + cut]
        start += cut
    for at in range(start, len(sequence)):
        yield sequence[at : at + 1]


def streamed(kind: str, ids: list[int], cuts=()) -> list[str]:
    detokenizer = Detokenizer(KINDS[kind])
    return [*(detokenizer.push(piece) for piece in pieces(ids, cuts)), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(text=SCRIPTS, cuts=CUTS)
@settings(max_examples=100, deadline=None)
def test_stream_of_a_text_is_its_decoding(kind, text, cuts):
    ids = encode(KINDS[kind], text)
    found = streamed(kind, ids, cuts)
    assert "".join(found) == decode(KINDS[kind], ids)
    assert not any(piece.endswith("\ufffd") for piece in found[:-1])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), cuts=CUTS)
@settings(max_examples=200, deadline=None)
def test_stream_of_any_tokens_is_their_decoding(kind, data, cuts):
    """What an untrained model writes: stray bytes, special tokens in the middle of characters, ids of no token."""
    size = KINDS[kind].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=60))
    assert "".join(streamed(kind, ids, cuts)) == decode(KINDS[kind], ids)


FALLBACKS = [f"<0x{byte:02X}>" for byte in (0x41, 0x80, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F)]
BYTES = {"byte_level": [*"AĢÃ©ä½łðŁ", "<|im_end|>"], "byte_fallback": [*FALLBACKS, "a", "▁", "</s>"]}


@pytest.mark.parametrize("kind", BYTES)
@given(data=st.data(), cuts=CUTS)
@settings(max_examples=300, deadline=None)
def test_bytes_of_valid_and_invalid_characters(kind, data, cuts):
    """A stray byte breaks all bytes next to it in SentencePiece vocabularies, and itself only in byte-level ones."""
    words = data.draw(st.lists(st.sampled_from(BYTES[kind]), max_size=40))
    ids = [KINDS[kind].token_to_id(word) for word in words]
    assert "".join(streamed(kind, ids, cuts)) == decode(KINDS[kind], ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_text_comes_with_its_token(kind):
    """Nothing waits that need not: after each token all whole characters are out, but for a last run of byte tokens."""
    tokenizer = KINDS[kind]
    ids = encode(tokenizer, "the lazy 世 dog. \U0001f44d naïve stop")
    detokenizer, out = Detokenizer(tokenizer), ""
    for number, token in enumerate(ids, 1):
        out += detokenizer.push([token])
        if not (tokenizer.id_to_token(token) or "").startswith("<0x"):
            assert out == decode(tokenizer, ids[:number]).rstrip("\ufffd")
        assert out + detokenizer.held() == decode(tokenizer, ids[:number])


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, skip_special_tokens=True):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token):
        return self.tokenizer.id_to_token(token)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("byte_level", ["Ġthe"]),
        ("byte_level", ["Ģ"]),  # a stray byte
        ("byte_level", ["<|im_end|>"]),
        ("byte_fallback", ["▁stop"]),
        ("byte_fallback", ["<0xE4>", "<0xBD>", "<0xA0>"]),
        ("metaspace", ["▁"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_cost_grows_with_the_length_and_not_with_its_square(kind, words):
    ids = [KINDS[kind].token_to_id(word) for word in words] * (3000 // len(words))
    assert None not in ids
    counting = Counting(KINDS[kind])
    detokenizer = Detokenizer(counting)
    text = "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish()
    assert text == decode(KINDS[kind], ids)
    assert counting.decoded < 10 * len(ids)


def test_tokenizers_of_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=KINDS["byte_fallback"])
    ids = tokenizer.encode("naïve 你\nstop")
    detokenizer = Detokenizer(tokenizer)
    found = "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish()
    assert found == KINDS["byte_fallback"].decode(ids)


WORDS = st.text(st.sampled_from("ab"), min_size=1, max_size=4)


@given(text=st.text(st.sampled_from("abc"), max_size=40), strings=st.lists(WORDS, max_size=3), cuts=CUTS)
@example(text="aab", strings=["aab", "ab"], cuts=[])
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_as_by_str_find(text, strings, cuts):
    stop, shown, completed = StopStrings(strings), "", None
    taken = 0
    for piece in pieces(text, cuts):
        shown += stop.push(piece)
        taken += len(piece)
        completed = completed if completed is not None or stop.found is None else (taken - len(piece), taken)
        if stop.found is None:
            hidden = text[len(shown) : taken]
            assert text[:taken] == shown + hidden
            # Held back is the beginning of a stop string, and never less than that.
            assert hidden == "" or any(string.startswith(hidden) for string in strings)
            assert not any(text[:taken].endswith(s[:n]) and n > len(hidden) for s in strings for n in range(1, len(s)))
    shown += stop.finish()

    ends = [(text.find(string) + len(string), text.find(string)) for string in strings if string in text]
    if not ends:
        assert stop.found is None and shown == text
        return
    end, start = min(ends)
    assert stop.found == StopMatch(text[start:end], start, end)
    assert shown == text[:start]
    assert completed[0] < end <= completed[1], "the piece that completed it, and no later one"


def test_of_two_with_the_same_end_the_longer_counts():
    stop = StopStrings(["b", "ab"])
    assert stop.push("xab") == "x"
    assert stop.found == StopMatch("ab", 1, 3)
    assert stop.push("more") == stop.finish() == ""


@pytest.mark.parametrize("strings", ["stop", ["stop", ""], [3]])
def test_invalid_stop_strings_are_refused(strings):
    with pytest.raises(RequestError, match="expected a list of strings, none of them empty"):
        StopStrings(strings)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("string", ["\n", "世", " sto", "stop", "界。", "é"])
def test_token_that_completes_a_stop_string(kind, string):
    """transformers' rule: the first token with which the decoded text holds it, even where more bytes may come."""
    tokenizer = KINDS[kind]
    ids = encode(tokenizer, "The fox; naïve café 你好，世界。 stops\nthere")
    expected = next(n for n in range(len(ids)) if string in decode(tokenizer, ids[:n]))
    for cuts in ([], [len(ids)], [3, 5, 2]):
        stream = TextStream(tokenizer, [string, "never"])
        text = "".join(stream.push(piece) for piece in pieces(ids, cuts)) + stream.finish()
        assert stream.stopped.string == string
        assert stream.num_tokens == expected
        whole = decode(tokenizer, ids)
        assert text == whole[: whole.index(string)]
        assert stream.stopped.start == len(text)


@given(text=SCRIPTS, cuts=CUTS)
@settings(max_examples=100, deadline=None)
def test_without_a_stop_string_the_stream_is_the_text(text, cuts):
    for kind, strings in [("byte_level", []), ("byte_fallback", ["\x00never"])]:
        stream, ids = TextStream(KINDS[kind], strings), encode(KINDS[kind], text)
        found = "".join(stream.push(piece) for piece in pieces(ids, cuts)) + stream.finish()
        assert found == decode(KINDS[kind], ids).split("\x00never")[0]
        assert stream.num_tokens == len(ids) or stream.stopped
