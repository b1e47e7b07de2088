"""An ordinary program that uses the `openai` SDK. It knows nothing of egressd."""

import sys
import time

import openai

base_url, question = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key="sk-demo", max_retries=0, timeout=5)
began = time.perf_counter()
try:
    answer = client.chat.completions.create(model="lab-1", messages=[{"role": "user", "content": question}])
except openai.APIConnectionError as error:
    spent = (time.perf_counter() - began) * 1000
    cause = error.__cause__ or error
    sys.exit(f"{type(error).__name__} after {spent:.1f} ms: {cause}")
print(answer.choices[0].message.content)
