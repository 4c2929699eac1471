"""Write locks/: every package with its version and the sha256 of its files, for Python 3.10 to 3.12.

``python tools/lock.py`` after a change of requirements.txt, and ``tools/licences.py`` after that; needs ``uv`` (by pip) and a
package index, downloads no package. Three files, so that a change of a small package leaves the layer with torch alone:

- ``packages.txt``: all but torch and CUDA. run.sh, test.sh and the image install it.
- ``torch-cuda12.txt``: torch and the CUDA libraries of the image.
- ``torch-cpu.txt``: torch for an image without CUDA. Kept by hand: these builds are on PyTorch's own index, not on PyPI.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
IMAGE_TORCH = "torch==2.10.0"
GPU = re.compile(r"(torch|triton|nvidia-|cuda-)")  # names of packages that belong to torch's build, not to ours
# Triton compiles kernels at run time: it needs a compiler, which the image has not, and nothing here calls it (635 MB unpacked).
UNUSED = re.compile(r"triton")


def resolve(requirements: str, constraints: Path | None = None) -> list[str]:
    """One lock entry (``name==version [; marker]`` with its hashes, several lines) for each package that is needed."""
    command = ["uv", "pip", "compile", "-", "--no-config", "--universal", "--python-version", "3.10", "--fork-strategy", "fewest",
               "--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    if constraints is not None:
        command += ["--constraints", str(constraints)]
    output = subprocess.run(command, input=requirements, capture_output=True, text=True, check=True).stdout
    return re.split(r"\n(?=\S)", output.strip())


def write(path: Path, title: str, entries: list[str]) -> None:
    """Write one lock file."""
    path.write_text(f"# {title} Made by tools/lock.py.\n" + "\n".join(entries) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(entries)} packages")


def main() -> int:
    """Command line; returns the exit status."""
    packages = LOCKS / "packages.txt"
    try:
        entries = resolve((ROOT / "requirements.txt").read_text(encoding="utf-8"))
        write(packages, "All packages but torch and CUDA.", [entry for entry in entries if not GPU.match(entry)])
        gpu = [entry for entry in resolve(IMAGE_TORCH, packages) if GPU.match(entry) and not UNUSED.match(entry)]
        write(LOCKS / "torch-cuda12.txt", "torch and CUDA of the image, without triton.", gpu)
    except subprocess.CalledProcessError as error:
        print(f"error: uv could not resolve the requirements:\n{error.stderr}", file=sys.stderr)
        return 1
    except FileNotFoundError:
        print("error: uv is not installed; run `pip install uv`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
