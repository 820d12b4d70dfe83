"""What a command answers: status, stdout, stderr."""

from __future__ import annotations

import contextlib
import io
import re

from nsa_transformer import cli

Answer = tuple[int, str, str]


def nsa(*arguments: str) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
    return status, out.getvalue(), err.getvalue()


def is_one_message(answer: Answer, pattern: str) -> None:
    status, _, err = answer
    assert status == 2, answer
    assert err.startswith("error: ") and err.count("error:") == 1 and "Traceback" not in err, err
    assert re.search(pattern, err, re.DOTALL), err
