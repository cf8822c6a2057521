"""The `autopipe` command.

A command line becomes an exit status: 0 done, 1 verify found a difference, 2 an error. Read `options.py` first, then
`commands.py`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from autopipe.cli.commands import COMMANDS, DONE, WRONG_CALL
from autopipe.cli.options import parser
from autopipe.errors import AutopipeError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors go to stderr in one line, after their traceback with `--debug`."""
    options = parser().parse_args(argv)
    try:
        return COMMANDS[options.command](options) or DONE
    except BrokenPipeError:
        sys.stderr.close()
        return DONE
    except KeyboardInterrupt:
        return _failed("interrupted", options.debug, INTERRUPTED)
    except AutopipeError as error:
        return _failed(str(error), options.debug)
    except Exception as error:  # noqa: BLE001  (the last resort: whatever went wrong is told in one line)
        return _failed(
            f"{type(error).__name__}: {error}; remedy: run it again with --debug to see where", options.debug
        )


def _failed(message: str, debug: bool, status: int = WRONG_CALL) -> int:
    if debug:
        traceback.print_exc()
    print(f"autopipe: error: {' '.join(message.split())}", file=sys.stderr)
    return status
