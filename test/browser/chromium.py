"""Debian's Chromium, driven by its own chromedriver: the few calls of the WebDriver protocol that the tests need."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

#: seconds for one call
CALL_TIMEOUT = 20.0
START_TIMEOUT = 20.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # The page under test is at this address, and nothing else is asked for.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def why_not() -> str | None:
    """Why there is no browser to test with."""
    if not any(shutil.which(name) for name in BROWSERS) or not shutil.which("chromedriver"):
        return "no Chromium (Debian: apt-get install chromium chromium-driver)"
    return None


class Page:
    """One window. As a context manager: browser and driver are gone afterwards, whatever happened."""

    def __init__(self, directory: Path, port: int, width: int = 1200, height: int = 1000) -> None:
        """``directory``: of its profile. ``port``: a free one, for the driver."""
        self._directory = directory
        self._port = port
        self._size = (width, height)
        self._session = ""

    def __enter__(self) -> Page:
        self._log = (self._directory / "chromedriver.log").open("wb")
        environment = {**os.environ, "HOME": str(self._directory), "TMPDIR": str(self._directory)}
        command = ["chromedriver", f"--port={self._port}"]
        # A group of its own, so that a driver that died takes no browser with it that would live on.
        self._driver = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            self._client = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=CALL_TIMEOUT)
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            if self._session:
                self._client.delete(self._session, timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._driver.pid, signal.SIGKILL)
        self._driver.wait()
        self._log.close()

    def _open(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if self._client.get("/status").json()["value"]["ready"]:
                    break
            assert time.monotonic() < deadline and self._driver.poll() is None, "chromedriver does not start"
            time.sleep(0.05)
        width, height = self._size
        binary = next(path for name in BROWSERS if (path := shutil.which(name)))
        flags = [*FLAGS, f"--user-data-dir={self._directory / 'profile'}", f"--window-size={width},{height}"]
        capabilities = {
            "goog:chromeOptions": {"binary": binary, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        # The first start of a browser on a busy machine takes its time.
        answer = self._client.post("/session", json={"capabilities": {"alwaysMatch": capabilities}}, timeout=60).json()
        assert "sessionId" in answer["value"], answer
        self._session = f"/session/{answer['value']['sessionId']}"

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url = self._session + path
        response = self._client.get(url) if body is None else self._client.post(url, json=body)
        value = response.json()["value"]
        assert response.status_code == 200, value
        return value

    def _devtools(self, command: str, **params: Any) -> Any:
        return self._call("/goog/cdp/execute", {"cmd": command, "params": params})

    def go(self, url: str) -> None:
        self._call("/url", {"url": url})

    def js(self, expression: str, *arguments: Any) -> Any:
        """The value of a JavaScript expression; ``arguments[0]`` and so on are in it."""
        return self._call("/execute/sync", {"script": f"return {expression}", "args": list(arguments)})

    def text(self, selector: str) -> str:
        return self.js("document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def wait(self, expression: str, timeout: float = 30.0) -> Any:
        """Until it is true. Fails with what the page shows."""
        deadline = time.monotonic() + timeout
        while not (value := self.js(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout:g} s: {expression}\n{self.text('body')}")
            time.sleep(0.1)
        return value

    def size(self, width: int, height: int) -> None:
        """Of what is shown; headless, a window cannot be as narrow as a telephone."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def dark(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("/screenshot")))

    def problems(self) -> list[str]:
        """What the browser complained of since the last call: errors of scripts, of the network, of its policy."""
        entries = self._call("/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries if entry["level"] in ("SEVERE", "WARNING")]
