"""Serve the ONNX form of an output folder as OpenAI's chat API, on this machine alone.

    python examples/serve.py OUT [PORT]

It answers POST /v1/chat/completions, whole or as a stream, one request at a time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import onnxruntime_genai as og


class ChatModel:
    """A model that onnxruntime-genai runs.

    Attributes:
        name: What answers call it.
        room: How many tokens a question and its answer may have.
        has_template: Whether it says how a chat is written.
    """

    def __init__(self, out: str) -> None:
        self.name = out
        self.model = og.Model(f"{out}/onnx")
        self.tokenizer = og.Tokenizer(self.model)
        settings = json.loads(Path(out, "onnx", "genai_config.json").read_text(encoding="utf-8"))
        self.room = settings["model"]["context_length"]
        written = Path(out, "onnx", "tokenizer_config.json")
        template = json.loads(written.read_text(encoding="utf-8")).get("chat_template")
        self.has_template = bool(template) or Path(out, "onnx", "chat_template.jinja").is_file()

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """Return messages by the model's chat template, or what they say where it has none."""
        if not self.has_template:
            return "\n".join(str(message["content"]) for message in messages)
        text = json.dumps(messages)
        return str(self.tokenizer.apply_chat_template(text, add_generation_prompt=True))

    def answer(self, request: dict[str, Any]) -> Iterator[str]:
        """Yield the answer to the messages of a request, piece by piece."""
        ids = self.tokenizer.encode(self.prompt(request["messages"]))
        options = {key: request[key] for key in ("temperature", "top_p") if key in request}
        if options:
            options["do_sample"] = options.get("temperature", 1.0) > 0
        params = og.GeneratorParams(self.model)
        length = min(len(ids) + request.get("max_tokens", 256), self.room)
        params.set_search_options(max_length=length, **options)
        generator = og.Generator(self.model, params)
        generator.append_tokens(ids)
        pieces = self.tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield pieces.decode(generator.get_next_tokens()[0])


class Handler(BaseHTTPRequestHandler):
    """Turns HTTP into requests to the server's model."""

    def do_POST(self) -> None:
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request["messages"]
        except (KeyError, TypeError, ValueError):
            self.send_error(400, "A request is a JSON object with messages.")
            return
        model: ChatModel = self.server.model  # type: ignore[attr-defined]
        about = {"id": "chat", "created": int(time.time()), "model": model.name}
        streams = bool(request.get("stream"))
        text = "" if streams else "".join(model.answer(request))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if streams else "application/json")
        self.end_headers()
        if not streams:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            said = {**about, "object": "chat.completion", "choices": [choice]}
            self.wfile.write(json.dumps(said).encode())
            return
        for piece in model.answer(request):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            said = {**about, "object": "chat.completion.chunk", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


def main() -> None:
    out, port = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    server = HTTPServer(("127.0.0.1", port), Handler)
    server.model = ChatModel(out)  # type: ignore[attr-defined]
    print(f"http://127.0.0.1:{server.server_port}/v1/chat/completions", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
