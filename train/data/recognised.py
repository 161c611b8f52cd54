"""The forms of a source's records: one in each file, counted, with the columns that nothing reads."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from train.config import ColumnsConfig
from train.data.messages import refuse
from train.data.records import MIXABLE, Read, read_record

#: Keys of messages that the trainer reads itself; all others are read by the chat template, or by nothing.
_MESSAGE_KEYS = set(
    "role content from value weight tool_calls tool_call_id reasoning_content thinking reasoning".split()
)
#: Columns that a line of the start names at most.
_MOST_NAMED = 12


class Recognised:
    """Reads the records of one source and remembers what they were.

    Attributes:
        forms: the number of records of each form, by its name.
        columns: all columns with a value in some record, in the order in which they came.
        read: those of them that were read.
        message_keys: keys of messages that are left to the chat template.
    """

    def __init__(self, columns: ColumnsConfig, read: Callable[..., Read] = read_record) -> None:
        """`read` reads a record as `read_record` does: (record, place, columns) → what it is."""
        self._named, self._read = columns, read
        self.forms: Counter[str] = Counter()
        self.columns: dict[str, None] = {}
        self.read: set[str] = set()
        self.message_keys: dict[str, None] = {}
        self._first: dict[str, tuple[str, str]] = {}  # of each file, the form and place of its first record

    def content(self, found: Any, file: str, place: str) -> Any:
        """The content of a record; None for a blank one.

        Raises:
            ConfigError: as `read_record`; or it has another form than the file's first record.
        """
        record = self._read(found, place, self._named)
        first, where = self._first.setdefault(file, (record.form, place))
        if record.form != first and not {record.form, first} <= MIXABLE:
            refuse(
                f"{place}: found {record.form} (the keys {', '.join(found)}), expected {first}, as in {where}: a file "
                "has records of one form. Put each form into a file of its own, as [[data.sources]] of a mixture."
            )
        self.forms[record.form] += 1
        self.columns.update(dict.fromkeys(key for key, value in found.items() if value is not None))
        self.read |= record.columns
        for column in record.columns:
            if isinstance(found[column], list):
                self._note_messages(found[column])
        return record.content

    def _note_messages(self, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, dict) and ("role" in message or "from" in message):
                self.message_keys.update(
                    dict.fromkeys(key for key in message.keys() - _MESSAGE_KEYS if message[key] is not None)
                )

    def require_columns(self, where: str) -> None:
        """Refuses a column that is named in [data.columns] and that no record had."""
        for field, column in self._named.given.items():
            if column not in self.columns and self.columns:
                refuse(
                    f"data.columns.{field}: none of the {self.forms.total():,} records of {where} has {column!r}, "
                    f"expected one of {', '.join(self.columns)}."
                )

    def notes(self, source: str) -> list[str]:
        """What the start of a run says: the forms, with their numbers of records, and the columns that are not read."""
        lines = [f"{count:,} records of {source}: {form}" for form, count in self.forms.items()]
        unread = [column for column in self.columns if column not in self.read]
        if unread:
            lines[-1] += f"; keys that are not read: {_listed(unread)}"
        if self.message_keys:
            keys = _listed(sorted(self.message_keys))
            lines[-1] += f"; keys of messages that are read where the chat template does: {keys}"
        return lines


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{', '.join(names[:_MOST_NAMED])}{more}"
