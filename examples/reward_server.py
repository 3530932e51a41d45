"""A reward server: what Tandem asks and what it wants to hear, in the standard library alone.

    python examples/reward_server.py --port 8765

and in a recipe:

    [[rewards]]
    url = "http://127.0.0.1:8765/"

Put a scorer of your own in the place of `score`. The protocol stands in docs/remote-rewards.md.
"""

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERSION = 1


def score(sample: dict[str, Any]) -> float:
    """1 for a response that says please or thank, less a little for every word."""
    response = sample["response"].lower()
    return float(any(word in response for word in ("please", "thank"))) - 0.01 * len(response.split())


class Handler(BaseHTTPRequestHandler):
    """Answers POST, at any path."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = json.loads(body)
            if request["version"] != VERSION:
                raise ValueError(f"this server speaks version {VERSION}, and the request is {request['version']!r}")
            scores = [score(sample) for sample in request["samples"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self.answer(400, {"error": f"{type(error).__name__}: {error}"})
        else:
            self.answer(200, {"scores": scores})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *words: Any) -> None:
        """A line for every request would be too many."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A reward server for this machine alone.")
    parser.add_argument("--port", type=int, default=8765, help="0 takes any that is free")
    with ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
