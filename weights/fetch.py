"""Fetch the official DINOv2 checkpoints: ``python3 weights/fetch.py vitl14_reg4 [--to DIR] [--timeout SECONDS]``.

Standard library only. The bytes go to ``NAME.part`` beside the target; that file is kept when the transfer breaks off, and the
next call goes on where it ended. NAME itself appears only once its size and sha256 are those of manifest.json.
Exit status 0: the file is in place; 1: it is not, and one line on stderr says why; 2: wrong arguments.
"""

# ruff: noqa: T201  (a command line tool talks to its user)
from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
BLOCK = 1 << 20  # bytes read at a time
STALL = 30.0  # seconds without a byte after which a connection counts as dead


class FetchError(Exception):
    """A checkpoint that could not be fetched; the message is one line."""


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, part: Path, expected_bytes: int, timeout: float) -> None:
    """Bring ``part`` to its full length, continuing what is there when the server can.

    Raises:
        FetchError: when the network, the server or the disk does not play along; what has arrived stays in ``part``.
    """
    have = part.stat().st_size if part.exists() else 0
    if have > expected_bytes:
        part.unlink()
        have = 0
    if have == expected_bytes:
        return
    headers = {"User-Agent": "dinoreg-fetch", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=min(STALL, timeout)) as answer:
            resumed = have > 0 and answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not resumed:
                have = 0
            said = time.monotonic()
            with part.open("ab" if resumed else "wb") as out:
                while have <= expected_bytes and (block := answer.read(BLOCK)):
                    out.write(block)
                    have += len(block)
                    if time.monotonic() - said > 5:
                        said = time.monotonic()
                        print(f"  {have / 1e6:.0f} of {expected_bytes / 1e6:.0f} MB", flush=True)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise FetchError(f"{url}: {error}") from error
    if have != expected_bytes:
        raise FetchError(f"{url}: the transfer ended after {have} of {expected_bytes} bytes; run the command again to go on")


def fetch(model: dict[str, object], folder: Path, timeout: float) -> Path:
    """Put one checkpoint of the manifest into ``folder`` and return its path; raises FetchError."""
    target = folder / str(model["file"])
    part = target.with_name(target.name + ".part")
    expected_sha256, expected_bytes = str(model["sha256"]), int(str(model["bytes"]))
    try:
        if target.exists():
            if sha256_of(target) == expected_sha256:
                print(f"{target}: already there, sha256 correct")
                return target
            print(f"{target}: its sha256 is not that of the manifest; fetching it again")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching {model['url']} ({expected_bytes / 1e6:.0f} MB) to {target}", flush=True)
        download(str(model["url"]), part, expected_bytes, timeout)
        found = sha256_of(part)
        if found != expected_sha256:
            part.unlink()
            raise FetchError(f"{model['url']}: sha256 is {found}, expected {expected_sha256}; the download was deleted")
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
    except OSError as error:
        raise FetchError(f"{target}: {error.strerror or error}") from error
    print(f"{target}: complete, sha256 correct")
    return target


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch an official DINOv2 checkpoint and verify its size and sha256.")
    parser.add_argument("arch", help="vits14, vitb14, vitl14 or vitg14, each also with _reg4 (four register tokens)")
    parser.add_argument("--to", type=Path, default=HERE, metavar="DIR", help="folder of the file (default: beside this script)")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="give up after this time (default: 3600)")
    parser.add_argument("--manifest", type=Path, default=HERE / "manifest.json", help="list of files and checksums")
    options = parser.parse_args(arguments)
    models = json.loads(options.manifest.read_text(encoding="utf-8"))["models"]
    if options.arch not in models:
        parser.error(f"unknown architecture {options.arch!r}; choose one of: {', '.join(models)}")

    fetched: list[Path] = []
    failure = ""

    def work() -> None:
        nonlocal failure
        try:
            fetched.append(fetch(models[options.arch], options.to, options.timeout))
        except FetchError as error:
            failure = str(error)

    # A name look-up cannot be given a time limit, so the whole transfer runs in a thread that is left behind when time is up.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(options.timeout)
    if worker.is_alive():
        failure = f"gave up after {options.timeout:g} s; run the command again to go on where it ended"
    if failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
    return 0 if fetched else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # at once, even if a name look-up still hangs in the thread
