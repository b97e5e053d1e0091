"""A session whose network runs in a web page: the page asks for inputs, and posts its outputs back."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

from castling_deploy.errors import ExportError
from castling_deploy.target import Session, Witness
from castling_deploy.witnesses.browser import Browser, showing

if TYPE_CHECKING:
    from castling_deploy.target import Arrays

LIMIT_S = 300  # for one answer, the first with the start of the browser: 2 s for the bundled networks
TENSORS = "X-Tensors"  # the header of a body of raw values: [{"name", "type", "shape"}, ...], percent-encoded
MIME = {".mjs": "text/javascript", ".wasm": "application/wasm"}

PAGE = """\
<!doctype html>
<meta charset="utf-8">
<title>castling verify</title>
<script type="module">
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, uint8: Uint8Array, int32: Int32Array, int64: BigInt64Array,
};
const said = [];
for (const level of ["warn", "error"]) {
  console[level] = (...words) => said.push(words.join(" "));
}
function fail(error) {
  const words = [error?.stack ?? String(error), ...said];
  return fetch("failure", { method: "POST", body: words.join("\\n") });
}
addEventListener("error", (event) => fail(event.error ?? event.message));
addEventListener("unhandledrejection", (event) => fail(event.reason));

try {
  const ort = await import("./ort.mjs");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL("ort.wasm", location).href };
  const session = await ort.InferenceSession.create("model.onnx", { executionProviders: ["wasm"] });
  for (;;) {
    const question = await fetch("question");
    if (question.status === 204) break;
    const described = JSON.parse(decodeURIComponent(question.headers.get("X-Tensors")));
    const values = await question.arrayBuffer();
    const feeds = {};
    let offset = 0;
    for (const { name, type, shape } of described) {
      const array = new ARRAYS[type](values, offset, shape.reduce((a, b) => a * b, 1));
      feeds[name] = new ort.Tensor(type, array, shape);
      offset += array.byteLength;
    }
    const outputs = Object.entries(await session.run(feeds));
    const tensors = outputs.map(([name, tensor]) => ({ name, type: tensor.type, shape: tensor.dims }));
    await fetch("answer", {
      method: "POST",
      headers: { "X-Tensors": encodeURIComponent(JSON.stringify(tensors)) },
      body: new Blob(outputs.map(([, tensor]) => tensor.data)),
    });
  }
} catch (error) {
  await fail(error).catch(() => {});
} finally {
  window.close();  // the last page of a browser whose master may have been killed: it ends with it
}
</script>
"""


class _Desk:
    """Where the server's threads and the session meet. Nobody without `token` is served."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.token = secrets.token_urlsafe()
        self.questions: SimpleQueue[Arrays | None] = SimpleQueue()  # None: there are no more
        self.answers: SimpleQueue[Arrays | str] = SimpleQueue()  # a text: the page failed


class _Handler(BaseHTTPRequestHandler):
    """One request of the page."""

    protocol_version = "HTTP/1.1"

    def __init__(self, desk: _Desk, *arguments: Any) -> None:
        self._desk = desk
        super().__init__(*arguments)

    def do_GET(self) -> None:
        name = self._asked()
        if name == "":
            self._send(PAGE.encode(), "text/html")
        elif name == "question":
            inputs = self._desk.questions.get()
            if inputs is None:
                self._send(status=HTTPStatus.NO_CONTENT)
            else:
                self._send(packed(inputs), tensors=described(inputs))
        elif name is not None and name in self._desk.files:
            self._send(self._desk.files[name].read_bytes(), MIME.get(Path(name).suffix, "application/octet-stream"))
        else:
            self._send(status=HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = self._asked()
        if name == "answer":
            self._desk.answers.put(unpacked(body, self.headers[TENSORS]))
        elif name == "failure":
            self._desk.answers.put(body.decode(errors="replace"))
        self._send(status=HTTPStatus.NOT_FOUND if name is None else HTTPStatus.NO_CONTENT)

    def _asked(self) -> str | None:
        """The path behind the token; None without the token."""
        _, token, *rest = self.path.split("/")
        return "/".join(rest) if secrets.compare_digest(token.encode(), self._desk.token.encode()) else None

    def _send(
        self,
        body: bytes = b"",
        kind: str = "application/octet-stream",
        status: HTTPStatus = HTTPStatus.OK,
        tensors: str | None = None,
    ) -> None:
        self.send_response(status)
        if status is not HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if tensors is not None:
            self.send_header(TENSORS, tensors)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a browser that is killed leaves its connections open


class _WebSession:
    """Inputs go to the page, outputs come back."""

    def __init__(self, desk: _Desk, browser: Browser, witness: Witness, limit_s: float) -> None:
        self._desk, self._browser, self._limit_s, self.witness = desk, browser, limit_s, witness

    def __call__(self, inputs: Arrays) -> Arrays:
        self._desk.questions.put(inputs)
        deadline = time.monotonic() + self._limit_s
        while time.monotonic() < deadline:
            ended = self._browser.ended is not None  # asked before the last look at the answers
            try:
                answer = self._desk.answers.get(timeout=0 if ended else 0.1)
            except Empty:
                if ended:
                    break
            else:
                if isinstance(answer, str):
                    raise ExportError(f"the web page does not run the artefact: {answer.strip()[:2000]}")
                return answer
        what = (
            f"ended with exit code {self._browser.ended} before its page answered"
            if self._browser.ended is not None
            else f"did not answer within {self._limit_s:g} s"
        )
        raise ExportError(f"the browser {what}", hint=f"its last words:\n{self._browser.last_words}")


@contextmanager
def web_session(files: Mapping[str, Path], witness: Witness, limit_s: float = LIMIT_S) -> Iterator[Session]:
    """The network of `files` in a page that this process serves to a browser of this machine, and to nobody else.

    `files` are those that the page asks for: ort.mjs, ort.wasm and model.onnx. Its calls raise ExportError when the
    page fails, the browser ends, or one takes longer than `limit_s` seconds.
    """
    desk = _Desk(files)
    with _Server(("127.0.0.1", 0), partial(_Handler, desk)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with showing(f"http://127.0.0.1:{server.server_port}/{desk.token}/") as browser:
                yield _WebSession(desk, browser, witness, limit_s)
        finally:
            desk.questions.put(None)  # to the thread that still waits
            server.shutdown()


def described(arrays: Arrays) -> str:
    """Names, types and shapes, for the header."""
    return quote(
        json.dumps([{"name": name, "type": str(a.dtype), "shape": list(a.shape)} for name, a in arrays.items()])
    )


def packed(arrays: Arrays) -> bytes:
    """The values of all arrays, one after the other."""
    return b"".join(array.tobytes() for array in arrays.values())


def unpacked(body: bytes, header: str) -> Arrays:
    """The arrays that a body and its header describe. Raises ValueError when the two do not fit together."""
    arrays, offset = {}, 0
    for tensor in json.loads(unquote(header)):
        dtype, shape = np.dtype(tensor["type"]), tuple(tensor["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        arrays[tensor["name"]] = np.frombuffer(body, dtype, count, offset).reshape(shape)
        offset += count * dtype.itemsize
    return arrays
