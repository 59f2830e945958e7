"""A decode as an animation in the terminal; as lines where the output is not one."""

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from djax.pictures.frames import Replay

# From the first forward to the last. All have a contrast of about 4.5 with black and with white.
COLOURS = ("#3d78d8", "#00828f", "#1c8559", "#5a7d1c", "#95700a", "#b8601c", "#cb4f4f", "#b8549f")
# Where there are 16 colours these are the terminal's own, which its theme keeps legible.
PLAIN_COLOURS = ("blue", "cyan", "green", "yellow", "red", "magenta")
MASK, SAME = "·", "■"
# Signs of djax's own for terminals whose encoding lacks them.
PLAIN_SIGNS = {MASK: ".", SAME: "#", "↵": "~", "⇥": "~"}


def show(replays: Sequence[Replay], console: Console, seconds_per_forward: float | None = None) -> None:
    """Replay the answers one after another, forward by forward, and leave the last frame standing.

    seconds_per_forward: how long a frame stands; None gives 0.4 s, and less where a replay would take over 20 s.

    Nothing moves but what is decided: a mask takes the room of the token that will stand there. Where the console is no
    terminal each forward is a line, without colours. Ctrl-C ends it as it ends anything, with the cursor restored.
    """
    for number, replay in enumerate(replays, 1):
        if len(replays) > 1:
            console.print(Text(f"answer {number} of {len(replays)}", "bold"))
        if console.is_terminal:
            pause = min(0.4, 20 / len(replay.forwards)) if seconds_per_forward is None else seconds_per_forward
            _animate(replay, console, pause)
        else:
            _lines(replay, console)


def status(replay: Replay, step: int) -> str:
    """What forward number `step` did, in a line."""
    forwards, all_ = len(replay.forwards), replay.generated
    if not step:
        return f"forward 0/{forwards} · 0/{all_} done"
    forward = replay.forwards[step - 1]
    parts = [
        f"forward {step}/{forwards}",
        "whole canvas" if forward.whole else "window",
        f"block [{forward.start}, {forward.end})",
        f"+{forward.accepted} token{'' if forward.accepted == 1 else 's'}",
        f"{forward.done}/{all_} done",
    ]
    return " · ".join(parts + [f"{replay.filled} filled after EOS"] * (step == forwards and replay.filled > 0))


def _writable(text: str, encoding: str) -> str:
    """What the encoding cannot say is replaced, cell for cell, so that columns stay where they are."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        if len(text) > 1:
            return "".join(_writable(sign, encoding) for sign in text)
        return PLAIN_SIGNS.get(text, "?" * cell_len(text))
    return text


def _animate(replay: Replay, console: Console, pause: float) -> None:
    width, room = console.width, max(1, console.height - 3)
    pieces = _pieces(replay)
    rows = _rows(replay, pieces, width)
    pieces = [_writable(piece, console.encoding) for piece in pieces]
    mask = _writable(MASK, console.encoding)
    colours = PLAIN_COLOURS if console.color_system == "standard" else COLOURS
    with Live(console=console, auto_refresh=False) as live:
        for step in range(len(replay.forwards) + 1):
            frame = _frame(replay, pieces, rows, step, colours, mask)
            line = Text(_writable(status(replay, step), console.encoding), "bold")
            # Of a canvas taller than the terminal, what stands around the block.
            block = replay.forwards[max(0, step - 1)].start
            middle = next(i for i, row in enumerate(rows) if row[-1] >= block)
            top = max(0, min(middle - room // 3, len(rows) - room))
            live.update(Group(*frame[top : top + room], Text(), line), refresh=True)
            time.sleep(pause)
        # Live draws once more when it ends, and then all of it.
        live.update(Group(*frame, Text(), line))


def _pieces(replay: Replay) -> list[str]:
    """A piece a position. A special token is named once: those that follow it are a sign, or EOS would fill the screen."""
    pieces, tokens = replay.pieces, replay.tokens
    for i in range(1, len(pieces)):
        if tokens[i] == tokens[i - 1] and int(tokens[i]) in replay.special:
            pieces[i] = SAME
    return pieces


def _rows(replay: Replay, pieces: Sequence[str], width: int) -> list[list[int]]:
    """Positions, in lines at most `width` cells wide; a new line after a newline and where the prompt ends."""
    rows: list[list[int]] = [[]]
    used = 0
    for i, piece in enumerate(pieces):
        if rows[-1] and (used + cell_len(piece) > width or i == replay.prompt or pieces[i - 1].endswith("↵")):
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += cell_len(piece)
    return rows


def _frame(
    replay: Replay, pieces: Sequence[str], rows: Sequence[Sequence[int]], step: int, colours: Sequence[str], mask: str = MASK
) -> list[Text]:
    states, last = replay.states(step), max(1, len(replay.forwards) - 1)
    frame = []
    for row in rows:
        line = Text(no_wrap=True, overflow="ellipsis")
        for i in row:
            if states[i] == "masked":
                line.append(mask + " " * (cell_len(pieces[i]) - 1), "dim")
            elif states[i] == "accepted":
                at = int(replay.accepted_at[i])
                colour = colours[(at - 1) * (len(colours) - 1) // last]
                line.append(pieces[i], f"bold reverse {colour}" if at == step else colour)
            else:
                line.append(pieces[i], "dim")
        frame.append(line)
    return frame


def _lines(replay: Replay, console: Console) -> None:
    pieces = _pieces(replay)
    lines = ["prompt: " + "".join(pieces[: replay.prompt])]
    for step in range(1, len(replay.forwards) + 1):
        states = replay.states(step)
        shown = (MASK if states[i] == "masked" else pieces[i] for i in range(replay.prompt, len(pieces)))
        lines.append(f"{status(replay, step)}: {''.join(shown)}")
    for line in lines:
        console.print(Text(_writable(line, console.encoding)), soft_wrap=True)
