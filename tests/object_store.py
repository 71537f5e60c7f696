"""A store of objects as Cloud Storage is one, on this machine: its JSON API over HTTP, as far as three clients use it.

They are the real ones: gcsfs, which `etils.epath` opens gs:// with, TensorStore, which Orbax writes arrays with, and
the C++ client inside ArrayRecord. So there is no folder, no append and no rename (copying an object is refused), an
object is there when all of it was uploaded and not before, and to write it again is to replace it.
"""

import base64
import contextlib
import dataclasses
import datetime
import email
import email.policy
import hashlib
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """One object, and which of all that were ever written it is."""

    data: bytes
    generation: int
    updated: str


class ObjectStore:
    """Buckets, and a server of them.

    Attributes:
      objects: "bucket/name" -> the object.
      buckets: names; others are missing.
      requests: "METHOD path" of every request, in order.
      forbidden: a regular expression of requests that the caller may not make; "" for none.
      unknown: whether the caller has no credentials at all.
    """

    def __init__(self, *buckets: str):
        self.buckets = set(buckets)
        self.objects: dict[str, StoredObject] = {}
        self.requests: list[str] = []
        self.forbidden = ""
        self.unknown = False
        self.lock = threading.Lock()
        self._written = 0
        self._uploads: dict[str, tuple[str, bytearray, int | None]] = {}

    def __getitem__(self, name: str) -> bytes:
        return self.objects[name].data

    def names(self, prefix: str) -> list[str]:
        """The names of objects that begin so, without it."""
        with self.lock:
            return sorted(name.removeprefix(prefix) for name in self.objects if name.startswith(prefix))

    def put(self, name: str, data: bytes, if_generation: int | None = None) -> StoredObject | None:
        """Writes an object, or None where another one is there than was expected."""
        with self.lock:
            old = self.objects.get(name)
            if if_generation is not None and (old.generation if old else 0) != if_generation:
                return None
            self._written += 1
            self.objects[name] = StoredObject(data, self._written, f"{datetime.datetime.now(datetime.UTC):%FT%T.%fZ}")
            return self.objects[name]

    def put_folder(self, name: str, folder: Path) -> None:
        """Writes every file of a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())

    @contextlib.contextmanager
    def serve(self) -> Iterator[dict[str, str]]:
        """Answers requests; yields the environment in which clients come here, and not to Google."""
        store = self

        class Handler(_Handler):
            objects = store

        server = _Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield {
                "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
                "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # google-cloud-cpp
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore asks for credentials nowhere else
                "NO_GCE_CHECK": "true",  # nor does google-auth
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which would ask by gRPC what kind of bucket this is
                "GOOGLE_CLOUD_PROJECT": "tests",
            }
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # gcsfs asks twice at once and takes the first answer
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: ObjectStore
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the name of the method it replaces)
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        url = urllib.parse.urlsplit(self.path)
        self._query = {key: value[0] for key, value in urllib.parse.parse_qs(url.query).items()}
        self._body = self._read_body()
        store = self.objects
        with store.lock:
            store.requests.append(f"{method} {self.path}")
        if store.unknown:
            return self._fail(401, "Anonymous caller does not have storage.objects.list access")
        if store.forbidden and re.search(store.forbidden, f"{method} {self.path}"):
            return self._fail(403, "the account does not have storage.objects.create access to the bucket")
        if method == "POST" and url.path.startswith("/batch/"):
            return self._batch()
        match = re.fullmatch(r"(/upload|/download)?(?:/resumable)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?(/)?", url.path)
        if match is None:
            return self._fail(404, f"no such thing: {url.path}")
        bucket = match[2]
        if bucket not in store.buckets:
            return self._fail(404, "The specified bucket does not exist.")
        if "/o" not in url.path:
            return self._json({"name": bucket, "kind": "storage#bucket", "location": "HERE"})
        key = urllib.parse.unquote(match[3]) if match[3] else ""
        if match[1] == "/upload":
            return self._upload(method, bucket)
        if re.search("/(rewriteTo|copyTo|moveTo)/", url.path):
            return self._fail(501, "objects are not copied here")
        if not key:
            return self._list(bucket)
        if method == "DELETE":
            with store.lock:
                found = store.objects.pop(f"{bucket}/{key}", None)
            return self._send(204, b"") if found else self._fail(404, "No such object")
        return self._get(bucket, key, media=self._query.get("alt") == "media")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _get(self, bucket: str, key: str, media: bool) -> None:
        found = self.objects.objects.get(f"{bucket}/{key}")
        if found is None:
            return self._fail(404, f"No such object: {bucket}/{key}")
        if not media:
            return self._json(_describe(bucket, key, found))
        data, status, headers = found.data, 200, {"x-goog-generation": str(found.generation)}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
            last = min(int(wanted[2]) if wanted[1] and wanted[2] else len(data) - 1, len(data) - 1)
            if first >= len(data):
                return self._fail(416, "range not satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        else:
            headers["x-goog-hash"] = f"md5={base64.b64encode(hashlib.md5(data).digest()).decode()}"
        self._send(status, data, "application/octet-stream", headers)

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self._query.get("prefix", ""), self._query.get("delimiter", "")
        items, prefixes = [], {}
        start, end = self._query.get("startOffset", ""), self._query.get("endOffset", "")
        with self.objects.lock:
            there = sorted(self.objects.objects.items())
        for name, found in there:
            key = name.removeprefix(f"{bucket}/")
            if key == name or not key.startswith(prefix) or key < start or (end and key >= end):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes[prefix + rest[: rest.index(delimiter) + 1]] = None
            else:
                items.append(_describe(bucket, key, found))
        self._json({"kind": "storage#objects", "items": items, "prefixes": list(prefixes)})

    def _upload(self, method: str, bucket: str) -> None:
        store, kind = self.objects, self._query.get("uploadType")
        expected = self._query.get("ifGenerationMatch")
        expected = None if expected is None else int(expected)
        if method == "DELETE":
            store._uploads.pop(self._query["upload_id"], None)
            return self._send(499, b"")
        if "upload_id" in self._query:
            return self._resume(self._query["upload_id"])
        if kind == "resumable":
            name = self._query.get("name") or json.loads(self._body)["name"]
            number = str(len(store.requests))
            store._uploads[number] = (f"{bucket}/{name}", bytearray(), expected)
            host = f"http://{self.headers['Host']}"
            location = f"{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return self._send(200, b"", headers={"Location": location})
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            about, content = email.message_from_bytes(head + self._body, policy=email.policy.HTTP).iter_parts()
            name, data = json.loads(about.get_content())["name"], content.get_payload(decode=True)
        else:
            name, data = self._query["name"], self._body
        self._finish(f"{bucket}/{name}", data, expected)

    def _resume(self, number: str) -> None:
        name, data, expected = self.objects._uploads[number]
        wanted = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if wanted is None or wanted[1] is None or int(wanted[1]) == len(data):
            data += self._body
        if wanted is not None and (wanted[3] == "*" or len(data) < int(wanted[3])):
            return self._send(308, b"", headers={"Range": f"bytes=0-{len(data) - 1}"} if data else {})
        del self.objects._uploads[number]
        self._finish(name, bytes(data), expected)

    def _finish(self, name: str, data: bytes, expected: int | None) -> None:
        written = self.objects.put(name, data, expected)
        if written is None:
            return self._fail(412, "at least one of the conditions did not hold")
        self._json(_describe(*name.split("/", 1), written))

    def _batch(self) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        answers = []
        for part in email.message_from_bytes(head + self._body, policy=email.policy.HTTP).iter_parts():
            path = str(part.get_payload(decode=True), "utf-8").split(" ")[1]
            match = re.search(r"/b/([^/]+)/o/([^/?]+)", path)
            assert match is not None
            with self.objects.lock:
                found = self.objects.objects.pop(f"{match[1]}/{urllib.parse.unquote(match[2])}", None)
            number = part["Content-ID"].strip("<>").rpartition("+")[2]
            status = "204 No Content" if found else "404 Not Found"
            answers.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self._send(200, ("".join(answers) + "--batch--").encode(), "multipart/mixed; boundary=batch")

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _fail(self, status: int, message: str) -> None:
        value = {"error": {"code": status, "message": message, "errors": [{"message": message, "reason": "none"}]}}
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str = "", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), **({"Content-Type": kind} if kind else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _describe(bucket: str, key: str, found: StoredObject) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{key}/{found.generation}",
        "name": key,
        "bucket": bucket,
        "size": str(len(found.data)),
        "generation": str(found.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": found.updated,
        "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
        "etag": str(found.generation),
    }
