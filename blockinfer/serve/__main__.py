"""`python -m blockinfer.serve MODEL`: an HTTP server that speaks OpenAI's API. `--help` lists its options."""

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

from blockinfer.checks import is_finite
from blockinfer.config import EngineConfig
from blockinfer.llm import LLM


def main(arguments: Sequence[str] | None = None) -> int:
    """-> the exit code: 2, after a one-sentence message, for options, a model or an address that cannot be used."""
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    for name in ("api_key", "served_model_name"):
        if options[name] == "":
            parser.error(f"--{name.replace('_', '-')} must not be empty")
    try:
        from blockinfer.serve.server import Server
        from blockinfer.serve.service import ServeOptions, Service
    except ImportError as error:
        parser.error(f"the server needs packages that are not there ({error}): pip install 'blockinfer[serve]'")
    from blockinfer.async_llm import AsyncLLM

    host, port = options.pop("host"), options.pop("port")
    key = options.pop("api_key") or os.environ.get("BLOCKINFER_API_KEY") or None
    if key is not None and (key != key.strip() or not key.isprintable()):
        # HTTP strips a header's ends; the value itself stays out of the log
        parser.error(
            "the key of --api-key or BLOCKINFER_API_KEY has spaces around it, a line break or the like: no request "
            "could bring it"
        )
    name = options.pop("served_model_name") or options["model"]
    limits = {name: options.pop(name) for name in ("max_queue", "max_request_bytes", "receive_timeout")}
    limits["shutdown_timeout"] = options.pop("shutdown_timeout")
    try:
        # before the model, which takes minutes to load
        listener = _bind(host, port)
    except OSError as error:
        parser.error(f"cannot listen on {host}:{port}: {error.strerror or error}")
    try:
        with listener, LLM(**{name: value for name, value in options.items() if value is not None}) as llm:
            if llm.tokenizer is None:
                raise ValueError(f"{options['model']}: there is no tokenizer, and answers are text; pass --tokenizer")
            try:
                # as long as neither listens, another server can bind the address too
                listener.listen()
            except OSError as error:
                parser.error(f"cannot listen on {host}:{port}: {error.strerror}")
            # by default the engine's thread, back from the device, waits 5 ms for a thread that writes answers
            sys.setswitchinterval(0.0005)
            engine = AsyncLLM(llm)
            try:
                service = Service(engine, ServeOptions(model=name, api_key=key, **limits))
                Server(service).run([listener])
            finally:
                engine.close()
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address that does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError:
        raise OSError("this cannot be the name of a host") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m blockinfer.serve", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="checkpoint folder, Hub name, or shape, as of LLM")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    add("--port", type=_number(int, 0, 65535), default=8000, help="0 takes a free one (8000)")
    add("--served-model-name", help="the name that requests give (MODEL)")
    add("--api-key", help="what requests to /v1 must bring; also read from BLOCKINFER_API_KEY (none)")
    wait = "answers that may wait besides the max_num_seqs that run; past it requests are refused with 429 (256)"
    add("--max-queue", type=_number(int, 0), default=256, help=wait)
    add("--max-request-bytes", type=_number(int, 1), default=1 << 20, help="of a body (1048576)")
    receive = "seconds for a request's headers, and for its body (20)"
    add("--receive-timeout", type=_number(float, 0.01), default=20.0, help=receive)
    grace = "seconds that what runs may take to finish after SIGTERM (30)"
    add("--shutdown-timeout", type=_number(float, 0), default=30.0, help=grace)
    engine = parser.add_argument_group("engine", "As of LLM: help(blockinfer.LLM) says more.")
    for name, field in EngineConfig.__dataclass_fields__.items():
        if name != "model":
            engine.add_argument("--" + name.replace("_", "-"), **_argument(field.type))
    return parser


def _argument(kind: Any) -> dict[str, Any]:
    """argparse's settings for an engine option, from its annotation."""
    kinds = get_args(kind) or (kind,)
    if bool in kinds:
        return {"action": "store_true", "default": None}
    if list[int] in kinds:
        return {"type": _integers, "metavar": "N,N,..."}
    return {"type": int, "metavar": "N"} if int in kinds else {}


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers, as 8,16,32, got {text!r}") from None


def _number(kind: type, least: float, most: float = float("inf")) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if not is_finite(value) or not least <= value <= most:
            bounds = f"from {least:g} to {most:g}" if most < float("inf") else f"of at least {least:g}"
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} {bounds}, got {text!r}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
