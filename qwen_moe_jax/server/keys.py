"""API keys: from a file or the environment, compared in constant time."""

import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.text_files import read_text

#: The environment variable of a single key.
VARIABLE = "QWEN_MOE_JAX_API_KEY"


class ApiKeys:
    """The keys that open the server; without any, it is open."""

    def __init__(self, keys: Sequence[str] = ()):
        self._keys = tuple(key.encode() for key in keys)

    def __len__(self) -> int:
        return len(self._keys)

    def admit(self, authorization: str | None) -> bool:
        """Whether a request with this Authorization header (`Bearer KEY`) may be served."""
        if not self._keys:
            return True
        scheme, _, found = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        given = found.strip().encode("utf-8", "surrogateescape")
        # All of them, whichever fits: the time says nothing of the keys.
        return any([hmac.compare_digest(given, key) for key in self._keys])


def read_keys(path: Path | None) -> ApiKeys:
    """The keys of a file, one a line, lines that begin with # left out; without a file, that of the environment.

    Raises:
        RequestError: the file cannot be read, or holds no key; the variable is empty.
    """
    if path is None:
        value = os.environ.get(VARIABLE)
        if value is not None and not value.strip():
            raise RequestError(f"{VARIABLE} is set and empty: give it a key, or unset it for a server without keys.")
        return ApiKeys([value.strip()] if value else [])
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as a file of API keys ({error}).") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise RequestError(f"{path}: found no API key, expected one a line.")
    return ApiKeys(keys)
