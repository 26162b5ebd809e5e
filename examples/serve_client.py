"""Ask every adapter of a running `tsugiki serve` the same thing at once, with nothing but the standard library.

    tsugiki serve --adapters-dir runs &
    python examples/serve_client.py http://127.0.0.1:8000 "Request: wake me at six\\nIntent:"

A key, if the server has one, is read from TSUGIKI_KEY.
"""
from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen


def call(url: str, body: dict | None = None) -> dict:
    """One request to the server; its JSON answer."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('TSUGIKI_KEY', 'none')}"}
    with urlopen(Request(url, json.dumps(body).encode() if body else None, headers)) as answer:
        return json.load(answer)


def main(url: str, prompt: str) -> dict[str, str]:
    """Model name -> its greedy answer. The server puts all of them in one batch."""
    models = [m["id"] for m in call(f"{url}/v1/models")["data"]]

    def ask(model: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 32}
        return call(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(len(models)) as threads:
        answers = dict(zip(models, threads.map(ask, models), strict=True))
    for model, answer in answers.items():
        print(f"{model:>20}  {answer.strip()}")
    return answers


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].replace("\\n", "\n"))
