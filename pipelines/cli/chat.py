"""`meteora chat`, a conversation in the terminal or on a page, and `meteora chat-server`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meteora.artifacts import MeteoraError
from meteora.untrusted.findings import MOST_NAMED, brief, for_terminal, listed
from pipelines.cli import options
from pipelines.reports.trace import legend, token_text
from pipelines.workspace.console import plain_console, say
from pipelines.workspace.faults import describe

if TYPE_CHECKING:
    from meteora.model.chat import Chat
    from meteora.model.trace import Token

app = typer.Typer()
Host = Annotated[str, typer.Option(help="The address to listen on.")]
AllowHost = Annotated[
    list[str],
    typer.Option(
        metavar="NAME", help="Also answer under this name, such as a proxy's; repeat it for more."
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on. 0: a free one.")]
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
COMMANDS = "/expert NAME, /expert, /trace FILE.html, /reset, /help, /quit"
ESCAPE = "a question that begins with / gets one more, as in //tmp"
HELP = (
    "/expert NAME sends every token to one expert, /expert alone goes back to the router;"
    " /trace FILE.html writes the conversation with the expert of each token; /reset begins a new"
    " conversation; /quit, or the end of the input, ends the program;"
    f" {ESCAPE}"
)


@app.command()
def chat(
    checkpoint: options.Checkpoint,
    expert: options.Expert = "",
    max_new_tokens: Annotated[int, options.count("Greatest length of an answer.")] = 512,
    web: Annotated[
        bool, typer.Option("--web", help="Talk on a web page, at --host and --port.")
    ] = False,
    host: Host = DEFAULT_HOST,
    port: Port = DEFAULT_PORT,
    allow_host: AllowHost = options.NONE,
    base: options.Base = None,
    token_for: options.TokenFor = options.NONE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Talk with a fused model: each token of an answer in the colour of its expert.

    Each line of the input is a turn or a command, and pasted lines are one turn; /help lists the
    commands. If the output is not a terminal, each answer is one line of plain text, with a
    backslash and an n for a line break. With --web, the conversation is on a page for a browser,
    where base, experts and the fused model can answer side by side. It listens on loopback unless
    you give --host, and asks for no key.
    """
    load = partial(_load, checkpoint, home, base, token_for, device, dtype)
    if web:
        from pipelines.serving.page import chat_page

        page = partial(chat_page, expert=expert, max_new_tokens=max_new_tokens)
        _serve(load, _last_part(checkpoint), host, port, allow_host, page)
    elif (host, port, allow_host) != (DEFAULT_HOST, DEFAULT_PORT, options.NONE):
        raise MeteoraError("--host, --port and --allow-host are for the page; give --web, too")
    else:
        Conversation(load(), max_new_tokens, expert).run()


