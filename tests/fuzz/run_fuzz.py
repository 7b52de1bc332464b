"""``make fuzz``: gives every parser that reads bytes from outside what a coverage-guided fuzzer comes up with.

A target fails when its parser raises what it does not promise, takes what it must not, hangs for ten seconds, or has
allocated 256 MB. What made it fail lies in build/fuzz/TARGET; give that file's path to look at it again.

Examples:
  make fuzz
  make fuzz ARGS="--only chat record --seconds 600"
  make fuzz ARGS="--only handle --input build/fuzz/handle/crash-0123"
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Final

import atheris

if "--here" in sys.argv:  # the process that fuzzes, and not the one that starts it
    with atheris.instrument_imports(include=["alora_serve", "adapter_router", "openai_front"]):
        from fuzz_targets import TARGETS
else:
    from fuzz_targets import TARGETS

OUTPUT: Final = Path(__file__).resolve().parent.parent.parent / "build" / "fuzz"
HANG_SECONDS: Final = 20
"""Twice what the patterns of an adapter may take."""

MEMORY_MB: Final = 3072
INPUT_BYTES: Final = 4096


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    corpus = OUTPUT / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={HANG_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        "-malloc_limit_mb=0",  # needs a sanitizer; targets hold themselves to a bound
        f"-max_len={INPUT_BYTES}",
        f"-artifact_prefix={OUTPUT / name}/",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name].run)
    atheris.Fuzz()


def main() -> None:
    """Parse flags and run each target in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--input", type=Path, help="run the one target on this file alone")
    parser.add_argument("--list", action="store_true", help="print the targets and exit")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(TARGETS))
        return
    if arguments.input is not None:
        [name] = arguments.only
        TARGETS[name].run(arguments.input.read_bytes())
        return
    if arguments.here:
        fuzz(arguments.only[0], arguments.seconds)
        return
    failed = []
    for name in arguments.only:
        print(f"{name}: {arguments.seconds} s", flush=True)
        command = [sys.executable, __file__, "--here", "--only", name, "--seconds", str(arguments.seconds)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        runs = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(f"    {int(runs[0].split()[-1]):,} inputs" if runs else "    ended early", flush=True)
        if done.returncode:
            failed.append(name)
            print("\n".join(done.stderr.splitlines()[-40:]))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what made them fail lies in {OUTPUT}")


if __name__ == "__main__":
    main()
