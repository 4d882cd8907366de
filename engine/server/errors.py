"""What went wrong, in the shape of OpenAI's API."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..async_engine import DeadError, DrainingError, OverloadedError

RETRIED = (429, 503)
RETRY_AFTER = "1"
"""Seconds, for these."""

LONGEST_MESSAGE = 1000
"""Characters: a message may quote what the client sent."""

PARAMS = {"json_schema": "response_format"}
"""What a body calls otherwise than SamplingParams."""

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An answer that is an error.

    status:  of HTTP.   param: the parameter that is at fault.   code: a word for programs
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: ValueError | OverloadedError | DrainingError | DeadError, field: str | None = None) -> APIError:
        """What the engine refuses or fails with.

        field: the parameter at fault, where a ValueError's message does not begin with another's name
        """
        if isinstance(error, ValueError):
            named = re.match(r"(?:a token(?: id)? of )?(\w+)[=\[]|token id \d+ of (?!the )(\w+)", str(error))
            name = (named[1] or named[2]) if named else field
            return cls(400, str(error), param=PARAMS.get(name, name))
        if isinstance(error, OverloadedError):
            return cls(429, str(error), code="overloaded")
        return cls(503, str(error), code="engine_dead" if isinstance(error, DeadError) else "shutting_down")

    @classmethod
    def of_failure(cls, error: str) -> APIError:
        """What a request fails with that was taken in, while the engine goes on.

        A schema may turn out too complex only when it has been followed a while, and that is the client's fault.
        """
        if error.startswith("json_schema="):
            return cls.of(ValueError(error))
        return cls(500, error, code="generation_failed")

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message[:LONGEST_MESSAGE].encode(errors="replace").decode()
        param = self.param and self.param[:LONGEST_MESSAGE].encode(errors="replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": RETRY_AFTER} if self.status in RETRIED else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(json.dumps(self.body()), self.status, headers, "application/json")


def _of_validation(error: RequestValidationError) -> APIError:
    """Names the first field that is wrong and what is wrong with it, and quotes nothing of the body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first['ctx']['error']}")
    where = [str(part) for part in first["loc"][1:]]
    if not where:
        return APIError(400, "the body must be a JSON object, with Content-Type: application/json")
    message = first["msg"].removeprefix("Value error, ")
    return APIError(400, f"{'.'.join(where)}: {message}", param=where[0])


def add_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = APIError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return APIError(500, "an internal fault of the server, see its log").response()


class ErrorDetail(BaseModel):
    """param: the parameter that is at fault.   code: a word for programs"""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


ERRORS = {
    400: "The request is wrong, or asks for what is not supported; param names the parameter",
    401: "A valid API key is needed, as `Authorization: Bearer KEY`",
    404: "No such model",
    413: "The body is too large",
    429: "As many requests run or wait as may",
    500: "A fault of the server, or of this request alone",
    503: "The server shuts down, or the engine is dead",
}


def documented(*statuses: int) -> Mapping[int | str, dict[str, Any]]:
    """The errors of a route, for /docs."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}}}
    retry = {"headers": {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}}
    return {
        status: {"description": ERRORS[status], "content": content} | (retry if status in RETRIED else {})
        for status in statuses
    }
