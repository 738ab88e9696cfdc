"""Thousands of files made wrong, or of networks that nobody drew: a line for each that fails, and what became of the rest.

    python -m tests.fuzz onnx --count 3000 --seed 0     mutated ONNX files, of the seeds from 0 on
    python -m tests.fuzz torch                          mutated files of PyTorch
    python -m tests.fuzz modules                        random networks as modules and exported programs
    python -m tests.fuzz kills --count 200              commands that are killed while they write
    python -m tests.fuzz graphs --only 1234             one random network again, and what there is to say about it; --save FILE keeps it

Status 1 where one fails: see the module of each kind for what that means.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from pathlib import Path

KINDS = {"onnx": "onnx_files", "torch": "torch_files", "graphs": "graphs", "modules": "modules", "kills": "kills"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first of as many seeds")
    parser.add_argument("--only", type=int, metavar="SEED", help="this seed alone, with all that there is to say about it")
    parser.add_argument("--save", type=Path, metavar="FILE", help="with --only: where what was made goes")
    parser.add_argument("--verbose", action="store_true", help="a line for each, also where nothing failed")
    args = parser.parse_args()
    tried = importlib.import_module(f"tests.fuzz.{KINDS[args.kind]}").tried
    if args.only is not None:
        found = tried(args.only, save=args.save, say=print)
        print(found.became, found.problem or "all is well", sep="\n")
        return bool(found.problem)
    start, said, failed = time.perf_counter(), Counter[str](), list[int]()
    for seed in range(args.seed, args.seed + args.count):
        found = tried(seed)
        said[found.became.partition(":")[0]] += 1
        if found.problem:
            failed.append(seed)
        if found.problem or args.verbose:
            print(f"{seed}: {found.problem.strip().splitlines()[-1] if found.problem else found.became}", flush=True)
    print(f"{args.count} seeds from {args.seed} on, {len(failed)} failed {failed}, {time.perf_counter() - start:.0f} s")
    print(", ".join(f"{count:,} {what}" for what, count in said.most_common()))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
