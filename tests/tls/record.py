"""Record the first flight of real TLS clients, on loopback.

    .venv/bin/python tests/tls/record.py             list the clients of this machine
    .venv/bin/python tests/tls/record.py corpus ...  record them (all, or those named) into the corpus
    /some/venv/bin/python tests/tls/record.py corpus chrome firefox safari    with curl_cffi installed there

The client is sent to a listener of our own, which reads until nothing more comes, and hangs up. What it reads
is the client's first flight, whole. One file of hexadecimal digits each; its first line says what it is, as
JSON.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = "api.example.test"
CORPUS = Path(__file__).resolve().parent / "corpus"
QUIET = 0.25  # seconds without a byte after which a flight is over
PATIENCE = 20.0  # seconds for a client to start

_PYTHON = f"""
import socket, ssl, sys
plain = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
context = ssl.create_default_context()
context.wrap_socket(plain, server_hostname="{NAME}")
"""
_NODE = f"""
require("tls").connect({{host: "127.0.0.1", port: Number(process.argv[1]), servername: "{NAME}"}})
  .on("error", () => process.exit(0));
"""
_JAVA = f"""
import java.net.*; import javax.net.ssl.*;
class Hello {{ public static void main(String[] words) throws Exception {{
  int port = Integer.parseInt(words[0]);
  var plain = new Socket("127.0.0.1", port);
  var factory = (SSLSocketFactory) SSLSocketFactory.getDefault();
  ((SSLSocket) factory.createSocket(plain, "{NAME}", port, true)).startHandshake();
}} }}
"""
_JAVA_HTTP = f"""
import java.net.*; import java.net.http.*;
class Hello {{ public static void main(String[] words) throws Exception {{
  var request = HttpRequest.newBuilder(URI.create("https://{NAME}:" + words[0] + "/")).build();
  HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
}} }}
"""
_CFFI = f"""
import sys
from curl_cffi import CurlOpt, requests
requests.get("https://{NAME}:" + sys.argv[2], impersonate=sys.argv[1], timeout=5,
             curl_options={{CurlOpt.RESOLVE: ["{NAME}:" + sys.argv[2] + ":127.0.0.1"]}})
"""
_CURL = ["curl", "-sk", "--resolve", f"{NAME}:PORT:127.0.0.1"]


@dataclass(frozen=True)
class Client:
    words: tuple[str, ...]  # PORT and FILE stand for the listener's port and for the file with `text`
    version: tuple[str, ...]  # prints the version in its first line
    text: str = ""

    @property
    def here(self) -> bool:
        if self.text is _CFFI:
            return importlib.util.find_spec("curl_cffi") is not None
        return shutil.which(self.words[0]) is not None

    def said(self) -> str:
        done = subprocess.run(self.version, capture_output=True, text=True, check=False)
        return ((done.stdout or done.stderr).splitlines() or ["unknown"])[0].partition(" (")[0].strip()


def _openssl(*words: str) -> Client:
    line = ("openssl", "s_client", "-connect", "127.0.0.1:PORT", "-servername", NAME, *words)
    return Client(line, ("openssl", "version"))


def _browser(which: str) -> Client:
    """As curl_cffi says hello for it: BoringSSL with the browser's settings, GREASE, order of extensions."""
    code = f'import curl_cffi; print("{which}, by curl_cffi", curl_cffi.__version__)'
    return Client((sys.executable, "FILE", which, "PORT"), (sys.executable, "-c", code), _CFFI)


LIVE: dict[str, Client] = {
    "openssl": _openssl(),
    "openssl-tls12": _openssl("-tls1_2"),
    "openssl-tls10": _openssl("-tls1", "-cipher", "ALL:@SECLEVEL=0"),
    "openssl-alpn": _openssl("-alpn", "h2,http/1.1", "-status"),
    "curl": Client((*_CURL, f"https://{NAME}:PORT/"), ("curl", "--version")),
    "python": Client(
        (sys.executable, "-c", _PYTHON, "PORT"),
        (
            sys.executable,
            "-c",
            "import sys, ssl; print('Python', sys.version.split()[0], ssl.OPENSSL_VERSION)",
        ),
    ),
    "node": Client(("node", "-e", _NODE, "PORT"), ("node", "-p", "'Node ' + process.version")),
    "java": Client(("java", "FILE", "PORT"), ("java", "--version"), _JAVA),
}
RECORDED: dict[str, Client] = {
    "java-http": Client(
        ("java", "-Djdk.net.hosts.file=HOSTS", "FILE", "PORT"), ("java", "--version"), _JAVA_HTTP
    ),
    "gnutls": Client(
        ("gnutls-cli", "--insecure", "--sni-hostname", NAME, "-p", "PORT", "127.0.0.1"),
        ("gnutls-cli", "--version"),
    ),
    "gnutls-old": Client(
        ("gnutls-cli", "--insecure", "--sni-hostname", NAME, "-p", "PORT", "127.0.0.1",
         "--priority", "NORMAL:-VERS-ALL:+VERS-TLS1.1:%SSL3_RECORD_VERSION"),
        ("gnutls-cli", "--version"),
    ),
    "nss": Client(
        ("tstclnt", "-D", "-b", "-o", "-h", "127.0.0.1", "-p", "PORT", "-a", NAME),
        ("dpkg-query", "-W", "-f", "NSS tstclnt ${Version}\n", "libnss3-tools"),
    ),
    "chrome": _browser("chrome"),
    "chrome99": _browser("chrome99"),
    "firefox": _browser("firefox"),
    "safari": _browser("safari"),
    "safari-ios": _browser("safari_ios"),
}  # fmt: skip


def record(client: Client) -> bytes:
    """The client's first flight."""
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        words = _filled(client, Path(directory), listener.getsockname()[1])
        with _running(words):
            stream, _ = listener.accept()
            with stream:
                return _flight(stream)


def _filled(client: Client, directory: Path, port: int) -> list[str]:
    file, hosts = directory / "Hello.java", directory / "hosts"
    file.write_text(client.text)
    hosts.write_text(f"127.0.0.1 {NAME}\n")
    values = {"PORT": str(port), "FILE": str(file), "HOSTS": str(hosts)}
    words = list(client.words)
    for mark, value in values.items():
        words = [word.replace(mark, value) for word in words]
    return words


@contextlib.contextmanager
def _running(words: list[str]) -> Iterator[None]:
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.kill()


def _flight(stream: socket.socket) -> bytes:
    found = bytearray()
    stream.settimeout(PATIENCE)
    with contextlib.suppress(TimeoutError):
        while data := stream.recv(1 << 16):
            found += data
            stream.settimeout(QUIET)
    return bytes(found)


def write(directory: Path, label: str, client: Client) -> None:
    flight = record(client)
    about = {"client": client.said(), "name": NAME}
    digits = flight.hex()
    lines = [digits[at : at + 100] for at in range(0, len(digits), 100)]
    (directory / f"{label}.hex").write_text("\n".join([json.dumps(about), *lines]) + "\n")


def load(path: Path) -> tuple[dict[str, str], bytes]:
    about, _, digits = path.read_text().partition("\n")
    return json.loads(about), bytes.fromhex(digits)


def main(words: list[str]) -> int:
    clients = LIVE | RECORDED
    if words[:1] != ["corpus"]:
        for label, client in clients.items():
            print(f"{label:14} {client.said() if client.here else '-'}")
        return 0
    for label in words[1:] or clients:
        if clients[label].here:
            write(CORPUS, label, clients[label])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
