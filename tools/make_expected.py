"""Make test/expected: the fields of the small case under both contracts, with MIND alone.

``python tools/make_expected.py`` after a change that moves results on purpose; say in the commit what moved and why.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test"))

from container.cases import FIELD, write_learn2reg, write_single  # noqa: E402
from container.fields import load_field, save_expected  # noqa: E402


def main() -> int:
    """Command line; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_learn2reg(work / "learn2reg")
        write_single(work / "single", work / "learn2reg")
        for contract, field in (("learn2reg", FIELD), ("single", "images/displacement-field/displacement-field.mha")):
            output = work / f"{contract}-output"
            output.mkdir()
            subprocess.run([sys.executable, str(ROOT / "process.py"), "--input", str(work / contract), "--output", str(output),
                            "--features", "mind"], check=True)
            target = ROOT / "test" / "expected" / f"{contract}.npz"
            save_expected(target, load_field(output / field))
            print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
