"""One candidate of one question, run a few times for a profiler to count.

python one_candidate.py QUESTION '{"projection": {"plain": {…}}}'
"""

from __future__ import annotations

import json
import sys

from fastpref_kernels import configs

from fastpref.commands.tune.questions import Sizes, questions
from fastpref.commands.tune.run import defaults


def run(name: str, content: dict, sizes: Sizes, times: int = 2) -> None:
    """The question's timed work under the entries of a file's content."""
    question = next(each for each in questions() if each.name == name)
    entries = defaults(sizes.device) | question.under | configs.entries_in(content)
    with configs.trial(entries):
        work, _ = question.work(sizes)
        for _ in range(times):
            work()


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]), Sizes())
