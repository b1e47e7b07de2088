"""The page in a real browser. Own target (`make test-browser`): chromium is a big package.

The browser is given files and nothing else. What is measured inside a page is measured by a script that a
test puts into a copy of it, whose security policy is taken out for that; that the policy holds is tested with
the page as it is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import page_samples as samples
import pytest

from egressd.journal.page import render

pytestmark = pytest.mark.browser

SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    # Nobody's resolver is asked anything: names other than this machine do not exist.
    "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"
PAGES: dict[str, Callable[[], str]] = {
    "ordinary": lambda: render(samples.ordinary()),
    "broken": lambda: render(samples.broken()),
    "empty": lambda: render(samples.empty()),
    "hostile": lambda: render(samples.hostile("  ".join(samples.HOSTILE))),
}


@dataclass(frozen=True)
class Browser:
    place: Path

    def run(
        self, page: Path, *arguments: str, width: int = 1000, height: int = 1200
    ) -> subprocess.CompletedProcess[str]:
        """One browser with a profile of its own, to its end."""
        profile = self.place / f"profile-{len(list(self.place.iterdir()))}"
        size = f"--window-size={width},{height}"
        command = ["chromium", *SWITCHES, f"--user-data-dir={profile}", size, *arguments, page.as_uri()]
        environment = {"HOME": str(self.place), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=self.place
        )
        assert done.returncode == 0, done.stderr
        return done

    def put(self, name: str, text: str) -> Path:
        path = self.place / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    if shutil.which("chromium") is None:
        pytest.fail("no chromium: make test-browser installs it")
    return Browser(tmp_path)


def said_to_console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def unguarded(page: str, script: str) -> str:
    """A copy that runs one script and tells the page around it what came out."""
    bare, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1
    return bare.replace("</body>", f"<script>parent.postMessage({script}, '*')</script></body>")


MEASURE = """(() => {
  const wide = document.documentElement.clientWidth, out = [];
  for (const element of document.querySelectorAll('body *')) {
    const box = element.getBoundingClientRect();
    const shown = box.width > 1 && getComputedStyle(element).visibility === 'visible';
    if (shown && !element.closest('thead') && (box.right > wide + 1 || box.left < -1)) {
      out.push(element.tagName + ' ' + element.textContent.slice(0, 40));
    }
  }
  return {wide: wide, scroll: document.documentElement.scrollWidth, out: out};
})()"""


def measured(browser: Browser, page: str, width: int) -> dict[str, object]:
    """In a frame of that width: a window of this browser has at least 500 pixels."""
    path = browser.put("measured", unguarded(page, MEASURE))
    frame = f"""<!DOCTYPE html><title></title><script>
      addEventListener('message', event => document.title = JSON.stringify(event.data))
      </script><iframe width={width} height=900 style='border: 0' src='{path.as_uri()}'></iframe>"""
    document = browser.run(
        browser.put("frame", frame), "--dump-dom", "--virtual-time-budget=4000", width=2000
    ).stdout
    title = re.search(r"<title>(\{.*?\})</title>", document)
    assert title, document[:500]
    found: dict[str, object] = json.loads(title[1])
    return found


@pytest.mark.parametrize("width", [360, 800, 1000, 1600])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_window(browser: Browser, name: str, width: int) -> None:
    found = measured(browser, PAGES[name](), width)
    assert found["wide"] == width
    assert found["scroll"] == width
    assert found["out"] == []


def test_a_page_that_is_too_wide_is_noticed(browser: Browser) -> None:
    wide = (
        PAGES["ordinary"]()
        .replace("<h1>", "<h1><svg width='900' height='5'></svg>")
        .replace("max-width: 100%", "")
    )
    found = measured(browser, wide, 360)
    assert found["out"] != []


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_it_is_drawn_in_the_readers_colours_without_complaint(browser: Browser, scheme: str) -> None:
    page = browser.put("page", PAGES["ordinary"]())
    done = browser.run(page, scheme, "--screenshot=shot.png", width=360, height=800)
    assert said_to_console(done) == []
    width, height, corner = read_png(browser.place / "shot.png")
    assert (width, height) == (360, 800)
    assert corner == ((20, 23, 28) if scheme is DARK else (255, 255, 255))  # --ground


def read_png(path: Path) -> tuple[int, int, tuple[int, ...]]:
    """Width, height and the first pixel (PNG, third edition, sections 9 and 11.2: a first line has nothing
    above it and a first pixel nothing before it, so that it is as it is under every filter)."""
    data, at, packed = path.read_bytes(), 8, b""
    width = height = 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", body)
            assert (depth, colour) in ((8, 2), (8, 6))
        if kind == b"IDAT":
            packed += body
        at += length + 12
    return width, height, tuple(zlib.decompress(packed)[1:4])


@pytest.mark.parametrize("name", PAGES)
def test_the_text_is_there_without_any_script(browser: Browser, name: str) -> None:
    page = PAGES[name]()
    done = browser.run(browser.put("page", page), "--dump-dom")
    assert said_to_console(done) == []
    for title in re.findall(r"<h2[^>]*>(.*?)</h2>", page):
        assert title in done.stdout
    assert "<script" not in done.stdout
    # The browser's own reading of the page has the elements that were written, and no other.
    for tag in ("table", "tr", "td", "li", "rect", "section", "code"):
        assert len(re.findall(rf"<{tag}[ >]", done.stdout)) == len(re.findall(rf"<{tag}[ >]", page)), tag


# ---- nothing leaves


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join(10)


def smuggled(page: str, address: str) -> str:
    """What escaping must prevent, done by hand: markup of a stranger's."""
    parts = (
        f"<img src='{address}/img'><link rel=stylesheet href='{address}/css'>"
        f"<script src='{address}/js'></script>"
        f"<iframe src='{address}/frame'></iframe><style>body {{ background: url({address}/url) }}</style>"
        f"<p style='background: url({address}/style)'>x</p><object data='{address}/object'></object>"
        f"<script>fetch('{address}/fetch')</script><svg><image href='{address}/image'/></svg>"
    )
    return page.replace("</body>", f"{parts}</body>")


