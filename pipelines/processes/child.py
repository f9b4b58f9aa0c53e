"""A child process for work that can be stopped: at a deadline, at Ctrl-C, with its parent.

A thread that computes or waits for a server cannot be stopped, a process can. `ChildProcess` starts
a module in a session of its own, so it can be killed with all its children. The module calls
`connect_to_parent` first; from then on it ends when its standard input closes, as it does when its
parent ends for any reason.

The two exchange messages, each a kind and a value: a "request" to the child, an "answer" or an
"error" from it, and before that any other kind for a listener.

Imports only the standard library: every request to the Hub starts such a process.
"""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Self, cast

Listeners = Mapping[str, Callable[..., None]]
"""Functions by kind of message; each is called with the value's items."""


class ChildError(Exception):
    """The child answers with an error; `args[0]` is the child's description of it."""


class ChildDiedError(ChildError):
    """The child ended without an answer; the message gives its exit code or signal."""


class ChildTimeoutError(ChildError):
    """The child did not answer before its deadline, and was killed."""


class Channel:
    """One end of the connection between a child and its parent; several threads may send.

    Messages are JSON if the child works on untrusted data, since unpickling can run code.
    """

    def __init__(self, connection: Connection, *, pickled: bool) -> None:
        self.connection = connection
        self._pickled = pickled
        self._turn = threading.Lock()

    def send(self, kind: str, value: object) -> None:
        """Send a message; OSError if the other end is closed."""
        message = (kind, value)
        data = pickle.dumps(message) if self._pickled else json.dumps(message).encode()
        with self._turn:
            self.connection.send_bytes(data)

    def receive(self) -> tuple[str, Any]:
        """Wait for a message; EOFError or OSError if the other end is closed."""
        data = self.connection.recv_bytes()
        kind, value = pickle.loads(data) if self._pickled else json.loads(data)  # noqa: S301
        return kind, value


class ChildProcess:
    """A module that runs as a process of its own, until this object is closed or this process ends.

    Args:
        module: Run as `python -m module`.
        pickled: Exchange pickled objects, not JSON: only with a child that reads nothing untrusted.
        quiet: Hide its output; if it dies, the error has the last line of its stderr.
        environment: Variables for it, in addition to those of this process.
    """

    def __init__(
        self,
        module: str,
        *,
        pickled: bool = False,
        quiet: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        ours, theirs = Pipe()
        self.channel = Channel(ours, pickled=pickled)
        self._stderr = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115  (until closed)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (our own module)
                # -P: a file in the working folder must not replace a library
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                env=os.environ | dict(environment or {}),
                stdin=subprocess.PIPE,  # never written to: it closes when this process ends
                stdout=subprocess.DEVNULL if quiet else None,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches this process only, which ends the child
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The id of the process, and of its process group."""
        return self._process.pid

    def ask(
        self, request: object, *, deadline_seconds: float, listeners: Listeners | None = None
    ) -> Any:  # noqa: ANN401  (what the module answers)
        """Send a request, and return the answer.

        Raises:
            ChildTimeoutError: There is no answer at the deadline; the child is killed.
            ChildDiedError: It ended without an answer.
            ChildError: It answers with an error. If messages are pickled, the error itself.
        """
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._kill()

        deadline = threading.Timer(deadline_seconds, stop)
        deadline.daemon = True
        deadline.start()
        try:
            self.send(request)
            return answers([self], listeners)[0]
        except ChildDiedError:
            if not late.is_set():
                raise
            raise ChildTimeoutError(
                f"it took longer than its deadline of {deadline_seconds:g} s and was stopped"
            ) from None
        finally:
            deadline.cancel()

    def send(self, request: object) -> None:
        """Send a request, for whose answer `answers` waits; `ChildDiedError` if it has ended."""
        try:
            self.channel.send("request", request)
        except OSError:
            raise ChildDiedError(self.how_it_ended()) from None

    def close(self) -> None:
        """Kill the child and its children. May be called twice."""
        self._kill()
        self._process.wait()
        for file in (self.channel.connection, self._process.stdin, self._stderr):
            if file is not None:
                file.close()

    def _kill(self) -> None:
        if self._process.returncode is None:  # else its id may belong to another process by now
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def how_it_ended(self) -> str:
        """Wait for the process to end by itself, and describe the end; then close it."""
        with suppress(ChildProcessError):  # closed already
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        words = ""
        if self._stderr is not None and not self._stderr.closed:
            self._stderr.seek(0)
            last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            words = f": {last[0]}" if last else ""
        self.close()
        code = self._process.returncode
        if code >= 0:
            return f"its process ended with code {code} and without an answer{words}"
        cause = "; that is mostly for want of memory" if code == -signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{cause}{words}"


def answers(children: Sequence[ChildProcess], listeners: Listeners | None = None) -> list[Any]:
    """The answers of several children to their requests, in the order of the children.

    Raises:
        ChildDiedError: One of them ended without an answer.
        ChildError: One of them answers with an error. If messages are pickled, the error itself.
    """
    found: dict[ChildProcess, Any] = {}
    waiting = {child.channel.connection: child for child in children}
    while waiting:
        for connection in wait(list(waiting)):
            child = waiting[cast("Connection", connection)]
            try:
                kind, value = child.channel.receive()
            except (EOFError, OSError):
                raise ChildDiedError(child.how_it_ended()) from None
            except (ValueError, TypeError) as error:  # the message is not from our own code
                raise ChildDiedError(f"its process sent no message: {error}") from None
            if kind == "answer":
                found[child] = value
                del waiting[child.channel.connection]
            elif kind == "error":
                raise value if isinstance(value, BaseException) else ChildError(value)
            elif listeners and kind in listeners:
                listeners[kind](*value)
    return [found[child] for child in children]


def connect_to_parent(*, pickled: bool = False) -> Channel:
    """The child's end of its channel. From now on this process ends when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return Channel(Connection(int(sys.argv[1])), pickled=pickled)


def limit_memory(most: int) -> None:
    """Limit the memory of this process to `most` bytes, or to its lower present limit."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _end_with_parent() -> None:
    # os.read takes no lock; a lock on `sys.stdin` would block the end of Python
    while os.read(0, 1024):
        pass
    os.killpg(os.getpid(), signal.SIGKILL)  # and all children of this process
