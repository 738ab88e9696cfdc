"""The command line: arguments become one library call, its report becomes a table. No logic lives here."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with the contract's status (see `bnfold.errors`)."""
    given = sys.argv[1:] if arguments is None else arguments
    status = run(given)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has left; nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run a command; its exit status. Anything wrong is one line on standard error, a traceback only with --debug."""
    import signal

    import typer

    from ..errors import BnfoldError
    from .app import app

    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in arguments
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="bnfold", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        return 0
    except BnfoldError as error:
        if debug:
            raise
        return _say(f"error: {' '.join(str(error).split())}", error.exit_status)
    except Exception as error:
        name = type(error).__name__
        if name in ("Exit", "NoArgsIsHelpError"):  # the parser's own, under whichever module it keeps them
            return getattr(error, "exit_code", 0)
        if name == "Abort":
            return _say("interrupted", 130)
        if hasattr(error, "format_message"):
            return _say(f"error: {' '.join(error.format_message().split())} (see 'bnfold --help')", 2)
        if debug:
            raise
        what = f"{name}: {' '.join(str(error).split())[:300]}"
        return _say(f"error: {what}; this is a defect of bnfold: run again with --debug and report what it prints", 70)


def _say(text: str, status: int) -> int:
    print(f"bnfold: {text}", file=sys.stderr)
    return status


def _terminate(*_: object) -> None:
    """A request to stop is an interruption: what was begun is cleaned up on the way out."""
    raise KeyboardInterrupt
