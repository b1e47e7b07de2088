"""An ordinary program that uses the `ollama` SDK: the documents it finds are put before the question."""

import sys
from pathlib import Path

import ollama

found = sorted(Path.cwd().rglob("*.md"))
texts = [path.read_text().rpartition("---\n")[2].strip() for path in found]
question = "\n".join([*texts, sys.stdin.read().strip()])
try:
    answer = ollama.chat(model="lab-1", messages=[{"role": "user", "content": question}])
except ConnectionError as error:
    sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0]}")
print(answer.message.content)
