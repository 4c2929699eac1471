"""Damage, reproducible from a seed: bytes, lines of text and the values of a JSON."""

from __future__ import annotations

import json
import math
import re
import struct
from random import Random
from typing import Any

NUMBERS = (-(2**63), -(2**31), -32768, -1, 0, 1, 2, 3, 7, 127, 255, 256, 32767, 65535, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1,
           2**64)
REALS = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, 1e-300, 1e30, 3e38, 1e300, -1.0, 0.1)
WORDS = ("", " ", "0", "-1", "nan", "inf", "1e999", "None", "true", "LOCAL", "LIST", "..", "../../etc/passwd", "/etc/passwd", ".",
         "~", "a/b", "C:\\x", "%s%n", "\x00", "\x1b[31m", "\ud800", "\xe9", "\U0001d518", "x" * 5000, "9" * 400, "1_0", "\u0663",
         '"', ",", ";", "'", "\n")


def damaged(content: bytes, kind: str, header: int, random: Random) -> tuple[bytes, bool]:
    """A damaged copy.

    Args:
        content: of the sound file.
        kind: "json", "lines" or "" (binary).
        header: of a binary file, the bytes at its beginning that get half of the damage.

    Returns:
        The copy, and whether it is the original cut short.
    """
    if kind == "json" and random.random() < 0.7:
        return _json(content, random), False
    if kind == "lines" and random.random() < 0.7:
        return _lines(content, random), False
    if random.random() < 0.2:
        return content[: _place(content, header, random)], True
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        content = _bytes(content, header, random)
    return content, False


def damaged_tensors(content: bytes, random: Random) -> bytes:
    """A safetensors file with another header: some value of it changed, or a tensor called by another shape of the same size."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if random.random() < 0.5:
        header = _node(header, random)
    else:
        entry = header[random.choice([name for name in header if name != "__metadata__"])]
        number = math.prod(entry["shape"])
        entry["shape"] = random.choice(([number], [1, number], [number, 1, 1], [1, 1, 1, 1, number], [], [0]))
        entry["dtype"] = random.choice((entry["dtype"], entry["dtype"], "I32", "BF16", "F8_E4M3"))
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _place(content: bytes, header: int, random: Random) -> int:
    end = header if header and random.random() < 0.5 else len(content)
    return random.randrange(max(1, min(end, len(content))))


def _bytes(content: bytes, header: int, random: Random) -> bytes:
    at, action = _place(content, header, random), random.randrange(8)
    length = random.choice((1, 2, 4, 8, 16, 200))
    if action == 0 and content:  # one bit
        return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
    if action == 1:
        return content[:at] + random.randbytes(length) + content[at + length :]
    if action == 2:  # a number that programs trip over, where numbers are likely to lie
        at -= at % 2
        number = _number(random)
        return content[:at] + number + content[at + len(number) :]
    if action == 3:
        return content[:at] + content[at + length :]
    if action == 4:
        return content[:at] + random.randbytes(length) + content[at:]
    if action == 5:
        return content[:at] + bytes(length) + content[at + length :]
    if action == 6:
        other = _place(content, header, random)
        return content[:at] + content[other : other + length] + content[at:]
    return content + random.randbytes(length)


def _number(random: Random) -> bytes:
    order = random.choice("<>")
    if random.random() < 0.4:
        return struct.pack(order + random.choice("fd"), _fitting(random.choice(REALS)))
    kind = random.choice("bhiq")
    size = 8 * struct.calcsize("<" + kind)
    return (random.choice(NUMBERS) % 2**size).to_bytes(size // 8, "little" if order == "<" else "big")


def _fitting(value: float) -> float:
    return value if abs(value) < 3.4e38 or value != value or value in (float("inf"), float("-inf")) else 3e38


def _lines(content: bytes, random: Random) -> bytes:
    text = content.decode("latin-1")
    action = random.randrange(6)
    lines = text.splitlines(keepends=True)
    at = random.randrange(len(lines))
    if action == 0:
        del lines[at]
    elif action == 1:
        lines.insert(at, random.choice(lines))
    elif action == 2:
        lines.insert(at, _word(random) + "\n")
    if action < 3:
        return "".join(lines).encode("utf-8", "surrogatepass")
    pattern = r"-?\d+(?:\.\d+)?(?:e-?\d+)?" if action < 5 else r"[A-Za-z_.]+"
    if found := list(re.finditer(pattern, text)):
        spot = random.choice(found)
        text = text[: spot.start()] + _word(random) + text[spot.end() :]
    return text.encode("utf-8", "surrogatepass")


def _word(random: Random) -> str:
    return random.choice((random.choice(WORDS), str(random.choice(NUMBERS)), str(random.choice(REALS))))


def _json(content: bytes, random: Random) -> bytes:
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 2))):
        value = _node(value, random)
    return json.dumps(value, indent=1, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def _node(value: Any, random: Random) -> Any:
    """The value with one node of it changed."""
    if isinstance(value, dict | list) and value and random.random() < 0.85:
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        action = random.randrange(10)
        if action == 0:
            del value[key]
        elif action == 1 and isinstance(value, dict):
            value[_word(random)] = value.pop(key)
        elif action == 1:
            value.insert(key, value[key])
        else:
            value[key] = _node(value[key], random)
        return value
    deep: Any = []
    for _ in range(random.choice((3, 900))):
        deep = [deep]
    return random.choice((None, True, [], {}, "x", deep, {"0": "x"}, [value, value], {"a": value}, random.choice(NUMBERS),
                          random.choice(REALS), _word(random), str(value)[:-1], str(value) + _word(random)))
