"""Errors in OpenAI's form: an object with message, type, param and code."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets an error as its answer.

    Args:
        status: of HTTP.
        message: what was found, what was expected, what to do.
        param: the field of the request, as `messages[0].content`; None where it is none.
        code: a word for programs, as `context_length_exceeded`.
        retry_after: seconds after which the same request may succeed, for the header Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        headers: Mapping[str, str] = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(self.body, status_code=self.status, headers=dict(headers))


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that no server state can make valid."""
    return ApiError(400, message, param=param, code=code)
