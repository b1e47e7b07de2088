"""Fetches a page from each host on the command line, as a program that searches might. One line each."""

import sys
import time
import urllib.error
import urllib.request

for host in sys.argv[1:]:
    began = time.perf_counter()
    try:
        with urllib.request.urlopen(f"https://{host}/", timeout=5) as page:
            ended = page.read().decode().strip()
    except urllib.error.URLError as error:
        ended = getattr(error.reason, "strerror", None) or str(error.reason)
    print(f"{host:24}{(time.perf_counter() - began) * 1000:5.1f} ms  {ended}", flush=True)
