"""The endpoints under /kevlar/ of a running server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

_MAX_BYTES = 16 << 20


class Failed(Exception):
    """What was asked for did not happen; the message says why."""

    exit_status = 1


class Unreachable(Failed):
    """Nobody answers there, or somebody else does."""

    exit_status = 3


class KeyRefused(Failed):
    exit_status = 4


class Server:
    def __init__(self, url: str, api_key: str | None, admin_api_key: str | None, timeout: float = 10.0) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        #: a server may have one key for clients and one for operators; who has only one of them says it everywhere
        self._key = api_key or admin_api_key
        self._admin_key = admin_api_key or api_key

    def status(self) -> dict[str, Any]:
        """Raises Failed."""
        status = self._ask("GET", "/kevlar/status", self._key)
        if not isinstance(status, dict) or not isinstance(status.get("groups"), list):
            raise Unreachable(f"{self.url}: answers, but not as SGLang-Kevlar does")
        return status

    def maintain(self, group: int, action: str, **query: float) -> None:
        """Raises Failed."""
        asked = f"?{urllib.parse.urlencode(query)}" if query else ""
        self._ask("POST", f"/kevlar/groups/{group}/{action}{asked}", self._admin_key)

    def roll_weights(self, **fields: Any) -> None:
        """Raises Failed."""
        self._ask("POST", "/kevlar/weights", self._admin_key, json.dumps(fields).encode())

    def _ask(self, method: str, path: str, key: str | None, body: bytes | None = None) -> Any:
        try:
            request = urllib.request.Request(self.url + path, body, method=method)
            if body is not None:
                request.add_header("Content-Type", "application/json")
            if key:
                request.add_header("Authorization", f"Bearer {key}")
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.loads(answer.read(_MAX_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, path) from error
        except urllib.error.URLError as error:
            raise Unreachable(f"{self.url}: cannot be reached: {error.reason}") from error
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.url}: cannot be reached: {error or type(error).__name__}") from error
        except ValueError as error:
            raise Unreachable(f"{self.url}: answers, but not as SGLang-Kevlar does: {error}") from error

    def _refused(self, error: urllib.error.HTTPError, path: str) -> Failed:
        said = _message(error)
        if error.code in (401, 403):
            return KeyRefused(f"{self.url}: the key is missing or wrong for {path.partition('?')[0]}")
        if said is None and error.code == 404:
            where = "this is no SGLang-Kevlar, or its --admin-port is another one"
            return Unreachable(f"{self.url}: has no {path.partition('?')[0]}: {where}")
        return Failed(said or f"{self.url}: {error.code} {error.reason}")


def _message(error: urllib.error.HTTPError) -> str | None:
    """Of an error that is ours."""
    try:
        message = json.loads(error.read(_MAX_BYTES))["error"]["message"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return message if isinstance(message, str) else None
