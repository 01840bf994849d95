"""The program of a process that tokenizes for another: see :mod:`saekit.data.tokenizing`.

It reads the function that makes ids with the name of the option that asked for this process, and then lists of
documents, from its standard input, and answers each list on its standard output, until there is no more to read.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any, BinaryIO

import numpy as np

from saekit.data.faults import TokenizingError
from saekit.errors import DataError
from saekit.reasons import reason


def serve(given: BinaryIO, answers: BinaryIO) -> None:
    """Answer what is ``given`` until that ends."""
    failure: TokenizingError | None = None
    tokenize: Any = None
    try:
        told, option = pickle.load(given)
    except EOFError:
        return
    try:
        tokenize = pickle.loads(told)
    except Exception as error:  # what its modules raise where they are imported
        failure = TokenizingError(f"the tokenizer cannot be read in another process: {error!r}. Set {option} to 0")
    while True:
        try:
            documents = pickle.load(given)
        except EOFError:
            return
        made = [(False, failure) if failure else _made(tokenize, document) for document in documents]
        pickle.dump(made, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _made(tokenize: Any, document: Any) -> tuple[bool, Any]:
    try:
        return True, np.asarray(tokenize(document), dtype=np.int64)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error that is made of more than its arguments
            return False, DataError(f"the tokenizer does not take it: {reason(error)}")
        return False, error


def main() -> None:
    """Nothing but answers may go to the standard output, whatever libraries print.

    A system that ends a job may signal all of its processes at once: the run still needs this one for its last steps.
    It ends when the run closes the pipe.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, answers)
    except BrokenPipeError:  # nobody waits for the answer any more
        os._exit(0)


if __name__ == "__main__":
    main()
