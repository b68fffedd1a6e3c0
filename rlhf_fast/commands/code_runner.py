"""``rlhf-fast code-runner``: grade programs for other machines, in this one's sandbox."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence

from rlhf_fast.commands import Parser
from rlhf_fast.errors import UserError


def main(argv: Sequence[str]) -> int:
    parser = Parser("code-runner", "Run the code reward's sandbox here, for training runs on other machines.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; only this machine by default")
    parser.add_argument("--port", type=int, default=8787, help="port to listen on")
    parser.add_argument("--workers", type=int, help="tasks at a time; default: one per core")
    parser.add_argument("--sandbox", default="bwrap", help="bwrap, docker or docker:IMAGE")
    args = parser.parse_args(argv)

    from rlhf_fast.rewards.code import Code
    from rlhf_fast.rewards.remote import TOKEN, Runner

    workers = args.workers or len(os.sched_getaffinity(0))
    grader = Code(args.sandbox, workers=workers).grader
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(32)
    try:
        server = Runner((args.host, args.port), grader, token, workers)
    except OSError as error:
        raise UserError(f"code-runner: cannot listen on {args.host}:{args.port}: {error.strerror}.") from error
    print(f"grading with {args.sandbox} on http://{args.host}:{server.server_port}; over there:", flush=True)
    shown = token if TOKEN not in os.environ else "(the same)"
    print(
        f"  export {TOKEN}={shown}\n  reward_funcs: [{{name: code, sandbox: 'http://HOST:{server.server_port}'}}]",
        flush=True,
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0
