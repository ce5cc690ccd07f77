"""The command line: `python -m graphopt demo`."""

import argparse
from pathlib import Path

NEEDED = ("matplotlib", "rich", "sklearn", "transformers")


def main() -> None:
    """Parse the command line and run what it names; without a command, print help."""
    parser = argparse.ArgumentParser(prog="python -m graphopt", description="Training that remembers fewer bytes.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a small model under stock Inductor and under lowmem, and compare",
        description="Train a model of 5 M parameters under stock Inductor, then under lowmem, and compare: "
        "losses, saved memory, peak memory, step time, compile time. Takes a few minutes on a CPU.",
    )
    demo.add_argument(
        "--model",
        choices=("gpt2", "llama", "vit"),
        default="gpt2",
        help="gpt2 and llama read the source of Python's standard library, vit reads digits (default: %(default)s)",
    )
    demo.add_argument("--steps", type=positive, default=150, help="training steps under each (default: %(default)s)")
    demo.add_argument(
        "--out", type=Path, default=Path("graphopt-demo"), help="folder written to (default: ./%(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, batches and dropout (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.command is None:
        parser.print_help()
        return
    try:
        from graphopt.demo import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NEEDED:
            raise
        parser.exit(1, f'the demo needs {missing}, which is not installed: pip install "graphopt[demo]"\n')
    run(arguments.model, steps=arguments.steps, out=arguments.out, seed=arguments.seed)


def positive(text: str) -> int:
    """A whole number of at least 1, or an error that argparse reports."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    main()
