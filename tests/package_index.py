"""A package index on this machine, for the tests of what is fetched."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.study import archives


class Index(ThreadingHTTPServer):
    """A package index on this machine: serves `files`, {project: (file name, content)}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[str, bytes]] = {}
        self.sent: list[str | None] = []  # the Range header of each file asked for
        self.ranges = True
        self.cut: int | None = None  # drop the connection after so many bytes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple/"


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self):
        kind, project = self.path.strip("/").split("/")[:2]
        if project not in self.server.files:
            self.send_error(404)
            return
        name, content = self.server.files[project]
        if kind == "simple":
            self.answer(
                200,
                "text/html",
                f'<a href="/file/{project}/{name}">{name}</a>'.encode(),
            )
            return
        asked = self.headers.get("Range")
        self.server.sent.append(asked)
        if asked and self.server.ranges:
            content = content[int(asked.removeprefix("bytes=").rstrip("-")) :]
            self.answer(206, "application/zip", content)
        else:
            self.answer(200, "application/zip", content)

    def answer(self, status: int, kind: str, content: bytes):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(
            content[: self.server.cut] if kind == "application/zip" else content
        )

    def log_message(self, *args):
        pass


def pin(package: str, file: str, content: bytes, members=()) -> None:
    archives.CATALOGUE["packages"][package] = {
        "version": "1.0",
        "file": file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "members": list(members),
    }


def publish(index: Index, package: str, file: str, content: bytes, members=()) -> None:
    pin(package, file, content, members)
    index.files[package] = (file, content)


def refusal(call, *args) -> str:
    with pytest.raises(archives.AssetError) as refused:
        call(*args)
    said = str(refused.value)
    assert "\n" not in said and said.endswith(".")
    return said
