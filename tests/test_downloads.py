"""Weights from a URL: over TLS, resumed where they were cut, and not downloaded twice."""

import hashlib
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from reference_files import renamed
from timm_reference import timm_variant
from variants import VARIANTS


SCRIPT = Path(__file__).parents[1] / "conversion" / "convert_crossvit_to_hf.py"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file under any name but missing.pth, with ETag and ranges, and cuts the first download if told so."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        server = self.server
        byte_range = self.headers.get("Range")
        server.requests.append((self.command, byte_range))
        start = int(byte_range.removeprefix("bytes=").partition("-")[0]) if byte_range else 0
        content = b"" if self.path.endswith("missing.pth") else server.content[start:]
        self.send_response(404 if not content else 206 if byte_range else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(server.content).hexdigest()[:20]}"')
        if byte_range:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        if body and server.cut:
            server.cut = False
            self.wfile.write(content[: 3 * len(content) // 4])
            self.close_connection = True
        elif body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate),
            *("-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.requests, server.content, server.cut = [], b"", False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def convert(server, tmp_path):
    def convert_url(name: str, *arguments, trusted: bool = True) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "localhost"}
        environment["TQDM_POSITION"] = "-1"  # progress bars without a terminal
        if trusted:
            environment["SSL_CERT_FILE"] = str(tmp_path / "certificate.pem")
        url = f"https://localhost:{server.server_port}/{name}"
        return subprocess.run(
            [sys.executable, SCRIPT, url, tmp_path / "output", *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )

    return convert_url


@pytest.mark.slow
def test_weights_from_a_url(server, convert, tmp_path):
    # More than two of the client's chunks of 10 MiB, of which whole ones survive
    torch.save(renamed(timm_variant(VARIANTS["crossvit_tiny"]), "ibm"), tmp_path / "weights.pth")
    server.content, server.cut = (tmp_path / "weights.pth").read_bytes(), True
    process = convert("crossvit_tiny_224.pth?download=true")
    assert process.returncode == 0, process.stderr
    record = json.loads((tmp_path / "output" / "conversion.json").read_text())
    assert record["variant"] == "crossvit_tiny" and record["source"]["format"] == "ibm"
    assert record["source"]["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert record["source"]["url"].endswith("/crossvit_tiny_224.pth?download=true")
    downloads = [byte_range for method, byte_range in server.requests if method == "GET"]
    assert downloads[0] is None and downloads[1] == f"bytes={20 * 2**20}-", downloads
    assert "100%" in process.stderr and "28.2M/28.2M" in process.stderr  # a progress bar

    # Again: it is there; and with other contents: it is not
    server.requests.clear()
    assert convert("crossvit_tiny_224.pth?download=true", "--overwrite").returncode == 0
    assert [method for method, _ in server.requests] == ["HEAD"]
    server.content = server.content[:-1]
    process = convert("crossvit_tiny_224.pth?download=true", "--overwrite")
    assert process.returncode == 1 and "truncated" in process.stderr


def test_urls_that_give_nothing(server, convert, tmp_path):
    server.content = b"<html>Sign in first</html>"
    for name, message in (("missing.pth", "404"), ("weights.pth", "<html>")):
        process = convert(name)
        lines = [line for line in process.stderr.splitlines() if line.strip() and "%|" not in line]
        assert process.returncode == 1 and len(lines) == 1 and message in lines[0], process.stderr
    process = convert("weights.pth", trusted=False)
    assert process.returncode == 1 and "certificate" in process.stderr and "Traceback" not in process.stderr
    assert not (tmp_path / "output").exists()
