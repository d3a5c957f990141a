"""What a client is told when a request fails: a status and OpenAI's error body."""

from __future__ import annotations

from typing import Any

from qwen2kit.errors import NonFiniteLogits, Qwen2KitError


class ApiError(Qwen2KitError):
    """A request that is not answered as asked.

    Args:
        status: HTTP status.
        message: one line for the client.
        kind: OpenAI's ``type``, e.g. ``invalid_request_error``.
        param: the field at fault.
        code: a word for programs.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {message, type, param, code}}``."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be carried out as it stands."""
    return ApiError(400, message, param=param, code=code)


def unauthorized() -> ApiError:
    """401; says nothing about the key that was expected or given."""
    return ApiError(
        401,
        "missing or wrong API key; send it as 'Authorization: Bearer KEY'",
        kind="authentication_error",
        code="invalid_api_key",
    )


def foreign_host() -> ApiError:
    """403: the request came under a name that may be anybody's."""
    return ApiError(
        403,
        "this server listens on localhost only and has no API key; start it with one to reach it "
        "under a public name",
        kind="permission_error",
        code="foreign_host",
    )


def overloaded(retry_after: int) -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        f"the server's queue is full; try again in {retry_after} s",
        kind="rate_limit_error",
        code="queue_full",
        retry_after=retry_after,
    )


def too_slow() -> ApiError:
    """The client reads so slowly that its answer was given up."""
    return ApiError(
        503,
        "the client does not read its stream; the answer was cut off",
        kind="server_error",
        code="client_too_slow",
    )


def shutting_down() -> ApiError:
    """503: the server is about to leave."""
    return ApiError(
        503, "the server is shutting down", kind="server_error", code="shutting_down", retry_after=5
    )


def no_memory() -> ApiError:
    """503: the device has no memory for this at the moment."""
    return ApiError(
        503,
        "the device is out of memory at the moment; try again, or send a shorter prompt",
        kind="server_error",
        code="out_of_memory",
        retry_after=10,
    )


def non_finite() -> ApiError:
    """500: the logits of this request are NaN or infinite; others go on."""
    return ApiError(500, str(NonFiniteLogits()), kind="server_error", code="non_finite_logits")


def engine_failed() -> ApiError:
    """500: the engine broke; what broke is in the server's own log."""
    return ApiError(500, "the engine failed", kind="server_error", code="engine_failed")
