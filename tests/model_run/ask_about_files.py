"""An ordinary program: asks a language model about the files of its working directory, by the `openai` SDK.

It knows nothing of egressd. Standard output is one JSON object: what the model said, and what it cost. Then
it tries to get out, to each ADDRESS:PORT on the command line, and tells how that ended.
"""

import errno
import json
import socket
import sys
from pathlib import Path

import openai

QUESTION = "What is in these files?"


def ask(text: str) -> dict[str, object]:
    client = openai.OpenAI(base_url="http://127.0.0.1:11434/v1", api_key="none", max_retries=0, timeout=60)
    answer = client.chat.completions.create(
        model="tiny", max_tokens=24, temperature=0, messages=[{"role": "user", "content": text}]
    )
    assert answer.usage is not None
    return {
        "text": answer.choices[0].message.content,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
    }


def attempt(target: str) -> str:
    address, _, port = target.rpartition(":")
    try:
        with socket.create_connection((address, int(port)), timeout=10):
            return "connected"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


files = {str(path): path.read_text() for path in sorted(Path().rglob("*")) if path.is_file()}
about = "".join(f"{name}\n{text}" for name, text in files.items())
json.dump(
    {
        "files": sorted(files),
        "bare": ask(QUESTION),
        "asked": ask(about + QUESTION),
        "again": ask(about + QUESTION),
        "out": {target: attempt(target) for target in sys.argv[1:]},
    },
    sys.stdout,
)
