"""As much of curl as docs/http.md uses, for machines that have none: `curl.py [flags] URL`.

Flags: -s and -N are the default, -i, -X, -d, --data-binary (@FILE), -H, -w (an HTTP status to
stderr), --max-time.
"""

from __future__ import annotations

import argparse
import http.client
import sys
from pathlib import Path
from urllib.parse import urlsplit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    for flag in ("-s", "-N"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("-i", dest="has_head", action="store_true")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-d", dest="data")
    parser.add_argument("--data-binary", dest="file")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-w", dest="write_out")
    parser.add_argument("--max-time", type=float)
    flags = parser.parse_args()
    url = urlsplit(flags.url)
    target = url.path + (f"?{url.query}" if url.query else "")
    connection = http.client.HTTPConnection(url.netloc, timeout=flags.max_time)
    headers = dict(line.split(": ", 1) for line in flags.headers)
    body = None if flags.data is None else flags.data.encode()
    if flags.file is not None:
        body = Path(flags.file.removeprefix("@")).read_bytes()
    method = flags.method or ("GET" if body is None else "POST")
    connection.request(method, target, body, headers)
    response = connection.getresponse()
    if flags.has_head:
        print(f"HTTP/1.1 {response.status} {response.reason}", end="\r\n")
        print("".join(f"{name}: {value}\r\n" for name, value in response.getheaders()), end="\r\n")
    print(response.read().decode(), end="")
    if flags.write_out is not None:
        print(response.status, file=sys.stderr)


if __name__ == "__main__":
    main()
