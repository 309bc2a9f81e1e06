"""Renders templates in its own process: `blockinfer.templates` starts this file and writes to its stdin.

Each line on stdin is {"chat_template", "conversation", "tokens"}, or {"template", "fields"} for a plain template, in
which a name that is no field is an error. Each gets one line on stdout: {"text"} or {"error", "line"}; line is the
template's, null if unknown. The arguments are the seconds of CPU time for each rendering, beyond which the process
dies, and the bytes it may allocate.
"""

import json
import resource
import sys
import time
from functools import lru_cache
from types import TracebackType

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main() -> None:
    # imports nothing from the package, which would import torch
    from transformers.utils.chat_template_utils import render_jinja_template

    cpu_seconds, memory = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, _address_space() + memory)
    for line in sys.stdin:
        # in seconds of the process's life; the default action of SIGXCPU ends it
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_seconds)
        try:
            asked = json.loads(line)
            if "template" in asked:
                text = _plain(asked["template"]).render(asked["fields"])
            else:
                options = {"chat_template": asked["chat_template"], "add_generation_prompt": True} | asked["tokens"]
                text = render_jinja_template([asked["conversation"]], **options)[0][0]
            reply = json.dumps({"text": text})
        except MemoryError:
            reply = json.dumps({"error": f"it needs more than {memory >> 20} MiB of memory", "line": None})
        except Exception as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            reply = json.dumps({"error": told, "line": getattr(error, "lineno", _line(error.__traceback__))})
        print(reply, flush=True)


@lru_cache(maxsize=1)
def _plain(template: str) -> Template:
    """With the settings of chat templates: a line that holds only a tag produces no line."""
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, extensions=["jinja2.ext.loopcontrols"]
    ).from_string(template)


def _line(traceback: TracebackType | None) -> int | None:
    """The innermost line of the template in the error's traceback."""
    found = None
    while traceback:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            found = traceback.tb_lineno
        traceback = traceback.tb_next
    return found


def _limit(what: int, soft: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _address_space() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
