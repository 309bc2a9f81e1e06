"""Renders a chat template, as a process of its own: `blockinfer.chat` starts this file and writes to it.

A line on stdin is {"chat_template", "conversation", "tokens"}, and gets one on stdout, {"text"} or {"error"}. The
arguments are the seconds of CPU time that each may take, beyond which the process dies, and the bytes that may be
allocated.
"""

import json
import resource
import sys
import time


def main() -> None:
    # no part of the package is imported: it would bring torch along
    from transformers.utils.chat_template_utils import render_jinja_template

    cpu_seconds, memory = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, _address_space() + memory)
    for line in sys.stdin:
        # in seconds of the process's life; the default action of SIGXCPU ends it
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_seconds)
        try:
            asked = json.loads(line)
            options = {"chat_template": asked["chat_template"], "add_generation_prompt": True} | asked["tokens"]
            rendered, _ = render_jinja_template([asked["conversation"]], **options)
            reply = json.dumps({"text": rendered[0]})
        except MemoryError:
            reply = json.dumps({"error": f"it needs more than {memory >> 20} MiB of memory"})
        except Exception as error:
            reply = json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        print(reply, flush=True)


def _limit(what: int, soft: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _address_space() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
