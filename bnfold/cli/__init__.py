"""The command line: arguments become one library call, its report becomes a table. No logic lives here."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from typing import Any

from bnfold.capture import COLOUR, NO_TELEMETRY, heard
from bnfold.errors import InputError
from bnfold.text import visible

from .streams import PLAIN, completing, fitted, open_streams, own_stderr, reader_may_leave

__all__ = ["main", "run"]

INTERRUPTED = "interrupted; no file is left half-written"
# onnx_ir imports them for sizes that are formulas: half of all that a command would import.
SELDOM = frozenset({"sympy", "onnx_ir._symbolic_shapes"})
COLLECTED = 300_000, 20, 100  # new objects between looks for cycles: those of a large graph stay as long as the command


class _WhenUsed:
    """Finds modules that are seldom needed, to be run when something of them is asked for."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in SELDOM else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def main() -> None:
    """Run the command of the process's arguments and exit with the contract's status (see `bnfold.errors`)."""
    sys.meta_path.insert(0, _WhenUsed)
    gc.set_threshold(*COLLECTED)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started it wants it ignored
        signal.signal(signal.SIGINT, _interrupt)
    os.environ[NO_TELEMETRY] = "1"
    if completing():
        os.environ["COLUMNS"] = "1000"  # Typer wraps what it says of an option, which a shell takes for more options
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode gets other characters, not an exception
            stream.reconfigure(errors=PLAIN)
    own_stderr()
    try:
        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # before the command began, or once more while it cleaned up
        status = _say(INTERRUPTED, 130)
    try:
        with reader_may_leave(sys.stdout):
            sys.stdout.flush()
    except InputError as error:
        status = _explain(error)
    gc.freeze()  # what is left goes with the process; Python would look through all of it for cycles
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run a command; its exit status. Whatever goes wrong is one line on standard error, a traceback only with --debug."""
    from bnfold.recalibration.distributed import close

    from .commands import command_line
    from .options import Interrupted
    from .settings import defaults

    debug, quiet = "--debug" in arguments, bool({"-q", "--quiet"} & {*arguments}) or completing()
    heard.clear()
    _interruptions.clear()
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            everything = "--help-all" in arguments or completing()
            parser = command_line(everything=everything, only="" if everything else next(iter(arguments), ""))
            asked = ["--help" if each == "--help-all" else each for each in arguments]
            asked = [*asked[1:2], "--help"] if asked[:1] == ["help"] else asked
            found = defaults(command_line, arguments, (lambda text: None) if quiet else _remark)
            status = parser.main(args=asked, prog_name="bnfold", standalone_mode=False, default_map=found)
        close()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, Interrupted):
        return _say(INTERRUPTED, 130)
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _say(INTERRUPTED, 130) if _interruptions else _explain(error)
    finally:
        if debug:
            _tell_heard()


def _tell_heard() -> None:
    """What the runtime printed, whose lines are shown as they came but for what acts on a terminal."""
    for line in (line for text in heard for line in text.splitlines() if line.strip()):
        print(f"runtime: {visible(COLOUR.sub('', line))}", file=sys.stderr)
    heard.clear()


def _explain(error: Exception) -> int:
    """Say in one line what is wrong; the status that belongs to it."""
    from bnfold.data.memory import out_of_memory
    from bnfold.errors import BnfoldError

    from .app import PARSER_ERROR

    if isinstance(error, BnfoldError):
        return _say(f"error: {error}", error.exit_status)
    if isinstance(error, PARSER_ERROR):
        context = getattr(error, "ctx", None)
        asked = context.command_path if context is not None else "bnfold"
        said = error.format_message().rstrip(".").replace(". Did you mean", "; did you mean")
        return _say(f"error: {said}{' See' if said.endswith('?') else '; see'} '{asked} --help'", 2)
    if isinstance(error, (MemoryError, RuntimeError)) and out_of_memory(error):
        return _say("error: out of memory; give a smaller --batch-size or --input-shape, or for recalibration a smaller --memory-budget", 5)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"error: {where}{error.strerror}; see to that file or disk, then run again", 3)
    what = f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
    return _say(f"error: {what}; this is a defect of bnfold: run again with --debug and report what it prints", 70)


def _say(text: str, status: int) -> int:
    print(fitted(f"bnfold: {visible(' '.join(text.split()))}"), file=sys.stderr, flush=True)
    if text.startswith("error: "):
        from bnfold.report.render.ci import annotate, on_github

        if on_github():
            annotate("error", "bnfold", text.removeprefix("error: "))
    return status


def _remark(text: str) -> None:
    with reader_may_leave(sys.stderr):
        print(fitted(f"bnfold: {visible(text)}"), file=sys.stderr, flush=True)


_interruptions: list[int] = []  # by their signals; a library may swallow one, in an import that is then broken, say


def _interrupt(number: int, _: object) -> None:
    """A request to stop is an interruption: what was begun is cleaned up on the way out."""
    _interruptions.append(number)
    raise KeyboardInterrupt