@app.command("chat-server")
def chat_server(
    checkpoint: options.Checkpoint,
    name: Annotated[
        str, typer.Option(help="The model's name in requests. Default: the end of CHECKPOINT.")
    ] = "",
    host: Host = DEFAULT_HOST,
    port: Port = DEFAULT_PORT,
    allow_host: AllowHost = options.NONE,
    base: options.Base = None,
    token_for: options.TokenFor = options.NONE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Serve a fused model to clients of OpenAI's API; a request may name one expert.

    Requests are answered one after the other. The server listens on loopback unless you give
    --host, and asks for no key.
    """
    load = partial(_load, checkpoint, home, base, token_for, device, dtype)
    _serve(load, name or _last_part(checkpoint), host, port, allow_host)


def _serve(
    load: Callable[[], Chat],
    name: str,
    host: str,
    port: int,
    allowed: Collection[str],
    page: Callable[[str, Sequence[str]], str] | None = None,
) -> None:
    """Serve a model until a person ends it.

    Args:
        allowed: further host names to accept
        page: makes the HTML of the page from the model's name and experts; None for no page
    """
    from pipelines.hub.client import is_loopback
    from pipelines.serving import host_names, server

    name = "".join(one if one.isprintable() else "?" for one in name)  # it may not be UTF-8
    names = host_names.names_of(host, allowed)
    with server.listen(host, port) as listening:
        chat = load()
        html = page(name, chat.experts) if page else ""
        shown = f"[{host}]" if ":" in host else host
        if not is_loopback(host):
            say(
                f"anyone who can reach {shown} can use this server; it asks for no key, and answers"
                f" to addresses and to {', '.join(names)}; --allow-host adds names",
                "note",
            )
        url = f"http://{shown}:{listening.getsockname()[1]}"
        if html:
            say(f"chat with {name} at {url}/ until Ctrl-C ends it")
        else:
            say(f"serving {name} at {url}/v1, and each expert as {name}:EXPERT")
        server.make_server(chat, name, names, html).run(sockets=[listening])


def _last_part(checkpoint: str) -> str:
    """The name of a checkpoint's folder, or of its repository."""
    folder = Path(checkpoint)
    return folder.resolve().name if folder.is_dir() else Path(checkpoint.partition("@")[0]).name


def _load(
    checkpoint: str,
    home: Path,
    base: Path | None,
    token_for: Collection[str],
    device: str,
    dtype: str,
) -> Chat:
    from meteora.model.chat import Chat
    from pipelines.admission import checkpoints

    found = checkpoints.find(checkpoint, home, base, token_for, device=device, dtype=dtype)
    return Chat(*found.load())


class Conversation:
    """Turns and commands, line by line, with one history."""

    def __init__(self, chat: Chat, max_new_tokens: int, expert: str = "") -> None:
        """Begin without a history.

        Raises:
            UnknownExpertError: No expert of the model has this name.
        """
        self.chat, self.max_new_tokens = chat, max_new_tokens
        self.messages: list[dict[str, str]] = []
        self._force(expert)
        self._out = plain_console()

    def run(self) -> None:
        """Take lines until the input ends, or a person quits.

        After a line that fails a person can go on; without a terminal the error ends the command.
        """
        person = sys.stdin.isatty()
        if person:
            some = listed([*self.chat.experts], MOST_NAMED)
            say(f"experts: {some}; commands: {COMMANDS}")
        for line in _lines(self._out.is_terminal):
            try:
                if line == "/quit":
                    return
                self.take(line)
            except Exception as error:  # such as a full disk, of a file that /trace writes
                if not person:
                    raise
                known = isinstance(error, MeteoraError)
                say(str(error) if known else describe(error) or brief(error), "error")

    def take(self, line: str) -> None:
        """Answer a turn, or execute a command."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command.startswith("//"):
            self._ask(line[1:])
        elif not command.startswith("/"):
            self._ask(line)
        elif command == "/expert":
            self._force(argument)
            say(f"{for_terminal(argument)} gets every token" if argument else "the router chooses")
        elif command == "/trace":
            self._write_trace(argument)
        elif command == "/reset":
            self.messages = []
            self.chat.forget()
            say("a new conversation begins")
        elif command == "/help":
            say(HELP)
        else:
            raise MeteoraError(f"{line}: there is no such command; there are {COMMANDS}; {ESCAPE}")

    def _force(self, expert: str) -> None:
        from meteora.model.fused import check_expert

        if expert:
            check_expert(expert, self.chat.experts)
        self.expert = expert

    def _write_trace(self, file: str) -> None:
        from pipelines.reports.html import check_writable, write_page
        from pipelines.reports.trace import trace_page

        if not file:
            raise MeteoraError("/trace needs the name of a file, such as /trace talk.html")
        path = Path(file).expanduser()
        check_writable(path)
        write_page(path, trace_page(self.chat.trace(), self.messages[0]["content"]))
        say(f"wrote {path}")

    def _ask(self, question: str) -> None:
        """Answer a turn. After Ctrl-C the history keeps the tokens so far, if there are any."""
        asked = [*self.messages, {"role": "user", "content": question}]
        tokens: list[Token] = []

        def show(token: Token) -> None:
            tokens.append(token)
            if self._out.is_terminal:
                before = tokens[-2] if len(tokens) > 1 else None
                self._out.print(
                    token_text(token, before, self._out.color_system), end="", soft_wrap=True
                )

        try:
            answer = self.chat.answer(
                asked, expert=self.expert, max_new_tokens=self.max_new_tokens, on_token=show
            )
            text, cut = answer.text, answer.truncated
        except KeyboardInterrupt:
            if not self._out.is_terminal:
                raise
            if not tokens:
                self._out.print()
                say("nothing is answered yet; the question is left out of the conversation")
                return
            text, cut = "".join(token.text for token in tokens), True
        self.messages = [*asked, {"role": "assistant", "content": text}]
        if self._out.is_terminal:
            self._out.print("…" if cut else "")
            self._out.print(
                legend(self.chat.experts, tokens, self._out.color_system),
                soft_wrap=True,
                end="\n\n",
            )
        else:
            print(for_terminal(text).replace("\n", "\\n"), flush=True)


def _lines(prompted: bool) -> Generator[str]:
    """The lines of the input that are not empty; a `MeteoraError` if it is no text.

    Args:
        prompted: Whether to print the prompt `> `.
    """
    if not sys.stdin.isatty():
        try:
            lines = (line.removeprefix(options.BYTE_ORDER_MARK).strip() for line in sys.stdin)
            # `encode` fails for bytes that are no UTF-8, if Python made surrogates of them
            yield from (line for line in lines if line.encode())
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise MeteoraError(f"the input is not {error.encoding}") from error
        return
    import readline  # `input` then has a history, and arrow keys

    # what is pasted is one question, with its line breaks; Python turns that off
    readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            line = input("> " if prompted else "").strip()
        except EOFError:
            if prompted:
                print()  # Ctrl-D leaves the prompt's line open
            return
        except KeyboardInterrupt:  # the line is dropped, and the conversation is not
            print()
            say("/quit, or the end of the input (Ctrl-D), ends the program")
            continue
        if line:
            yield line
