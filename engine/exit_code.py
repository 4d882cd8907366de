"""How a command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code(name: str, run: Callable[[], int | None]) -> int:
    """What `run` returns, None being 0; 2 after a line for a ValueError, which is what the user did; 130 for Ctrl-C."""
    try:
        return run() or 0
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
