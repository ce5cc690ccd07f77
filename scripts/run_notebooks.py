"""Execute every notebook, or those named, and leave the executed copies in build/notebooks; fail on the first error."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SECONDS_PER_CELL = 600


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]] or sorted(ROOT.glob("notebooks/*.ipynb"))
    executed = ROOT / "build" / "notebooks"
    executed.mkdir(parents=True, exist_ok=True)
    for path in paths:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        try:
            where = {"metadata": {"path": path.parent}}
            NotebookClient(notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources=where).execute()
        finally:
            nbformat.write(notebook, executed / path.name)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"notebooks executed: {len(paths)}")


if __name__ == "__main__":
    main()
