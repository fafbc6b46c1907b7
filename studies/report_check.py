"""A report as a browser shows it: screenshots, console errors, requests, and what overflows.

    python studies/report_check.py REPORT.html --to shots

needs Chromium on the path (``--chromium`` names another). It writes one screenshot of the whole
page for each of 1280 and 390 pixels of width, light and dark, prints a line for each, and exits
with 1 if the console has an error, the page asks for anything but itself, or it scrolls sideways.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")

# What sticks out of the page, but for what scrolls in a box of its own.
_OVERFLOW = """
(() => {
  const width = document.documentElement.clientWidth;
  const boxed = e => e.closest('.scroll, pre, svg') && !e.matches('.scroll, pre, svg');
  const wide = [...document.querySelectorAll('body *')]
    .filter(e => !boxed(e) && e.getBoundingClientRect().right > width + 1)
    .map(e => e.tagName.toLowerCase() + (e.id && '#' + e.id));
  return JSON.stringify({page: document.documentElement.scrollWidth - width,
                         wide: wide.slice(0, 8),
                         height: document.documentElement.scrollHeight});
})()
"""


class Browser:
    """Chromium, spoken to over its pipe: no network, no driver."""

    def __init__(self, executable: str) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self.profile = tempfile.mkdtemp()
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        arguments += ["--remote-debugging-pipe", f"--user-data-dir={self.profile}"]
        # the protocol's pipes are file descriptors 3 and 4 of the browser
        command = ["sh", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "sh", executable]
        self.process = subprocess.Popen(
            [*command, *arguments, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.out, self.buffer, self.ours_in = ours_out, b"", ours_in
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            chunk = os.read(self.ours_in, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser is gone")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; events that come meanwhile are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait(self, session: str, url: str) -> None:
        """Until the page is there; the blank one before it has a load event too."""
        ready = f"document.readyState === 'complete' && location.href === {json.dumps(url)}"
        for _ in range(600):
            answer = self.ask("Runtime.evaluate", session, expression=ready)
            if answer["result"].get("value") is True:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{url}: not loaded after a minute")

    def close(self) -> None:
        """End the browser."""
        self.ask("Browser.close")
        self.process.wait(timeout=30)
        shutil.rmtree(self.profile, ignore_errors=True)


def complaints(events: list[dict[str, Any]], url: str) -> list[str]:
    """Errors of the console, and requests for anything but the page itself."""
    found = []
    for event in events:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            found.append(f"exception: {params['exceptionDetails']['text']}")
        if event.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
            found.append(f"console: {params['args']}")
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            found.append(f"log: {params['entry']['text']}")
        if event.get("method") == "Network.requestWillBeSent":
            asked = params["request"]["url"]
            if asked.partition("#")[0] != url and not asked.startswith("data:"):
                found.append(f"request: {asked}")
    return found


def check(browser: Browser, page: Path, width: int, scheme: str, to: Path, unfold: bool) -> bool:
    """Show the page once, photograph it, and say what is wrong with it."""
    target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
    session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    browser.events.clear()
    for domain in ("Page", "Runtime", "Log", "Network"):
        browser.ask(f"{domain}.enable", session)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.ask("Emulation.setDeviceMetricsOverride", session, **size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.ask("Emulation.setEmulatedMedia", session, features=[feature])
    url = page.resolve().as_uri()
    browser.ask("Page.navigate", session, url=url)
    browser.wait(session, url)
    if unfold:
        script = "document.querySelectorAll('details').forEach(d => d.open = true)"
        browser.ask("Runtime.evaluate", session, expression=script)
    measured = browser.ask("Runtime.evaluate", session, expression=_OVERFLOW)
    found = json.loads(measured["result"]["value"])
    # the browser draws no picture taller than this
    clip = {"x": 0, "y": 0, "width": width, "height": min(found["height"], 16000), "scale": 1}
    shot = browser.ask("Page.captureScreenshot", session, captureBeyondViewport=True, clip=clip)
    path = to / f"{page.stem}-{width}-{scheme}.png"
    path.write_bytes(base64.b64decode(shot["data"]))
    wrong = complaints(browser.events, url)
    if found["page"] > 0 or found["wide"]:
        wrong.append(f"wider than the page by {found['page']} px: {', '.join(found['wide'])}")
    browser.ask("Target.closeTarget", targetId=target)
    print(f"{path}  {found['height']} px tall  {'; '.join(wrong) or 'clean'}")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="a report.html")
    parser.add_argument("--to", type=Path, default=Path("."), help="folder of the screenshots")
    parser.add_argument("--chromium", default="chromium", help="the browser's executable")
    parser.add_argument("--unfold", action="store_true", help="open all that is folded")
    args = parser.parse_args()
    if shutil.which(args.chromium) is None:
        sys.exit(f"{args.chromium}: no such browser on the path")
    if not args.page.is_file():
        sys.exit(f"{args.page}: no such file")
    args.to.mkdir(parents=True, exist_ok=True)
    browser = Browser(args.chromium)
    try:
        clean = [
            check(browser, args.page, width, scheme, args.to, args.unfold)
            for width in WIDTHS
            for scheme in SCHEMES
        ]
    finally:
        browser.close()
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