def test_what_were_smuggled_in_would_load_nothing(browser: Browser, listener: tuple[str, list[str]]) -> None:
    address, asked = listener
    page = browser.put("page", smuggled(PAGES["ordinary"](), address))
    done = browser.run(page, "--dump-dom", "--virtual-time-budget=3000")
    assert asked == []
    assert any("Content Security Policy" in line for line in said_to_console(done))


def test_without_its_policy_it_would_load(browser: Browser, listener: tuple[str, list[str]]) -> None:
    address, asked = listener
    page = browser.put("page", smuggled(unguarded(PAGES["ordinary"](), "1"), address))
    browser.run(page, "--dump-dom", "--virtual-time-budget=3000")
    assert {"/img", "/css", "/js", "/frame", "/url", "/style", "/fetch", "/image"} <= set(asked)


@pytest.mark.parametrize("name", ["ordinary", "hostile"])
def test_no_request_is_made_for_the_page(browser: Browser, name: str) -> None:
    page = browser.put("page", PAGES[name]())
    browser.run(page, "--dump-dom", "--log-net-log=net.json", "--virtual-time-budget=2000")
    log = json.loads((browser.place / "net.json").read_text(encoding="utf-8"))
    numbers = log["constants"]["logEventTypes"]
    urls = {
        event.get("params", {}).get("url", "")
        for event in log["events"]
        if event["type"] in (numbers["URL_REQUEST_START_JOB"], numbers["REQUEST_ALIVE"])
    }
    connected = [e for e in log["events"] if e["type"] == numbers["TCP_CONNECT"]]
    assert connected == []
    hosts = {
        urlsplit(url).hostname for url in urls if url and not url.startswith(("file:", "data:", "chrome:"))
    }
    # What the browser asks for itself, and does not get: see SWITCHES.
    assert [
        h for h in hosts if not re.fullmatch(r"([a-z0-9-]+\.)*(google|googleapis|gstatic)\.com", str(h))
    ] == []


# ---- paper


def printed(browser: Browser, page: str, name: str) -> tuple[list[str], tuple[float, float]]:
    """The text of each sheet, and the size of a sheet in points."""
    path = browser.put(name, page)
    browser.run(path, "--no-pdf-header-footer", f"--print-to-pdf={name}.pdf", DARK)
    pdf = browser.place / f"{name}.pdf"
    text = subprocess.run(
        ["pdftotext", "-layout", pdf, "-"], capture_output=True, text=True, check=True
    ).stdout
    said = subprocess.run(["pdfinfo", pdf], capture_output=True, text=True, check=True).stdout
    size = re.search(r"Page size:\s+([0-9.]+) x ([0-9.]+)", said)
    assert size
    return text.split("\f")[:-1], (float(size[1]), float(size[2]))


def test_it_prints_on_a4(browser: Browser) -> None:
    sheets, size = printed(browser, PAGES["ordinary"](), "ordinary")
    assert size == pytest.approx((595, 842), abs=1)
    assert 3 <= len(sheets) <= 9
    text = " ".join(" ".join(sheets).split())
    for said in (
        "Nothing left but",
        "44,120,331 B",
        "198.51.100.20",
        "- host: eu.api.openai.com",
        "egressctl verify",
    ):
        assert said in text, said
    assert "Contents" not in text


def test_paper_is_white_in_the_dark(browser: Browser) -> None:
    printed(browser, PAGES["ordinary"](), "ordinary")
    ppm = subprocess.run(
        ["pdftoppm", "-r", "20", "-f", "1", "-l", "1", browser.place / "ordinary.pdf"],
        capture_output=True,
        check=True,
    ).stdout
    header, pixels = re.match(rb"P6\s\d+\s\d+\s255\s", ppm), ppm
    assert header
    light = sum(byte > 200 for byte in pixels[header.end() :])
    assert light > 0.8 * (len(pixels) - header.end())


def test_long_tables_repeat_their_headings_and_cut_no_row(browser: Browser) -> None:
    """Host n has the addresses 203.0.(n / 256).(n mod 256) and 2001:db8::n, one line each in its row."""
    sheets, _ = printed(browser, render(samples.many(300)), "many")
    seen: list[int] = []
    for sheet in sheets:
        four = [int(high) << 8 | int(low) for high, low in re.findall(r"\b203\.0\.(\d+)\.(\d+)\b", sheet)]
        six = [int(number, 16) for number in re.findall(r"\b2001:db8::([0-9a-f]{1,3})\b", sheet)]
        if len(four) > 4:  # more than other tables show of these addresses
            assert "Connections" in sheet
            assert "Real" in sheet
            assert four == six, "a row is cut"
            seen += four
    assert seen == sorted(range(300), reverse=True)


def test_the_browser_left_nothing_listening(browser: Browser) -> None:
    before = set(_listening())
    browser.run(browser.put("page", PAGES["empty"]()), "--dump-dom")
    assert set(_listening()) <= before


def _listening() -> list[str]:
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()
    ]
    return [fields[1] for fields in lines if len(fields) > 3 and fields[3] == "0A"]  # TCP_LISTEN
