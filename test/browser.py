"""A headless Chromium driven through a pipe (the DevTools protocol), for tests of pages. No package and no port is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
MOVED = (210, 211)  # descriptors that ours are moved to first: they may be 4 and 3
SECONDS = 60  # a start on a busy machine takes 10


class Browser:
    """One tab.

    Attributes:
        events: everything that the browser told: (method, parameters).
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._pending, self._number = to_browser, from_browser, b"", 0
        self._session: dict[str, str] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._from, 2**16) if ready else b""
            assert chunk, "the browser ended, or says nothing"
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """Load a file into a window of so many CSS pixels, without a network, and wait until it is there."""
        self.events.clear()
        self.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Page.navigate", url=page.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of all events of these kinds."""
        return [parameters for method, parameters in self.events if method in methods]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile folder of its own, ended afterwards."""
    assert PROGRAM is not None
    pipes = [os.pipe(), os.pipe()]
    reads, writes = pipes[0][0], pipes[1][1]
    # --no-sandbox: as root in a container it does not start otherwise; pages are our own
    command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
               "--hide-scrollbars", f"--user-data-dir={profile}"]
    # it reads commands from descriptor 3 and answers on 4
    redirected = f"{MOVED[0]}<&{reads} {MOVED[1]}>&{writes} 3<&{MOVED[0]} 4>&{MOVED[1]}"
    process = subprocess.Popen(["bash", "-c", f'exec "$0" "$@" {redirected}', *command], pass_fds=(reads, writes),
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for fd in (reads, writes):
        os.close(fd)
    try:
        yield Browser(pipes[0][1], pipes[1][0])
    finally:
        process.terminate()
        process.wait(10)
        for fd in (pipes[0][1], pipes[1][0]):
            os.close(fd)
