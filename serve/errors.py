"""What can go wrong between a request and its answer, and the shape in which clients are told (OpenAI's)."""

from typing import Any

from vlm.errors import UserError


class ParameterError(UserError):
    """A value of a request is out of bounds; `param` names it."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class EngineError(RuntimeError):
    """A request that was in order could not be served."""


class QueueFullError(EngineError):
    """More requests are waiting than the engine takes; try again later."""


class EngineStoppedError(EngineError):
    """The engine takes no requests: it has not started, is draining, or has failed."""


class DeadlineError(EngineError):
    """The request's deadline passed before its answer was complete."""


class RequestError(EngineError):
    """The model failed on this request (the log knows more); others are not affected."""


class ApiError(Exception):
    """An answer with an error status. The text goes to the client: no paths, no internals."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def queue_is_full() -> ApiError:
    message = "the queue is full; try again in a second"
    return ApiError(429, message, "rate_limit_error", code="queue_full", headers={"Retry-After": "1"})


def is_draining() -> ApiError:
    message = "the server is shutting down and takes no new requests"
    return ApiError(503, message, "server_error", code="draining", headers={"Retry-After": "5"})


def as_api_error(error: BaseException) -> ApiError | None:
    """The answer for an error of the floors below; None when it is nobody's expected error."""
    match error:
        case ApiError():
            return error
        case ParameterError():
            return ApiError(400, str(error), param=error.param, code=error.code or "invalid_value")
        case UserError():
            return ApiError(400, str(error))
        case QueueFullError():
            return queue_is_full()
        case EngineStoppedError():
            return is_draining()
        case DeadlineError():
            return ApiError(504, "the answer was not complete within the time limit", "server_error", code="timeout")
        case RequestError():
            return ApiError(500, "the model failed on this request", "server_error", code="request_failed")
    return None
