"""`[data.columns]`: which column of a record is read as which field."""

import dataclasses
from dataclasses import dataclass

from qwen_moe_jax.config.checks import Checks

#: The fields that make each form of a record what it is.
FORM_FIELDS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
)


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """The columns of records, the keys of JSON objects, that are read as these fields; left out, those of that name.

    Naming a column of text, messages, prompt and completion, or instruction and output also chooses that form, where a
    record has the keys of several.

    Attributes:
        text: the text of a document.
        messages: a list of messages, with role and content or with from and value; left out, messages or conversations.
        prompt: text or messages before the completion, which are not learned.
        completion: text or messages that are learned.
        instruction: what the user asks.
        input: what the user adds to the instruction.
        output: the assistant's answer.
        history: earlier turns, a list of pairs of an instruction and its output.
        system: the system message, where messages have none.
        tools: a list of the tools' JSON schemas.
        chosen: the better answer of a pair of preferences, or the whole text or conversation with it.
        rejected: the worse one.
        margin: how much better the chosen answer is, for a reward model.
        label: of a text.
        tokens: a list of words.
        labels: a label for each of them.
        chat_template_kwargs: variables of the chat template.
    """

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    history: str | None = None
    system: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    margin: str | None = None
    label: str | None = None
    tokens: str | None = None
    labels: str | None = None
    chat_template_kwargs: str | None = None

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for field, column in self.given.items():
                twice = [other for other, same in self.given.items() if same == column and other != field]
                check(column != "", field, "the name of a column")
                check(not twice, field, f"a column of its own: it is also that of {', '.join(twice)}")
            chosen = [fields for fields in FORM_FIELDS if set(fields) & self.given.keys()]
            for fields in chosen[1:]:
                first = " and ".join(chosen[0])
                for field in fields:
                    check(field not in self.given, field, f"none with {first}: a source has records of one form")

    @property
    def given(self) -> dict[str, str]:
        """The columns that are named, by field."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {field: column for field, column in named.items() if column is not None}

    @property
    def form(self) -> tuple[str, ...] | None:
        """The fields of the form that is chosen; None where no column of one is named."""
        return next((fields for fields in FORM_FIELDS if set(fields) & self.given.keys()), None)
