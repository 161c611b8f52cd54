"""Answers of a given form: masks over the vocabulary, by llguidance."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np
import tokenizers

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.server.chat_form import Thought, ToolForm

#: White space that a model may put between the parts of a JSON text: enough for indentation, and an end to it.
_JSON_SPACE = r"[ \n]{0,20}"
#: What a grammar of an answer may begin with.
_LEXEMES = "ANY: /(?s:.*)/\nSPACE: /[ \\t\\r\\n]{1,8}/\n"


class GrammarMask:
    """The tokens that may come next in one sequence; see `inference.request.TokenMask`."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._matcher = matcher

    def allowed(self) -> np.ndarray:
        """uint32 [ceil(V / 32)].

        Raises:
            RequestError: the grammar has become too large for its limits.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return mask

    def accept(self, token: int) -> None:
        """Takes in a token.

        Raises:
            RequestError: it is none of those that were allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar of the answer cannot go on ({self._matcher.get_error():.300}).")


class Grammars:
    """Grammars over one tokenizer.

    Args:
        tokenizer: of the checkpoint.
        vocab_size: of the model, which may be larger than the tokenizer's.
        stop_tokens: that end an answer; at least one.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, stop_tokens: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocabulary = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(stop_tokens))
        self._matcher = lru_cache(maxsize=64)(self._compiled)

    def mask(self, grammar: str) -> GrammarMask:
        """The mask of a new sequence.

        Raises:
            RequestError: the grammar cannot be served; the message says which part of the schema.
        """
        return GrammarMask(self._matcher(grammar).deep_copy())

    def json(self, schema: Mapping[str, Any], thought: Thought) -> str:
        """The grammar of a JSON text of a schema, after the answer's thought."""
        return self._answer(thought, "value", f"value: %json {_embedded(schema)}\n")

    def calls(self, tools: Mapping[str, Mapping[str, Any]], form: ToolForm, thought: Thought, *, several: bool) -> str:
        """The grammar of at least one tool call, or of exactly one.

        Args:
            tools: the functions that may be called: the JSON schema of the arguments by name.
            form: how calls are written.
            thought: where the answer's thought is.
            several: more than one call is allowed.
        """
        rules = [f"call: {self._tag('<tool_call>')} {_quoted(chr(10))} body {self._tag('</tool_call>')}\n"]
        if form == "json":
            calls = [
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, "arguments": schema or {"type": "object"}},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for name, schema in tools.items()
            ]
            rules.append(f"body: value {_quoted(chr(10))}\nvalue: %json {_embedded({'anyOf': calls})}\n")
        else:
            rules += self._xml_calls(tools)
        return self._answer(thought, "call (SPACE? call)*" if several else "call", "".join(rules))

    def _xml_calls(self, tools: Mapping[str, Mapping[str, Any]]) -> list[str]:
        rules = ["body: " + " | ".join(f"function_{number}" for number in range(len(tools))) + "\n"]
        for number, (name, schema) in enumerate(tools.items()):
            parameters = []
            required = schema.get("required", []) if schema else []
            for index, (key, of_value) in enumerate((schema or {}).get("properties", {}).items()):
                rule = f"parameter_{number}_{index}"
                parameters.append(rule if key in required else f"{rule}?")
                begin, end = _quoted(f"<parameter={key}>\n"), "\n</parameter>\n"
                if isinstance(of_value, dict) and of_value.get("type") == "string" and "enum" not in of_value:
                    rules.append(f"{rule}: {begin} text_{number}_{index}\n")
                    rules.append(f"text_{number}_{index}[suffix={_quoted(end)}]: /(?s:.*)/\n")
                elif isinstance(of_value, dict) and of_value.get("type") == "string":
                    words = " | ".join(_quoted(str(word)) for word in of_value["enum"])
                    rules.append(f"{rule}: {begin} ({words}) {_quoted(end)}\n")
                else:
                    rules.append(f"{rule}: {begin} value_{number}_{index} {_quoted(end)}\n")
                    rules.append(f"value_{number}_{index}: %json {_embedded(of_value)}\n")
            begin, end = _quoted(f"<function={name}>\n"), _quoted("</function>\n")
            rules.append(f"function_{number}: {begin} {' '.join(parameters)} {end}\n")
        return rules

    def _answer(self, thought: Thought, body: str, rules: str) -> str:
        """The rules with what comes before: the rest of a thought that the prompt began, or one that may come."""
        close = self._tag("</think>")
        rest = f"ANY {close} SPACE?" if close.startswith("<") else "thought_text SPACE?"
        text = "" if close.startswith("<") else f"thought_text[suffix={close}]: /(?s:.*)/\n"
        before = {
            "none": "",
            "open": "thought",
            "possible": f"({self._tag('<think>')} thought)?",
        }[thought]
        used = "" if thought == "none" else f"thought: {rest}\n{text}"
        return f"start: {before} {body}\n{used}{_LEXEMES}{rules}"

    def _tag(self, tag: str) -> str:
        """A tag in a grammar: by its name where it is a token of the vocabulary, else as text."""
        return tag if self._tokenizer.token_to_id(tag) is not None else _quoted(tag)

    def _compiled(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise RequestError(f"no grammar can be made of it: {matcher.get_error().splitlines()[0]:.300}.")
        return matcher


def _embedded(schema: Any) -> str:
    options = {"x-guidance": {"whitespace_pattern": _JSON_SPACE}}
    return json.dumps({**schema, **options} if isinstance(schema, Mapping) else schema)


def _quoted(text: str) -> str:
    return json.dumps(text)
