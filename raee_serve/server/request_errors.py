"""Requests that are refused before vLLM sees them, told in vLLM's OpenAI error format."""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from raee_serve.server.options import MethodError, RequestError

ERROR_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.METHOD_NOT_ALLOWED: "MethodNotAllowedError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLargeError",
}


def error_response(error: RequestError) -> JSONResponse:
    """Its message and parameter, as vLLM tells its own errors."""
    answer = create_error_response(
        str(error), ERROR_TYPES[error.status], error.status, error.parameter
    )
    headers = {"allow": error.allowed} if isinstance(error, MethodError) else None
    return JSONResponse(answer.model_dump(), status_code=error.status, headers=headers)
