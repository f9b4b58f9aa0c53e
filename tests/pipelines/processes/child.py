"""A child process that does what the request asks for, by its name."""

import os
import signal
import subprocess
import sys
import time

from pipelines.processes.child import connect_to_parent


def main() -> None:
    pickled = os.environ["PICKLED"] == "1"
    channel = connect_to_parent(pickled=pickled)
    while True:
        try:
            _, request = channel.receive()
        except EOFError:
            return
        print("noise on stdout")  # noqa: T201
        match request:
            case "hang":
                started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                channel.send("started", [started.pid])
                time.sleep(600)
            case "die":
                raise SystemExit("no disk")
            case "be killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refuse":
                channel.send("error", ValueError("no") if pickled else {"text": "no"})
            case "babble":
                channel.connection.send_bytes(b"[1, 2, 3]")
            case "where is json":
                import json  # noqa: PLC0415

                channel.send("answer", json.__file__)
            case _:
                channel.send("progress", [1, 2])
                channel.send("answer", request)


if __name__ == "__main__":
    main()
