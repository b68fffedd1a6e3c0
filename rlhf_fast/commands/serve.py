"""``rlhf-fast serve``: a model and its adapters over HTTP, in the dialect of OpenAI and vLLM."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_fast.commands import Parser
from rlhf_fast.commands.generate import add_model_options, cache_tokens, load_policy
from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.rollout.serving.app import Service

GRACE = 30.0  # seconds that running requests have to finish once the server is told to stop
API_KEY = "RLHF_FAST_API_KEY"


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "serve",
        "Serve a model and named adapters on it: /v1/completions and /v1/chat/completions as OpenAI and vLLM have them, for "
        "rollouts or any of their clients. Listens on this machine only, unless there is an API key.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face name, model folder or run folder")
    parser.add_argument(
        "--adapter", metavar="NAME=FOLDER", action="append", default=[], help="also serve this adapter; may be repeated"
    )
    parser.add_argument("--served_model_name", metavar="NAME", help="what clients call the model; MODEL when not given")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; other than loopback needs an API key"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--api_key", help=f"what clients must send; better in the environment, as {API_KEY}")
    parser.add_argument("--max_tokens", type=int, default=32_768, help="most new tokens of a response")
    parser.add_argument("--slots", type=int, default=64, help="responses written at once")
    parser.add_argument(
        "--cache_tokens", type=int, help="most tokens, prompts included, held at once; what is free when not given"
    )
    add_model_options(parser)
    args = parser.parse_args(argv)
    uvicorn = import_uvicorn()
    from rlhf_fast.rollout.serving.app import build_app
    from rlhf_fast.rollout.serving.guard import is_loopback

    api_key = args.api_key or os.environ.get(API_KEY) or None
    if api_key is None and not is_loopback(args.host):
        raise UserError(
            f"serve: --host {args.host} lets other machines in; set an API key ({API_KEY} in the environment, or "
            "--api_key), or leave --host at 127.0.0.1"
        )
    service, said = _service(args)
    listener = listen(args.host, args.port)
    config = uvicorn.Config(
        build_app(service, api_key), log_level="warning", lifespan="on", timeout_graceful_shutdown=int(GRACE) + 5
    )
    sys.stderr.write(said)
    print(f"serving {', '.join(service.models.roles)} at {address(listener)}/v1 (Ctrl-C stops)", flush=True)
    with signals_end_quietly():
        _server(uvicorn, config, service).run(sockets=[listener])
    return 0


def _server(uvicorn: Any, config: Any, service: Service) -> Any:
    class Server(uvicorn.Server):
        """Gives running requests their time when it is told to stop."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            super().handle_exit(sig, frame)
            service.worker.drain(GRACE)

    return Server(config)


def listen(host: str, port: int, command: str = "serve") -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: the address is not one of this machine's, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{command}: cannot listen on {host} port {port} ({error}); choose another --host or --port"
        ) from error


def address(listener: socket.socket) -> str:
    """What to type into a browser to get there."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def import_uvicorn(command: str = "serve") -> Any:
    """uvicorn, with starlette there too.

    Raises:
        UserError: they are not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"{command} needs starlette and uvicorn: pip install 'rlhf-fast[serve]' ({error})") from error
    return uvicorn


def _service(args: Any) -> tuple[Service, str]:
    """What is served, and what there is to say of its memory."""
    import torch

    from rlhf_fast.rollout.serving.app import Service
    from rlhf_fast.rollout.serving.protocol import ApiError
    from rlhf_fast.rollout.serving.worker import ServedModels, Worker
    from rlhf_fast.rollout.slots import SlotEngine, slot_refusal, steady_length

    if args.max_tokens < 1:
        raise UserError(f"serve: --max_tokens must be at least 1, got {args.max_tokens}")
    pairs = [text.partition("=") for text in args.adapter]
    if wrong := [text for text, (name, _, folder) in zip(args.adapter, pairs) if not name or not folder]:
        raise UserError(f"serve: --adapter wants NAME=FOLDER, got {wrong[0]!r}")
    torch.seed()  # requests without a seed draw anew after every start
    policy = load_policy(args)
    steady = steady_length(policy.model)
    if reason := slot_refusal(policy, longest=steady):
        raise UserError(f"serve: the slot engine cannot write with {args.model}: {reason}; serve it with vLLM")
    models = ServedModels(policy, args.served_model_name or args.model)
    for name, _, folder in pairs:
        try:
            models.load(name, folder)
        except ApiError as error:
            raise UserError(f"serve: --adapter {name}: {error.message}") from error
    room, said = cache_tokens(policy, args, args.slots, steady)
    if steady is not None:
        said += (
            f"sequences have at most {steady:,} tokens: beside a longer one {args.model} changes the positions of all\n"
        )
    # who names no number of tokens gets as many as there may be, and these must fit beside a prompt
    most = args.max_tokens if room is None else min(args.max_tokens, max(1, room // 2))
    return Service(Worker(SlotEngine(policy, slots=args.slots, max_tokens=room)), models, most), said


@contextlib.contextmanager
def signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when all is shut down; by then there is nothing left to end."""
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
