"""Errors as clients get them: OpenAI's error body."""

import json
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refused or failed request: a sentence, and the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """In ASCII: a message may quote a lone surrogate, which UTF-8 cannot encode."""
    return Response(json.dumps(content), status, headers, media_type="application/json")


def of_exception(error: Exception) -> ApiError:
    """The ApiError for an error that ended an accepted request."""
    if isinstance(error, ApiError):
        return error
    return ApiError(500, str(error) or type(error).__name__)


async def on_api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def on_http_error(request: Request, error: HTTPException) -> Response:
    """The router's errors: an unknown path or method."""
    asked = f"{request.method} {request.url.path}"
    messages = {404: f"there is no {asked} here", 405: f"{asked}: this path takes {(error.headers or {}).get('Allow')}"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()
