"""What a user is told: one line on stderr, above the progress bar if there is one."""

import sys

from tqdm import tqdm


def warn(message):
    """Something was lost, and the run goes on."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def fail(message, code=2):
    """End the process. Exit code 2 says that the command line, or a file it names, is not what was expected."""
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def require(condition, message):
    """Fail unless the condition holds; the message names a value and what was expected."""
    if not condition:
        fail(message)
