"""What the Hub answers, as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import HubError, LcpatchError

_ADVICE = {
    401: "the Hub does not know this token, or the repository is private: hf auth login, or pass token=…",
    403: "this token may not do that: take one with the right to (to load a gated model, accept its terms first)",
    404: "there is no such repository or revision, or it is private: check the name, or pass token=…",
    409: "somebody else changed the repository meanwhile: try again",
    413: "the files are too large for one request: try again with a smaller max_shard_size",
    429: "too many requests: wait a minute and try again",
}


@contextmanager
def sentence(task: str, token: str | bool | None = None, afterwards: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into a `HubError`.

    Args:
        task: what was tried, such as "push to me/model".
        token: never repeated, whatever a server says.
        afterwards: appended to the message.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    transport = HfHubHTTPError.__bases__[0]  # httpx's base error, whichever httpx this huggingface_hub builds on
    try:
        yield
    except LcpatchError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, transport, ConnectionError, TimeoutError, RuntimeError) as error:
        # A failed upload of a large file is a RuntimeError around what happened; by Xet, one that says it itself.
        happened = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        raise HubError(_clean(f"cannot {task}: {_why(happened)}{afterwards}", token)) from error


def _why(error: BaseException) -> str:
    """What happened and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "the files are not in the cache and the Hub cannot be reached: check the connection and HF_ENDPOINT"
    if type(error) is RuntimeError:
        return str(error).rstrip(".")
    if not isinstance(error, HfHubHTTPError):
        return f"no answer from the Hub ({type(error).__name__}): check the connection and try again"
    status = error.response.status_code
    fallback = "the Hub has a fault: try again later" if status >= 500 else error.server_message or "it was refused"
    advice = _ADVICE.get(status, fallback)
    wait = error.response.headers.get("Retry-After", "")
    if wait.isascii() and wait.isdigit():
        advice = f"{advice.partition(':')[0]}: wait {wait[:6]} s and try again"
    return f"{status}, {advice}"


def _clean(message: str, token: str | bool | None) -> str:
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            message = message.replace(secret, "…")
    return message
