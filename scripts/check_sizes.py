"""Fail on a source file of more than 500 lines, and on a file in git that is generated or larger than 1 MB."""

import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES_WANTED, LINES_ALLOWED = 300, 500
BYTES_ALLOWED = 1_000_000


def main() -> None:
    lines = {path.relative_to(ROOT): _lines(path) for path in sorted(ROOT.glob("graphopt/**/*.py"))}
    print(f"graphopt: {len(lines)} files, median {statistics.median(lines.values()):.0f} lines")
    for path, count in lines.items():
        if LINES_WANTED < count <= LINES_ALLOWED:
            print(f"  {path} has {count} lines; past {LINES_WANTED} it wants splitting")

    wrong = [f"{path} has {count} lines" for path, count in lines.items() if count > LINES_ALLOWED]
    # what .gitignore names is generated
    wrong += [f"{path} is generated" for path in _tracked("--cached", "--ignored", "--exclude-standard")]
    sizes = {path: (ROOT / path).stat().st_size for path in _tracked() if (ROOT / path).is_file()}
    wrong += [f"{path} has {size} bytes" for path, size in sizes.items() if size > BYTES_ALLOWED]
    if wrong:
        sys.exit("\n".join(wrong))


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _tracked(*options: str) -> list[str]:
    command = ["git", "ls-files", "-z", *options]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]


if __name__ == "__main__":
    main()
