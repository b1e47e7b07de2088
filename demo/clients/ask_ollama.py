"""An ordinary program that uses the `ollama` SDK. It knows nothing of egressd."""

import sys

import ollama

answer = ollama.chat(model="lab-1", messages=[{"role": "user", "content": sys.argv[1]}])
print(answer.message.content)
