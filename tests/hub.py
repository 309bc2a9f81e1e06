"""A stand-in for the Hugging Face Hub: dataset repositories served from a folder, all at one commit."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Serves `folder`, which holds owner/name/files; gives the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlparse(self.path).path.strip("/").split("/")
            if parts[0] == "datasets":  # datasets/OWNER/NAME/resolve/REVISION/FILE
                self.file(folder.joinpath(*parts[1:3]), folder.joinpath(*parts[1:3], *parts[5:]))
            elif parts[:2] == ["api", "datasets"] and parts[4] == "tree":  # api/datasets/OWNER/NAME/tree/REVISION/...
                self.tree(folder.joinpath(*parts[2:4]), folder.joinpath(*parts[2:4], *parts[6:]))
            elif parts[:2] == ["api", "datasets"]:
                self.reply(200, json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT}).encode())
            else:
                self.reply(404, b"")

        do_HEAD = do_GET

        def file(self, repository, path):
            if path.is_file():
                self.reply(200, path.read_bytes(), ETag=f'"{hashlib.sha1(path.read_bytes()).hexdigest()}"')
            else:
                self.reply(404, b"", **{"X-Error-Code": "EntryNotFound" if repository.is_dir() else "RepoNotFound"})

        def tree(self, repository, path):
            if not path.is_dir():
                return self.reply(404, b"", **{"X-Error-Code": "EntryNotFound"})
            entries = [
                {"type": "directory" if p.is_dir() else "file", "path": str(p.relative_to(repository))}
                | {"size": p.stat().st_size, "oid": hashlib.sha1(p.name.encode()).hexdigest()}
                for p in sorted(path.iterdir())
            ]
            self.reply(200, json.dumps(entries).encode())

        def reply(self, status, body, **headers):
            self.send_response(status)
            for name, value in headers.items() | {("X-Repo-Commit", COMMIT), ("Content-Length", str(len(body)))}:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
