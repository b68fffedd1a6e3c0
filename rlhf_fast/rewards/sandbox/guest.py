"""What runs inside a sandbox: one role of a code test. Standard library only, because its text is all that enters.

It is started as ``python -I -S -c <this file>`` and reads frames from its standard input (8 hexadecimal digits of length, then
that many bytes of ``marshal``). The first frame is its job. It answers ``ready``, and from then on nothing it says is trusted:

    program  runs the source; what is left of the input is the program's input, and its output the answer
    call     runs the source; every further frame is a call to one of its functions, every line the value returned
    tests    runs test code that calls the candidate, which lives in another sandbox, through stand-ins; every line is a
             call to be passed on, or whether a test passed

``json`` is not used: importing it would double the start-up time.
"""

import marshal
import os
import resource
import sys

MODULE = type(sys)


def read_exactly(count):
    parts = []
    while count:
        part = os.read(0, min(count, 1 << 20))
        if not part:
            os._exit(0)  # the parent has what it wanted
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_frame():
    return marshal.loads(read_exactly(int(read_exactly(8), 16)))


def encoded(value):
    """A plain value as JSON that keeps its type; anything else raises TypeError. Read by ``wire.decode``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f'["int","{int(value):x}"]'
    if isinstance(value, float):
        return f'["float","{float(value).hex()}"]'
    if isinstance(value, complex):
        return f'["complex","{value.real.hex()}","{value.imag.hex()}"]'
    if isinstance(value, str):
        return f'["str","{value.encode("utf-8", "surrogatepass").hex()}"]'
    if isinstance(value, (bytes, bytearray)):
        return f'["bytes","{value.hex()}"]'
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return line(kind.__name__, *value)
    if isinstance(value, dict):
        return ",".join(['["dict"', *(f"[{encoded(k)},{encoded(v)}]" for k, v in value.items())]) + "]"
    raise TypeError(f"a {type(value).__name__}, which is no plain value")


def limit(job):
    """Resource limits for this process and whatever it becomes; nobody inside may raise them again."""
    for name, value in (
        ("RLIMIT_CPU", job["cpu_s"]),
        ("RLIMIT_AS", job["memory"]),
        ("RLIMIT_FSIZE", job["scratch"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 64),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def module(name):
    sys.modules[name] = made = MODULE(name)
    return made.__dict__


def line(kind, *values):
    """A message: what it is, and its values. Also how a collection is encoded."""
    return "[" + ",".join([f'"{kind}"', *map(encoded, values)]) + "]"


def say(channel, text):
    data = memoryview(text.encode("ascii") + b"\n")
    while data:
        data = data[os.write(channel, data) :]


def message_of(error):
    try:
        return str(error)[:500]
    except Exception:  # noqa: BLE001 (its author is not to be trusted)
        return ""


def raised(error):
    """The message for an exception: its type's name, or the nearest built-in one's, and what it says."""
    kind = next(c for c in type(error).__mro__ if c.__module__ == "builtins")
    return line("raised", kind.__name__, message_of(error))


def run(source, name, namespace):
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 (what a sandbox is for)


def run_program(job):
    sys.argv = ["program.py"]
    run(job["source"], "program.py", module("__main__"))


def serve_calls(job, channel):
    namespace, broken = module("candidate"), None
    try:
        run(job["source"], "candidate.py", namespace)
    except BaseException as error:  # noqa: BLE001
        broken = raised(error)
    while True:
        name, args, kwargs = read_frame()
        try:
            answer = broken or line("value", namespace[name](*args, **kwargs))
        except BaseException as error:  # noqa: BLE001
            answer = raised(error)
        say(channel, answer)


def built_in_error(name, message):
    """The exception of this name, or RuntimeError for names that are no ordinary built-in one's."""
    kind = getattr(sys.modules["builtins"], name, None)
    # one that ends a loop would let `all(map(candidate, cases))` pass without a result
    if not isinstance(kind, type) or not issubclass(kind, Exception) or kind in (StopIteration, StopAsyncIteration):
        kind = RuntimeError
    try:
        return kind(message)
    except TypeError:  # UnicodeDecodeError and its like want more than a message
        return RuntimeError(message)


def stand_in(name, channel):
    """A function that has the candidate's function of this name called, and only plain values come back."""

    def call(*args, **kwargs):
        try:
            said = line("call", name, args, kwargs)
        except TypeError as error:
            say(channel, line("broken", f"they pass {error}"))
            os._exit(0)
        say(channel, said)
        kind, *rest = read_frame()
        if kind == "value":
            return rest[0]
        raise built_in_error(*rest)

    call.__name__ = name
    return call


def run_tests(job, channel):
    namespace = module("tests")
    try:
        run(job["setup"], "setup.py", namespace)
    except BaseException as error:  # noqa: BLE001
        return say(channel, line("broken", f"their set-up raises {type(error).__name__}: {message_of(error)}"))
    for name, called in job["stand_ins"].items():
        namespace[name] = stand_in(called, channel)
    for source in job["tests"]:
        try:
            run(source, "tests.py", namespace)
            say(channel, line("passed"))
        except BaseException as error:  # noqa: BLE001
            say(channel, line("failed", f"{type(error).__name__}: {message_of(error)}"))


def main():
    job = read_frame()
    limit(job)
    os.write(1, b"ready\n")
    nowhere = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nowhere, 2)
    if job["role"] == "program":
        return run_program(job)
    # what the code prints must not mix with what this file says
    channel = os.dup(1)
    os.dup2(nowhere, 1)
    (serve_calls if job["role"] == "call" else run_tests)(job, channel)


main()
