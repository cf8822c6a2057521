"""The `autopipe` command: a command line goes in, an exit status comes out (0 done, 1 a fault was found, 2 the call is wrong)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from autopipe.cli.commands import COMMANDS
from autopipe.cli.options import parser
from autopipe.errors import AutopipeError, CaptureError, EngineError

DONE, FAULT, WRONG_CALL = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors go to stderr in one line, with `--debug` after their traceback."""
    options = parser().parse_args(argv)
    try:
        COMMANDS[options.command](options)
    except BrokenPipeError:
        sys.stderr.close()
    except KeyboardInterrupt:
        return _failed("interrupted", debug=options.debug, status=130)
    except AutopipeError as error:
        fault = isinstance(error, (CaptureError, EngineError))
        return _failed(str(error), debug=options.debug, status=FAULT if fault else WRONG_CALL)
    except Exception as error:  # noqa: BLE001  (the last resort: whatever went wrong is told in one line)
        return _failed(
            f"{type(error).__name__}: {error}; remedy: run it again with --debug to see where", options.debug, FAULT
        )
    return DONE


def _failed(message: str, debug: bool, status: int) -> int:
    if debug:
        traceback.print_exc()
    print(f"autopipe: error: {' '.join(message.split())}", file=sys.stderr)
    return status
